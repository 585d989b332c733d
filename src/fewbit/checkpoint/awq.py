"""AWQ folders of version `gemm`, as AutoAWQ, GPTQModel and AutoRound write them: codes packed along the outputs.

`x.qweight` int32 [K, N * bits / 32] and `x.qzeros` int32 [G, N * bits / 32] hold outputs 0, 2, 4, 6, 1, 3, 5, 7 of
every eight, in this order from the lowest bits on.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fewbit.checkpoint._folder import Json
from fewbit.checkpoint._foreign import (
    AUTO_ROUND_AWQ,
    Foreign,
    Stored,
    auto_round_packing,
    read_settings,
    unreadable,
)
from fewbit.config_values import shown
from fewbit.formats._bitstream import pack_rows, unpack_rows, words

INTERLEAVE = (0, 2, 4, 6, 1, 3, 5, 7)


def matches(path: Path) -> bool:
    """A folder that says it is quantized with AWQ, or with AutoRound in AWQ's layout."""
    settings = read_settings(path)
    return settings.get("quant_method") == "awq" or auto_round_packing(settings) in AUTO_ROUND_AWQ


class AWQ(Foreign):
    """Codes are unpacked, put in order, transposed and packed along the inputs."""

    def __init__(self, path: Path, settings: Json) -> None:
        own = settings.get("quant_method") == "awq"
        # AutoRound goes on with the same order for widths that run across words
        self.widths = (4,) if own else (4, 5, 6, 7)
        version = settings.get("version") or settings.get("checkpoint_format") or settings.get("format") or "gemm"
        if own and str(version).lower() != "gemm":
            raise unreadable(f"AWQ's version is {shown(version)}; known is gemm")
        super().__init__(path, settings)

    def sizes(
        self, bits: int, n: int, qweight: tuple[int, ...], order: tuple[int, ...] | None
    ) -> tuple[int, int] | None:
        whole = n % len(INTERLEAVE) == 0 and order is None
        return (n, qweight[0]) if whole and qweight[1] == words(n, bits) else None

    def packed(self, plan: Stored, qweight: Tensor) -> Tensor:
        return pack_rows(_in_order(qweight, plan).t().contiguous(), plan.bits)

    def zeros(self, plan: Stored, qzeros: Tensor) -> Tensor:
        return _in_order(qzeros, plan)

    def says_symmetric(self) -> bool:
        return self.settings.get("zero_point") is False or self.settings.get("sym") is True


def _in_order(packed: Tensor, plan: Stored) -> Tensor:
    """int32 [n, words(N)] -> uint8 codes [n, N]."""
    stored = unpack_rows(packed, plan.bits, plan.shape[0]).unflatten(1, (-1, len(INTERLEAVE)))
    codes = torch.empty_like(stored)
    codes[..., list(INTERLEAVE)] = stored
    return codes.flatten(1)


def open(path: Path) -> AWQ:  # noqa: A001
    """Open a folder."""
    return AWQ(path, read_settings(path))
