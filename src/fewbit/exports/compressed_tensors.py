"""compressed-tensors' `pack-quantized`, which is also how fewbit itself spells integers: vLLM, SGLang and transformers
load it where embedding and head are kept in 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fewbit.checkpoint._writer import Planned, quantization_config

LAYOUT = "compressed-tensors"
DEFAULT = "int4g64"
Packed = Planned


def settings(tensors: Sequence[Planned], linears: set[str]) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    found = quantization_config(tensors, linears)
    if found is None or found["quant_method"] != LAYOUT:
        raise ValueError("the limits let through what the layout can't say")
    return found
