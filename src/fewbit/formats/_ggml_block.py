"""What ggml's block types share.

A row is a run of blocks; a block holds the parameters and the codes of a few consecutive columns, so one part,
`blocks` uint8 [out, blocks per row * bytes per block], holds everything. Every type comes down to

    w = scale * level + offset

with a scale, and for some types an offset, for each `span` columns; a level is `code - zero`, or what a table of whole
numbers has at the code. Scales of the larger blocks have two levels themselves: a small whole number for each span
times a half for the block. All products of the two are exact in float32.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from fewbit.formats import Affine, Format, Layout, Params, Shape, Tabled, TwoLevel, _ggml_writing
from fewbit.qtensor import QTensor


class GgmlFormat(Format):
    """A block type. `codes` and `params` are 2-D: leading axes (experts) are stacked by rows.

    A type says its sizes, takes a block apart and, where its scales have two levels, what those are.
    """

    # columns in a block, and its size
    block: ClassVar[int]
    block_bytes: ClassVar[int]
    # columns that share a scale; codes are below 2**bits
    span: ClassVar[int]
    bits: ClassVar[int]
    # a level is code - zero, or levels[code] where there is a table
    zero: ClassVar[int] = 0
    levels: ClassVar[tuple[int, ...] | None] = None

    @abstractmethod
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        """uint8 [out, blocks, bytes] -> codes uint8 [out, blocks, columns], parameters as stored [out, blocks, n]."""

    def two_level(self, params: Params) -> TwoLevel | None:
        """The scales, where they have two levels; None where `params` has a `scale` and maybe an offset, `minimum`."""
        return None

    def accepts(self, shape: Shape) -> str | None:
        """Rows must be whole blocks."""
        if shape[-1] % self.block:
            return f"{self.spec} needs a multiple of {self.block} columns, not {shape[-1]}"
        return None

    def layout(self, shape: Shape, dtype: torch.dtype) -> Layout:
        """One part of bytes; scales lie inside it in the type's own dtype, whatever `dtype` says."""
        return {"blocks": (torch.uint8, (*shape[:-1], shape[-1] // self.block * self.block_bytes))}

    def unpack(self, q: QTensor) -> tuple[Tensor, Params]:
        """Codes uint8 [out, in] and parameters as stored, [out, n]."""
        row_blocks = q.shape[-1] // self.block
        codes, params = self.take_apart(q.parts["blocks"].reshape(-1, row_blocks, self.block_bytes))
        return codes.flatten(1), {name: p.flatten(1) for name, p in params.items()}

    def take(self, q: QTensor, rows: Tensor) -> QTensor:
        """Rows (of the first axis) are rows of blocks."""
        return QTensor(q.spec, (rows.numel(), *q.shape[1:]), {"blocks": q.parts["blocks"][rows]})

    def value(self, codes: Tensor, params: Params) -> Tensor:
        """scale * level + offset, rounded to float32 after the product and after the sum, as ggml does."""
        scale, offset = self._scales(params)
        levels = codes.float().sub_(self.zero) if self.levels is None else self._table(codes.device)[codes.int()]
        w = levels.reshape(*scale.shape, self.span).mul_(scale.float()[..., None])
        return (w if offset is None else w.add_(offset.float()[..., None])).flatten(1)

    def fit(
        self, w: Tensor, importance: Tensor | None = None, dtype: torch.dtype = torch.float32, search: bool = True
    ) -> Params:
        """Parameters as they are stored, in the type's own dtypes; FewbitError for a type that is only read."""
        if self.spec not in _ggml_writing.FITS:
            return super().fit(w, importance, dtype, search)
        return _ggml_writing.fit(self, w, importance, search)

    def round(self, w: Tensor, params: Params) -> Tensor:
        return _ggml_writing.nearest_codes(self, w, *self._scales(params))

    def pack(self, codes: Tensor, params: Params) -> QTensor:
        blocks = _ggml_writing.put_together(self, codes, params)
        return QTensor(self.spec, tuple(codes.shape), {"blocks": blocks})

    def affine(self, q: QTensor) -> Affine | None:
        """None for the types with a table of levels."""
        if self.levels is not None:
            return None
        codes, params = self.unpack(q)
        scale, offset = self._scales(params)
        zero = self.zero if offset is None else None
        return Affine(codes, scale, zero, offset, self.span, self.bits, two_level=self.two_level(params))

    def tabled(self, q: QTensor) -> Tabled | None:
        """For the types with a table of levels."""
        if self.levels is None:
            return None
        codes, params = self.unpack(q)
        return Tabled(codes, self.levels, self._scales(params)[0], self.span, self.bits, self.two_level(params))

    def _scales(self, params: Params) -> tuple[Tensor, Tensor | None]:
        """Scale and offset of each span, [out, spans]."""
        two = self.two_level(params)
        return (params["scale"], params.get("minimum")) if two is None else (two.scales(), two.offsets())

    def _table(self, device: torch.device) -> Tensor:
        return torch.tensor(self.levels, dtype=torch.float32, device=device)


def half(blocks: Tensor, start: int) -> Tensor:
    """The f16 at byte `start` of each block: [out, blocks, 1]."""
    return aligned(blocks[..., start : start + 2]).view(torch.float16)


def words(part: Tensor, size: int) -> Tensor:
    """Bytes as unsigned little-endian numbers of 2 or 4 bytes: int32 or int64 [..., n]."""
    if size == 2:
        return aligned(part).view(torch.int16).int() & 0xFFFF
    return aligned(part).view(torch.int32).long() & 0xFFFFFFFF


def aligned(part: Tensor) -> Tensor:
    """A copy, whose bytes can be seen as wider numbers wherever the original lies."""
    return part.clone(memory_format=torch.contiguous_format)


def fields(packed: Tensor, run: int, bits: int, count: int) -> Tensor:
    """Numbers of `bits` bits, `count` to an item of `packed` [out, blocks, n], in their order of columns.

    Of each run of `run` items first the lowest bits of all, then the next ones: [out, blocks, n * count].
    """
    if packed.dtype == torch.uint8 and run % 8 == 0:
        # eight bytes at once: bits that are shifted from one byte into the next are masked away
        wide = aligned(packed).view(torch.int64).unflatten(-1, (-1, 1, run // 8))
        mask = ((1 << bits) - 1) * 0x0101010101010101
        out = wide.new_empty(*wide.shape[:-2], count, run // 8)
        for i in range(count):
            torch.bitwise_right_shift(wide[..., 0, :], bits * i, out=out[..., i, :])
        bytes_: Tensor = out.bitwise_and_(mask).flatten(-3).view(torch.uint8)
        return bytes_
    shifts = torch.arange(0, bits * count, bits, dtype=packed.dtype, device=packed.device)
    found: Tensor = packed.unflatten(-1, (-1, 1, run)) >> shifts[:, None] & ((1 << bits) - 1)
    return found.flatten(-3)
