"""The kernel that lays codes out for a card, compiled for the CPU: the bits that the layout's own definition gives."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

from fewbit.formats import parse
from fewbit.kernels import _cuda_layout as layout
from fewbit.kernels import _cuda_matrix as matrix
from fewbit.kernels import _nvrtc
from fewbit.qtensor import QTensor
from tests.kernels.stand_in import compiled

RUN = """
#include "pack.cu"
extern "C" void run(const u8* first, const u8* second, u64 stride, int rows, int columns, int tiles, u32* out,
                    int blocks) {
    for (int at = 0; at < blocks * tiles * 128; ++at) {
        threadIdx = {at % 128, 0, 0};
        blockIdx = {at / 128 % blocks, at / 128 / blocks, 0};
        pack(first, second, stride, rows, columns, tiles, out);
    }
}
"""


@pytest.mark.parametrize("bits", range(2, 9))
def test_streams_are_laid_out_as_the_layout_says(bits: int, tmp_path: Path) -> None:
    shutil.copy(_nvrtc.SOURCES / "pack.cu", tmp_path)
    shutil.copy(Path(__file__).with_name("card_on_cpu.h"), tmp_path / "pieces.cuh")
    (tmp_path / "run.cpp").write_text(RUN)
    run = compiled(tmp_path, matrix.packing_defines(bits)).run
    fmt, g = parse(f"int{bits}"), torch.Generator().manual_seed(bits)
    stored = layout.stored_bits(bits)
    for rows, columns, pair in ((32, 128, False), (50, 300, False), (1, 1, False), (48, 257, True)):
        codes = [torch.randint(0, 2**bits, (rows, columns), generator=g, dtype=torch.uint8) for _ in range(1 + pair)]
        streams = [fmt.pack(c, {"scale": torch.ones(rows, 1)}).parts["packed"] for c in codes]
        # what is behind the last code of a row means nothing
        tails = [s.view(torch.uint8)[:, -1:] for s in streams] if columns * bits % 32 in range(1, 25) else []
        for tail in tails:
            tail |= 0x80
        turns = torch.stack([c.view(-1, 16, columns) for c in codes], 1).reshape(-1, columns) if pair else codes[0]
        blocks, tiles = -(-len(turns) // 32), layout.tiles_of(columns)
        filled = torch.nn.functional.pad(turns, (0, tiles * 128 - columns, 0, blocks * 32 - len(turns)))
        out = torch.full((blocks, tiles, stored, 32, 4), -1, dtype=torch.int32)
        second = ctypes.c_void_p(streams[1].data_ptr() if pair else None)
        sizes = [ctypes.c_int(n) for n in (rows, columns, tiles)]
        run(
            ctypes.c_void_p(streams[0].data_ptr()), second, ctypes.c_uint64(4 * streams[0].shape[1]), *sizes,
            ctypes.c_void_p(out.data_ptr()), ctypes.c_int(blocks),
        )  # fmt: skip
        assert torch.equal(out, layout.pack_codes(filled, stored)), (rows, columns)


STACKS = [
    ("int4g64", [(80, 384)]),
    ("int3g32a", [(64, 300), (33, 300)]),
    ("int7", [(20, 96), (70, 96)]),
    ("int5g64a", [(48, 256), (48, 256)]),
]


@pytest.mark.parametrize(("spec", "shapes"), STACKS, ids=[s[0] for s in STACKS])
def test_parameters_of_all_rows_at_once_are_those_of_slices(make_tensor, spec, shapes) -> None:
    stored = [make_tensor(spec, *shape) for shape in shapes]
    kind = matrix.kind(stored[0])
    (part,) = matrix.build(stored, [kind] * len(stored), torch.device("cpu"))
    some = matrix._parameters(stored, part.kind, part.pair, torch.device("cpu"))
    if not part.pair and any(rows % 32 for rows, _ in shapes[:-1]):
        assert some is None
        return
    scales, shifts = matrix._grouped(some, part.scales.shape[1])
    assert torch.equal(scales, part.scales)
    assert (shifts is None) == (part.shifts is None)
    assert shifts is None or torch.equal(shifts, part.shifts)
    assert matrix._factor(matrix._largest(some, part.kind)) == part.factor


def test_a_pair_of_7_and_8_bits_has_no_common_stream(make_tensor) -> None:
    mixed = [make_tensor("int7g32a", 48, 256), make_tensor("int8g32a", 48, 256)]
    (part,) = matrix.build(mixed, [matrix.kind(q) for q in mixed], torch.device("cpu"))
    assert part.pair == 48
    assert matrix._parameters(mixed, part.kind, part.pair, torch.device("cpu")) is None


@pytest.mark.parametrize(("spec", "shapes"), STACKS, ids=[s[0] for s in STACKS])
def test_a_card_lays_out_what_the_definition_does(make_tensor, spec, shapes) -> None:
    if reason := _nvrtc.missing():
        pytest.skip(reason)
    stored = [make_tensor(spec, *shape) for shape in shapes]
    kinds = [matrix.kind(q) for q in stored]
    (here,) = matrix.build(stored, kinds, torch.device("cpu"))
    device = torch.device("cuda", torch.cuda.current_device())
    for there in (stored, [QTensor(q.spec, q.shape, {n: p.to(device) for n, p in q.parts.items()}) for q in stored]):
        (part,) = matrix.build(there, kinds, device)
        assert torch.equal(part.codes.cpu(), here.codes)
        assert torch.equal(part.scales.cpu(), here.scales)
        assert part.shifts is here.shifts is None or torch.equal(part.shifts.cpu(), here.shifts)
        assert (part.pair, part.factor, part.kind) == (here.pair, here.factor, here.kind)
