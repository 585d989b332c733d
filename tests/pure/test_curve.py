"""The curve is found again from what it gives, and orders models as their losses do."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fewbit.allocation import Choice, Item
from fewbit.curve import Curve, fitted
from fewbit.rates import Joint, Part

SPECS = ("few", "fair", "many")


def parts() -> list[Part]:
    random = np.random.default_rng(2)
    found = []
    for i in range(9):
        losses = random.lognormal() * np.array([1.0, 0.2, 0.01])
        choices = tuple(Choice(s, 1, float(loss)) for s, loss in zip(SPECS, losses, strict=True))
        found.append(Part(f"p{i}", (f"p{i}",), Item(f"p{i}", choices), i < 8))
    return found


def joints(truth: Curve, noise: float = 0.0) -> list[Joint]:
    random = np.random.default_rng(3)
    found = []
    for inside, ends in [(0, 0), (1, 1), (2, 2), (0, 2), (2, 0), (1, 2)]:
        picks = {p.name: SPECS[inside if p.inside else ends] for p in parts()}
        total = sum(next(c.loss for c in truth.weighted(p).choices if c.spec == picks[p.name]) for p in parts())
        found.append(Joint(picks, truth.predicted(total) * math.exp(noise * random.standard_normal())))
    return found


@pytest.mark.parametrize("truth", [Curve(0.7, 0.8, 0.5), Curve(1.2, 1.0, 2.0), Curve(0.3, 0.5, 1.0)])
def test_it_is_found_again(truth: Curve) -> None:
    found = fitted(parts(), joints(truth))
    assert found.factor == pytest.approx(truth.factor, rel=0.05)
    assert found.power == pytest.approx(truth.power, rel=0.02)
    assert found.inside == pytest.approx(truth.inside, rel=0.05)
    noisy = fitted(parts(), joints(truth, 0.1))
    for exact, joint in zip(joints(truth), joints(truth, 0.1), strict=True):
        total = sum(next(c.loss for c in noisy.weighted(p).choices if c.spec == joint.picks[p.name]) for p in parts())
        assert math.log(noisy.predicted(total) / exact.kl) == pytest.approx(0, abs=0.35)


def test_more_loss_is_never_predicted_better() -> None:
    # measured the wrong way round
    odd = [Joint(j.picks, 1 / j.kl) for j in joints(Curve())]
    found = fitted(parts(), odd)
    assert found.power > 0
    assert found.predicted(2.0) > found.predicted(1.0)


def test_too_few_configurations_change_nothing() -> None:
    assert fitted(parts(), joints(Curve(0.5))[:2]) == Curve()
