"""ggml's blocks of 32 columns with one scale, or a scale and a minimum."""

from __future__ import annotations

from torch import Tensor

from fewbit.formats import Params
from fewbit.formats._ggml_block import GgmlFormat, fields, half


class _Plain(GgmlFormat):
    block = span = 32


class Q4_0(_Plain):  # noqa: N801
    """Four bits and a scale: w = scale * (code - 8)."""

    spec = "gguf:q4_0"
    block_bytes, bits, zero = 18, 4, 8

    # byte  0  1 | 2                3                ...  17
    #       f16  | lo: column 0     lo: column 1     ...  lo: column 15
    #       scale| hi: column 16    hi: column 17    ...  hi: column 31
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        return fields(blocks[..., 2:], 16, 4, 2), {"scale": half(blocks, 0)}


class Q4_1(_Plain):  # noqa: N801
    """Four bits, a scale and a minimum: w = scale * code + minimum."""

    spec = "gguf:q4_1"
    block_bytes, bits = 20, 4

    # byte  0  1 | 2  3   | 4                5                ...  19
    #       f16  | f16    | lo: column 0     lo: column 1     ...  lo: column 15
    #       scale| minimum| hi: column 16    hi: column 17    ...  hi: column 31
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        return fields(blocks[..., 4:], 16, 4, 2), {"scale": half(blocks, 0), "minimum": half(blocks, 2)}


class Q5_0(_Plain):  # noqa: N801
    """Five bits and a scale: w = scale * (code - 16)."""

    spec = "gguf:q5_0"
    block_bytes, bits, zero = 22, 5, 16

    # byte  0  1 | 2 .. 5                        | 6 .. 21
    #       f16  | bit i of the 32: the fifth    | four low bits,
    #       scale| bit of column i               | as in Q4_0
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        return fields(blocks[..., 6:], 16, 4, 2) | fields(blocks[..., 2:6], 1, 1, 8) << 4, {"scale": half(blocks, 0)}


class Q5_1(_Plain):  # noqa: N801
    """Five bits, a scale and a minimum: w = scale * code + minimum."""

    spec = "gguf:q5_1"
    block_bytes, bits = 24, 5

    # byte  0  1 | 2  3   | 4 .. 7                     | 8 .. 23
    #       f16  | f16    | bit i of the 32: the fifth | four low bits,
    #       scale| minimum| bit of column i            | as in Q4_0
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        codes = fields(blocks[..., 8:], 16, 4, 2) | fields(blocks[..., 4:8], 1, 1, 8) << 4
        return codes, {"scale": half(blocks, 0), "minimum": half(blocks, 2)}


class Q8_0(_Plain):  # noqa: N801
    """Eight bits and a scale: w = scale * (code - 128); stored as code - 128, signed."""

    spec = "gguf:q8_0"
    block_bytes, bits, zero = 34, 8, 128

    # byte  0  1 | 2               3               ...  33
    #       f16  | int8: column 0  int8: column 1  ...  int8: column 31
    #       scale|
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        # adding 128 to a byte flips its top bit
        return blocks[..., 2:] ^ 128, {"scale": half(blocks, 0)}
