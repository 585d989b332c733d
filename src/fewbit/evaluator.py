"""How much was lost: a candidate's predictions beside the full-precision model's on the same text.

The protocol is that of llama.cpp's perplexity tool, so that figures compare: consecutive 512-token windows, each run
alone, predictions at positions 256 to 510 scored. KL(reference || candidate) is in nats a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.calibration import read_text, windows
from fewbit.errors import FewbitError
from fewbit.runtime.cache import Sequence as CachedSequence
from fewbit.runtime.engine import LanguageModel, load, set_threads
from fewbit.source import describe_source

Progress = Callable[[int, int, str], None]
WINDOW = 512
FIRST_SCORED = WINDOW // 2


@dataclass(frozen=True)
class Quality:
    """A candidate beside the reference. Errors are standard errors of the mean over tokens; KL in nats."""

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

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass
class Scores:
    """Per-token figures of one candidate, float32 [tokens] each."""

    kl: Tensor
    agrees: Tensor
    loss: Tensor
    reference_loss: Tensor


def score(reference: Tensor, candidate: Tensor, targets: Tensor) -> Scores:
    """Compare logits float32 [n, vocab] at the positions that predict `targets` int64 [n]."""
    p, q = reference.log_softmax(-1), candidate.log_softmax(-1)
    at = targets[:, None]
    return Scores(
        kl=(p.exp() * (p - q)).sum(-1),
        agrees=(p.argmax(-1) == q.argmax(-1)).float(),
        loss=-q.gather(1, at).squeeze(1),
        reference_loss=-p.gather(1, at).squeeze(1),
    )


def window_logits(model: LanguageModel, window: Tensor) -> Tensor:
    """One window int64 [512] run alone -> logits float32 [255, vocab] of positions 256 to 510."""
    sequence = CachedSequence()
    try:
        return model.forward([(sequence, window.tolist())], wanted=list(range(FIRST_SCORED, len(window) - 1)))
    finally:
        model.allocator.truncate(sequence, 0)


def evaluate(
    models: str | Path | Sequence[str | Path],
    against: str | Path,
    text: str | Path,
    *,
    windows: int = 64,
    exact: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Quality]:
    """Measure each of `models` against the full-precision model `against`, run in float32, on the text file `text`.

    exact  runs the quantized weights with float activations; otherwise the default kernels run
    Raises FewbitError where the text is too short or the models' vocabularies differ.
    """
    if threads is not None:
        set_threads(threads)
    candidates = [models] if isinstance(models, str | Path) else list(models)
    reference = load(against, exact=True, context=None)
    tokens = _windows(reference, Path(text), windows)
    found = []
    loaded = [load(model, exact=exact) for model in candidates]
    for model in loaded:
        _check_context(model)
        if model.source.args.vocab_size != reference.source.args.vocab_size:
            raise FewbitError(
                f"{model.name} and {reference.name} have different vocabularies.",
                f"{model.source.args.vocab_size:,} and {reference.source.args.vocab_size:,} tokens.",
                "Compare a model with the one it was made from.",
            )
    scores: list[list[Scores]] = [[] for _ in loaded]
    for i, window in enumerate(tokens):
        expected = window_logits(reference, window)
        for j, (model, kept) in enumerate(zip(loaded, scores, strict=True)):
            kept.append(score(expected, window_logits(model, window), window[FIRST_SCORED + 1 :]))
            if progress:
                progress(i * len(loaded) + j + 1, len(tokens) * len(loaded), f"window {i + 1} of {len(tokens)}")
    for model, kept in zip(loaded, scores, strict=True):
        found.append(_summary(model, kept))
    return found


def _windows(reference: LanguageModel, text: Path, most: int) -> Tensor:
    if most < 1:
        raise FewbitError("No window to score.", f"Asked for {most}.", "Give --windows 1 or more.")
    _check_context(reference)
    return windows(read_text(text), reference.tokenizer, WINDOW, most)


def _check_context(model: LanguageModel) -> None:
    if model.context < WINDOW:
        raise FewbitError(
            f"{model.name} is too small to measure.",
            f"Its context is {model.context}; a window takes {WINDOW} tokens.",
            "Use a model with a longer context.",
        )


def _summary(model: LanguageModel, scores: list[Scores]) -> Quality:
    kl, agrees, loss, expected = (
        torch.cat([getattr(s, name) for s in scores]).double() for name in ("kl", "agrees", "loss", "reference_loss")
    )
    size = describe_source(model.source)
    perplexity, reference = loss.mean().exp(), expected.mean().exp()
    return Quality(
        model=model.name,
        mean_kl=float(kl.mean()),
        mean_kl_error=_error(kl),
        median_kl=float(kl.quantile(0.5)),
        p99_kl=float(kl.quantile(0.99)),
        top1=float(agrees.mean()),
        top1_error=_error(agrees),
        perplexity=float(perplexity),
        perplexity_error=float(perplexity) * _error(loss),
        reference_perplexity=float(reference),
        reference_perplexity_error=float(reference) * _error(expected),
        tokens=len(kl),
        weight_bytes=size.weight_bytes,
        bits_per_weight=size.bits_per_weight,
        exact=model.exact,
    )


def _error(x: Tensor) -> float:
    """Standard error of the mean; 0 for a single value."""
    return float(x.std() / len(x) ** 0.5) if len(x) > 1 else 0.0
