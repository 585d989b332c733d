"""Four bits that pick one of 16 uneven levels: IQ4_NL, IQ4_XS, MXFP4 and NVFP4."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fewbit.formats import Params, TwoLevel
from fewbit.formats._ggml_block import GgmlFormat, fields, half, words

# dense around zero, for weights with a bell's distribution (kvalues_iq4nl in ggml-common.h)
UNEVEN: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# twice the numbers of a float of 4 bits, e2m1 (OCP Microscaling Formats 1.0, 5.3.3); the ninth is minus zero
E2M1: Final = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


class IQ4_NL(GgmlFormat):  # noqa: N801
    """32 columns with one scale."""

    spec = "gguf:iq4_nl"
    block = span = 32
    block_bytes, bits, levels = 18, 4, UNEVEN

    # byte  0  1 | 2 .. 17
    #       f16  | nibbles as in Q4_0
    #       scale|
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        return fields(blocks[..., 2:], 16, 4, 2), {"scale": half(blocks, 0)}


class IQ4_XS(GgmlFormat):  # noqa: N801
    """256 columns; a signed step of 6 bits for each 32."""

    spec = "gguf:iq4_xs"
    block, span = 256, 32
    block_bytes, bits, levels = 136, 4, UNEVEN

    # byte  0  1 | 2  3              | 4 .. 7              | 8 .. 135
    #       f16  | bits 2i and 2i+1: | four low bits of    | for each 32 columns 16 bytes,
    #       scale| top bits of step i| steps 2i and 2i + 1 | nibbles as in Q4_0
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        steps = fields(blocks[..., 4:8], 1, 4, 2) | fields(words(blocks[..., 2:4], 2), 1, 2, 8).to(torch.uint8) << 4
        return fields(blocks[..., 8:], 16, 4, 2), {"scale": half(blocks, 0), "steps": steps.to(torch.int8) - 32}

    def two_level(self, params: Params) -> TwoLevel:
        return TwoLevel(params["scale"], params["steps"])


class MXFP4(GgmlFormat):
    """32 columns with a power of two: floats of 4 bits under a shared exponent (OCP Microscaling Formats 1.0)."""

    spec = "gguf:mxfp4"
    block = span = 32
    block_bytes, bits, levels = 17, 4, E2M1

    # byte  0        | 1 .. 16
    #       exponent | nibbles as in Q4_0
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        """Scales are 2^(exponent - 128), half of what the exponent says as the levels are doubled; exact in bf16."""
        exponent = blocks[..., :1].int()
        # the two smallest are subnormal
        bits = torch.where(exponent < 2, 0x0040 >> 1 << exponent, (exponent - 1) << 7)
        return fields(blocks[..., 1:], 16, 4, 2), {"scale": bits.to(torch.int16).view(torch.bfloat16)}


class NVFP4(GgmlFormat):
    """64 columns; a scale for each 16 is a float of 8 bits, e4m3 without its sign."""

    spec = "gguf:nvfp4"
    block, span = 64, 16
    block_bytes, bits, levels = 36, 4, E2M1

    # byte  0 .. 3             | 4 .. 35
    #       scales of 16       | for each 16 columns 8 bytes: lo: columns 0..7,
    #       columns            | hi: columns 8..15
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        """Half of each scale, as the levels are doubled; exact in bf16. 127, its NaN, is 0 as in ggml."""
        exponent, fraction = (blocks[..., :4] >> 3 & 15).float(), (blocks[..., :4] & 7).float()
        scale = torch.where(exponent == 0, fraction * 2**-10, (1 + fraction / 8) * 2 ** (exponent - 8))
        scale = scale.masked_fill_(blocks[..., :4] == 127, 0.0)
        return fields(blocks[..., 4:], 8, 4, 2), {"scale": scale.bfloat16()}
