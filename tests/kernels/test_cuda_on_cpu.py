"""The product kernel itself, compiled for the CPU with a stand-in for what only a card has: every way to cut it."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

from fewbit.formats import parse
from fewbit.kernels import _cuda_matrix as matrix
from fewbit.kernels._cuda_shapes import Shape
from fewbit.kernels._nvrtc import SOURCES
from fewbit.kernels.cuda import _Output, _weights
from tests.kernels.stand_in import compiled

RUN = """
#include "product.cu"
extern "C" void run(Weights weights, const u16* x, Output output, int blocks, int tiles, int tokens, int wide,
                    int high) {
    for (int at = 0; at < wide * high; ++at) {
        memset(poisoned, 0xFF, sizeof poisoned);
        Block block(WARPS);
        block_now = &block;
        std::vector<std::thread> threads;
        for (int t = 0; t < 32 * WARPS; ++t)
            threads.emplace_back([=] {
                threadIdx = {t, 0, 0};
                blockIdx = {at % wide, at / wide, 0};
                product(weights, x, output, blocks, tiles, tokens);
            });
        for (std::thread& thread : threads) thread.join();
    }
}
"""


def kernel(folder: Path, defines: dict[str, object]) -> ctypes.CDLL:
    """product.cu with these defines, as a library."""
    for file in SOURCES.iterdir():
        text = file.read_text(encoding="utf-8")
        (folder / file.name).write_text(
            text.replace("extern __shared__ __align__(16) char shared[];", "char* shared = poisoned;")
        )
    for name in ("pieces.cuh", "units.cuh"):
        shutil.copy(Path(__file__).with_name("card_on_cpu.h"), folder / name)
    # two names of one header
    (folder / "units.cuh").write_text('#include "pieces.cuh"\n')
    (folder / "run.cpp").write_text(RUN)
    return compiled(folder, defines)


CASES = [
    # spec, shapes, tokens, shape, gated
    ("int4g64", [(80, 384)], 3, Shape(1, 2, 2, 2, 2), False),
    ("int3g32a", [(70, 300)], 12, Shape(2, 2, 2, 3, 2), False),
    ("int2g128", [(33, 640)], 1, Shape(1, 4, 1, 2, 1), False),
    ("int8a", [(48, 256), (48, 256)], 9, Shape(1, 2, 2, 2, 0), False),
    ("int5g64a", [(48, 256), (48, 256)], 5, Shape(2, 1, 1, 4, 1), True),
    ("gguf:q4_1", [(96, 256)], 20, Shape(1, 2, 2, 2, 2), False),
    ("int6", [(64, 256)], 33, Shape(1, 2, 1, 3, 0), False),
]


@pytest.mark.parametrize(("spec", "shapes", "tokens", "shape", "gated"), CASES)
def test_the_kernel_multiplies(make_tensor, tmp_path, spec, shapes, tokens, shape, gated):
    stored = [make_tensor(spec, *s) for s in shapes]
    (part,) = matrix.build(stored, [matrix.kind(q) for q in stored], torch.device("cpu"))
    wide = 1 if tokens <= 8 else 2 if tokens <= 16 else 4
    library = kernel(tmp_path, part.kind.defines() | shape.defines() | {"NT": wide, "GATED": int(gated)})
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, part.columns, generator=g).half()
    padded = torch.nn.functional.pad(x, (0, part.tiles * 128 - part.columns))
    halves = padded.view(tokens, -1, 32).transpose(0, 1).contiguous()
    columns = part.pair if gated else part.rows
    scales, add = torch.rand(tokens, generator=g) + 0.5, torch.randn(tokens, columns, generator=g)
    out = torch.full((tokens, columns), torch.nan)
    output = _Output(scales.data_ptr(), 0 if gated else add.data_ptr(), out.data_ptr(), columns, part.rows, part.pair)
    grid = (-(-part.blocks // (shape.row_warps * shape.row_blocks)), -(-tokens // (8 * wide)))
    sizes = (part.blocks, part.tiles, tokens, *grid)
    library.run(_weights(part), ctypes.c_void_p(halves.data_ptr()), output, *map(ctypes.c_int, sizes))
    w = torch.cat([parse(spec).dequantize(q).double() for q in stored])
    expected = x.double() @ w.T * scales[:, None]
    if gated:
        gate, up = expected.chunk(2, 1)
        expected = torch.nn.functional.silu(gate) * up
    else:
        expected = expected + add
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().mean()))
