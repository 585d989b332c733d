"""Calibration text that the model writes itself, so that it is of the kind the model was trained on.

Liu et al. 2023 (LLM-QAT, section 3.1) begin each text with a random token; Xu et al. 2024 (Magpie, section 2) let a
chat model write the user's question too, by giving it no more than what stands before one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fewbit.calibration import rendered, separator
from fewbit.errors import FewbitError
from fewbit.runtime.cache import PAGE_SIZE
from fewbit.runtime.cache import Sequence as CachedSequence
from fewbit.runtime.engine import DEFAULT_CONTEXT, LanguageModel, Progress, load
from fewbit.tokenizer import Tokenizer

# the first tokens choose the subject and are drawn as the model has it; what follows stays closer to the likely
FIRST_TOKENS: Final = 8
FIRST_TEMPERATURE: Final = 1.0
TEMPERATURE: Final = 0.8
TOP_K: Final = 256
# a question that has not ended by then is ended for the model
LONGEST_QUESTION: Final = 96
# windows that are written side by side, and the most tokens of each that run in one step
TOGETHER: Final = 32
CHUNK: Final = 32
# draws of a first token before any will do
ATTEMPTS: Final = 1000
# no model writes these by itself
QUESTION, ANSWER = "<<1: question>>", "<<2: answer>>"


def write(
    model: str | Path, count: int, length: int, seed: int = 0, progress: Progress | None = None
) -> list[list[int]]:
    """`count` lists of `length` token ids, sampled from the model; the same seed gives the same ids.

    Every second list of a model with a chat template holds conversations, the others plain texts. The model is in
    memory while it writes. Raises FewbitError where it can't be loaded, its template fails, its output is not a
    number, or a list is longer than its context.
    """
    if count < 1 or length < 1:
        raise FewbitError(
            "The model can't write so little.",
            f"Asked for {count} texts of {length} tokens.",
            "Ask for at least one text of at least one token.",
        )
    loaded = load(model, context=length if length > DEFAULT_CONTEXT else None, device="cpu", progress=progress)
    if length > loaded.context:
        raise FewbitError(
            "The calibration windows are longer than the model's context.",
            f"A window has {length:,} tokens; {loaded.name} was made for at most {loaded.context:,}.",
            f"Choose windows of at most {loaded.context:,} tokens.",
        )
    return _write_all(loaded, count, length, seed, progress)


@dataclass(frozen=True)
class _Frame:
    """What is put around the model's own words: tokens between texts, and those around a question and its answer."""

    between: list[int]
    opening: list[int]
    turn: list[int]
    closing: list[int]
    ends: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> _Frame:
        between = separator(tokenizer)
        ends = tokenizer.eos_ids | (set(between) if len(between) == 1 else set())
        if tokenizer.chat_template is None:
            return cls(between, [], [], [], ends)
        messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
        first, _, rest = rendered(messages, tokenizer).partition(QUESTION)
        turn, _, last = rest.partition(ANSWER)
        opening, turn_ids, closing = (tokenizer.encode(part, bos=False) for part in (first, turn, last))
        return cls(between, opening, turn_ids, closing, ends)

    @property
    def chats(self) -> bool:
        """Whether there is a turn to take: a template may leave out what it was given."""
        return bool(self.opening and self.turn)


@dataclass
class _Window:
    """A list of ids that is being written, the model's cache of it, and where in a text it has come to."""

    chat: bool
    random: torch.Generator
    ids: list[int] = field(default_factory=list)
    cached: CachedSequence = field(default_factory=CachedSequence)
    # tokens of the present text, or turn, that the model wrote
    own: int = 0
    asking: bool = False

    def open(self, frame: _Frame, tokenizer: Tokenizer) -> None:
        """Begin a text: before a question, or with a random token."""
        self.own, self.asking = 0, self.chat
        self.ids += frame.opening if self.chat else [_first_token(tokenizer, self.random)]

    def add(self, token: int, frame: _Frame, tokenizer: Tokenizer) -> None:
        """Take the model's next token; where it ends a turn or a text, go on with the next."""
        ended = token in frame.ends
        if not ended:
            self.ids.append(token)
            self.own += 1
        if self.asking and (ended or self.own == LONGEST_QUESTION):
            self.own, self.asking = 0, False
            self.ids += frame.turn
        elif ended:
            self.ids += frame.closing if self.chat else []
            self.ids += frame.between
            self.open(frame, tokenizer)


def _write_all(model: LanguageModel, count: int, length: int, seed: int, progress: Progress | None) -> list[list[int]]:
    tokenizer, frame = model.tokenizer, _Frame.of(model.tokenizer)
    together = min(TOGETHER, model.allocator.pages // -(-length // PAGE_SIZE))
    windows: list[_Window] = []
    active: list[_Window] = []
    while active or len(windows) < count:
        while len(active) < together and len(windows) < count:
            windows.append(_started(len(windows), seed, frame, tokenizer))
            active.append(windows[-1])
        _advance(model, [w for w in active if len(w.ids) < length], frame)
        for window in active:
            if len(window.ids) >= length:
                model.allocator.truncate(window.cached, 0)
        active = [w for w in active if len(w.ids) < length]
        if progress:
            done = sum(min(len(w.ids), length) for w in windows)
            progress(done, count * length, "writing calibration text")
    return [w.ids[:length] for w in windows]


def _started(index: int, seed: int, frame: _Frame, tokenizer: Tokenizer) -> _Window:
    """A window's ids depend on its own numbers alone, however many are written."""
    window = _Window(frame.chats and index % 2 == 1, torch.Generator().manual_seed((seed << 20) + index))
    if tokenizer.add_bos and tokenizer.data.bos_token_id is not None:
        window.ids.append(tokenizer.data.bos_token_id)
    window.open(frame, tokenizer)
    # a template that writes the BOS itself
    if window.ids[:1] == window.ids[1:2] == [tokenizer.data.bos_token_id]:
        del window.ids[0]
    return window


def _advance(model: LanguageModel, windows: list[_Window], frame: _Frame) -> None:
    """One step of the model for all windows; those whose last token has run get another."""
    if not windows:
        return
    logits = model.forward([(w.cached, w.ids[len(w.cached.ids) :][:CHUNK]) for w in windows]).cpu()
    for window, row in zip(windows, logits, strict=True):
        if len(window.cached.ids) == len(window.ids):
            window.add(_draw(row, window, frame, model.name), frame, model.tokenizer)


def _draw(logits: Tensor, window: _Window, frame: _Frame, name: str) -> int:
    """A token by its probability among the TOP_K likeliest; no text ends within its first tokens."""
    values, ids = logits.topk(min(TOP_K, len(logits)))
    if not values.isfinite().all():
        raise FewbitError(
            "The model's output is not a number.",
            f"{name} gave {int((~logits.isfinite()).sum()):,} of {len(logits):,} logits as NaN or infinite while it "
            f"wrote its calibration text, at token {len(window.ids):,}.",
            "Its weights are damaged or overflow: calibrate on a text instead, which names the broken tensor.",
        )
    early = window.own < FIRST_TOKENS
    if early:
        values = values.masked_fill(torch.isin(ids, torch.tensor(sorted(frame.ends))), float("-inf"))
    chances = (values / (FIRST_TEMPERATURE if early else TEMPERATURE)).softmax(0)
    return int(ids[torch.multinomial(chances, 1, generator=window.random)])


def _first_token(tokenizer: Tokenizer, random: torch.Generator) -> int:
    """A random token that is no special one and begins with a letter."""
    size, token = tokenizer.inner.get_vocab_size(), 0
    for _ in range(ATTEMPTS):
        token = int(torch.randint(size, (1,), generator=random))
        # a special token has no text
        if tokenizer.decode([token]).strip()[:1].isalpha():
            break
    return token
