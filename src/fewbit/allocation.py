"""Bits under a budget: one choice for each item, so that predicted losses are least and bytes stay below a limit.

This is the multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger: Knapsack Problems, 2004, chapter 11), solved
by dynamic programming over bytes. Matrices come in few shapes, so the bytes of all choices have a large common divisor,
and counting in it is exact; where it is too small, choices are rounded up to coarser units, and the walk along the
convex hull of the choices (the same as a Lagrange multiplier lowered step by step) is taken where it is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewbit.errors import FewbitError

# units of bytes that are told apart at most: a byte and an item each in the table of decisions
MOST_UNITS = 1 << 17
# choices of an item are numbered in a byte
MOST_CHOICES = 255


@dataclass(frozen=True)
class Choice:
    """One way to store an item: what it is called, the bytes it takes, and the loss it is predicted to cause."""

    spec: str
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Item:
    """What gets one choice: a matrix, matrices that are multiplied together, the cache."""

    name: str
    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.choices) <= MOST_CHOICES:
            raise ValueError(f"{self.name} has {len(self.choices)} choices, not 1 to {MOST_CHOICES}")
        if any(c.nbytes < 0 or not math.isfinite(c.loss) for c in self.choices):
            raise ValueError(f"a choice of {self.name} has negative bytes or no finite loss")

    @property
    def least(self) -> int:
        """The bytes of its smallest choice."""
        return min(c.nbytes for c in self.choices)


@dataclass(frozen=True)
class Allocation:
    """The choice of each item by its name; bytes and loss of all together."""

    picks: dict[str, Choice]
    nbytes: int
    loss: float


def allocate(items: Sequence[Item], budget: int) -> Allocation:
    """The choices of least total loss whose bytes are at most `budget`; more budget never means more loss.

    FewbitError with the smallest budget that works where not even the smallest choices fit.
    """
    names = [item.name for item in items]
    if len(set(names)) != len(names):
        raise ValueError("two items have the same name")
    least = sum(item.least for item in items)
    if least > budget:
        raise FewbitError(
            "Nothing fits this budget.",
            f"The smallest choices of all {len(items)} parts take {least:,} bytes together; "
            f"{max(0, budget):,} are allowed, {least - budget:,} too few.",
            f"Allow at least {least / 1e9:.3f} GB ({least:,} bytes), or take a smaller model.",
        )
    useful = [_undominated(item) for item in items]
    unit, exact = _unit(useful)
    found = _solve(useful, (budget - least) // unit, unit)
    if not exact:
        found = min(found, _along_hulls(useful, budget), key=lambda picks: _totals(useful, picks)[1])
    nbytes, loss = _totals(useful, found)
    picks = {item.name: item.choices[pick] for item, pick in zip(useful, found, strict=True)}
    return Allocation(picks, nbytes, loss)


def _totals(items: Sequence[Item], picks: Sequence[int]) -> tuple[int, float]:
    chosen = [item.choices[pick] for item, pick in zip(items, picks, strict=True)]
    return sum(c.nbytes for c in chosen), math.fsum(c.loss for c in chosen)


def _undominated(item: Item) -> Item:
    """By rising bytes and falling loss: what is larger and no better is never chosen."""
    kept: list[Choice] = []
    for choice in sorted(item.choices, key=lambda c: (c.nbytes, c.loss)):
        if not kept or choice.loss < kept[-1].loss:
            kept.append(choice)
    return Item(item.name, tuple(kept))


def _unit(items: Sequence[Item]) -> tuple[int, bool]:
    """Bytes that are counted as one, and whether every choice is a whole number of them more than the smallest."""
    extra = [c.nbytes - item.least for item in items for c in item.choices]
    most = sum(item.choices[-1].nbytes - item.least for item in items)
    divisor = math.gcd(*extra) or 1
    return (divisor, True) if most // divisor <= MOST_UNITS else (-(-most // MOST_UNITS), False)


def _solve(items: Sequence[Item], units: int, unit: int) -> list[int]:
    """Dynamic programming: after each item, the least loss for every number of units spent at most."""
    most = sum(-(-(item.choices[-1].nbytes - item.least) // unit) for item in items)
    units = min(units, most)
    loss: NDArray[np.float64] = np.zeros(units + 1)
    decisions = np.zeros((len(items), units + 1), dtype=np.uint8)
    for i, item in enumerate(items):
        best = np.full(units + 1, np.inf)
        for k, choice in enumerate(item.choices):
            spent = -(-(choice.nbytes - item.least) // unit)
            if spent > units:
                break
            tried = loss[: units + 1 - spent] + choice.loss
            better = tried < best[spent:]
            best[spent:][better] = tried[better]
            decisions[i, spent:][better] = k
        loss = best
    picks = [0] * len(items)
    left = units
    for i in range(len(items) - 1, -1, -1):
        picks[i] = int(decisions[i, left])
        chosen = items[i].choices[picks[i]]
        left -= -(-(chosen.nbytes - items[i].least) // unit)
    return picks


def _along_hulls(items: Sequence[Item], budget: int) -> list[int]:
    """From the smallest choices, steps along each item's convex hull by falling gain a byte, until one does not fit.

    It stops there: what fits a smaller budget is then a part of what fits a larger one.
    """
    steps = [step for i, item in enumerate(items) for step in _hull_steps(i, item)]
    steps.sort(key=lambda step: -step[0])
    picks = [0] * len(items)
    left = budget - sum(item.least for item in items)
    for _, i, pick in steps:
        cost = items[i].choices[pick].nbytes - items[i].choices[picks[i]].nbytes
        if cost > left:
            break
        left -= cost
        picks[i] = pick
    return picks


def _hull_steps(index: int, item: Item) -> list[tuple[float, int, int]]:
    """(gain a byte, item, choice) of each step along the lower convex hull; gains fall along it."""
    steps = []
    at = 0
    while at < len(item.choices) - 1:
        here = item.choices[at]
        gains = [((here.loss - c.loss) / (c.nbytes - here.nbytes), k) for k, c in enumerate(item.choices) if k > at]
        gain, at = max(gains)
        steps.append((gain, index, at))
    return steps
