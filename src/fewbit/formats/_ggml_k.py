"""The K-quants: 256 columns, whose scales (and minima) are small whole numbers times a half for the block.

Bits are kept in strips: of the bytes of a strip, 32 neighbouring columns take the lowest bits, the next 32 columns the
bits above, and so on. `fields` takes them in that order.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from fewbit.formats import Params, TwoLevel
from fewbit.formats._ggml_block import GgmlFormat, fields, half


class _WithScale(GgmlFormat):
    """w = scale * step * (code - zero), a step for each 16 columns."""

    block, span = 256, 16

    def two_level(self, params: Params) -> TwoLevel:
        return TwoLevel(params["scale"], params["steps"])


class _WithMinimum(GgmlFormat):
    """w = scale * step * code - minimum * minimum_step."""

    block = 256

    def two_level(self, params: Params) -> TwoLevel:
        return TwoLevel(params["scale"], params["steps"], params["minimum"], params["minimum_steps"])


class Q2_K(_WithMinimum):  # noqa: N801
    """Two bits; a step and a minimum of 4 bits for each 16 columns."""

    spec = "gguf:q2_k"
    block_bytes, span, bits = 84, 16, 2

    # byte  0 .. 15          | 16 .. 79          | 80 81 | 82 83
    #       lo: step         | two strips of 32  | f16   | f16
    #       hi: minimum_step | bytes, 128 columns| scale | minimum
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        steps = blocks[..., :16]
        params = {"scale": half(blocks, 80), "steps": steps & 15}
        params |= {"minimum": half(blocks, 82), "minimum_steps": steps >> 4}
        return fields(blocks[..., 16:80], 32, 2, 4), params


class Q3_K(_WithScale):  # noqa: N801
    """Three bits around 4; a signed step of 6 bits for each 16 columns."""

    spec = "gguf:q3_k"
    block_bytes, bits, zero = 110, 3, 4

    # byte  0 .. 31             | 32 .. 95          | 96 .. 107        | 108 109
    #       bit i: the third of | two low bits: two | steps, see below | f16
    #       columns 32i..32i+31 | strips of 32 bytes|                  | scale
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        codes = fields(blocks[..., 32:96], 32, 2, 4) | fields(blocks[..., :32], 32, 1, 8) << 2
        # 16 steps of 6 bits: the low nibbles of 8 bytes, then their high nibbles; of 4 bytes more two bits for each
        steps = fields(blocks[..., 96:104], 8, 4, 2) | fields(blocks[..., 104:108], 4, 2, 4) << 4
        return codes, {"scale": half(blocks, 108), "steps": steps.to(torch.int8) - 32}


class _Six(_WithMinimum):
    """What Q4_K and Q5_K begin with."""

    span = 32

    @abstractmethod
    def codes(self, blocks: Tensor) -> Tensor:
        """uint8 [out, blocks, 256]."""

    # byte  0  1 | 2  3    | 4 .. 7           | 8 .. 11           | 12 .. 15
    #       f16  | f16     | 0-5: steps 0..3  | 0-5: minima 0..3  | lo: steps 4..7, low bits
    #       scale| minimum | 6-7: steps 4..7, | 6-7: minima 4..7, | hi: minima 4..7, low bits
    #                      |      top bits    |      top bits     |
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        first, second, low = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
        steps = torch.cat((first & 63, low & 15 | first >> 2 & 48), -1)
        minimum_steps = torch.cat((second & 63, low >> 4 | second >> 2 & 48), -1)
        params = {"scale": half(blocks, 0), "steps": steps}
        return self.codes(blocks), params | {"minimum": half(blocks, 2), "minimum_steps": minimum_steps}


class Q4_K(_Six):  # noqa: N801
    """Four bits; a step and a minimum of 6 bits for each 32 columns."""

    spec = "gguf:q4_k"
    block_bytes, bits = 144, 4

    # byte  0 .. 15 | 16 .. 143
    #       scales  | four strips of 32 bytes, 64 columns each
    def codes(self, blocks: Tensor) -> Tensor:
        return fields(blocks[..., 16:], 32, 4, 2)


class Q5_K(_Six):  # noqa: N801
    """Five bits; a step and a minimum of 6 bits for each 32 columns."""

    spec = "gguf:q5_k"
    block_bytes, bits = 176, 5

    # byte  0 .. 15 | 16 .. 47                                | 48 .. 175
    #       scales  | bit i: the fifth of columns 32i..32i+31 | four low bits, as in Q4_K
    def codes(self, blocks: Tensor) -> Tensor:
        return fields(blocks[..., 48:], 32, 4, 2) | fields(blocks[..., 16:48], 32, 1, 8) << 4


class Q6_K(_WithScale):  # noqa: N801
    """Six bits around 32; a signed step of 8 bits for each 16 columns."""

    spec = "gguf:q6_k"
    block_bytes, bits, zero = 210, 6, 32

    # byte  0 .. 127                    | 128 .. 191                  | 192 .. 207 | 208 209
    #       four low bits: two strips   | two top bits: two strips of | steps,     | f16
    #       of 64 bytes, 128 columns    | 32 bytes, 128 columns       | signed     | scale
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        codes = fields(blocks[..., :128], 64, 4, 2) | fields(blocks[..., 128:192], 32, 2, 4) << 4
        return codes, {"scale": half(blocks, 208), "steps": blocks[..., 192:208].contiguous().view(torch.int8)}
