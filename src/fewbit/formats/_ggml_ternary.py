"""Weights of -1, 0 and 1 times one scale for 256 columns."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.formats import Params
from fewbit.formats._ggml_block import GgmlFormat, fields, half


class _Ternary(GgmlFormat):
    block = span = 256
    bits, zero = 2, 1


class TQ1_0(_Ternary):  # noqa: N801
    """Five weights in a byte, as a fraction of 256 in base 3."""

    spec = "gguf:tq1_0"
    block_bytes = 54

    # byte  0 .. 31         | 32 .. 47         | 48 .. 51       | 52 53
    #       five weights of | five weights of  | four weights of| f16
    #       columns 0..159  | columns 160..239 | 240..255       | scale
    # the first digits of all bytes of a run are its first columns, then come the second digits
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        runs = (_digits(blocks[..., :32], 5), _digits(blocks[..., 32:48], 5), _digits(blocks[..., 48:52], 4))
        return torch.cat(runs, -1), {"scale": half(blocks, 52)}


class TQ2_0(_Ternary):  # noqa: N801
    """Two bits a weight; the code 3 stands for 2."""

    spec = "gguf:tq2_0"
    block_bytes = 66

    # byte  0 .. 63                              | 64 65
    #       two strips of 32 bytes, 128 columns  | f16 scale
    def take_apart(self, blocks: Tensor) -> tuple[Tensor, Params]:
        return fields(blocks[..., :64], 32, 2, 4), {"scale": half(blocks, 64)}


def _digits(packed: Tensor, count: int) -> Tensor:
    """The first `count` digits in base 3 after the point of byte / 256; bytes wrap around at 256, as in ggml."""
    powers = torch.tensor([1, 3, 9, 27, 81][:count], dtype=torch.uint8, device=packed.device)
    rest = packed[..., None, :] * powers[:, None]
    return (rest.int() * 3 >> 8).to(torch.uint8).flatten(-2)
