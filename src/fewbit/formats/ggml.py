"""The block types of ggml as GGUF files hold them, read only: `gguf:q4_0`, `gguf:q4_1`, `gguf:q8_0`.

A row is a run of blocks; a block holds the parameters and the codes of a few consecutive columns, so one part,
`blocks` uint8 [out, blocks per row * bytes per block], holds everything. Layouts after ggml's `ggml-common.h`.
A further type is one more class: its sizes, how a block is taken apart, and what the codes stand for.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from fewbit.formats import Affine, Format, Layout, Params, Shape
from fewbit.qtensor import QTensor


class GgmlFormat(Format):
    """What the block types share. `codes` and `params` are 2-D: leading axes (experts) are stacked by rows."""

    # columns in a block, and its size
    block: ClassVar[int]
    block_bytes: ClassVar[int]

    def accepts(self, shape: Shape) -> str | None:
        """Rows must be whole blocks."""
        if shape[-1] % self.block:
            return f"{self.spec} needs a multiple of {self.block} columns, not {shape[-1]}"
        return None

    def layout(self, shape: Shape, dtype: torch.dtype) -> Layout:
        """One part of bytes; scales lie inside it in the type's own dtype, whatever `dtype` says."""
        return {"blocks": (torch.uint8, (*shape[:-1], shape[-1] // self.block * self.block_bytes))}

    def unpack(self, q: QTensor) -> tuple[Tensor, Params]:
        """Codes [out, in] and the parameters of each block, [out, blocks]."""
        row_blocks = q.shape[-1] // self.block
        codes, params = self.take_apart(q.parts["blocks"].reshape(-1, row_blocks, self.block_bytes))
        return codes.flatten(1), params

    def take(self, q: QTensor, rows: Tensor) -> QTensor:
        """Rows (of the first axis) are rows of blocks."""
        return QTensor(q.spec, (rows.numel(), *q.shape[1:]), {"blocks": q.parts["blocks"][rows]})

    @abstractmethod
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        """uint8 [out, blocks, bytes] -> codes [out, blocks, columns] and parameters [out, blocks]."""


class Q4_0(GgmlFormat):  # noqa: N801
    """Four bits and a scale: w = scale * (code - 8), codes 0..15."""

    spec = "gguf:q4_0"
    block = 32
    block_bytes = 18

    # byte  0  1 | 2                3                ...  17
    #       f16  | lo: column 0     lo: column 1     ...  lo: column 15
    #       scale| hi: column 16    hi: column 17    ...  hi: column 31
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        """Codes uint8, `scale` f16."""
        return _nibbles(blocks[..., 2:]), {"scale": _half(blocks, 0)}

    def value(self, codes: Tensor, params: Params) -> Tensor:
        """scale * (code - 8)."""
        return _by_block(codes.to(torch.int8).sub_(8), params["scale"]).flatten(1)

    def affine(self, q: QTensor) -> Affine:
        """Zero is code 8 everywhere."""
        codes, params = self.unpack(q)
        return Affine(codes, params["scale"], zero=8, offset=None, span=self.block, bits=4)


class Q4_1(GgmlFormat):  # noqa: N801
    """Four bits, a scale and a minimum: w = scale * code + minimum, codes 0..15."""

    spec = "gguf:q4_1"
    block = 32
    block_bytes = 20

    # byte  0  1 | 2  3   | 4                5                ...  19
    #       f16  | f16    | lo: column 0     lo: column 1     ...  lo: column 15
    #       scale| minimum| hi: column 16    hi: column 17    ...  hi: column 31
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        """Codes uint8, `scale` and `minimum` f16."""
        return _nibbles(blocks[..., 4:]), {"scale": _half(blocks, 0), "minimum": _half(blocks, 2)}

    def value(self, codes: Tensor, params: Params) -> Tensor:
        """scale * code + minimum, rounded to float32 after the product and after the sum, as ggml does."""
        return _by_block(codes, params["scale"]).add_(params["minimum"].float()[..., None]).flatten(1)

    def affine(self, q: QTensor) -> Affine:
        """No one code is zero, so the minimum is the offset."""
        codes, params = self.unpack(q)
        return Affine(codes, params["scale"], zero=None, offset=params["minimum"], span=self.block, bits=4)


class Q8_0(GgmlFormat):  # noqa: N801
    """Eight bits and a scale: w = scale * code, codes -128..127."""

    spec = "gguf:q8_0"
    block = 32
    block_bytes = 34

    # byte  0  1 | 2               3               ...  33
    #       f16  | int8: column 0  int8: column 1  ...  int8: column 31
    #       scale|
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        """Codes int8, `scale` f16."""
        return blocks[..., 2:].contiguous().view(torch.int8), {"scale": _half(blocks, 0)}

    def value(self, codes: Tensor, params: Params) -> Tensor:
        """scale * code."""
        return _by_block(codes, params["scale"]).flatten(1)

    def affine(self, q: QTensor) -> Affine:
        """Codes move up by 128 to be unsigned."""
        codes, params = self.unpack(q)
        # adding 128 to a byte flips its top bit
        shifted = codes.view(torch.uint8).bitwise_xor(128)
        return Affine(shifted, params["scale"], zero=128, offset=None, span=self.block, bits=8)


TYPES: tuple[type[GgmlFormat], ...] = (Q4_0, Q4_1, Q8_0)


def parse(spec: str) -> Format | None:
    """The format `spec` names, or None where it is none of these."""
    for kind in TYPES:
        if spec == kind.spec:
            return kind()
    return None


def _half(blocks: Tensor, start: int) -> Tensor:
    """The f16 at byte `start` of each block: [out, blocks]."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16).squeeze(-1)


def _nibbles(packed: Tensor) -> Tensor:
    """Low halves of all bytes are the first columns, high halves the rest."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _by_block(codes: Tensor, scale: Tensor) -> Tensor:
    """codes [out, in] times the scale of their block [out, blocks] -> float32 [out, blocks, columns]."""
    return codes.reshape(*scale.shape, -1).float() * scale.float()[..., None]
