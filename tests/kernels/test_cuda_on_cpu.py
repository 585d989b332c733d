"""The product kernels, compiled for the CPU with a stand-in for what only a card has: every way to cut them."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

from fewbit.formats import parse
from fewbit.kernels import _cuda_matrix as matrix
from fewbit.kernels._cuda_products import Output, weights
from fewbit.kernels._cuda_shapes import Shape, Tile
from fewbit.kernels._nvrtc import SOURCES
from tests.kernels.stand_in import compiled

RUN = """
#include "NAME.cu"
extern "C" bool run(Weights weights, const u16* x, Output output, PARAMETERS int wide, int high, int deep) {
    gridDim = {wide, high, deep};
    u64 all = (u64)blocks * tiles;
    readable = {{weights.codes, all * CODE_BYTES},
                {weights.scales, all * GROUPS * SCALE_BYTES},
                {weights.shifts, all * GROUPS * SHIFT_BYTES},
                {(const char*)x, (u64)tiles * 256 * tokens}};
    strayed = false;
    for (int at = 0; at < wide * high * deep; ++at) {
        memset(poisoned, 0xFF, sizeof poisoned);
        Block block(32 * WARPS);
        block_now = &block;
        std::vector<std::thread> threads;
        for (int t = 0; t < 32 * WARPS; ++t)
            threads.emplace_back([=] {
                threadIdx = {t, 0, 0};
                blockIdx = {at % wide, at / wide % high, at / wide / high};
                NAME(weights, x, output, ARGUMENTS);
            });
        for (std::thread& thread : threads) thread.join();
    }
    return strayed;
}
"""
FEW = {"NAME": "product", "PARAMETERS": "int blocks, int tiles, int tokens,", "ARGUMENTS": "blocks, tiles, tokens"}
MANY = {
    "NAME": "many",
    "PARAMETERS": "float* partial, u32* arrived, int blocks, int tiles, int each, int tokens,",
    "ARGUMENTS": "partial, arrived, blocks, tiles, each, tokens",
}


def kernel(folder: Path, which: dict[str, str], defines: dict[str, object]) -> ctypes.CDLL:
    """One of the sources with these defines, as a library."""
    for file in SOURCES.iterdir():
        text = file.read_text(encoding="utf-8")
        (folder / file.name).write_text(
            text.replace("extern __shared__ __align__(16) char shared[];", "char* shared = poisoned;")
        )
    for name in ("pieces.cuh", "units.cuh"):
        shutil.copy(Path(__file__).with_name("card_on_cpu.h"), folder / name)
    # two names of one header
    (folder / "units.cuh").write_text('#include "pieces.cuh"\n')
    text = RUN
    for name, spelled in which.items():
        text = text.replace(name, spelled)
    (folder / "run.cpp").write_text(text)
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


class Case:
    """A matrix of random weights, random activations as halves, and where the product goes."""

    def __init__(self, make_tensor, spec: str, shapes: list[tuple[int, int]], tokens: int, gated: bool) -> None:
        stored = [make_tensor(spec, *s) for s in shapes]
        (self.part,) = matrix.build(stored, [matrix.kind(q) for q in stored], torch.device("cpu"))
        g = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, self.part.columns, generator=g).half()
        padded = torch.nn.functional.pad(x, (0, self.part.tiles * 128 - self.part.columns))
        self.halves = padded.view(tokens, -1, 32).transpose(0, 1).contiguous()
        columns = self.part.pair if gated else self.part.rows
        self.scales, self.add = torch.rand(tokens, generator=g) + 0.5, torch.randn(tokens, columns, generator=g)
        self.out = torch.full((tokens, columns), torch.nan)
        w = torch.cat([parse(spec).dequantize(q).double() for q in stored])
        expected = x.double() @ w.T * self.scales[:, None]
        if gated:
            gate, up = expected.chunk(2, 1)
            expected = torch.nn.functional.silu(gate) * up
        else:
            expected = expected + self.add
        self.expected, self.gated = expected, gated

    def output(self) -> Output:
        """For the kernel."""
        add = 0 if self.gated else self.add.data_ptr()
        stride = self.out.shape[1]
        return Output(self.scales.data_ptr(), add, self.out.data_ptr(), stride, self.part.rows, self.part.pair)

    def check(self) -> None:
        """The product is there, to the accuracy of its sums."""
        near = 1e-4 * float(self.expected.abs().mean())
        torch.testing.assert_close(self.out.double(), self.expected, rtol=1e-4, atol=near)


@pytest.mark.parametrize(("spec", "shapes", "tokens", "shape", "gated"), CASES)
def test_the_kernel_multiplies(make_tensor, tmp_path, spec, shapes, tokens, shape, gated):
    case = Case(make_tensor, spec, shapes, tokens, gated)
    part, wide = case.part, 1 if tokens <= 8 else 2 if tokens <= 16 else 4
    library = kernel(tmp_path, FEW, part.kind.defines() | shape.defines() | {"NT": wide, "GATED": int(gated)})
    grid = (-(-part.blocks // (shape.row_warps * shape.row_blocks)), -(-tokens // (8 * wide)), 1)
    sizes = (part.blocks, part.tiles, tokens, *grid)
    x = ctypes.c_void_p(case.halves.data_ptr())
    strayed = library.run(weights(part), x, case.output(), *map(ctypes.c_int, sizes))
    assert strayed & 255 == 0
    case.check()


MANY_CASES = [
    # spec, shapes, tokens, tile, parts of the columns, gated
    ("int4g128", [(80, 640)], 19, Tile(2, 2, 1, 1, 3, 1, 3, 1, 1), 1, False),
    ("int3g32a", [(70, 1100)], 12, Tile(2, 1, 2, 2, 3, 2, 2, 1, 1), 3, False),
    ("int2g64", [(33, 1300)], 35, Tile(4, 1, 2, 1, 4, 4, 2, 1, 0), 2, False),
    ("int8a", [(48, 512), (48, 512)], 9, Tile(2, 1, 2, 2, 2, 1, 2, 1, 1), 2, True),
    ("int5g64a", [(48, 384), (48, 384)], 41, Tile(6, 2, 1, 1, 3, 1, 4, 1, 1), 1, True),
    ("gguf:q4_1", [(40, 768)], 33, Tile(4, 2, 1, 1, 2, 1, 3, 1, 1), 3, False),
    ("int6", [(64, 640)], 57, Tile(8, 1, 2, 1, 3, 1, 3, 1, 1), 2, False),
]


@pytest.mark.parametrize(("spec", "shapes", "tokens", "tile", "count", "gated"), MANY_CASES)
def test_the_kernel_for_more_tokens_multiplies(make_tensor, tmp_path, spec, shapes, tokens, tile, count, gated):
    case = Case(make_tensor, spec, shapes, tokens, gated)
    part = case.part
    library = kernel(tmp_path, MANY, part.kind.defines() | tile.defines() | {"GATED": int(gated)})
    grid = (-(-tokens // (8 * tile.wide)), -(-part.blocks // tile.tall), count)
    sums = torch.full((grid[0] * grid[1] * count * tile.sums,), torch.nan)
    arrived = torch.zeros(grid[0] * grid[1], dtype=torch.int32)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (sums, arrived)]
    sizes = (part.blocks, part.tiles, -(-part.tiles // count), tokens, *grid)
    x = ctypes.c_void_p(case.halves.data_ptr())
    strayed = library.run(weights(part), x, case.output(), *pointers, *map(ctypes.c_int, sizes))
    assert strayed & 255 == 0
    case.check()
    assert not arrived.any()
