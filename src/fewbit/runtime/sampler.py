"""Which token comes next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fewbit.errors import FewbitError
from fewbit.kernels import Choice, chooser

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
# colder than this, only the likeliest token has any probability left in float32
GREEDY_BELOW = 1e-4


# top-k's first look: the largest values of the columns of a table with so many rows
TABLE_ROWS = 64
# top-p's: tokens of at least this probability, then of at least that
LIKELY_SHARES = (1e-3, 1e-4, 1e-5)


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
        # which tokens [vocab] the repetition penalty has seen, on the device that chooses, after so many of a history
        self._seen: Tensor | None = None
        self._told = -1

    def __call__(self, logits: Tensor, history: Sequence[int]) -> int:
        """logits float32 [vocab]; `history` are the tokens the repetition penalty looks at.

        Logits on a card are chosen from there, with other random numbers' places than here; -1 where one is not finite.
        """
        s = self.sampling
        # any history may be given here
        self._told = -1
        if choice := self.start(logits, history):
            return choice.tokens()[0]
        logits = logits.cpu()
        if s.repetition_penalty != 1.0 and history:
            logits = _penalized(logits, history, s.repetition_penalty)
        if s.temperature < GREEDY_BELOW:
            return greedy(logits)
        values, ids = candidates(np.divide(logits.numpy(), s.temperature, dtype=np.float32), s)
        return int(ids[self._draw(np.exp(values - values.max()))])

    def start(self, logits: Tensor, history: Sequence[int]) -> Choice | None:
        """Begin to choose from logits [vocab] where they lie; None where nothing can choose there.

        `history` is as it was at the last call with the token chosen there behind it, which need not have been looked
        at: what the repetition penalty wants to know stays on the device. After any other history it is told anew.
        """
        choose = chooser(logits.device)
        if choose is None:
            return None
        s = self.sampling
        penalized = s.repetition_penalty != 1.0
        if penalized:
            logits = self._penalized_there(logits, history)
        t = s.temperature if s.temperature >= GREEDY_BELOW else 0.0
        point = float(torch.rand((), dtype=torch.float64, generator=self.random)) if t else 0.0
        choice = choose(logits[None], t, s.top_k, s.top_p, s.min_p, [point])
        if penalized and self._seen is not None:
            self._seen.index_fill_(0, choice.ids, True)
        return choice

    def _penalized_there(self, logits: Tensor, history: Sequence[int]) -> Tensor:
        if self._seen is None or len(history) != self._told + 1:
            self._seen = torch.zeros(len(logits), dtype=torch.bool)
            self._seen[list(history)] = True
            self._seen = self._seen.to(logits.device)
        self._told = len(history)
        return torch.where(self._seen, _discouraged(logits, self.sampling.repetition_penalty), logits)

    def _draw(self, p: Floats) -> int:
        """An index with probabilities in proportion to p: where a uniform number falls among their running sums."""
        sums = torch.from_numpy(p).cumsum(0, dtype=torch.float64)
        point = torch.rand((), dtype=torch.float64, generator=self.random) * sums[-1]
        return min(int(torch.searchsorted(sums, point, right=True)), len(p) - 1)


# Over a whole vocabulary numpy takes a tenth of torch's time, and it wakes no threads: torch's would spin for a while
# on the cores that the next step's products need.


def greedy(logits: Tensor) -> int:
    """The likeliest token of logits float32 [vocab]."""
    if choose := chooser(logits.device):
        return choose(logits[None], 0.0, 0, 1.0, 0.0, [0.0]).tokens()[0]
    return int(logits.cpu().numpy().argmax())


def candidates(x: Floats, s: Sampling) -> tuple[Floats, Ids]:
    """The logits of x [vocab] that pass top-k, top-p and min-p, largest first (of equal ones the lower id); their ids.

    What certainly fails is left out before anything is sorted. Without a filter, all in the order of their ids.
    """
    k = s.top_k if s.top_k < len(x) else 0
    if not k and s.top_p == 1.0 and s.min_p == 0.0:
        return x, np.arange(len(x))
    floor = _top_k_floor(x, k) if k else max(_top_p_floor(x, s.top_p), _min_p_floor(x, s.min_p))
    ids = np.flatnonzero(x >= np.float32(floor))
    ids = ids[np.argsort(-x[ids], kind="stable")][: k or len(ids)]
    if s.top_p < 1.0 or s.min_p:
        # top-p counts probability among the top-k
        ids = ids[: _passes(x[ids], _log_sum_exp(x[ids] if k else x), s)]
    return x[ids], ids


def _top_k_floor(x: Floats, k: int) -> float:
    """A value that at least k of x reach, and not many more: k columns of a table of x have their largest there."""
    columns = len(x) // TABLE_ROWS
    if k > columns:
        return float(np.partition(x, -k)[-k])
    largest = x[: TABLE_ROWS * columns].reshape(TABLE_ROWS, columns).max(axis=0)
    return float(np.partition(largest, -k)[-k])


def _top_p_floor(x: Floats, top_p: float) -> float:
    """A value such that the tokens which reach it have a probability of more than top_p together."""
    if top_p == 1.0:
        return -math.inf
    total = _log_sum_exp(x)
    for share in LIKELY_SHARES:
        floor = total + math.log(share)
        # well above, so that rounding does not count
        if np.exp(x[x >= np.float32(floor)] - np.float32(total)).sum() > top_p + 1e-4:
            return floor
    # all tokens below this share together have half of what top-p leaves out
    return total + math.log((1 - top_p) / (2 * len(x)))


def _min_p_floor(x: Floats, min_p: float) -> float:
    return float(x.max()) + math.log(min_p) - 1e-3 if min_p else -math.inf


def _log_sum_exp(x: Floats) -> float:
    top = x.max()
    return float(top) + math.log(np.exp(x - top).sum(dtype=np.float64))


def _passes(values: Floats, total: float, s: Sampling) -> int:
    """How many of the sorted values pass top-p and min-p; at least one."""
    p = np.exp(values.astype(np.float64) - total)
    before = p.cumsum() - p
    inside = (before < s.top_p) | (s.top_p == 1.0)
    return max(1, int((inside & (p >= s.min_p * p[0])).sum()))


def _penalized(logits: Tensor, history: Sequence[int], penalty: float) -> Tensor:
    seen = torch.tensor(sorted(set(history)))
    return logits.index_put((seen,), _discouraged(logits[seen], penalty))


def _discouraged(logits: Tensor, penalty: float) -> Tensor:
    """Logits divided by the penalty, or multiplied where negative (Keskar et al. 2019, section 4.1)."""
    return torch.where(logits > 0, logits / penalty, logits * penalty)
