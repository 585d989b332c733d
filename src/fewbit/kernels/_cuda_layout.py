"""How weights lie on a card: in the order in which a warp feeds them to the matrix units.

A tile is 32 rows x 128 columns. Of 32 of its columns each of a warp's 32 threads holds 16 pairs of codes, one pair for
a register of operand A of mma.m16n8k16 (its fragment is given in the PTX manual), in `bits` 32-bit words. A pair's
first code lies in a word's low half, its second in the high half, at the same place: `FIELDS`.

    codes   int32 [row blocks, tiles, bits, 32 threads, 4]          16 bytes of each thread side by side
    scales  [row blocks, tiles * groups of a tile, 8, 4]            rows r, r + 8, r + 16, r + 24 side by side;
            [row blocks, 8, 4] where a row has one scale
    shifts  as scales: int8 where w = scale * (code - 2^(bits-1) + shift), float32 where w = scale * (code -
            2^(bits-1)) + shift, None where there are none

Columns and rows are filled up with scales of 0. Two matrices of the same shape may lie as a pair: 16 rows of the first,
16 of the second in turn, so that one thread holds what belongs together of gate and up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.formats import Affine

ROWS, COLUMNS, THREADS = 32, 128, 32
PAIRS = 16
SCALE_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# columns to a scale that a tile can have; others are spelled in the largest of these that divides them
SPANS = (128, 64, 32)

# (word, bit in each half of it, first bit of the code, how many)
Field = tuple[int, int, int, int]


def pair_of(four: int, member: int) -> int:
    """The number of one of the four pairs of a thread's row `four` (of row, row + 8, row + 16, row + 24)."""
    return four // 2 * 8 + member * 2 + four % 2


def _two() -> list[list[Field]]:
    return _placed((pair_of(i % 4, i // 4 * 2 + r), r, 2 * i, 0, 2) for r in range(2) for i in range(8))


def _three() -> list[list[Field]]:
    """Five codes in 16 bits; the bits that are left in three words hold the last pair."""
    places = [(pair_of(four, r), r, at, 0, 3) for r in range(3) for four, at in ((0, 0), (1, 3), (3, 6), (2, 12))]
    places += [(pair_of(r, 3), r, 9, 0, 3) for r in range(3)]
    return _placed(places + [(pair_of(3, 3), r, 15, r, 1) for r in range(3)])


def _four() -> list[list[Field]]:
    return _placed((pair_of(i, r), r, 4 * i, 0, 4) for r in range(4) for i in range(4))


def _five() -> list[list[Field]]:
    """Three codes in 16 bits; the bits that are left in five words hold the last pair."""
    places = [(pair_of(2 * i + r // 4, r % 4), r, 5 * i, 0, 5) for r in range(5) for i in range(2)]
    places += [(pair_of(1, 1 + r) if r < 3 else pair_of(3, r - 2), r, 10, 0, 5) for r in range(5)]
    return _placed(places + [(pair_of(3, 3), r, 15, r, 1) for r in range(5)])


def _six() -> list[list[Field]]:
    """Four low bits in four words, two high ones in two."""
    low = [(i, i // 4, i % 4 * 4, 0, 4) for i in range(PAIRS)]
    return _placed(low + [(i, 4 + i // 8, i % 8 * 2, 4, 2) for i in range(PAIRS)])


def _eight() -> list[list[Field]]:
    return _placed((i, i // 2, i % 2 * 8, 0, 8) for i in range(PAIRS))


def _placed(places: Iterable[tuple[int, int, int, int, int]]) -> list[list[Field]]:
    """(pair, *field) in any order -> the fields of each pair."""
    fields: list[list[Field]] = [[] for _ in range(PAIRS)]
    for pair, *field in places:
        fields[pair].append((field[0], field[1], field[2], field[3]))
    return fields


# of codes of so many bits, for each of the 16 pairs, where its bits lie; codes.cuh takes them from there
FIELDS: dict[int, list[list[Field]]] = {2: _two(), 3: _three(), 4: _four(), 5: _five(), 6: _six(), 8: _eight()}


@dataclass(frozen=True)
class Kind:
    """What the kernels are compiled for. span: 0 where a row has one scale; scales, shifts: see tiles.cuh."""

    bits: int
    span: int
    scales: int
    shifts: int

    def defines(self) -> dict[str, object]:
        """For the compiler."""
        return {"BITS": self.bits, "SPAN": self.span, "SCALES": self.scales, "SHIFTS": self.shifts}


def stored_bits(bits: int) -> int:
    """7-bit codes take a byte."""
    return 8 if bits == 7 else bits


def stored_span(span: int, columns: int) -> int | None:
    """0 for one scale a row, else the widest span that a tile has and that divides `span`; None where none does."""
    if span >= columns:
        return 0
    return next((s for s in SPANS if span % s == 0), None)


def tiles_of(columns: int) -> int:
    """Tiles in a row."""
    return -(-columns // COLUMNS)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, columns], multiples of 32 and 128, below 2**bits -> int32 [blocks, tiles, bits, 32, 4]."""
    rows, columns = codes.shape
    blocks, tiles = rows // ROWS, columns // COLUMNS
    # row: half of the tile, 8 rows of it, row; column: 32 of them, thread of a row, product, pair, first or second
    split = codes.view(blocks, 2, 2, 8, tiles, 4, 4, 2, 2, 2)
    pairs = split.permute(0, 4, 5, 3, 6, 1, 7, 8, 2, 9).reshape(blocks, tiles, 4, THREADS, PAIRS, 2)
    halves = torch.zeros(blocks, tiles, 4, THREADS, bits, 2, dtype=torch.int32, device=codes.device)
    for pair, fields in enumerate(FIELDS[bits]):
        code = pairs[..., pair, :].to(torch.int32)
        for word, at, first, count in fields:
            halves[..., word, :] |= ((code >> first) & ((1 << count) - 1)) << at
    words = halves[..., 0] | halves[..., 1] << 16
    # a thread's 4 * bits words, in chunks of four
    per_thread = words.permute(0, 1, 3, 2, 4).reshape(blocks, tiles, THREADS, bits, 4)
    return per_thread.permute(0, 1, 3, 2, 4).contiguous()


def unpack_codes(packed: Tensor) -> Tensor:
    """The inverse of `pack_codes`."""
    blocks, tiles, bits = packed.shape[:3]
    per_thread = packed.permute(0, 1, 3, 2, 4).reshape(blocks, tiles, THREADS, 4, bits)
    words = per_thread.permute(0, 1, 3, 2, 4)
    halves = torch.stack([words & 0xFFFF, words >> 16 & 0xFFFF], -1)
    pairs = torch.zeros(blocks, tiles, 4, THREADS, PAIRS, 2, dtype=torch.int32, device=packed.device)
    for pair, fields in enumerate(FIELDS[bits]):
        for word, at, first, count in fields:
            pairs[..., pair, :] |= (halves[..., word, :] >> at & (1 << count) - 1) << first
    split = pairs.view(blocks, tiles, 4, 8, 4, 2, 2, 2, 2, 2).permute(0, 5, 8, 3, 1, 2, 4, 6, 7, 9)
    return split.reshape(blocks * ROWS, tiles * COLUMNS).to(torch.uint8)


def pack_groups(values: Tensor, groups: int) -> Tensor:
    """[rows, groups] of whole blocks of rows -> [blocks, groups, 8, 4], filled up with zeros to `groups`."""
    filled = torch.nn.functional.pad(values, (0, groups - values.shape[1]))
    return filled.view(-1, 4, 8, groups).permute(0, 3, 2, 1).contiguous()


def kind_of(a: Affine) -> Kind | None:
    """What a matrix is compiled for; None where its groups can't be spelled. Shifts are a guess from one slice: bytes
    where every offset there is a whole number of scales.
    """
    span = stored_span(a.span, a.codes.shape[1])
    if span is None or a.scale.dtype not in SCALE_KINDS:
        return None
    bits = stored_bits(a.bits)
    shifts = 0 if a.zero == 1 << (bits - 1) else 1 if whole_shifts(a) is not None else 2
    return Kind(bits, span, SCALE_KINDS[a.scale.dtype], shifts)


def whole_shifts(a: Affine) -> Tensor | None:
    """offset / scale + 2^(bits-1) as int8 [out, groups] where those are whole numbers that a byte holds, else None."""
    centre = 1 << (stored_bits(a.bits) - 1)
    scale = a.scale.float()
    offset = scale * -float(a.zero or 0) if a.offset is None else a.offset
    shift = (offset / scale).round()
    exact = (shift * scale == offset).all() & (shift + centre >= -128).all() & (shift + centre <= 127).all()
    return (shift + centre).to(torch.int8) if bool(exact) else None


def shifts_of(a: Affine, kind: Kind) -> Tensor | None:
    """Shifts as `kind` has them; ValueError where whole ones were expected and these are not."""
    if kind.shifts == 0:
        return None
    if kind.shifts == 1:
        whole = whole_shifts(a)
        if whole is None:
            raise ValueError("offsets are no whole numbers of scales")
        return whole
    scale = a.scale.float()
    offset = scale * -float(a.zero or 0) if a.offset is None else a.offset
    return offset + scale * (1 << (kind.bits - 1))


def respanned(values: Tensor, span: int, kind: Kind, columns: int) -> Tensor:
    """[rows, groups of `span`] with each group's value as often as it takes groups of the kind's span."""
    if kind.span == 0 or span == kind.span:
        return values
    return values.repeat_interleave(span // kind.span, 1)[:, : -(-columns // kind.span)]
