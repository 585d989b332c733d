"""From losses of parts to the divergence of a whole model, as measured on a few configurations of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fewbit.allocation import Item
from fewbit.rates import Joint, Part

# what a loss inside blocks may count beside one at the ends, tried on a grid
INSIDE = np.geomspace(0.1, 10.0, 81)
# predictions saturate, so the divergence grows more slowly than the losses' sum; never the other way round
LEAST_POWER, MOST_POWER = 0.3, 1.0


@dataclass(frozen=True)
class Curve:
    """KL = factor * (inside * losses in blocks + losses of embedding and head) ^ power, in nats a token."""

    factor: float = 1.0
    power: float = 1.0
    inside: float = 1.0

    def weighted(self, part: Part) -> Item:
        """The part's choices, with losses that add up across parts."""
        share = self.inside if part.inside else 1.0
        choices = tuple(type(c)(c.spec, c.nbytes, share * c.loss) for c in part.item.choices)
        return Item(part.name, choices)

    def predicted(self, loss: float) -> float:
        """The divergence that comes of weighted losses that add up to `loss`."""
        return float(self.factor * loss**self.power)


def fitted(parts: Sequence[Part], joints: Sequence[Joint]) -> Curve:
    """The curve of least squares in the logarithm of the divergence; the identity where nothing was measured."""
    usable = [joint for joint in joints if joint.kl > 0]
    if len(usable) < 3:
        return Curve()
    sums = np.array([_sums(parts, joint.picks) for joint in usable])
    target = np.log([joint.kl for joint in usable])
    best, least = Curve(), math.inf
    for inside in INSIDE:
        x = np.log(np.maximum(inside * sums[:, 0] + sums[:, 1], 1e-30))
        spread = x - x.mean()
        slope = float(spread @ target / max(spread @ spread, 1e-30))
        power = min(MOST_POWER, max(LEAST_POWER, slope))
        offset = float((target - power * x).mean())
        error = float(np.square(target - power * x - offset).sum())
        if error < least:
            best, least = Curve(math.exp(offset), power, float(inside)), error
    return best


def _sums(parts: Sequence[Part], picks: Mapping[str, str]) -> tuple[float, float]:
    """Losses in blocks and at the ends."""
    inside = ends = 0.0
    for part in parts:
        loss = next(c.loss for c in part.item.choices if c.spec == picks[part.name])
        if part.inside:
            inside += loss
        else:
            ends += loss
    return inside, ends
