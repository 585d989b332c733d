"""One window's predictions beside another model's: KL divergence, top-1, loss, and the tokens that came off worst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from fewbit.tokenizer import Tokenizer

# rows of logits that are taken to float64 at once: a few megabytes, which stay in the processor's cache
ROWS = 8
WORST, CONTEXT_TOKENS = 20, 40


class Prediction:
    """Logits float32 [n, vocab] as log-probabilities; sums are float64, so that a KL of 1e-9 is seen as 1e-9."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.total = torch.cat([piece.double().logsumexp(-1) for piece in logits.split(ROWS)])

    def rows(self, start: int, stop: int) -> Tensor:
        """Log-probabilities float64 of the positions [start, stop)."""
        return self.logits[start:stop].double() - self.total[start:stop, None]

    def at(self, ids: Tensor) -> Tensor:
        """Log-probabilities float64 [n, k] of the tokens `ids` int64 [n, k]."""
        return self.logits.gather(1, ids).double() - self.total[:, None]

    def targets(self, ids: Tensor) -> Tensor:
        """Log-probabilities float64 [n] of the tokens int64 [n] that stood in the text."""
        return self.at(ids[:, None])[:, 0]

    @cached_property
    def best(self) -> Tensor:
        """The likeliest tokens, int64 [n]."""
        return self.logits.argmax(-1)

    def top(self, row: int, count: int) -> list[tuple[int, float]]:
        """The likeliest tokens of one position with their probabilities."""
        ids = self.logits[row].topk(min(count, self.logits.shape[1])).indices
        return list(zip(ids.tolist(), self.rows(row, row + 1)[0, ids].exp().tolist(), strict=True))

    def kl(self, other: Prediction) -> Tensor:
        """KL(self || other) in nats, float64 [n]."""
        found = []
        for start in range(0, len(self.logits), ROWS):
            p, q = (side.rows(start, start + ROWS) for side in (self, other))
            found.append((p.exp() * p.sub_(q)).sum(-1))
        # what rounding leaves of equal distributions may be -1e-16
        return torch.cat(found).clamp_min(0)


class Expected(Protocol):
    """What the reference predicts: a `Prediction`, or the compressed one that the cache kept."""

    @property
    def best(self) -> Tensor: ...

    def targets(self, ids: Tensor) -> Tensor: ...

    def top(self, row: int, count: int) -> list[tuple[int, float]]: ...

    def kl(self, other: Prediction) -> Tensor: ...


@dataclass(frozen=True)
class Scores:
    """Per-token figures of one candidate, float64 [tokens] each."""

    kl: Tensor
    agrees: Tensor
    loss: Tensor
    reference_loss: Tensor

    def unusable(self) -> int:
        """How many positions have a figure that is not finite."""
        return int((~(self.kl.isfinite() & self.loss.isfinite() & self.reference_loss.isfinite())).sum())


def score(reference: Expected, candidate: Prediction, targets: Tensor) -> Scores:
    """Compare at the positions that predict `targets` int64 [n]."""
    return Scores(
        kl=reference.kl(candidate),
        agrees=(reference.best == candidate.best).double(),
        loss=-candidate.targets(targets),
        reference_loss=-reference.targets(targets),
    )


def joined(scores: Sequence[Scores]) -> Scores:
    """The tokens of several windows."""
    parts = ("kl", "agrees", "loss", "reference_loss")
    return Scores(*(torch.cat([getattr(s, name) for s in scores]) for name in parts))


@dataclass(frozen=True)
class WorstToken:
    """A prediction that quantization changed much.

    domain, window, position   the text's name, the window (from 0) in it, the predicted token's place in the window
    before, actual             the text that precedes it (about 40 tokens), and the token that stood there
    expected, found            the three likeliest tokens and their probabilities: the reference's, the candidate's
    """

    domain: str
    window: int
    position: int
    kl: float
    before: str
    actual: str
    expected: tuple[tuple[str, float], ...]
    found: tuple[tuple[str, float], ...]


class Worst:
    """Keeps the WORST largest divergences of a candidate."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[WorstToken] = []

    def add(
        self, place: tuple[str, int], window: Tensor, first: int, kl: Tensor, sides: tuple[Expected, Prediction]
    ) -> None:
        """Look at one window int64 [w] whose tokens from `first` on were predicted with divergences `kl`.

        place   the text's name and the window's number in it
        """
        ids: list[int] = window.tolist()
        bound = self.tokens[-1].kl if len(self.tokens) == WORST else -1.0
        values, rows = kl.topk(min(WORST, len(kl)))
        for value, row in zip(values.tolist(), rows.tolist(), strict=True):
            if value <= bound:
                break
            at = first + row
            before = ids[max(0, at - CONTEXT_TOKENS) : at]
            expected, found = (self._named(before, side.top(row, 3)) for side in sides)
            actual = self._token(before, ids[at])
            text = self.tokenizer.decode(before, skip_special=False)
            self.tokens.append(WorstToken(*place, at, value, text, actual, expected, found))
        # stable: of equal divergences the earlier one stays first
        self.tokens.sort(key=lambda token: -token.kl)
        del self.tokens[WORST:]

    def _named(self, before: list[int], top: list[tuple[int, float]]) -> tuple[tuple[str, float], ...]:
        return tuple((self._token(before, token), p) for token, p in top)

    def _token(self, before: list[int], token: int) -> str:
        """A token's text behind its context, where decoders keep the leading space that they drop at a beginning."""
        start = self.tokenizer.decode(before, skip_special=False)
        whole = self.tokenizer.decode([*before, token], skip_special=False)
        alone = self.tokenizer.decode([token], skip_special=False)
        return whole.removeprefix(start) if whole.startswith(start) else alone
