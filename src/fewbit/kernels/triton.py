"""Products on a card through Triton, which comes with torch: where fewbit's own kernels can't be compiled, or refuse.

Weights stay as a format of integers packs them, codes along the row with the lowest bits first. A few tokens are
multiplied as they are read; for more, rows are written out slice by slice for cuBLAS. Everything is in float32. Slower
than cuda.py, and the same for any width and group.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fewbit.formats import parse
from fewbit.formats._bitstream import pack_rows, unpack_rows
from fewbit.kernels import Backend, Packed
from fewbit.qtensor import QTensor

DEVICES = ("cuda",)
LEAST_CAPABILITY = (8, 0)
# tokens that are multiplied one by one
FEW = 4
# rows and columns of a block of threads
ROWS, COLUMNS = 16, 512
# weights that are unpacked at a time
SLICE_WEIGHTS = 1 << 24


def missing() -> str | None:
    """Why Triton can't multiply here, in words; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton, which comes with torch's CUDA builds, is not installed"
    # it compiles a small piece of C for each kernel it launches
    if not any(shutil.which(name) for name in (os.environ.get("CC") or "cc", "gcc", "clang")):
        return "triton wants a C compiler (gcc or clang), and there is none"
    return None


@cache
def _products() -> ModuleType:
    from fewbit.kernels import _triton_products

    return _triton_products


@dataclass(frozen=True)
class _Part:
    """One matrix, rows `first` on of the stacked ones. `kind`: codes less (0) `centre`, (1) a zero; (2) an offset."""

    first: int
    rows: int
    columns: int
    bits: int
    span: int
    kind: int
    centre: int
    packed: Tensor
    scale: Tensor
    offset: Tensor | None

    def arguments(self) -> list[Any]:
        """As the kernels take them."""
        data = [self.packed, self.scale, self.scale if self.offset is None else self.offset]
        sizes = [self.rows, self.columns, self.packed.shape[1], self.scale.shape[1], self.span, self.centre]
        whole = 32 % self.bits == 0 and (self.span % (32 // self.bits) == 0 or self.span == self.columns)
        return [*data, *sizes, self.bits, self.kind, whole, ROWS, COLUMNS]

    def values(self, rows: Tensor) -> Tensor:
        """Rows int64 [T] in float32 [T, columns]."""

        def spread(t: Tensor) -> Tensor:
            return t[rows].float().repeat_interleave(self.span, 1)[:, : self.columns]

        levels = unpack_rows(self.packed[rows], self.bits, self.columns).float()
        if self.kind == 2 and self.offset is not None:
            return levels * spread(self.scale) + spread(self.offset)
        return (levels - (self.centre if self.offset is None else spread(self.offset))) * spread(self.scale)


class Triton(Backend):
    """Everything that is `scale * code + offset` in groups of neighbouring columns."""

    name = "triton"
    priority = 30

    def refuses(self, q: QTensor) -> str | None:
        """None where the tensor is affine."""
        if len(q.shape) != 2:
            return f"{q.spec} of shape {q.shape} is not a matrix"
        fmt = parse(q.spec)
        first = torch.zeros(1, dtype=torch.int64, device=next(iter(q.parts.values())).device)
        affine = fmt.affine(fmt.take(q, first))
        return None if affine is not None else f"{q.spec} is not scale times code plus offset in groups of neighbours"

    def prepare(self, tensors: list[QTensor]) -> Packed:
        """One part for each matrix, on the device where its tensors lie."""
        columns = tensors[0].shape[1]
        if any(q.shape[1] != columns for q in tensors):
            raise ValueError(f"stacked matrices need equal widths, got {[q.shape[1] for q in tensors]}")
        parts: list[_Part] = []
        for q in tensors:
            parts.append(_part(q, sum(part.rows for part in parts)))
        splits = tuple(q.shape[0] for q in tensors)
        held = [t for part in parts for t in (part.packed, part.scale, part.offset) if t is not None]
        return Packed((sum(splits), columns), splits, parts, sum(t.nbytes for t in held))

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        """x [T, in] float32 -> [T, out] float32."""
        x = x.contiguous()
        tokens, total = len(x), packed.shape[0]
        out = torch.empty(tokens, total, device=x.device)
        for part in packed.data if tokens else ():
            there = out[:, part.first :]
            if tokens <= FEW:
                _products().few[-(-part.rows // ROWS), tokens](x, there, total, *part.arguments())
                continue
            # whole blocks: they know the matrix's last row, not the slice's
            step = max(1, SLICE_WEIGHTS // part.columns // ROWS) * ROWS
            for first in range(0, part.rows, step):
                w = torch.empty(min(step, part.rows - first), part.columns, device=x.device)
                _products().expand[-(-len(w) // ROWS), -(-part.columns // COLUMNS)](w, first, *part.arguments())
                there[:, first : first + len(w)] = F.linear(x, w)
        return out

    def rows(self, packed: Packed, ids: Tensor) -> Tensor:
        """Rows `ids` [T] -> float32 [T, in]; rows of ids that are out of range are NaN."""
        found = torch.full((len(ids), packed.shape[1]), torch.nan, device=ids.device)
        for part in packed.data:
            here = (ids >= part.first) & (ids < part.first + part.rows)
            values = part.values((ids - part.first).clamp(0, part.rows - 1))
            found = torch.where(here[:, None], values, found)
        return found


def _part(q: QTensor, first: int) -> _Part:
    fmt, device = parse(q.spec), next(iter(q.parts.values())).device
    rows, columns = q.shape
    step = max(32, SLICE_WEIGHTS // columns // 32 * 32)
    pieces = [fmt.take(q, torch.arange(i, min(rows, i + step), device=device)) for i in range(0, rows, step)]
    packed, scales, offsets = list[Tensor](), list[Tensor](), list[Tensor]()
    kind, centre, bits, span = 0, 0, 0, columns
    for piece in pieces:
        a = fmt.affine(piece)
        if a is None:
            raise ValueError(f"{q.spec} is not affine")
        packed.append(pack_rows(a.codes, a.bits))
        scales.append(a.scale)
        bits, span = a.bits, a.span
        if a.zeros is not None:
            kind, offsets = 1, [*offsets, a.zeros]
        elif a.offset is not None:
            kind, offsets = 2, [*offsets, a.offset]
        else:
            centre = a.zero or 0
    offset = torch.cat(offsets).contiguous() if offsets else None
    return _Part(
        first, rows, columns, bits, span, kind, centre, torch.cat(packed), torch.cat(scales).contiguous(), offset
    )


def backend() -> Triton | None:
    """None where Triton can't be used, or torch's current card is older than sm_80."""
    if missing() is not None or not torch.cuda.is_available():
        return None
    return Triton() if torch.cuda.get_device_capability() >= LEAST_CAPABILITY else None
