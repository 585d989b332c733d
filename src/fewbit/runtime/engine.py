"""A loaded model: prompts in, text out."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fewbit import kernels
from fewbit.errors import FewbitError
from fewbit.fetching import Fetcher
from fewbit.kernels.ops import INT4, Batch
from fewbit.layers import Weights
from fewbit.prepared import PreparedLayouts
from fewbit.qtensor import QTensor
from fewbit.runtime.cache import PAGE_SIZE, PageAllocator, Steps
from fewbit.runtime.cache import Sequence as CachedSequence
from fewbit.runtime.decoding import decode, not_finite
from fewbit.runtime.generation import Generation
from fewbit.runtime.graphs import StepGraphs
from fewbit.runtime.placement import CARD_CHUNK, PREFILL_CHUNK, CardMemoryError, Placement, out_of_memory, place
from fewbit.runtime.sampler import Sampler, Sampling
from fewbit.source import Source, open_source
from fewbit.tokenizer import Tokenizer

Progress = Callable[[int, int, str], None]
DEFAULT_CONTEXT = 8192
# how keys and values may be kept, the default first
CACHES = {"16bit": torch.float16, "int8": torch.int8, "int4": INT4}


class LanguageModel:
    """A model in memory with its tokenizer and cache. `context` is the most tokens a conversation may have."""

    def __init__(
        self,
        source: Source,
        exact: bool,
        context: int | None,
        progress: Progress | None = None,
        cache: str | None = None,
        placement: Placement | None = None,
    ) -> None:
        self.source, self.name, self.exact = source, source.name, exact
        dtype = cache_dtype(exact, cache)
        self.tokenizer = Tokenizer(source.checkpoint.tokenizer())
        self.context = checked_context(source, context)
        placement = placement or placed(source, "cpu", exact, context, cache)
        self.device, self.plan, self.device_note = placement.device, placement.plan, placement.note
        # tokens of a prompt that run at once: bounds the activations' memory
        self.chunk = CARD_CHUNK if self.device.type == "cuda" else PREFILL_CHUNK
        with self._on_card():
            self.backends = kernels.available(exact, self.device.type)
        # why the reference runs what a faster kernel refused
        self.notes: list[str] = []
        # why no prepared layout is kept, or what was wrong with the one that was
        self.prepared_note: str | None = None
        pages = -(-self.context // PAGE_SIZE)
        said: str | None = None
        try:
            with self._on_card():
                self.model: Any = self._load(progress)
                self.model.allocate(pages * PAGE_SIZE, dtype)
        except torch.OutOfMemoryError as error:
            said = str(error)
        if said is not None:
            # only now, as the error's frames held what had been loaded
            raise self._no_memory(said)
        self._graphs = None
        if self.device.type == "cuda" and self.model.stack.replays:
            self._graphs = StepGraphs(self.model, self.device, pages, PAGE_SIZE)
        self.allocator = PageAllocator(pages)
        self._kept = CachedSequence()
        self._latest: object = None
        # one step at a time, whichever thread asks
        self._lock = threading.RLock()

    def _load(self, progress: Progress | None) -> Any:
        source, total = self.source, len(self.source.weights)
        ops = kernels.ops_on(self.device, self.exact)
        prepared = None
        if self.device.type == "cpu" and source.path.exists():
            shapes = {w.name: w.shape for w in source.weights}
            prepared = PreparedLayouts(source.path, source.checkpoint.weight_bytes(), shapes, self.backends)
            total -= len(prepared.names)
        with ExitStack() as open_while_loading:
            read: Callable[[str], QTensor] = source.read
            if self.device.type == "cuda":
                names = [w.name for w in source.weights]
                read = open_while_loading.enter_context(Fetcher(source, names, self.device)).read
            if prepared:
                open_while_loading.callback(prepared.close)
            if progress:
                read = _counted(read, progress, total)
            weights = Weights(read, source.has, self.backends, ops, self.notes, prepared, self.device, self.context)
            model = source.module.Model(source.args, weights)
            if prepared:
                prepared.keep()
                self.prepared_note = prepared.note
            return model

    def _on_card(self) -> AbstractContextManager[Any]:
        """The model's card is torch's current one inside; on the CPU nothing changes."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _no_memory(self, said: str) -> FewbitError:
        torch.cuda.empty_cache()
        return out_of_memory(self.plan, self.device, said)

    @torch.inference_mode()
    def forward(self, steps: Steps, wanted: list[int] | None = None) -> Tensor:
        """Append new tokens to each sequence and run them together in one step.

        Returns float32 [W, vocab]: the logits of the tokens `wanted` (indices into the flat batch), by default the
        last token of each sequence.
        """
        if not all(new for _, new in steps):
            raise ValueError("every sequence of a step needs a new token")
        with self._lock:
            logits = self._guarded(lambda: self._step(steps, wanted), [s for s, _ in steps])
            for sequence, new in steps:
                sequence.ids += new
            return logits

    def _guarded(self, step: Callable[[], Tensor], sequences: list[CachedSequence]) -> Tensor:
        """A step of the sequences, undone where it fails."""
        try:
            with self._on_card():
                return step()
        except BaseException as error:
            # an interrupted step (Ctrl-C) has not written all of its keys and values
            for sequence in sequences:
                self.allocator.truncate(sequence, len(sequence.ids))
            if not isinstance(error, torch.OutOfMemoryError):
                raise
            said = str(error)
        raise self._no_memory(said)

    def _step(self, steps: Steps, wanted: list[int] | None) -> Tensor:
        """Logits; pages are reserved, the sequences' ids are left as they are."""
        f = self.allocator.lay_out(steps)
        self._check_ids(f.ids)
        if self._graphs and wanted is None and len(f.ids) == len(steps) and self._graphs.takes(len(steps)):
            return self._graphs.run(f.ids, f.positions, f.slots, f.lengths, f.pages)
        wanted = wanted if wanted is not None else [i - 1 for i in f.starts[1:]]
        table = [page for pages in f.table() for page in pages]
        cut = _tensors(self.device, f.ids, f.positions, f.slots, table, f.lengths, f.starts, wanted)
        batch = Batch(cut[2], cut[3].view(len(steps), -1), cut[4], cut[5], PAGE_SIZE, cut[6])
        return cast(Tensor, self.model(cut[0], cut[1], batch))

    def _check_ids(self, ids: Sequence[int]) -> None:
        # a card told of a row that is not there gives nothing back to this process any more
        size = self.source.args.vocab_size
        if min(ids) < 0 or max(ids) >= size:
            raise IndexError(f"token ids must lie in 0 .. {size - 1}, got {min(ids)} .. {max(ids)}")

    def prefill(self, sequence: CachedSequence, ids: Sequence[int], owner: object = None) -> Tensor:
        """Run a prompt (or the next token) in chunks -> logits [vocab] of its last token.

        `owner` is the answer the sequence was given to by `begin`. Raises FewbitError where a newer one has taken it,
        and where the model's output is not finite (on a card, where a look would make the host wait, choosing does).
        """
        for i in range(0, len(ids), self.chunk):
            with self._lock:
                self._check_owner(sequence, owner)
                logits = self.forward([(sequence, list(ids[i : i + self.chunk]))])
        if logits.is_cpu and not math.isfinite(logits.numpy().max()):
            raise not_finite(logits, len(sequence.ids))
        return logits[0]

    def _check_owner(self, sequence: CachedSequence, owner: object) -> None:
        if owner is not None and self._latest is not owner:
            raise FewbitError(
                "This answer was ended by a newer one.",
                f"It had come to token {len(sequence.ids)}; a loaded model holds one conversation.",
                "Finish an answer before asking for the next, or load the model twice.",
            )

    def tokens(
        self, sequence: CachedSequence, logits: Tensor, sampler: Sampler, history: list[int], count: int, owner: object
    ) -> Iterator[int]:
        """At most `count` tokens that follow from `logits` [vocab], added to `history` one by one.

        Raises as `prefill` does.
        """
        return decode(self, sequence, logits, sampler, history, count, owner)

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may begin with a token that only the device knows."""
        return self._graphs is not None

    @torch.inference_mode()
    def step_ahead(self, sequence: CachedSequence, ids: Tensor, owner: object) -> Tensor:
        """A step with a token [1] that the card knows -> logits [vocab]; it counts once `keep` is told the token."""

        def step() -> Tensor:
            have, graphs = len(sequence.ids), self._graphs
            assert graphs is not None  # noqa: S101
            self.allocator.reserve(sequence, have + 1)
            return graphs.run(ids, [have], [sequence.slot(have)], [have + 1], [sequence.pages])

        with self._lock:
            self._check_owner(sequence, owner)
            return self._guarded(step, [sequence])[0]

    def keep(self, sequence: CachedSequence, token: int, owner: object) -> None:
        """`token` is what the step ahead ran. Raises FewbitError where a newer answer has taken the sequence."""
        with self._lock:
            self._check_owner(sequence, owner)
            sequence.ids.append(token)

    def generate(
        self,
        prompt: str | list[int],
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Generation:
        """Continue a text (or token ids): an iterator of text pieces with `.stats`.

        Stops at the model's end tokens, a `stop` string (not given out), `max_tokens`, or the end of the context.
        Raises FewbitError where the prompt does not fit the context.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return Generation(self, self._fitting(ids), max_tokens, sampling or Sampling(), stop)

    def chat(
        self,
        messages: str | Sequence[dict[str, Any]],
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Generation:
        """Answer a conversation (a list of {"role", "content"}, or one user message) through the chat template.

        What the conversation shares with the one before is not computed again.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.generate(self.tokenizer.render(messages), max_tokens=max_tokens, sampling=sampling, stop=stop)

    def _fitting(self, ids: list[int]) -> list[int]:
        if not ids:
            raise FewbitError("The prompt is empty.", "It has no tokens.", "Give at least one character.")
        if len(ids) >= self.context:
            limit = self.source.args.max_position_embeddings
            raise FewbitError(
                "The prompt does not fit the context.",
                f"It has {len(ids):,} tokens; the context holds {self.context:,}, one of them for the answer.",
                f"Shorten the prompt, or load with a larger context (at most {limit:,}).",
            )
        size = self.source.args.vocab_size
        if bad := [i for i in ids if not 0 <= i < size]:
            raise FewbitError(
                "The prompt has token ids the model does not know.",
                f"The first is {bad[0]}; ids run from 0 to {size - 1:,}.",
                "Check that the tokenizer belongs to the model.",
            )
        return ids

    def synchronize(self) -> None:
        """Wait for what runs on the card."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def device_name(self) -> str:
        """`cpu`, or the card's own name."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def card_memory(self) -> int | None:
        """Bytes in use on the card now, by everything that uses it; None on the CPU."""
        if self.device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def begin(self, owner: object, ids: list[int]) -> tuple[CachedSequence, int]:
        """Give the model's conversation to `owner`: the sequence, and how many leading tokens of `ids` it holds."""
        with self._lock:
            self._latest = owner
            # the last token must run again: its logits are what the answer begins with
            shared = min(self._kept.common_prefix(ids), len(ids) - 1)
            self.allocator.truncate(self._kept, shared)
            return self._kept, shared


def checked_context(source: Source, context: int | None) -> int:
    """The tokens a conversation may have; FewbitError where the model was not made for as many."""
    limit = source.args.max_position_embeddings
    if context is not None and not 0 < context <= limit:
        raise FewbitError(
            f"A context of {context:,} tokens is not possible.",
            f"{source.name} was made for at most {limit:,}.",
            f"Choose a context from 1 to {limit:,}.",
        )
    return context or min(limit, DEFAULT_CONTEXT)


def placed(source: Source, device: str, exact: bool, context: int | None, cache: str | None) -> Placement:
    """Where a model goes with these settings of `load`; raises as that does."""
    return place(device, source, checked_context(source, context), exact, cache_dtype(exact, cache))


def _tensors(device: torch.device, *lists: Sequence[int]) -> tuple[Tensor, ...]:
    """int64 tensors of the lists: cut from one, which takes a third of the time that making each would."""
    flat = torch.tensor([i for part in lists for i in part], dtype=torch.int64)
    if device.type != "cpu":
        flat = flat.to(device)
    return torch.split(flat, [len(part) for part in lists])


def _counted(read: Callable[[str], QTensor], progress: Progress, total: int) -> Callable[[str], QTensor]:
    done = 0

    def counted(name: str) -> QTensor:
        nonlocal done
        done += 1
        progress(min(done, total), total, name)
        return read(name)

    return counted


def cache_dtype(exact: bool, cache: str | None) -> torch.dtype:
    """What keys and values are kept in: float32 in exact runs, which keep all of their bits, else a name of CACHES.

    FewbitError where an exact run is given another, or the name is none.
    """
    if cache is not None and cache not in CACHES:
        raise FewbitError(
            "There is no such cache.", f"Asked for {cache!r}; there are {', '.join(CACHES)}.", "Choose one of them."
        )
    if exact and cache is not None:
        raise FewbitError(
            "An exact run can't have another cache.",
            f"Asked for {cache}; exact runs keep keys and values in float32: only weights are rounded there.",
            "Drop one of the two.",
        )
    return torch.float32 if exact else CACHES[cache or "16bit"]


def set_threads(count: int) -> None:
    """CPU threads of torch and of every backend; FewbitError where the machine can't have as many."""
    most = 4 * (os.cpu_count() or 1)
    if not 1 <= count <= most:
        raise FewbitError(
            f"{count:,} threads are not possible.",
            f"This machine has {os.cpu_count()} logical processors; from 1 to {most} threads make sense.",
            "Leave --threads out to use the machine's cores.",
        )
    kernels.set_threads(count)


def load(
    model: str | Path,
    *,
    exact: bool = False,
    context: int | None = None,
    threads: int | None = None,
    device: str = "auto",
    cache: str | None = None,
    progress: Progress | None = None,
) -> LanguageModel:
    """Load an alias, a model of the hub, a folder or a GGUF file.

    exact    float32 activations and the reference kernels: the definition, slower
    context  most tokens of a conversation (default: the model's own limit, at most 8192)
    threads  CPU threads (default: the cores this process may use)
    device   auto (a card that is there and has room, or the CPU, with `device_note` saying why), cpu, cuda, cuda:N
    cache    keys and values in "16bit" (default); in "int8": about half the memory, and less to read at long contexts;
             or in "int4": less than a third, at a price in quality. Exact runs keep them in float32 and refuse all.
    Raises FewbitError where the model is missing, broken, of an unknown architecture, the context impossible, there is
    no such cache, or the named device is not there or too small.
    """
    cache_dtype(exact, cache)
    if threads is not None:
        set_threads(threads)
    source = open_source(model, progress)
    placement = placed(source, device, exact, context, cache)
    try:
        return LanguageModel(source, exact, context, progress, cache, placement)
    except CardMemoryError as error:
        if device != "auto":
            raise
        note = f"The CPU is used. {error.what} {error.facts}"
    placement = replace(placed(source, "cpu", exact, context, cache), note=note)
    return LanguageModel(source, exact, context, progress, cache, placement)
