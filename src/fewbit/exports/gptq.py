"""GPTQ's layout, version 1, as AutoGPTQ wrote it: vLLM, SGLang, and transformers with GPTQModel load it.

A matrix [N, K] of `bits` with G groups: `qweight` int32 [K * bits / 32, N], a stream of bits down each column; `qzeros`
int32 [G, N * bits / 32], zero points less one; `scales` f16 [G, N]; `g_idx` int32 [K], the group of each input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fewbit
from fewbit.checkpoint._writer import Planned
from fewbit.errors import FewbitError
from fewbit.exports._folders import half_scales, zero_points
from fewbit.formats import Layout
from fewbit.formats._bitstream import pack_rows, words
from fewbit.formats.integer import IntegerFormat
from fewbit.qtensor import QTensor

LAYOUT = "gptq"
DEFAULT = "int4g64"
# groups may be of scattered columns
SCATTERED = True


class Packed(Planned):
    """A matrix in this layout."""

    @property
    def integers(self) -> IntegerFormat:
        """The format, known to be one of integers."""
        fmt = self.format
        if not isinstance(fmt, IntegerFormat):
            raise TypeError(self.spec)
        return fmt

    def stored(self, scale_dtype: torch.dtype) -> Layout:
        rows, columns = self.shape
        stem, bits, groups = self.name.removesuffix(".weight"), self.integers.bits, self.integers.groups(columns)
        return {
            f"{stem}.qweight": (torch.int32, (words(columns, bits), rows)),
            f"{stem}.qzeros": (torch.int32, (groups, words(rows, bits))),
            f"{stem}.scales": (torch.float16, (groups, rows)),
            f"{stem}.g_idx": (torch.int32, (columns,)),
        }

    def spelled(self, q: QTensor) -> dict[str, Tensor]:
        fmt, columns = self.integers, self.shape[1]
        stem = self.name.removesuffix(".weight")
        zeros = zero_points(q)
        if not bool(zeros.all()):
            # some engines add the one without looking at the width, and would take it for 2^bits
            raise FewbitError(
                "A zero point of this model can't be written in GPTQ's layout.",
                f"{self.name} has {int((zeros == 0).sum()):,} zero points of 0, and zero points are stored less one.",
                "Export to awq or compressed-tensors, or quantize without zero points (--format int4g64).",
            )
        order = q.parts.get("g_idx", torch.arange(columns, dtype=torch.int32) // fmt.span(columns))
        return {
            f"{stem}.qweight": q.parts["packed"].t().contiguous(),
            f"{stem}.qzeros": pack_rows(zeros.t().contiguous() - 1, fmt.bits),
            f"{stem}.scales": half_scales(self.name, q).t().contiguous(),
            f"{stem}.g_idx": order.int(),
        }


def settings(tensors: Sequence[Planned], linears: set[str], scattered: bool = False) -> dict[str, Any]:  # noqa: ARG001
    """`quantization_config` of config.json."""
    fmt = next(t.integers for t in tensors if isinstance(t, Packed))
    return {
        "quant_method": "gptq",
        "bits": fmt.bits,
        "group_size": fmt.group or -1,
        "desc_act": scattered,
        "sym": not fmt.asymmetric,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"fewbit:{fewbit.__version__}"]},
    }
