"""The Hopper product on the CPU with a stand-in for the card, how it is planned, and on a card where there is one."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

from fewbit.formats import parse
from fewbit.kernels import _cuda_hopper as hopper
from fewbit.kernels import _cuda_matrix as matrix
from fewbit.kernels import _nvrtc
from fewbit.kernels._cuda_hopper import Cut, Launch
from fewbit.kernels._cuda_layout import Kind
from fewbit.kernels._nvrtc import SOURCES
from tests.kernels.stand_in import compiled

RUN = """
#include "wgmma.cu"
extern "C" void run(Task task, int grid) {
    gridDim = {grid, 1, 1};
    for (int first = 0; first < grid; first += KS) {
        Cluster cluster(KS * THREADS);
        std::vector<std::thread> threads;
        std::vector<char*> rooms;
        for (int r = 0; r < KS; ++r) {
            rooms.push_back((char*)std::aligned_alloc(1024, (SHARED_BYTES + 1023) / 1024 * 1024));
            memset(rooms[r], 0xFF, SHARED_BYTES);
            cluster.blocks.push_back(std::make_unique<HopperBlock>(rooms[r], r, THREADS, &cluster));
        }
        for (int t = 0; t < KS * THREADS; ++t)
            threads.emplace_back([=, &cluster] {
                threadIdx = {t % THREADS, 0, 0};
                blockIdx = {first + t / THREADS, 0, 0};
                here = cluster.blocks[t / THREADS].get();
                crowd(task);
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
    ("int4g128", [(140, 384)], 135, Cut(128, 3, 2), False, 2),
    ("int8a", [(48, 640), (48, 640)], 20, Cut(64, 4, 1, 4), False, 4),
    ("int2g32a", [(80, 256), (80, 256)], 9, Cut(64, 2, 2), True, 1),
    ("gguf:q4_1", [(99, 256)], 70, Cut(64, 4, 2, 2), False, 4),
    ("int3g64", [(40, 384)], 10, Cut(64, 4, 1), False, 1),
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
    pieces = -(-part.blocks // 4) * -(-tokens // cut.tokens)
    shape = (columns, part.rows, part.pair, 0, part.blocks, part.tiles, tokens, 0, pieces, 0.5)
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


def test_activations_lie_in_the_order_of_the_weights():
    """A loop over what wgmma.cu says of x."""
    x = torch.arange(11 * 128, dtype=torch.float32).reshape(11, 128).half()
    got = hopper.words_of(x)
    assert got.shape == (2, 16, 64)
    for token in range(11):
        for column in range(128):
            thread, member, odd = column % 32 // 8, column % 8 // 2, column % 2
            place = column % 64 // 32 * 32 + (4 * member + thread) * 2 + odd
            word = place // 8 ^ token % 8
            assert got[column // 64, token, word * 8 + place % 8] == x[token, column]
    assert not got[:, 11:].any()


@pytest.mark.parametrize(
    ("kind", "wide", "cluster", "gated"), [(Kind(3, 64, 1, 1), 256, 1, 1), (Kind(8, 0, 0, 2), 64, 4, 0)]
)
def test_the_kernel_compiles(kind, wide, cluster, gated):
    if _nvrtc.lacking() or hopper.ARCH not in _nvrtc.architectures():
        pytest.skip("cuda-bindings or an NVRTC that knows sm_90 (the extra fewbit[cuda]) is not there")
    defines = kind.defines() | hopper.filled(kind, wide, cluster, 227 << 10).defines() | {"GATED": gated}
    images = [_nvrtc.compiled("wgmma.cu", defines, hopper.ARCH), _nvrtc.compiled("wgmma_halve.cu", {}, hopper.ARCH)]
    assert all(image.startswith(b"\x7fELF") for image in images)


@pytest.fixture
def card() -> None:
    """Skips where this machine's card is none of compute capability 9.0."""
    if _nvrtc.missing() is not None or _nvrtc.card_arch() != hopper.ARCH:
        pytest.skip("there is no card of compute capability 9.0, or nothing to compile with")


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(("tokens", "columns"), [(3, 192), (130, 1100), (9, 40000)])
def test_halves_on_a_card(tokens, columns):
    x = torch.randn(tokens, columns, device="cuda")
    x[1] *= 1e9
    got = hopper.halve(x)
    padded = torch.nn.functional.pad(x / got.scales[:, None], (0, -columns % 128)).half()
    assert got.scales[1] > 1
    assert torch.equal(got.values[:, :tokens], hopper.words_of(padded)[:, :tokens])


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("spec", ["int4g128", "int3g64a", "int2g32", "int8a", "int5g64", "int6", "gguf:q4_1"])
def test_products_on_a_card(make_tensor, spec):
    for shapes, tokens in (([(600, 1100)], 70), ([(48, 2048), (48, 2048)], 130), ([(33, 4096)], 300)):
        stored = [make_tensor(spec, *s) for s in shapes]
        kinds = [matrix.kind(q) for q in stored]
        (part,) = matrix.build(stored, kinds, torch.device("cuda", 0))
        x = torch.randn(tokens, part.columns, device="cuda")
        halves = hopper.halve(x)
        w = torch.cat([parse(spec).dequantize(q).double() for q in stored]).cuda()
        expected = x.half().double() @ w.T
        most = _nvrtc.most_shared(0)
        for wide, cluster in ((256, 1), (128, 1), (128, 2), (64, 4), (64, 1)):
            cut, count = hopper.filled(part.kind, wide, cluster, most), hopper.pieces(part.blocks, tokens, wide)
            # in two launches, where there are two pieces
            launches = tuple(Launch(cut, a, b) for a, b in ((0, count // 2), (count // 2, count)) if b > a)
            outs = []
            for _ in range(2):
                outs.append(torch.full((tokens, part.rows), torch.nan, device="cuda"))
                hopper.product(part, halves, outs[-1].data_ptr(), 0, part.rows, False, launches)
            assert torch.equal(*outs)
            assert (outs[0].double() - expected).norm() < 5e-4 * expected.norm(), (shapes, cut)


SHAPES = [(256, 64), (896, 64), (256, 224), (192, 32), (32, 112), (1792, 64), (1, 1), (3, 5)]


@pytest.mark.parametrize("processors", [132, 114, 78])
def test_plans_make_every_piece_once_and_fit(processors):
    most = 227 << 10
    for kind in (Kind(4, 128, 2, 0), Kind(8, 32, 0, 2), Kind(2, 0, 1, 1)):
        for blocks, tiles in SHAPES:
            for tokens in (33, 64, 65, 200, 256, 512, 2048, 5000):
                launches = hopper.plan(kind, blocks, tiles, tokens, processors, most)
                at = 0
                for launch in launches:
                    cut = launch.cut
                    assert (launch.first, cut.tokens) == (at, launches[0].cut.tokens)
                    assert launch.end > at
                    assert cut.cluster == 1 or launch.grid(processors) <= processors * cut.at_once
                    assert cut.cluster <= tiles
                    assert cut.x_slots >= 2
                    assert (cut.shared(kind) + 1024) * cut.at_once <= most + 1024
                    # sums that a cluster brings together lie where slots were
                    assert cut.cluster == 1 or cut.tokens * hopper.ROOM <= cut.shared(kind) - 16 * hopper.BARRIERS
                    at = launch.end
                assert at == hopper.pieces(blocks, tokens, launches[0].cut.tokens)


def test_a_plan_for_a_full_card_is_one_launch_and_what_is_left_is_shared_out():
    kind, most = Kind(4, 128, 2, 0), 227 << 10
    (launch,) = hopper.plan(kind, 256, 64, 2048, 132, most)
    assert (launch.cut.tokens, launch.cut.cluster) == (256, 1)
    whole, rest = hopper.plan(kind, 896, 64, 512, 132, most)
    assert (whole.end, rest.cut.cluster) == (3 * 132, 2)
    # few tokens, few rows: columns are shared from the start
    assert [one.cut.cluster for one in hopper.plan(kind, 192, 32, 64, 132, most)] == [2]
