"""One answer of a model, piece by piece, and what it took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fewbit.runtime.sampler import Sampler, Sampling
from fewbit.tokenizer import TextStream

if TYPE_CHECKING:
    from fewbit.runtime.engine import LanguageModel


@dataclass
class Stats:
    """What an answer took; filled while it is generated. Rates are tokens a second."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    finish_reason: Literal["", "stop", "length"] = ""

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens that were not cached, a second."""
        return (self.prompt_tokens - self.cached_tokens) / max(self.prompt_seconds, 1e-9)

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first, which the prompt's time pays for."""
        return max(self.new_tokens - 1, 0) / max(self.decode_seconds, 1e-9)


class Generation(Iterator[str]):
    """The pieces of one answer. A model holds one conversation: a newer answer ends an unfinished older one."""

    def __init__(
        self, model: LanguageModel, ids: list[int], max_tokens: int | None, sampling: Sampling, stop: Sequence[str]
    ) -> None:
        room = model.context - len(ids)
        self.stats = Stats(prompt_tokens=len(ids))
        self._pieces = self._run(model, ids, room if max_tokens is None else min(max_tokens, room), sampling, stop)

    def __next__(self) -> str:
        return next(self._pieces)

    def _run(
        self, model: LanguageModel, ids: list[int], budget: int, sampling: Sampling, stop: Sequence[str]
    ) -> Iterator[str]:
        stats, sampler, text = self.stats, Sampler(sampling), TextStream(model.tokenizer, stop)
        sequence, stats.cached_tokens = model.begin(self, ids)
        history = list(ids)
        clock = time.perf_counter()
        logits = model.prefill(sequence, ids[stats.cached_tokens :], self)
        for token in model.tokens(sequence, logits, sampler, history, budget, self):
            now = time.perf_counter()
            if not stats.new_tokens:
                stats.prompt_seconds = now - clock
            else:
                stats.decode_seconds += now - clock
            stats.new_tokens += 1
            if token in model.tokenizer.eos_ids:
                stats.finish_reason = "stop"
                break
            if piece := text.push(token):
                yield piece
            if text.stopped:
                stats.finish_reason = "stop"
                return
            clock = time.perf_counter()
        stats.finish_reason = stats.finish_reason or "length"
        if rest := text.flush():
            yield rest
