"""GPTQ folders, as AutoGPTQ, GPTQModel and AutoRound write them: codes packed along the inputs.

`x.qweight` int32 [K * bits / 32, N] is one stream of bits down each column, lowest bits first, which for 3 bits runs
across words. Version 1 stores zero points less one, `gptq_v2` as they are. `x.g_idx` int32 [K] gives each input's
group; with activation order (`desc_act`) a group's inputs are not neighbours.
"""

from __future__ import annotations

from pathlib import Path

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
from fewbit.formats._bitstream import unpack_rows, words

# AutoRound's layouts with zero points less one, and as they are
AUTO_ROUND_V1 = ("auto", *(f"auto_round:{name}{tail}" for name in ("gptq", "auto_gptq") for tail in ("", ":exllamav2")))
AUTO_ROUND_V2 = ("auto_round", "auto_round:gptqmodel", "auto_round:exllamav2", "auto_round:tritonv2")
# a one in every field of a word
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def matches(path: Path) -> bool:
    """A folder that says it is quantized with GPTQ, or with AutoRound in GPTQ's layout."""
    settings = read_settings(path)
    packing = auto_round_packing(settings)
    return settings.get("quant_method") == "gptq" or (packing is not None and packing not in AUTO_ROUND_AWQ)


class GPTQ(Foreign):
    """Codes already lie as fewbit packs them, but for a transposition."""

    def __init__(self, path: Path, settings: Json) -> None:
        self.less_one = _stored_less_one(settings)
        # GPTQModel's 5, 6 and 7 bits lie in planes
        self.widths = (2, 3, 4, 8) if auto_round_packing(settings) is None else (2, 3, 4, 5, 6, 7, 8)
        super().__init__(path, settings)

    def sizes(
        self, bits: int, n: int, qweight: tuple[int, ...], order: tuple[int, ...] | None
    ) -> tuple[int, int] | None:
        columns = order[0] if order else qweight[0] * 32 // bits
        return (n, columns) if qweight == (words(columns, bits), n) else None

    def packed(self, plan: Stored, qweight: Tensor) -> Tensor:
        return qweight.t().contiguous()

    def zeros(self, plan: Stored, qzeros: Tensor) -> Tensor:
        if self.less_one and plan.bits in ONES:
            # the writer subtracted from whole words, so that a zero point of 0 borrowed from its neighbour
            qzeros = qzeros + ONES[plan.bits]
        zeros = unpack_rows(qzeros, plan.bits, plan.shape[0])
        if self.less_one and plan.bits not in ONES:
            zeros = (zeros + 1) & ((1 << plan.bits) - 1)
        return zeros

    def says_symmetric(self) -> bool:
        return self.settings.get("sym", True) is not False


def _stored_less_one(settings: Json) -> bool:
    """Whether zero points are stored less one; FewbitError for a layout that is not read."""
    packing = auto_round_packing(settings)
    if packing is not None:
        if packing not in AUTO_ROUND_V1 + AUTO_ROUND_V2:
            raise unreadable(f"AutoRound's packing_format is {shown(packing)}")
        return packing in AUTO_ROUND_V1
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
        raise unreadable(f"GPTQ's checkpoint_format is {shown(layout)}; known are gptq and gptq_v2")
    return layout == "gptq"


def open(path: Path) -> GPTQ:  # noqa: A001
    """Open a folder."""
    return GPTQ(path, read_settings(path))
