"""What the native layout keeps of a matrix: codes, scales, offsets, and the kind of block they lie in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.formats import Affine, Tabled, TwoLevel, parse
from fewbit.qtensor import QTensor

# columns whose activations share a scale: a group is whole blocks, or half of one
BLOCK = 32
SCALE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# of scales that are a whole number for a group times a number for several
STEP_TYPES = {torch.uint8: 3, torch.int8: 4}
SUPER_TYPES = {torch.float32: 0, torch.float16: 1}
# of what a group adds to scale * code; uint8 stands for zero points
OFFSET_TYPES = {None: 0, torch.float32: 1, torch.float16: 2, torch.uint8: 3}
OFFSET_STEPS = 4


@dataclass(frozen=True)
class Kind:
    """What rows must agree in to lie in one block: what `add_block` is told, but for the number of rows."""

    span: int
    code_bits: int
    scale_type: int
    zero: int
    offset_type: int
    super_span: int = 0
    super_type: int = 0
    levels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rows:
    """Some rows as `fill` takes them.

    codes uint8 [n, in]; scale, offset [n, groups]; their supers [n, supers], where scales have two levels
    """

    kind: Kind
    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None
    scale_supers: Tensor | None = None
    offset_supers: Tensor | None = None

    def parts(self) -> list[Tensor | None]:
        """In the order of `fill`, each contiguous and on the CPU; ValueError where shapes do not fit the kind."""
        columns = self.codes.shape[1]
        groups = -(-columns // self.kind.span)
        supers = -(-columns // self.kind.super_span) if self.kind.super_span else 0
        found = [self.codes, self.scale, self.offset, self.scale_supers, self.offset_supers]
        for part, width in zip(found, (columns, groups, groups, supers, supers), strict=True):
            if part is not None and (tuple(part.shape) != (len(self.codes), width) or not part.is_cpu):
                raise ValueError(f"{self.kind} has {width} numbers a row on the CPU, got {part.shape} on {part.device}")
        return [None if part is None else part.contiguous() for part in found]


def refuses(q: QTensor) -> str | None:
    """Why the native layout can't hold a matrix, or None."""
    if len(q.shape) != 2:
        return f"{q.spec} of shape {q.shape} is not a matrix"
    if "g_idx" in q.parts:
        return f"{q.spec} has groups of scattered columns (activation order)"
    # a single row has the tensor's whole structure
    found = _found(parse(q.spec).take(q, torch.zeros(1, dtype=torch.int64)))
    if found is None:
        return f"{q.spec} is not scale times code plus offset, nor a table of levels"
    columns = q.shape[1]
    halves = found.span * 2 == BLOCK and columns % BLOCK == 0
    if found.span % BLOCK and found.span < columns and not halves:
        return f"{q.spec} has groups of {found.span} columns, and the kernel takes multiples of {BLOCK}"
    if found.scale.dtype not in SCALE_TYPES:
        return f"{q.spec} has scales of {found.scale.dtype}"
    return None


def slices(q: QTensor, rows: int) -> Iterator[tuple[int, Rows]]:
    """A matrix in slices of `rows` rows as (first row, rows); whole where it is no longer than that."""
    fmt = parse(q.spec)
    for start in range(0, q.shape[0], rows):
        stop = min(q.shape[0], start + rows)
        found = _found(q if stop - start == q.shape[0] else fmt.take(q, torch.arange(start, stop)))
        if found is None:
            raise ValueError(f"{q.spec} is neither affine nor has a table")
        yield start, _rows(found)


def _found(q: QTensor) -> Affine | Tabled | None:
    fmt = parse(q.spec)
    return fmt.affine(q) or fmt.tabled(q)


def _rows(a: Affine | Tabled) -> Rows:
    columns = a.codes.shape[1]
    span = min(a.span, columns)
    if isinstance(a, Tabled):
        return _stored(a.codes, a.scale, None, a.two_level, span, a.bits, 0, a.levels)
    # there are no planes of 7 bits, nor of 5 for halves of a block
    bits = {7: 8, 5: 6 if span < BLOCK and span < columns else 5}.get(a.bits, a.bits)
    # in the fewest bytes
    offset = a.offset if a.zeros is None else a.zeros
    return _stored(a.codes, a.scale, offset, a.two_level, span, bits, a.zero or 0, ())


def _stored(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    two: TwoLevel | None,
    span: int,
    bits: int,
    zero: int,
    levels: tuple[int, ...],
) -> Rows:
    offset_type = OFFSET_TYPES[None if offset is None else offset.dtype]
    if two is None:
        return Rows(Kind(span, bits, SCALE_TYPES[scale.dtype], zero, offset_type, levels=levels), codes, scale, offset)
    super_span = codes.shape[1] // two.scale.shape[1]
    kind = Kind(
        span,
        bits,
        STEP_TYPES[two.steps.dtype],
        zero,
        offset_type if two.minimum is None else OFFSET_STEPS,
        super_span,
        SUPER_TYPES[two.scale.dtype],
        levels,
    )
    return Rows(kind, codes, two.steps, two.minimum_steps, two.scale, two.minimum)
