"""Quantize to a size: what bits are worth is measured, bits are chosen, written, and judged beside one format."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fewbit.judge import Verdict
from fewbit.quantizer import Summary

# what a matrix may become; zero points win back more than they take at few bits
SPECS = (
    "int2g64a", "int2g32a", "int3g128a", "int3g64a", "int3g32a", "int4g128a", "int4g64a", "int4g32a",
    "int5g64a", "int6g64", "int8",
)  # fmt: skip
# of the calibration text: windows to measure parts on, and others to judge whole models on
MEASURED, HELD_OUT = 24, 16
# counted up when what is kept, or how it is measured, changes
VERSION = 1


@dataclass(frozen=True)
class Fitted:
    """What was chosen and why: `mixed` and `uniform` are the verdicts, `uniform_spec` the best single format."""

    summary: Summary
    budget: int
    predicted: float
    mixed: Verdict
    uniform: Verdict | None
    uniform_spec: str | None
    kept: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)
