"""Loops over columns that can't be one large operation: each column waits for the one before.

On a CPU such a loop runs on one thread: columns are small, and waiting for a second thread costs more than it brings.
On a GPU the launches of the small operations would cost more than the operations, so a loop is recorded once for a
shape as a CUDA graph and replayed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# a loop takes its tensors by name, changes them in place and returns nothing
Loop = Callable[[dict[str, Tensor]], None]
WARM_UPS = 1
# recording takes the time of about three runs
WORTH_RECORDING = 5


class ColumnLoop:
    """`loop` over `blocks` blocks of columns; on a GPU equal shapes share a recording, if there are enough."""

    def __init__(self, loop: Loop, blocks: int) -> None:
        self.loop, self.blocks = loop, blocks
        self._recorded: dict[tuple[tuple[int, ...], ...], tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]] = {}

    def __call__(self, tensors: dict[str, Tensor]) -> None:
        """Run the loop; every tensor holds what the loop left in it afterwards."""
        device = next(iter(tensors.values())).device
        if device.type != "cuda" or self.blocks < WORTH_RECORDING:
            with single_threaded(device):
                self.loop(tensors)
            return
        with torch.cuda.device(device):
            self._replay(tensors)

    def _replay(self, tensors: dict[str, Tensor]) -> None:
        key = tuple(tuple(t.shape) for t in tensors.values())
        if key not in self._recorded:
            self._recorded[key] = self._record(tensors)
        graph, held = self._recorded[key]
        for name, t in tensors.items():
            held[name].copy_(t)
        graph.replay()
        for name, t in tensors.items():
            t.copy_(held[name])

    def _record(self, tensors: dict[str, Tensor]) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
        held = {name: torch.empty_like(t).copy_(t) for name, t in tensors.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.loop(held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.loop(held)
        return graph, held


def column_major(x: Tensor) -> Tensor:
    """The same matrix with each column contiguous in memory."""
    return x.t().contiguous().t()


class single_threaded:  # noqa: N801
    """Torch on one thread while a loop over small columns runs on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.threads = torch.get_num_threads() if device.type == "cpu" else 0

    def __enter__(self) -> None:
        if self.threads:
            torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)
