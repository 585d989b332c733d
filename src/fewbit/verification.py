"""An export, run in the engine it is for and by fewbit itself: do both predict the same?

Two engines agree when, on fewbit's greedy tokens, each choice is the same or within 0.1 nat of the other's top, and
the mean KL divergence is at most 1e-4 (float32 against float32) or 0.01 (activations rounded on either side). fewbit's
side is its float32 run. Of an engine whose activations have 8 bits a choice may lie as far off as fewbit's own 8-bit
kernels put it, by half as much again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit import engines
from fewbit.engines import ENGINES, Engine
from fewbit.errors import FewbitError
from fewbit.runtime.cache import Sequence as CachedSequence
from fewbit.runtime.engine import LanguageModel, load
from fewbit.tokenizer import Tokenizer

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea, there lived",
    "Q: If a train travels 60 miles in 45 minutes, how fast is it going?\nA:",
)
TOKENS, CONTEXT = 32, 128
EXACT_KL, ROUNDED_KL, GAP = 1e-4, 0.01, 0.1
# times what fewbit's own 8-bit activations do, for an engine that has such
ALLOWANCE = 1.5
# texts an engine with a tokenizer of its own must cut into the same tokens
TEXTS = (
    *PROMPTS,
    "In 1984 there were 365 days; 3.14159 and 1,000,000.\n\n\tDon't I'LL naïve café — “quotes”",
    "漢字かな 한국어 العربية हिन्दी 😀👩‍👩‍👧 ½ ² x=[i**2 for i in range(10)]  # ...\r\n   end",
)


@dataclass(frozen=True)
class Check:
    """One engine's result; `error` where it could not run, `install` where it is not there."""

    engine: str
    version: str = ""
    activation_bits: int | None = None
    kl: float | None = None
    gap: float | None = None
    same: float | None = None
    limit: float | None = None
    gap_limit: float | None = None
    tokens_differ: list[str] = field(default_factory=list)
    error: str | None = None
    install: str | None = None

    @property
    def ran(self) -> bool:
        """Whether the engine was there and gave something."""
        return self.kl is not None

    @property
    def agrees(self) -> bool:
        """By the rule."""
        return (
            self.kl is not None and self.gap is not None and self.limit is not None and self.gap_limit is not None
            and self.kl <= self.limit and self.gap <= self.gap_limit and not self.tokens_differ
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"agrees": self.agrees}


@dataclass(frozen=True)
class Verification:
    """All engines' results; `source_kl` is the export's mean KL divergence from its source on the same tokens."""

    checks: list[Check]
    tokens: int
    source_kl: float | None = None

    @property
    def failed(self) -> list[Check]:
        """Those that were there and do not agree."""
        return [c for c in self.checks if c.install is None and not c.agrees]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"checks": [c.to_dict() for c in self.checks], "tokens": self.tokens, "source_kl": self.source_kl}


@dataclass(frozen=True)
class Reference:
    """fewbit's own runs: token sequences, where the answers start, and its log-probabilities for them.

    logprobs of the float32 run, `rounded` of the usual kernels, whose activations have 8 bits.
    """

    sequences: list[list[int]]
    starts: list[int]
    logprobs: Tensor
    rounded: Tensor


def verify(
    path: Path,
    layout: str,
    pythons: Sequence[str] = (),
    tell: Callable[[str], None] | None = None,
    source: Path | None = None,
) -> Verification:
    """Every engine of a layout, on the export at `path`; `pythons` are interpreters that may have them.

    `source` is what was exported: what that predicts along the same tokens is compared too.
    """
    say = tell or (lambda text: None)
    say("running the export with fewbit")
    ours, tokenizer = reference(path)
    expected = [tokenizer.encode(text, bos=False) for text in TEXTS]
    job = {
        "model": str(path.absolute()), "sequences": ours.sequences, "starts": ours.starts, "texts": list(TEXTS),
        "vocabulary": ours.logprobs.shape[1], "threads": torch.get_num_threads(), "layout": layout,
    }  # fmt: skip
    found = []
    for engine in ENGINES:
        if layout not in engine.layouts:
            continue
        python = engines.find(engine, pythons)
        if python is None:
            found.append(Check(engine.name, install=engine.install))
            continue
        say(f"running the export with {engine.name}")
        try:
            found.append(_compared(engine, ours, engines.run(engine, python, job), expected))
        except FewbitError as e:
            found.append(Check(engine.name, error=e.facts))
    kl = None
    if source is not None:
        say("running the source with fewbit")
        before = _along(load(source, exact=True, device="cpu", context=CONTEXT), ours.sequences, ours.starts)
        kl = compare(before, ours.logprobs)[0]
    return Verification(found, len(ours.logprobs), kl)


def reference(path: Path) -> tuple[Reference, Tokenizer]:
    """Greedy answers of `TOKENS` tokens, whatever ends them, and what fewbit predicts along them."""
    model = load(path, device="cpu", context=CONTEXT)
    prompts = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    answers = [_greedy(model, ids) for ids in prompts]
    sequences = [ids for ids, _ in answers]
    starts = [len(ids) for ids in prompts]
    logprobs = _along(load(path, exact=True, device="cpu", context=CONTEXT), sequences, starts)
    rounded = torch.cat([found for _, found in answers])
    return Reference(sequences, starts, logprobs, rounded), model.tokenizer


def _along(model: LanguageModel, sequences: list[list[int]], starts: list[int]) -> Tensor:
    """Log-probabilities [tokens, vocabulary] of what follows from each start on."""
    rows = []
    for ids, start in zip(sequences, starts, strict=True):
        cached = CachedSequence()
        rows.append(model.forward([(cached, ids[:-1])], wanted=list(range(start - 1, len(ids) - 1))))
        model.allocator.truncate(cached, 0)
    return torch.cat(rows).log_softmax(-1)


def _greedy(model: LanguageModel, prompt: list[int]) -> tuple[list[int], Tensor]:
    """The prompt with its answer, and the log-probabilities [TOKENS, vocabulary] it was chosen by."""
    ids, sequence = list(prompt), CachedSequence()
    rows = [model.prefill(sequence, ids)]
    for _ in range(TOKENS - 1):
        ids.append(int(rows[-1].argmax()))
        rows.append(model.prefill(sequence, ids[-1:]))
    model.allocator.truncate(sequence, 0)
    return [*ids, int(rows[-1].argmax())], torch.stack(rows).log_softmax(-1)


def compare(ours: Tensor, theirs: Tensor) -> tuple[float, float, float]:
    """Log-probabilities [tokens, vocabulary] of two engines -> mean KL(ours || theirs), how far their choices lie below
    our top in nats at most, the share of equal choices.
    """
    kl = torch.where(ours > -torch.inf, ours.exp() * (ours - theirs), 0.0).sum(-1)
    best, choice = ours.amax(-1), theirs.argmax(-1, keepdim=True)
    gaps = best - ours.gather(1, choice).squeeze(1)
    return float(kl.mean()), float(gaps.max()), float((ours.argmax(-1, keepdim=True) == choice).float().mean())


def _compared(engine: Engine, ours: Reference, answer: engines.Answer, expected: list[list[int]]) -> Check:
    kl, gap, same = compare(ours.logprobs, answer.logprobs)
    differ = []
    if answer.tokens is not None:
        differ = [text for text, mine, other in zip(TEXTS, expected, answer.tokens, strict=True) if mine != other]
    limit, gap_limit = EXACT_KL if answer.activation_bits == 32 else ROUNDED_KL, GAP
    if answer.activation_bits == 8:
        # near ties turn with activations in 8 bits, whoever rounds them: fewbit's own kernels tell by how much
        gap_limit = max(GAP, ALLOWANCE * compare(ours.logprobs, ours.rounded)[1])
    return Check(engine.name, answer.version, answer.activation_bits, kl, gap, same, limit, gap_limit, differ)
