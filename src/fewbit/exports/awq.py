"""AWQ's `gemm` layout, as AutoAWQ wrote it: vLLM, SGLang, and transformers with GPTQModel load it.

A matrix [N, K] of 4 bits with G groups: `qweight` int32 [K, N / 8], `qzeros` int32 [G, N / 8], both with outputs
0, 2, 4, 6, 1, 3, 5, 7 of every eight in a word from the lowest bits on, and `scales` f16 [G, N].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint._writer import Planned
from fewbit.checkpoint.awq import INTERLEAVE
from fewbit.exports._folders import half_scales, zero_points
from fewbit.formats import Layout
from fewbit.formats._bitstream import pack_rows
from fewbit.formats.integer import IntegerFormat
from fewbit.qtensor import QTensor

LAYOUT = "awq"
DEFAULT = "int4g64a"


class Packed(Planned):
    """A matrix in this layout."""

    def stored(self, scale_dtype: torch.dtype) -> Layout:
        rows, columns = self.shape
        fmt = self.format
        if not isinstance(fmt, IntegerFormat):
            raise TypeError(self.spec)
        stem, groups = self.name.removesuffix(".weight"), fmt.groups(columns)
        return {
            f"{stem}.qweight": (torch.int32, (columns, rows // 8)),
            f"{stem}.qzeros": (torch.int32, (groups, rows // 8)),
            f"{stem}.scales": (torch.float16, (groups, rows)),
        }

    def spelled(self, q: QTensor) -> dict[str, Tensor]:
        stem = self.name.removesuffix(".weight")
        codes, _ = self.format.unpack(q)
        return {
            f"{stem}.qweight": _across(codes.t().contiguous()),
            f"{stem}.qzeros": _across(zero_points(q).t().contiguous()),
            f"{stem}.scales": half_scales(self.name, q).t().contiguous(),
        }


def settings(tensors: Sequence[Planned], linears: set[str]) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    fmt = next(t.format for t in tensors if isinstance(t, Packed))
    plain = {t.name.removesuffix(".weight") for t in tensors if t.name in linears and not isinstance(t, Packed)}
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": getattr(fmt, "group", None) or -1,
        "zero_point": True,
        "version": "gemm",
        # the head is known to be none
        "modules_to_not_convert": sorted(plain - {"lm_head"}) or None,
    }


def _across(codes: Tensor) -> Tensor:
    """uint8 [n, N] -> int32 [n, N / 8], every eight in AWQ's order."""
    return pack_rows(codes.unflatten(1, (-1, 8))[..., list(INTERLEAVE)].flatten(1), 4)
