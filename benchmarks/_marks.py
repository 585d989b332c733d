"""A mark is a figure with a bound. Each benchmark prints its marks, saves them as JSON and exits non-zero below one."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Mark:
    """`value` must be at most (or at least) `bound`."""

    name: str
    value: float
    bound: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the mark is met."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{'ok  ' if self.holds else 'MISS'} {self.name}: {self.value:.4g} ({sign} {self.bound:.4g})"


def finish(benchmark: str, marks: list[Mark], figures: Any) -> None:
    """Print and save; exits with 1 where a mark is missed."""
    for mark in marks:
        print(mark)
    RESULTS.mkdir(exist_ok=True)
    found = {"machine": platform.platform(), "marks": [asdict(m) for m in marks], "figures": figures}
    (RESULTS / f"{benchmark}.json").write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(0 if all(m.holds for m in marks) else 1)
