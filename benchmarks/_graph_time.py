"""How long a call takes on a card: replays of a CUDA graph over copies of its weights, so that no cache holds them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

# bytes that all copies together should have, several times the largest L2
COLD_BYTES = 200_000_000
# seconds before figures are taken
REST = 0.3
# microseconds that a graph should take
LENGTH = 3000.0


def copies(nbytes: int) -> int:
    """How many copies of weights are cold."""
    return max(4, min(12, int(COLD_BYTES / nbytes) + 1))


def graph_time(calls: Sequence[Callable[[], object]], rounds: int = 7) -> float:
    """Median microseconds of one of `calls`, made in turn."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once() -> None:
        for call in calls:
            call()

    once()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        start.record()
        once()
        end.record()
        torch.cuda.synchronize()
    repeats = max(1, min(20, int(LENGTH / max(1.0, start.elapsed_time(end) * 1e3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            once()
    graph.replay()
    torch.cuda.synchronize()
    # dense products lower the clock, and it takes its time to rise again
    time.sleep(REST)
    times = []
    for _ in range(rounds):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (repeats * len(calls)))
    return statistics.median(times)
