"""An export, run in the engine it is for and by fewbit itself: do both predict the same?

Two engines agree when, on fewbit's greedy tokens, each choice is the same or within 0.1 nat of the other's top, and
the mean KL divergence is at most 1e-4 (float32 against float32) or 0.01 (activations rounded on either side).
"""

from __future__ import annotations

import os
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

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea, there lived",
    "Q: If a train travels 60 miles in 45 minutes, how fast is it going?\nA:",
)
TOKENS = 32
EXACT_KL, ROUNDED_KL, GAP = 1e-4, 0.01, 0.1
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
    kl: float | None = None
    gap: float | None = None
    same: float | None = None
    limit: float | None = None
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
            self.kl is not None and self.gap is not None and self.limit is not None
            and self.kl <= self.limit and self.gap <= GAP and not self.tokens_differ
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"agrees": self.agrees}


@dataclass(frozen=True)
class Reference:
    """fewbit's own run: token sequences, where the answers start, and its log-probabilities for them."""

    sequences: list[list[int]]
    starts: list[int]
    logprobs: Tensor


def verify(
    path: Path,
    layout: str,
    pythons: Sequence[str] = (),
    tell: Callable[[str], None] | None = None,
) -> list[Check]:
    """Every engine of a layout, on the export at `path`; `pythons` are interpreters that may have them."""
    say = tell or (lambda text: None)
    say("running the export with fewbit")
    model = load(path, exact=True, device="cpu")
    rounded: Reference | None = None
    exact = reference(model)
    texts = list(TEXTS)
    expected = [model.tokenizer.encode(text, bos=False) for text in texts]
    found = []
    for engine in ENGINES:
        if layout not in engine.layouts:
            continue
        python = engines.find(engine, pythons)
        if python is None:
            found.append(Check(engine.name, install=engine.install))
            continue
        say(f"running the export with {engine.name}")
        job = {
            "model": str(path.absolute()), "sequences": exact.sequences, "starts": exact.starts, "texts": texts,
            "vocabulary": exact.logprobs.shape[1], "threads": len(os.sched_getaffinity(0)), "layout": layout,
        }  # fmt: skip
        try:
            answer = engines.run(engine, python, job)
        except FewbitError as e:
            found.append(Check(engine.name, error=e.facts))
            continue
        check = _compared(engine, exact, answer, texts, expected)
        found.append(check)
    del rounded
    return found


def reference(model: LanguageModel) -> Reference:
    """Greedy answers of `TOKENS` tokens, whatever ends them, and the predictions they were chosen by."""
    sequences, starts, rows = [], [], []
    for prompt in PROMPTS:
        ids = model.tokenizer.encode(prompt)
        starts.append(len(ids))
        sequence = CachedSequence()
        row = model.prefill(sequence, ids)
        for _ in range(TOKENS):
            rows.append(row.log_softmax(-1))
            ids.append(int(row.argmax()))
            row = model.forward([(sequence, ids[-1:])])[0]
        model.allocator.truncate(sequence, 0)
        sequences.append(ids)
    return Reference(sequences, starts, torch.stack(rows))


def compare(ours: Tensor, theirs: Tensor) -> tuple[float, float, float]:
    """Log-probabilities [tokens, vocabulary] of two engines -> mean KL(ours || theirs), the largest gap of a choice below
    the other's top in nats, the share of equal choices.
    """
    kl = torch.where(ours > -torch.inf, ours.exp() * (ours - theirs), 0.0).sum(-1)
    a, b = ours.argmax(-1, keepdim=True), theirs.argmax(-1, keepdim=True)
    gaps = torch.cat((ours.gather(1, a) - ours.gather(1, b), theirs.gather(1, b) - theirs.gather(1, a)))
    return float(kl.mean()), float(gaps.max()), float((a == b).float().mean())


def _compared(
    engine: Engine, ours: Reference, answer: engines.Answer, texts: list[str], expected: list[list[int]]
) -> Check:
    kl, gap, same = compare(ours.logprobs, answer.logprobs)
    differ = []
    if answer.tokens is not None:
        differ = [text for text, mine, other in zip(texts, expected, answer.tokens, strict=True) if mine != other]
    limit = EXACT_KL if answer.exact else ROUNDED_KL
    return Check(engine.name, answer.version, kl, gap, same, limit, differ)
