"""Two to three bits a weight: four or eight neighbours together are a point of a list, their signs lie beside it.

An index picks a point of small magnitudes (the lists are in `_ggml_points`). Magnitude and sign of a weight together
are its code, of 3 or 4 bits: `levels` has the magnitudes and then their negatives. A scale is a half for 256 columns
times an odd number of 4 bits (3 for IQ1) for each 16 or 32, times a constant.
"""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar, Final

import torch
from torch import Tensor

from fewbit.formats import Params, TwoLevel
from fewbit.formats._ggml_block import GgmlFormat, fields, half, words
from fewbit.formats._ggml_points import LISTS, points

_TWO: Final = (8, 25, 43)
_THREE_XXS: Final = (4, 12, 20, 28, 36, 44, 52, 62)
_THREE_S: Final = (1, 3, 5, 7, 9, 11, 13, 15)


def _both_signs(magnitudes: tuple[int, ...]) -> tuple[int, ...]:
    return (*magnitudes, *(-m for m in magnitudes))


class _Grid(GgmlFormat):
    """w = scale * factor * (2 * step + 1) * level."""

    block = 256
    grid: ClassVar[str]
    factor: ClassVar[float]

    def two_level(self, params: Params) -> TwoLevel:
        """The factor is a power of two; with it a small half would lose bits, so it is float32."""
        scale = params["scale"] if self.factor == 1 else params["scale"].float() * self.factor
        return TwoLevel(scale, params["steps"] * 2 + 1)

    def _codes(self, index: Tensor, second: Tensor) -> Tensor:
        """Points [.., n] and, for each of their columns, whether the level is of the second half [.., columns]."""
        found = points(self.grid).to(index.device)[index].flatten(-2)
        return found + second * LISTS[self.grid][1]


class IQ2_XXS(_Grid):  # noqa: N801
    """256 points of eight columns; seven sign bits for eight columns."""

    spec = "gguf:iq2_xxs"
    block_bytes, span, bits, levels = 66, 32, 3, _both_signs(_TWO)
    grid, factor = "iq2_xxs", 1 / 8

    # byte  0  1 | for each 32 columns 8 bytes:
    #       f16  | 4 bytes: points of 8 columns | u32: 4 times 7 bits of signs, 4 bits: step
    #       scale|
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        eight = blocks[..., 2:].unflatten(-1, (8, 8))
        second = words(eight[..., 4:], 4)
        codes = self._codes(eight[..., :4].int().flatten(-2), _seven_signs(second))
        return codes, {"scale": half(blocks, 0), "steps": (second.flatten(-2) >> 28).to(torch.uint8)}


class IQ2_XS(_Grid):  # noqa: N801
    """512 points of eight columns; seven sign bits for eight columns; a step for each 16."""

    spec = "gguf:iq2_xs"
    block_bytes, span, bits, levels = 74, 16, 3, _both_signs(_TWO)
    grid, factor = "iq2_xs", 1 / 8

    # byte  0  1 | 2 .. 65: for each 8 columns a u16        | 66 .. 73
    #       f16  | 0-8: point, 9-15: signs                  | steps, low nibble first
    #       scale|
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        eight = words(blocks[..., 2:66], 2)
        signs = fields(_evened(eight >> 9), 1, 1, 8)
        return self._codes(eight & 511, signs), {"scale": half(blocks, 0), "steps": fields(blocks[..., 66:], 1, 4, 2)}


class IQ2_S(_Grid):  # noqa: N801
    """1024 points of eight columns; all signs; a step for each 16."""

    spec = "gguf:iq2_s"
    block_bytes, span, bits, levels = 82, 16, 3, _both_signs(_TWO)
    grid, factor = "iq2_s", 1 / 8

    # byte  0  1 | 2 .. 33       | 34 .. 65        | 66 .. 73            | 74 .. 81
    #       f16  | points, 8 low | bit i: sign of  | points, 2 top bits, | steps, low
    #       scale| bits          | column i        | lowest first        | nibble first
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        index = blocks[..., 2:34].int() | fields(blocks[..., 66:74], 1, 2, 4).int() << 8
        codes = self._codes(index, fields(blocks[..., 34:66], 1, 1, 8))
        return codes, {"scale": half(blocks, 0), "steps": fields(blocks[..., 74:], 1, 4, 2)}


class IQ3_XXS(_Grid):  # noqa: N801
    """256 points of four columns; seven sign bits for eight columns."""

    spec = "gguf:iq3_xxs"
    block_bytes, span, bits, levels = 98, 32, 4, _both_signs(_THREE_XXS)
    grid, factor = "iq3_xxs", 1 / 4

    # byte  0  1 | 2 .. 65     | 66 .. 97
    #       f16  | points of 4 | for each 32 columns a u32: 4 times 7 bits of signs,
    #       scale| columns     | 4 bits: step
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        second = words(blocks[..., 66:], 4)
        codes = self._codes(blocks[..., 2:66].int(), _seven_signs(second[..., None]))
        return codes, {"scale": half(blocks, 0), "steps": (second >> 28).to(torch.uint8)}


class IQ3_S(_Grid):  # noqa: N801
    """512 points of four columns; all signs; a step for each 32."""

    spec = "gguf:iq3_s"
    block_bytes, span, bits, levels = 110, 32, 4, _both_signs(_THREE_S)
    grid, factor = "iq3_s", 1

    # byte  0  1 | 2 .. 65       | 66 .. 73              | 74 .. 105       | 106 .. 109
    #       f16  | points, 8 low | bit i of the 64: ninth| bit i: sign of  | steps, low
    #       scale| bits          | bit of point i        | column i        | nibble first
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        index = blocks[..., 2:66].int() | fields(blocks[..., 66:74], 1, 1, 8).int() << 8
        codes = self._codes(index, fields(blocks[..., 74:106], 1, 1, 8))
        return codes, {"scale": half(blocks, 0), "steps": fields(blocks[..., 106:], 1, 4, 2)}


class _OneBit(_Grid):
    """Points of -1, 0 and 1, moved up or down by an eighth: levels are eighths."""

    bits, levels = 3, (-7, 1, 9, -9, -1, 7)
    grid, factor = "iq1", 1 / 8


class IQ1_S(_OneBit):  # noqa: N801
    """2048 points of eight columns, moved together in each 32 columns."""

    spec = "gguf:iq1_s"
    block_bytes, span = 50, 32

    # byte  0  1 | 2 .. 33       | 34 .. 49: for each 32 columns a u16
    #       f16  | points, 8 low | 0-11: 4 times the 3 top bits of a point, 12-14: step, 15: moved down
    #       scale| bits          |
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        high = words(blocks[..., 34:], 2)
        index = blocks[..., 2:34].int() | fields(high, 1, 3, 4) << 8
        down = (high >> 15).to(torch.uint8).repeat_interleave(32, -1)
        return self._codes(index, down), {"scale": half(blocks, 0), "steps": (high >> 12 & 7).to(torch.uint8)}


class IQ1_M(_OneBit):  # noqa: N801
    """2048 points of eight columns, each moved up or down; a step for each 16."""

    spec = "gguf:iq1_m"
    block_bytes, span = 56, 16

    # byte  0 .. 31       | 32 .. 47: nibbles, low first,   | 48 .. 55: four u16
    #       points, 8 low | 0-2: top bits of a point,       | 0-11: 4 steps of 3 bits
    #       bits          | 3: moved down                   | 12-15: a nibble of the f16 scale, lowest first
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        nibbles, last = fields(blocks[..., 32:48], 1, 4, 2), words(blocks[..., 48:], 2)
        index = blocks[..., :32].int() | (nibbles & 7).int() << 8
        nibble = last >> 12
        scale = nibble[..., :1] | nibble[..., 1:2] << 4 | nibble[..., 2:3] << 8 | nibble[..., 3:] << 12
        params = {"scale": scale.to(torch.int16).view(torch.float16), "steps": fields(last, 1, 3, 4).to(torch.uint8)}
        return self._codes(index, (nibbles >> 3).repeat_interleave(8, -1)), params


def _seven_signs(word: Tensor) -> Tensor:
    """The signs of 32 columns in 28 bits: [out, blocks, 8, 1] -> uint8 [out, blocks, 256]."""
    shifts = torch.arange(0, 28, 7, device=word.device)
    return fields(_evened(word >> shifts & 127).flatten(-2), 1, 1, 8)


def _evened(seven: Tensor) -> Tensor:
    """Seven bits and an eighth that makes the number of ones even: uint8."""
    return _even(seven.device)[seven.long()]


@lru_cache(maxsize=4)
def _even(device: torch.device) -> Tensor:
    table = [bits | bits.bit_count() % 2 << 7 for bits in range(128)]
    return torch.tensor(table, dtype=torch.uint8, device=device)
