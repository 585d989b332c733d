"""Bits under a budget, beside trying everything."""

from __future__ import annotations

import itertools
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit import allocation
from fewbit.allocation import Choice, Item, allocate
from fewbit.errors import FewbitError


def _items(draw_bytes: st.SearchStrategy[int]) -> st.SearchStrategy[list[Item]]:
    choice = st.tuples(draw_bytes, st.floats(0, 100))
    choices = st.lists(choice, min_size=1, max_size=4)
    return st.lists(choices, min_size=1, max_size=5).map(
        lambda all_: [
            Item(f"m{i}", tuple(Choice(f"s{k}", n, loss) for k, (n, loss) in enumerate(c))) for i, c in enumerate(all_)
        ]
    )


def _best(items: list[Item], budget: int) -> float:
    """Trying every combination."""
    losses = [
        sum(c.loss for c in picked)
        for picked in itertools.product(*(item.choices for item in items))
        if sum(c.nbytes for c in picked) <= budget
    ]
    return min(losses)


@settings(max_examples=300, deadline=None)
@given(_items(st.integers(0, 40).map(lambda n: 96 * n)), st.integers(0, 20000))
def test_the_least_loss_of_all_combinations(items: list[Item], budget: int) -> None:
    least = sum(item.least for item in items)
    if budget < least:
        with pytest.raises(FewbitError, match="Nothing fits") as raised:
            allocate(items, budget)
        assert f"{least:,} bytes" in raised.value.facts
        # the smallest that works does work
        budget = least
    found = allocate(items, budget)
    assert found.nbytes == sum(c.nbytes for c in found.picks.values()) <= budget
    assert found.loss == pytest.approx(_best(items, budget), rel=1e-12, abs=1e-12)
    assert all(found.picks[item.name] in item.choices for item in items)


@settings(max_examples=100, deadline=None)
@given(_items(st.integers(0, 10**6)), st.lists(st.integers(0, 5 * 10**6), min_size=2, max_size=6))
def test_more_budget_is_never_worse_in_coarse_units_too(items: list[Item], budgets: list[int]) -> None:
    """Bytes without a common divisor, counted in far fewer units than they have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "MOST_UNITS", 64)
        least = sum(item.least for item in items)
        losses = []
        for budget in sorted(least + b for b in budgets):
            found = allocate(items, budget)
            assert found.nbytes <= budget
            # coarse units may miss the best, never beat it
            assert found.loss >= _best(items, budget) - 1e-9
            losses.append(found.loss)
    assert all(more <= fewer + 1e-9 for fewer, more in itertools.pairwise(losses))


def test_a_budget_for_everything_gives_everything_its_best() -> None:
    items = [Item("a", (Choice("lo", 3, 9.0), Choice("hi", 70, 0.5))), Item("b", (Choice("x", 5, 1.0),))]
    found = allocate(items, 10**18)
    assert [c.spec for c in found.picks.values()] == ["hi", "x"]
    assert (found.nbytes, found.loss) == (75, 1.5)


def test_a_70b_shape_takes_seconds_and_little_memory() -> None:
    """80 blocks of four products, 8 rates; the time is generous, the memory is not."""
    random = np.random.default_rng(1)
    shapes = {"qkv": 10240 * 8192, "o": 8192 * 8192, "gate_up": 57344 * 8192, "down": 8192 * 28672}
    bits = (2.25, 2.5, 3.25, 3.5, 4.25, 5.25, 6.25, 8.125)
    items = [
        Item(
            f"{block}.{name}",
            tuple(Choice(f"{b}", int(n * b / 8), float(random.lognormal()) * 4.0**-b) for b in bits),
        )
        for block in range(80)
        for name, n in shapes.items()
    ]
    tracemalloc.start()
    start = time.perf_counter()
    found = allocate(items, 30 * 10**9)
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 29.9e9 < found.nbytes <= 30e9
    assert peak < 500e6
    assert seconds < 60


@pytest.mark.parametrize(("nbytes", "loss"), [(-1, 0.0), (1, float("nan")), (1, float("inf"))])
def test_impossible_choices_are_refused(nbytes: int, loss: float) -> None:
    with pytest.raises(ValueError, match="negative bytes or no finite loss"):
        Item("a", (Choice("s", nbytes, loss),))


def test_names_are_told_apart() -> None:
    item = Item("a", (Choice("s", 1, 0.0),))
    with pytest.raises(ValueError, match="same name"):
        allocate([item, item], 10)
