"""How fast a model runs on this machine."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fewbit.errors import FewbitError
from fewbit.layers import Linear
from fewbit.memory import PeakMemory
from fewbit.runtime.cache import Sequence
from fewbit.runtime.engine import LanguageModel, load
from fewbit.runtime.sampler import greedy

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Speed:
    """Medians of several runs. Rates are tokens a second; `read_rate` is weight bytes times decode rate, in GB/s."""

    model: str
    load_seconds: float
    prompt_tokens: int
    prompt_rate: float
    new_tokens: int
    decode_rate: float
    peak_memory: int
    weight_bytes: int
    read_rate: float
    threads: int
    # products by the backend that runs them
    backends: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def measure_speed(
    model: str | Path,
    *,
    prompt: int = 512,
    new: int = 64,
    threads: int | None = None,
    repeat: int = 3,
    progress: Progress | None = None,
) -> Speed:
    """Load a model, then time a prompt of `prompt` random tokens and `new` greedy tokens after it, `repeat` times."""
    if min(prompt, new, repeat) < 1:
        raise FewbitError(
            "There is nothing to time.", f"prompt {prompt}, new {new}, repeat {repeat}.", "Give 1 or more of each."
        )
    with PeakMemory() as memory:
        clock = time.perf_counter()
        loaded = load(model, threads=threads)
        load_seconds = time.perf_counter() - clock
        if prompt + new > loaded.context:
            raise FewbitError(
                "The run does not fit the context.",
                f"{prompt} + {new} tokens; the context holds {loaded.context:,}.",
                "Give a smaller --prompt or --new.",
            )
        runs = []
        for i in range(repeat + 1):
            if progress:
                progress(i, repeat + 1, "warming up" if i == 0 else f"run {i} of {repeat}")
            runs.append(time_once(loaded, prompt, new))
    # the first run warms caches and threads
    seconds = [statistics.median(r[k] for r in runs[1:]) for k in (0, 1)]
    weight_bytes = loaded.source.checkpoint.weight_bytes()
    return Speed(
        model=loaded.name,
        load_seconds=load_seconds,
        prompt_tokens=prompt,
        prompt_rate=prompt / seconds[0],
        new_tokens=new,
        decode_rate=new / seconds[1],
        peak_memory=memory.peak,
        weight_bytes=weight_bytes,
        read_rate=weight_bytes * new / seconds[1] / 1e9,
        threads=torch.get_num_threads(),
        backends=_backends(loaded),
    )


def time_once(model: LanguageModel, prompt: int, new: int) -> tuple[float, float]:
    """Seconds of a random prompt's prefill, and of `new` greedy steps after it."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(model.source.args.vocab_size, (prompt,), generator=random).tolist()
    sequence = Sequence()
    try:
        start = time.perf_counter()
        logits = model.prefill(sequence, ids)
        middle = time.perf_counter()
        for _ in range(new):
            logits = model.forward([(sequence, [greedy(logits)])])[0]
        return middle - start, time.perf_counter() - middle
    finally:
        model.allocator.truncate(sequence, 0)


def _backends(model: LanguageModel) -> dict[str, int]:
    parts = [p for layer in model.model.stack.layers for p in vars(layer).values()]
    parts += [model.model.head]
    return dict(Counter(p.backend.name for p in parts if isinstance(p, Linear)))
