"""Stored matrices brought onto a card in its layout, slice by slice."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from fewbit.formats import Affine, parse
from fewbit.formats.integer import IntegerFormat
from fewbit.kernels import _cuda_layout as layout
from fewbit.kernels import _nvrtc
from fewbit.kernels._cuda_layout import Kind
from fewbit.kernels._nvrtc import Kernel
from fewbit.qtensor import QTensor

# weights that are unpacked at a time: about 0.3 GB of the card's memory for a while
SLICE_WEIGHTS = 1 << 24
# rows of each matrix of a pair that lie together
PAIRED = layout.ROWS // 2


@dataclass(frozen=True)
class Part:
    """Rows that agree in kind, on a card. `pair`: 0, or the rows of each of two matrices that lie in turn.

    `first` is where its rows begin among the stacked ones; `factor` a power of two that brings all weights to where
    halves hold them well.
    """

    kind: Kind
    first: int
    rows: int
    columns: int
    pair: int
    codes: Tensor
    scales: Tensor
    shifts: Tensor | None
    factor: float

    @property
    def blocks(self) -> int:
        """Blocks of 32 rows."""
        return int(self.codes.shape[0])

    @property
    def tiles(self) -> int:
        """Tiles of 128 columns."""
        return int(self.codes.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes on the card."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.shifts) if t is not None)


@dataclass(frozen=True)
class _Rows:
    """Some rows, unpacked."""

    codes: Tensor
    scales: Tensor
    shifts: Tensor | None

    def joined(self, other: _Rows, dim: int) -> _Rows:
        """Rows behind each other (dim 0)."""
        shifts = None if self.shifts is None or other.shifts is None else torch.cat([self.shifts, other.shifts], dim)
        return _Rows(torch.cat([self.codes, other.codes], dim), torch.cat([self.scales, other.scales], dim), shifts)

    def part(self, rows: slice) -> _Rows:
        """Some of them."""
        return _Rows(self.codes[rows], self.scales[rows], None if self.shifts is None else self.shifts[rows])

    def each(self, change: Callable[[Tensor], Tensor]) -> _Rows:
        """`change` applied to all three."""
        return _Rows(change(self.codes), change(self.scales), None if self.shifts is None else change(self.shifts))


def kind(q: QTensor) -> Kind | str:
    """What kernels a matrix wants, or in words why there are none. Looks at its first rows."""
    if len(q.shape) != 2:
        return f"{q.spec} of shape {q.shape} is not a matrix"
    if "g_idx" in q.parts:
        return f"{q.spec} has groups of scattered columns (activation order)"
    fmt = parse(q.spec)
    a = fmt.affine(fmt.take(q, torch.arange(min(8, q.shape[0]), device=next(iter(q.parts.values())).device)))
    if a is None:
        return f"{q.spec} is not scale times code plus offset"
    found = layout.kind_of(a)
    if found is not None:
        return found
    if a.scale.dtype not in layout.SCALE_KINDS:
        return f"{q.spec} has scales of {a.scale.dtype}"
    return f"{q.spec} has groups of {a.span} columns, and the kernel takes multiples of {layout.SPANS[-1]}"


def build(tensors: Sequence[QTensor], kinds: Sequence[Kind], device: torch.device) -> list[Part]:
    """Parts of neighbours that agree in kind; two matrices of one shape and kind become a pair."""
    parts: list[Part] = []
    first = start = 0
    while start < len(tensors):
        stop = next((i for i in range(start, len(tensors)) if kinds[i] != kinds[start]), len(tensors))
        group = list(tensors[start:stop])
        alike = len(group) == len(tensors) == 2 and group[0].shape == group[1].shape
        pair = group[0].shape[0] if alike and group[0].shape[0] % PAIRED == 0 else 0
        try:
            part = _part(group, kinds[start], first, pair, device)
        except _NotWholeError:
            part = _part(group, replace(kinds[start], shifts=2), first, pair, device)
        parts.append(part)
        first, start = first + part.rows, stop
    return parts


class _NotWholeError(ValueError):
    """Later rows have offsets that the first ones did not let expect."""


def _part(group: list[QTensor], kind: Kind, first: int, pair: int, device: torch.device) -> Part:
    rows, columns = sum(q.shape[0] for q in group), group[0].shape[1]
    blocks, tiles = -(-rows // layout.ROWS), layout.tiles_of(columns)
    groups = tiles * (layout.COLUMNS // kind.span) if kind.span else 1
    codes = torch.empty(blocks, tiles, kind.bits, layout.THREADS, 4, dtype=torch.int32, device=device)
    if device.type == "cuda" and (whole := _parameters(group, kind, pair, device)) is not None:
        _pack_streams(group, pair, device, codes)
        return Part(kind, first, rows, columns, pair, codes, *_grouped(whole, groups), _factor(_largest(whole, kind)))
    dtype = next(d for d, number in layout.SCALE_KINDS.items() if number == kind.scales)
    scales = torch.empty(blocks, groups, 8, 4, dtype=dtype, device=device)
    shifts: Tensor | None = None
    if kind.shifts:
        shifts = torch.empty_like(scales, dtype=torch.int8 if kind.shifts == 1 else torch.float32)
    largest, at = 0.0, 0
    for some in _blocks(group, kind, pair, device):
        packed = _packed(some, kind, tiles, groups)
        to = slice(at, at + len(packed.codes))
        codes[to], scales[to] = packed.codes, packed.scales
        if shifts is not None and packed.shifts is not None:
            shifts[to] = packed.shifts
        largest, at = max(largest, _largest(some, kind)), to.stop
    return Part(kind, first, rows, columns, pair, codes, scales, shifts, _factor(largest))


def _parameters(group: list[QTensor], kind: Kind, pair: int, device: torch.device) -> _Rows | None:
    """Scales and shifts of all rows in the order they lie in, where the codes are streams of bits that a card lays out
    by itself; None where they are something else, or a block would have rows of two tensors.
    """
    formats = [parse(q.spec) for q in group]
    if not pair and any(q.shape[0] % layout.ROWS for q in group[:-1]):
        return None
    # 7 and 8 bits are one kind, and their streams are not
    if pair and len({q.parts["packed"].shape for q in group if "packed" in q.parts}) > 1:
        return None
    found = []
    for q, fmt in zip(group, formats, strict=True):
        if not isinstance(fmt, IntegerFormat):
            return None
        q = QTensor(q.spec, q.shape, {name: part.to(device) for name, part in q.parts.items() if name != "packed"})
        found.append(_rows(fmt.affine_of(torch.empty(q.shape, dtype=torch.uint8, device="meta"), q), kind))

    def stacked(parts: list[Tensor]) -> Tensor:
        if not pair:
            return torch.cat(parts)
        return torch.stack([t.view(-1, PAIRED, t.shape[1]) for t in parts], 1).reshape(-1, parts[0].shape[1])

    shifts = [some.shifts for some in found if some.shifts is not None]
    codes = torch.empty(0, device="meta")
    return _Rows(codes, stacked([some.scales for some in found]), stacked(shifts) if shifts else None)


def _grouped(some: _Rows, groups: int) -> tuple[Tensor, Tensor | None]:
    """Scales and shifts as the kernels take them, filled up to whole blocks."""

    def laid_out(t: Tensor) -> Tensor:
        return layout.pack_groups(torch.nn.functional.pad(t, (0, 0, 0, -len(t) % layout.ROWS)), groups)

    return laid_out(some.scales), None if some.shifts is None else laid_out(some.shifts)


def _pack_streams(group: list[QTensor], pair: int, device: torch.device, codes: Tensor) -> None:
    """The codes of a group of integers, from the streams they are stored in, by a kernel."""
    at, streams = 0, [q.parts["packed"].to(device).contiguous() for q in group]
    for i, q in enumerate(group[:1] if pair else group):
        stream, fmt = streams[i], parse(q.spec)
        assert isinstance(fmt, IntegerFormat)  # noqa: S101
        blocks = -(-q.shape[0] * len(streams if pair else [q]) // layout.ROWS)
        args = (
            ctypes.c_void_p(stream.data_ptr()),
            ctypes.c_void_p(streams[1].data_ptr() if pair else None),
            ctypes.c_uint64(4 * stream.shape[1]),
            *map(ctypes.c_int, (*q.shape, codes.shape[1])),
            ctypes.c_void_p(codes[at:].data_ptr()),
        )
        _packing(fmt.bits, device.index).launch((blocks, codes.shape[1], 1), (128, 1, 1), args)
        at += blocks


@cache
def _packing(width: int, device: int) -> Kernel:
    return _nvrtc.module("pack.cu", ("pack",), packing_defines(width), device)["pack"]


def packing_defines(width: int) -> dict[str, object]:
    """What pack.cu is compiled for, for codes of `width` bits."""
    bits = layout.stored_bits(width)
    fields = ",".join(
        f"{{{pair},{word},{at},{first},{count}}}"
        for pair, places in enumerate(layout.FIELDS[bits])
        for word, at, first, count in places
    )
    return {"WIDTH": width, "BITS": bits, "FIELDS": f"{{{fields}}}"}


def _packed(some: _Rows, kind: Kind, tiles: int, groups: int) -> _Rows:
    """Rows filled up to whole blocks, in the card's layout."""
    short = -len(some.codes) % layout.ROWS
    filled = some.each(lambda t: torch.nn.functional.pad(t, (0, 0, 0, short)))
    codes = torch.nn.functional.pad(filled.codes, (0, tiles * layout.COLUMNS - filled.codes.shape[1]))
    shifts = None if filled.shifts is None else layout.pack_groups(filled.shifts, groups)
    return _Rows(layout.pack_codes(codes, kind.bits), layout.pack_groups(filled.scales, groups), shifts)


def _blocks(group: list[QTensor], kind: Kind, pair: int, device: torch.device) -> Iterator[_Rows]:
    """The group's rows in the order they lie in, whole blocks at a time but for the last."""
    columns = group[0].shape[1]
    step = max(layout.ROWS, SLICE_WEIGHTS // columns // layout.ROWS * layout.ROWS)
    if pair:
        both = (_slices(q, kind, step // 2, device) for q in group)
        for a, b in zip(*both, strict=True):
            lying = [some.each(lambda t: t.view(-1, PAIRED, t.shape[1])) for some in (a, b)]
            yield lying[0].joined(lying[1], 1).each(lambda t: t.reshape(-1, t.shape[2]))
        return
    left: _Rows | None = None
    for q in group:
        for some in _slices(q, kind, step, device):
            whole = some if left is None else left.joined(some, 0)
            count = len(whole.codes) // layout.ROWS * layout.ROWS
            if count:
                yield whole.part(slice(0, count))
            left = whole.part(slice(count, None)) if count < len(whole.codes) else None
    if left is not None:
        yield left


def _slices(q: QTensor, kind: Kind, step: int, device: torch.device) -> Iterator[_Rows]:
    fmt = parse(q.spec)
    there = QTensor(q.spec, q.shape, {name: part.to(device) for name, part in q.parts.items()})
    for start in range(0, q.shape[0], step):
        stop = min(q.shape[0], start + step)
        some = there if stop - start == q.shape[0] else fmt.take(there, torch.arange(start, stop, device=device))
        a = fmt.affine(some)
        if a is None or layout.stored_bits(a.bits) != kind.bits or layout.SCALE_KINDS.get(a.scale.dtype) != kind.scales:
            raise ValueError(f"rows of one {q.spec} tensor disagree")
        yield _rows(a, kind)


def _rows(a: Affine, kind: Kind) -> _Rows:
    columns = a.codes.shape[1]
    try:
        shifts = layout.shifts_of(a, kind)
    except ValueError as error:
        raise _NotWholeError(str(error)) from error
    spanned = layout.respanned(a.scale, a.span, kind, columns)
    return _Rows(a.codes, spanned, None if shifts is None else layout.respanned(shifts, a.span, kind, columns))


def _largest(some: _Rows, kind: Kind) -> float:
    """A bound on the weights' magnitudes."""
    centre = 1 << (kind.bits - 1)
    scale = some.scales.float().abs()
    if some.shifts is None:
        bound = scale * centre
    elif kind.shifts == 1:
        bound = scale * (some.shifts.float().abs() + centre)
    else:
        bound = scale * centre + some.shifts.abs()
    return float(bound.max())


def _factor(largest: float) -> float:
    """1 where halves hold weights up to `largest` well, and 512 times their scales, else the power of two that brings
    them there.
    """
    if not 0 < largest < math.inf or 2.0**-6 <= largest < 2.0**6:
        return 1.0
    return 2.0 ** max(-126, min(126, 5 - math.frexp(largest)[1]))
