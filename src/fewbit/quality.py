"""The figures of a candidate beside the reference, and their errors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from fewbit.scoring import Scores, WorstToken


@dataclass(frozen=True)
class Paired:
    """A candidate's mean KL minus the first one's on the same tokens, with that difference's standard error.

    verdict   "lower" or "higher" where the difference is more than two errors, else "not distinguishable"
    """

    difference: float
    error: float
    verdict: str


@dataclass(frozen=True)
class DomainQuality:
    """The figures of one text alone; units as in `Quality`."""

    name: str
    mean_kl: float
    mean_kl_error: float
    median_kl: float
    p99_kl: float
    top1: float
    top1_error: float
    perplexity: float
    perplexity_error: float
    reference_perplexity: float
    reference_perplexity_error: float
    tokens: int
    paired: Paired | None = None


@dataclass(frozen=True)
class Quality:
    """A candidate beside the reference. Errors are standard errors of the mean over windows (over the tokens of a
    single one); KL in nats.

    domains       the same figures for each text
    worst         the 20 predictions of largest KL, largest first
    cache_error   what the cached reference may add to or take from the mean KL: the difference of the means on one
                  window that was run again, and two standard errors of it over all cached windows, as a root of
                  squares; 0 where no cached reference was used
    paired        beside the first candidate of the same call; None for the first
    device        what ran it: `cpu`, or the card's name
    device_note   why the card was not used, where there is one
    """

    model: str
    mean_kl: float
    mean_kl_error: float
    median_kl: float
    p99_kl: float
    top1: float
    top1_error: float
    perplexity: float
    perplexity_error: float
    reference_perplexity: float
    reference_perplexity_error: float
    tokens: int
    weight_bytes: int
    bits_per_weight: float
    exact: bool
    domains: tuple[DomainQuality, ...] = ()
    worst: tuple[WorstToken, ...] = ()
    cache_error: float = 0.0
    paired: Paired | None = None
    device: str = "cpu"
    device_note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def figures(scores: Scores, window: int) -> dict[str, Any]:
    """The fields that `Quality` and `DomainQuality` share."""
    perplexity, reference = float(scores.loss.mean().exp()), float(scores.reference_loss.mean().exp())
    return {
        "mean_kl": float(scores.kl.mean()),
        "mean_kl_error": standard_error(scores.kl, window),
        "median_kl": float(scores.kl.quantile(0.5)),
        "p99_kl": float(scores.kl.quantile(0.99)),
        "top1": float(scores.agrees.mean()),
        "top1_error": standard_error(scores.agrees, window),
        "perplexity": perplexity,
        "perplexity_error": perplexity * standard_error(scores.loss, window),
        "reference_perplexity": reference,
        "reference_perplexity_error": reference * standard_error(scores.reference_loss, window),
        "tokens": len(scores.kl),
    }


def paired(difference: Tensor, window: int) -> Paired:
    """From the difference of two candidates' KL at each token, float64 [n]."""
    mean, error = float(difference.mean()), standard_error(difference, window)
    verdict = "not distinguishable"
    if abs(mean) > 2 * error:
        verdict = "lower" if mean < 0 else "higher"
    return Paired(mean, error, verdict)


def standard_error(x: Tensor, window: int) -> float:
    """Of the mean of x float64 [G * window], one after the other: sqrt(G / (G - 1) * sum_g (sum_i x_gi - mean)^2) / n.

    Tokens of one window are alike, so windows are what is taken as independent (cluster-robust standard error of a
    mean). Of a single window, the error over its tokens; 0 for a single value.
    """
    groups = len(x) // window
    if groups < 2:
        return float(x.std() / len(x) ** 0.5) if len(x) > 1 else 0.0
    sums = (x - x.mean()).reshape(groups, window).sum(-1)
    return float((groups / (groups - 1) * sums.square().sum()).sqrt()) / len(x)
