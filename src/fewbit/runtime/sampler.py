"""Which token comes next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.errors import FewbitError

# candidates looked at before a full sort is tried: top-p rarely needs more
FIRST_LOOK = 1024
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
            return int(logits.argmax())
        values, ids = self._candidates(logits / s.temperature)
        chosen = torch.multinomial(values.softmax(0), 1, generator=self.random)
        return int(ids[chosen])

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The logits that pass the filters, largest first, and their ids."""
        s, size = self.sampling, len(logits)
        count = min(s.top_k or size, size)
        if s.top_p == 1.0 and s.min_p == 0.0:
            return _largest(logits, count)
        # top-p counts probability among the top-k
        values, ids = _largest(logits, count if s.top_k else min(FIRST_LOOK, size))
        total = values.logsumexp(0) if s.top_k else logits.logsumexp(0)
        kept = _passes(values, total, s)
        if kept == len(values) < count:
            values, ids = _largest(logits, count)
            kept = _passes(values, total, s)
        return values[:kept], ids[:kept]


def _largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    found = torch.topk(logits, count)
    return found.values, found.indices


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
