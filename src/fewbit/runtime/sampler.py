"""Which token comes next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewbit.errors import FewbitError

# colder than this, only the likeliest token has any probability left in float32
GREEDY_BELOW = 1e-4


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. Filters apply in this order: repetition penalty, temperature, top-k, top-p, min-p;
    0 (top_k, min_p) or 1 (top_p, repetition_penalty) turns one off.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        limits = {
            "temperature": (0 <= self.temperature <= 100, "from 0 to 100"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "min_p": (0 <= self.min_p < 1, "from 0, below 1"),
            "repetition_penalty": (0 < self.repetition_penalty <= 100, "above 0, at most 100"),
            "seed": (self.seed is None or -(2**63) <= self.seed < 2**63, "a whole number of 64 bits"),
        }
        for name, (holds, words) in limits.items():
            if not holds:
                raise FewbitError(
                    f"The sampling setting {name} is out of range.",
                    f"Got {getattr(self, name)}; it must be {words}.",
                    "Leave the setting out to use its default.",
                )


class Sampler:
    """Draws tokens; the same seed, settings and logits give the same tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.random = torch.Generator()
        if sampling.seed is None:
            self.random.seed()
        else:
            self.random.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor, history: Sequence[int]) -> int:
        """logits float32 [vocab]; `history` are the tokens the repetition penalty looks at."""
        s = self.sampling
        if s.repetition_penalty != 1.0 and history:
            logits = _penalized(logits, history, s.repetition_penalty)
        if s.temperature < GREEDY_BELOW:
            # a tenth of the time of torch's
            return int(logits.numpy().argmax())
        values, ids = candidates(logits / s.temperature, s)
        return int(ids[self._draw(values.softmax(0))])

    def _draw(self, p: Tensor) -> int:
        """An index with the probabilities p: where a uniform number falls among their running sums."""
        sums = p.cumsum(0, dtype=torch.float64)
        point = torch.rand((), dtype=torch.float64, generator=self.random) * sums[-1]
        return min(int(torch.searchsorted(sums, point, right=True)), len(p) - 1)


def candidates(logits: Tensor, s: Sampling) -> tuple[Tensor, Tensor]:
    """The logits that pass top-k, top-p and min-p, largest first (of equal ones the lower id), and their ids [n].

    What certainly fails is left out before anything is sorted. Without a filter, all in the order of their ids.
    """
    size = len(logits)
    top_k = 0 if s.top_k >= size else s.top_k
    if not top_k and s.top_p == 1.0 and s.min_p == 0.0:
        return logits, torch.arange(size)
    # top-p counts probability among the top-k
    counted = torch.topk(logits, top_k).values if top_k else logits
    total = counted.logsumexp(0)
    floor = float(counted[-1]) if top_k else -math.inf
    if not top_k and s.top_p < 1.0:
        # all tokens below this share together have less than 1 - top_p, and half of it leaves room for rounding
        floor = float(total) + math.log((1 - s.top_p) / (2 * size))
    if s.min_p:
        floor = max(floor, float(logits.max()) + math.log(s.min_p) - 1e-3)
    ids = torch.from_numpy(np.flatnonzero(logits.numpy() >= np.float32(floor)))
    values, order = logits[ids].sort(descending=True, stable=True)
    # more than k pass where several equal the last
    kept = min(_passes(values, total, s), top_k or size)
    return values[:kept], ids[order[:kept]]


def _passes(values: Tensor, total: Tensor, s: Sampling) -> int:
    """How many of the sorted values pass top-p and min-p; at least one."""
    p = (values - total).exp()
    before = p.cumsum(0) - p
    return max(1, int(((before < s.top_p) & (p >= s.min_p * p[0])).sum()))


def _penalized(logits: Tensor, history: Sequence[int], penalty: float) -> Tensor:
    """Seen tokens' logits divided by the penalty, or multiplied where negative (Keskar et al. 2019, section 4.1)."""
    seen = torch.tensor(sorted(set(history)))
    score = logits[seen]
    return logits.index_put((seen,), torch.where(score > 0, score / penalty, score * penalty))
