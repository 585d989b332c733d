"""An export, run in the engine it is for and by fewbit itself: do both predict the same?

Two engines agree when, on fewbit's greedy tokens, each choice is the same or within 0.1 nat of the other's top, and
the mean KL divergence is at most 1e-4 (float32 against float32) or 0.01 (activations rounded on either side). fewbit's
side is its float32 run. Activations of 8 bits turn near ties of a small model whoever rounds them, so an engine that
has such is asked twice: with the export, whose mean KL counts, and with a twin of it whose weights have the same
values in float32, of which the whole rule is asked.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit import engines
from fewbit.checkpoint._writer import Planned
from fewbit.engines import ENGINES, Engine
from fewbit.errors import FewbitError
from fewbit.exports import _limits, export
from fewbit.methods import silent
from fewbit.runtime.cache import Sequence as CachedSequence
from fewbit.runtime.engine import LanguageModel, load
from fewbit.source import describe_source, open_source
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
# the float32 twin of an export is made where it has at most this many bytes
TWIN_BYTES = 4 << 30
# texts an engine with a tokenizer of its own must cut into the same tokens
TEXTS = (
    *PROMPTS,
    "In 1984 there were 365 days; 3.14159 and 1,000,000.\n\n\tDon't I'LL naïve café — “quotes”",
    "漢字かな 한국어 العربية हिन्दी 😀👩‍👩‍👧 ½ ² x=[i**2 for i in range(10)]  # ...\r\n   end",
)


@dataclass(frozen=True)
class Check:
    """One engine's result; `error` where it could not run, `install` where it is not there, `refused` where it is known
    not to load such an export.
    """

    engine: str
    version: str = ""
    activation_bits: int | None = None
    kl: float | None = None
    gap: float | None = None
    same: float | None = None
    limit: float | None = None
    # of the float32 twin, where there is one: it is held to the rule
    twin_kl: float | None = None
    twin_gap: float | None = None
    tokens_differ: list[str] = field(default_factory=list)
    error: str | None = None
    install: str | None = None
    refused: str | None = None

    @property
    def ran(self) -> bool:
        """Whether the engine was there and gave something."""
        return self.kl is not None

    @property
    def agrees(self) -> bool:
        """By the rule."""
        if self.kl is None or self.gap is None or self.limit is None or self.tokens_differ:
            return False
        if self.twin_kl is None or self.twin_gap is None:
            return self.kl <= self.limit and self.gap <= GAP
        return self.kl <= self.limit and self.twin_kl <= EXACT_KL and self.twin_gap <= GAP

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
        return [c for c in self.checks if c.install is None and c.refused is None and not c.agrees]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"checks": [c.to_dict() for c in self.checks], "tokens": self.tokens, "source_kl": self.source_kl}


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
    source: Path | None = None,
) -> Verification:
    """Every engine of a layout, on the export at `path`; `pythons` are interpreters that may have them.

    `source` is what was exported: what that predicts along the same tokens is compared too.
    """
    say = tell or silent
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
        if (reason := _refusal(engine, layout, path)) is not None:
            found.append(Check(engine.name, refused=reason))
            continue
        say(f"running the export with {engine.name}")
        try:
            found.append(_asked(engine, python, job, ours, expected, say))
        except FewbitError as e:
            found.append(Check(engine.name, error=e.facts))
    kl = None
    if source is not None:
        say("running the source with fewbit")
        before = _along(load(source, exact=True, device="cpu", context=CONTEXT), ours.sequences, ours.starts)
        kl = compare(before, ours.logprobs)[0]
    return Verification(found, len(ours.logprobs), kl)


def _refusal(engine: Engine, layout: str, path: Path) -> str | None:
    """Why the engine is known not to load the export; None where it should."""
    if engine.limits is None:
        return None
    source = open_source(path)
    linears = [Planned(w.name, source.spec(w.name), w.shape) for w in source.weights if w.role == "linear"]
    return _limits.refusal(layout, engine.limits, linears)


def reference(path: Path) -> tuple[Reference, Tokenizer]:
    """Greedy answers of `TOKENS` tokens, whatever ends them, and what the float32 run predicts along them."""
    model = load(path, device="cpu", context=CONTEXT)
    prompts = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    sequences = [_greedy(model, ids) for ids in prompts]
    starts = [len(ids) for ids in prompts]
    logprobs = _along(load(path, exact=True, device="cpu", context=CONTEXT), sequences, starts)
    return Reference(sequences, starts, logprobs), model.tokenizer


def _along(model: LanguageModel, sequences: list[list[int]], starts: list[int]) -> Tensor:
    """Log-probabilities [tokens, vocabulary] of what follows from each start on."""
    rows = []
    for ids, start in zip(sequences, starts, strict=True):
        cached = CachedSequence()
        rows.append(model.forward([(cached, ids[:-1])], wanted=list(range(start - 1, len(ids) - 1))))
        model.allocator.truncate(cached, 0)
    return torch.cat(rows).log_softmax(-1)


def _greedy(model: LanguageModel, prompt: list[int]) -> list[int]:
    """The prompt with its answer."""
    ids, sequence = list(prompt), CachedSequence()
    row = model.prefill(sequence, ids)
    for _ in range(TOKENS - 1):
        ids.append(int(row.argmax()))
        row = model.prefill(sequence, ids[-1:])
    model.allocator.truncate(sequence, 0)
    return [*ids, int(row.argmax())]


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
    limit = EXACT_KL if answer.activation_bits == 32 else ROUNDED_KL
    return Check(engine.name, answer.version, answer.activation_bits, kl, gap, same, limit, tokens_differ=differ)


def _asked(
    engine: Engine,
    python: str,
    job: dict[str, Any],
    ours: Reference,
    expected: list[list[int]],
    say: Callable[[str], None],
) -> Check:
    """What an engine makes of the export and, where it rounds activations to 8 bits, of its weights in float32."""
    check = _compared(engine, ours, engines.run(engine, python, job), expected)
    path = Path(job["model"])
    if check.activation_bits != 8 or 4 * describe_source(open_source(path)).parameters > TWIN_BYTES:
        return check
    say(f"running its float32 twin with {engine.name}")
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=path.parent) as work:
        twin = Path(work) / "twin.gguf"
        export(path, twin, to="gguf", type="f32")
        kl, gap, _ = compare(ours.logprobs, engines.run(engine, python, job | {"model": str(twin)}).logprobs)
    return replace(check, twin_kl=kl, twin_gap=gap)
