"""How fast a model runs on this machine, and how near that comes to what the machine gives at most."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fewbit.errors import FewbitError
from fewbit.kernels import Ceiling, ceilings
from fewbit.layers import Linear
from fewbit.memory import PeakMemory
from fewbit.random_models import RandomCheckpoint
from fewbit.runtime.cache import Sequence
from fewbit.runtime.engine import LanguageModel, load, placed, set_threads
from fewbit.runtime.sampler import Sampler, Sampling
from fewbit.source import Source

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Speed:
    """Medians of several runs. Rates are tokens a second, ceilings bytes and multiply-adds a second.

    prompt_share   prompt_rate * multiply_adds / prompt_tokens / dot_ceiling
    decode_share   decode_rate * read_bytes / read_ceiling
    Ceilings and shares are None where the native kernels are not there.
    """

    model: str
    load_seconds: float
    prompt_tokens: int
    prompt_rate: float
    # of each run, in order
    prompt_rates: tuple[float, ...]
    new_tokens: int
    decode_rate: float
    decode_rates: tuple[float, ...]
    peak_memory: int
    # of the files
    weight_bytes: int
    # of the weights in memory that one decoded token reads
    read_bytes: int
    # of all linears for the whole prompt
    multiply_adds: int
    read_ceiling: float | None
    dot_ceiling: float | None
    prompt_share: float | None
    decode_share: float | None
    threads: int
    # products by the backend that runs them
    backends: dict[str, int]
    # of the native kernels, or of the card
    instruction_set: str | None
    # `cpu`, or the card's name
    device: str
    # in use on the card after the runs, by everything
    card_memory: int | None
    # why the card was not used, where there is one
    device_note: str | None
    # why no prepared layout is kept, or what was wrong with the one that was
    prepared_note: str | None
    # how keys and values were kept
    cache: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def measure_speed(
    model: str | Path | Source,
    *,
    prompt: int = 512,
    new: int = 64,
    threads: int | None = None,
    device: str = "auto",
    context: int | None = None,
    repeat: int = 5,
    cache: str | None = None,
    progress: Progress | None = None,
) -> Speed:
    """Load a model (or a source, such as `random_model` gives), then time a prompt of `prompt` random tokens and `new`
    greedy tokens after it, `repeat` times.

    Between the runs the machine's ceilings are measured; `cache` is that of `load`. Raises FewbitError where the run
    does not fit the context.
    """
    if min(prompt, new, repeat) < 1:
        raise FewbitError(
            "There is nothing to time.", f"prompt {prompt}, new {new}, repeat {repeat}.", "Give 1 or more of each."
        )
    with PeakMemory() as memory:
        clock = time.perf_counter()
        loaded = _load(model, threads, device, context, cache)
        loaded.synchronize()
        load_seconds = time.perf_counter() - clock
        if prompt + new > loaded.context:
            raise FewbitError(
                "The run does not fit the context.",
                f"{prompt} + {new} tokens; the context holds {loaded.context:,}.",
                "Give fewer tokens with --prompt or --tokens.",
            )
        # warms caches and threads; the ceilings' buffer comes later, as it is not the model's memory
        if progress:
            progress(0, repeat + 1, "warming up")
        time_once(loaded, prompt, new)
    machine = ceilings(loaded.device)
    runs, found = [], []
    for i in range(repeat):
        if progress:
            progress(i + 1, repeat + 1, f"run {i + 1} of {repeat}")
        if machine:
            found.append(machine.measure())
        runs.append(time_once(loaded, prompt, new))
    return Speed(
        model=loaded.name,
        load_seconds=load_seconds,
        peak_memory=memory.peak,
        weight_bytes=loaded.source.checkpoint.weight_bytes(),
        threads=torch.get_num_threads(),
        backends=dict(Counter(linear.backend.name for linear in linears(loaded))),
        instruction_set=machine.isa if machine else None,
        device=loaded.device_name,
        card_memory=loaded.card_memory(),
        device_note=loaded.device_note,
        prepared_note=loaded.prepared_note,
        cache=cache or "16bit",
        **_rates(loaded, prompt, new, runs, found),
    )


def _load(
    model: str | Path | Source, threads: int | None, device: str, context: int | None, cache: str | None
) -> LanguageModel:
    if not isinstance(model, Source):
        return load(model, threads=threads, device=device, context=context, cache=cache)
    if threads is not None:
        set_threads(threads)
    placement = placed(model, device, False, context, cache)
    if isinstance(model.checkpoint, RandomCheckpoint):
        model.checkpoint.device = placement.device
    return LanguageModel(model, False, context, cache=cache, placement=placement)


def _rates(
    model: LanguageModel, prompt: int, new: int, runs: list[tuple[float, float]], found: list[Ceiling]
) -> dict[str, Any]:
    """The fields of Speed that follow from the runs' seconds and the ceilings found between them."""
    prompt_rates = tuple(prompt / seconds for seconds, _ in runs)
    decode_rates = tuple(new / seconds for _, seconds in runs)
    prompt_rate, decode_rate = statistics.median(prompt_rates), statistics.median(decode_rates)
    read = statistics.median(c.read_rate for c in found) if found else None
    dots = statistics.median(c.dot_rate for c in found) if found else None
    per_token, adds = read_bytes(model), multiply_adds(model, prompt)
    return {
        "prompt_tokens": prompt,
        "prompt_rate": prompt_rate,
        "prompt_rates": prompt_rates,
        "new_tokens": new,
        "decode_rate": decode_rate,
        "decode_rates": decode_rates,
        "read_bytes": per_token,
        "multiply_adds": adds,
        "read_ceiling": read,
        "dot_ceiling": dots,
        "prompt_share": prompt_rate * adds / prompt / dots if dots else None,
        "decode_share": decode_rate * per_token / read if read else None,
    }


def time_once(model: LanguageModel, prompt: int, new: int) -> tuple[float, float]:
    """Seconds of a random prompt's prefill, and of `new` greedy steps after it."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(model.source.args.vocab_size, (prompt,), generator=random).tolist()
    sequence = Sequence()
    try:
        start = time.perf_counter()
        logits = model.prefill(sequence, ids)
        model.synchronize()
        middle = time.perf_counter()
        # the last token is not only chosen but run as well
        for token in model.tokens(sequence, logits, Sampler(Sampling()), [], new, None):
            last = token
        model.forward([(sequence, [last])])
        model.synchronize()
        return middle - start, time.perf_counter() - middle
    finally:
        model.allocator.truncate(sequence, 0)


def linears(model: LanguageModel) -> Iterator[Linear]:
    """Every product of a step: those of the blocks, then the head (which may be the embedding too)."""
    for layer in model.model.stack.layers:
        yield from (part for part in vars(layer).values() if isinstance(part, Linear))
    yield model.model.head


def read_bytes(model: LanguageModel) -> int:
    """Bytes of packed weights that one decoded token reads; of an embedding that is not the head, next to none."""
    return sum(linear.packed.nbytes for linear in linears(model))


def multiply_adds(model: LanguageModel, prompt: int) -> int:
    """Multiply-adds of all linears for a prompt of so many tokens: the head runs for the last token of each chunk."""
    *blocks, head = (rows * columns for rows, columns in (linear.packed.shape for linear in linears(model)))
    return sum(blocks) * prompt + head * -(-prompt // model.chunk)
