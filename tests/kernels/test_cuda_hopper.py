"""The Hopper product on the CPU with a stand-in for the card, the order of its activations, and on a card where there is
one.
"""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

from fewbit.formats import parse
from fewbit.kernels import _cuda_hopper as hopper
from fewbit.kernels import _cuda_matrix as matrix
from fewbit.kernels._cuda_hopper import Cut
from fewbit.kernels._nvrtc import SOURCES
from tests.kernels.stand_in import compiled

RUN = """
#include "wgmma.cu"
extern "C" void run(Task task, int grid) {
    constexpr int size = STAGES * (STAGE_BYTES + 16) + ROOM_BYTES;
    for (int first = 0; first < grid; first += CLUSTER) {
        Cluster cluster(CLUSTER * THREADS);
        std::vector<std::thread> threads;
        std::vector<char*> rooms;
        for (int r = 0; r < CLUSTER; ++r) {
            rooms.push_back((char*)std::aligned_alloc(1024, (size + 1023) / 1024 * 1024));
            memset(rooms[r], 0xFF, size);
            cluster.blocks.push_back(std::make_unique<HopperBlock>(rooms[r], r, THREADS, &cluster));
        }
        for (int t = 0; t < CLUSTER * THREADS; ++t)
            threads.emplace_back([=, &cluster] {
                threadIdx = {t % THREADS, 0, 0};
                blockIdx = {first + t / THREADS, 0, 0};
                gridDim = {grid, 1, 1};
                here = cluster.blocks[t / THREADS].get();
                many(task);
            });
        for (std::thread& thread : threads) thread.join();
        for (char* room : rooms) std::free(room);
    }
}
"""


def kernel(folder: Path, defines: dict[str, object]) -> ctypes.CDLL:
    """wgmma.cu with these defines, as a library."""
    for file in SOURCES.iterdir():
        text = file.read_text(encoding="utf-8")
        (folder / file.name).write_text(
            text.replace("extern __shared__ __align__(1024) char shared[];", "char* shared = here->shared;")
        )
    shutil.copy(Path(__file__).with_name("card_on_cpu.h"), folder / "pieces.cuh")
    shutil.copy(Path(__file__).with_name("hopper_on_cpu.h"), folder / "wgmma_units.cuh")
    (folder / "run.cpp").write_text(RUN)
    return compiled(folder, defines)


CASES = [
    # spec, shapes, tokens, cut, gated, grid
    ("int4g128", [(300, 640)], 131, Cut(128, 2, 1, 1, 2), False, 2),
    ("int3g64", [(260, 384)], 70, Cut(64, 3, 1, 0), False, 1),
    ("int2g32a", [(40, 384)], 20, Cut(64, 2, 2, 0), False, 2),
    ("int8a", [(48, 640), (48, 640)], 30, Cut(64, 2, 4, 0), False, 4),
    ("int4g64a", [(144, 256), (144, 256)], 9, Cut(64, 2, 1, 0), True, 2),
    ("gguf:q4_1", [(99, 256)], 10, Cut(64, 2, 2, 0), False, 2),
]


@pytest.mark.parametrize(("spec", "shapes", "tokens", "cut", "gated", "grid"), CASES)
def test_the_kernel_multiplies(make_tensor, tmp_path, spec, shapes, tokens, cut, gated, grid):
    stored = [make_tensor(spec, *s) for s in shapes]
    (part,) = matrix.build(stored, [matrix.kind(q) for q in stored], torch.device("cpu"))
    library = kernel(tmp_path, part.kind.defines() | cut.defines() | {"GATED": int(gated)})
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, part.columns, generator=g).half()
    halves = hopper.words_of(torch.nn.functional.pad(x, (0, part.tiles * 128 - part.columns)))
    columns = part.pair if gated else part.rows
    scales, add = torch.rand(tokens, generator=g) + 0.5, torch.randn(tokens, columns, generator=g)
    out = torch.full((tokens, columns), torch.nan)
    weights = (part.codes.data_ptr(), part.scales.data_ptr(), 0 if part.shifts is None else part.shifts.data_ptr())
    addresses = (scales.data_ptr(), 0 if gated else add.data_ptr(), out.data_ptr())
    shape = (columns, part.rows, part.pair, 0, part.blocks, part.tiles, tokens, 0.5)
    library.run(hopper._Task(*weights, halves.data_ptr(), *addresses, *shape), ctypes.c_int(grid))
    w = torch.cat([parse(spec).dequantize(q).double() for q in stored])
    expected = x.double() @ w.T * scales[:, None]
    if gated:
        gate, up = expected.chunk(2, 1)
        expected = torch.nn.functional.silu(gate) * up
    else:
        expected = expected + add
    # weights are rounded to halves
    error = (out.double() - expected).norm() / expected.norm()
    assert error < 5e-4, error
