"""Decoding steps recorded once as CUDA graphs and run again: one launch a step instead of hundreds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewbit.kernels.ops import Batch

# sequences of a recorded step; fewer are filled up with sequences of no tokens
BUCKETS = (1, 2, 4, 8, 16)


def bucket(sequences: int) -> int | None:
    """The recorded step that takes so many sequences; None where there are too many."""
    return next((size for size in BUCKETS if size >= sequences), None)


class StepGraphs:
    """Recorded steps of one new token a sequence. `pages` is the width of the page table: the most of a sequence."""

    def __init__(self, model: Any, device: torch.device, pages: int, page_size: int) -> None:
        self.model, self.device, self.pages, self.page_size = model, device, pages, page_size
        self._recorded: dict[int, _Recorded] = {}
        # steps never run at the same time, so they share the memory of what lies between their operations
        self._pool: Any = None

    def takes(self, sequences: int) -> bool:
        """Whether a recorded step has room for so many."""
        return bucket(sequences) is not None

    def run(
        self,
        ids: Sequence[int] | Tensor,
        positions: Sequence[int],
        slots: Sequence[int],
        lengths: Sequence[int],
        pages: Sequence[Sequence[int]],
    ) -> Tensor:
        """Logits float32 [S, vocab] of the next token of each of S sequences; `ids` may lie on the card already."""
        size = bucket(len(ids))
        if size is None:
            raise ValueError(f"at most {BUCKETS[-1]} sequences, got {len(ids)}")
        if size not in self._recorded:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            self._recorded[size] = _Recorded(size, self.pages, self.page_size, self.device)
        recorded = self._recorded[size]
        there = ids if isinstance(ids, Tensor) else None
        recorded.fill([0] * len(ids) if isinstance(ids, Tensor) else ids, positions, slots, lengths, pages)
        recorded.send(there)
        return recorded.run(self.model, self._pool)[: len(ids)].clone()


class _Recorded:
    """One graph with its inputs: they lie in one tensor, filled from one pinned buffer by one copy."""

    def __init__(self, size: int, width: int, page_size: int, device: torch.device) -> None:
        self.size, self.width, self.device = size, width, device
        count = size * (4 + width) + size + 1
        self.host = torch.zeros(count, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.numbers = self.host.numpy()
        self.inputs = torch.zeros(count, dtype=torch.int64, device=device)
        self.ids, self.positions, slots, lengths, pages, starts = self.inputs.split(
            [size] * 4 + [size * width, size + 1]
        )
        self.batch = Batch(slots, pages.view(size, width), lengths, starts, page_size)
        self.numbers[-size - 1 :] = range(size + 1)
        self.graph: Any = None
        self.logits: Tensor | None = None
        self.copied = torch.cuda.Event() if device.type == "cuda" else None

    def fill(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        lengths: Sequence[int],
        pages: Sequence[Sequence[int]],
    ) -> None:
        """Put a step's numbers into the host's buffer; sequences that are not there have no tokens."""
        if self.copied is not None:
            # the step before may not have read it yet
            self.copied.synchronize()
        size, numbers = self.size, self.numbers
        table = [0] * (size * self.width)
        for s, used in enumerate(pages):
            table[s * self.width : s * self.width + len(used)] = used
        filler = [0] * (size - len(ids))
        numbers[: -size - 1] = [*ids, *filler, *positions, *filler, *slots, *filler, *lengths, *filler, *table]

    def send(self, ids: Tensor | None) -> None:
        """The host's buffer to the card; ids that are there already instead of the host's."""
        self.inputs.copy_(self.host, non_blocking=True)
        if self.copied is not None:
            self.copied.record()
        if ids is not None:
            self.ids[: len(ids)].copy_(ids)

    def run(self, model: Any, pool: Any) -> Tensor:
        """Logits [size, vocab], in memory that the next step writes again."""
        if self.graph is None:
            self._record(model, pool)
        self.graph.replay()
        assert self.logits is not None  # noqa: S101
        return self.logits

    def _record(self, model: Any, pool: Any) -> None:
        # everything that is made at first use is made now; the step may run twice, as it writes the same rows
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            model(self.ids, self.positions, self.batch)
        torch.cuda.current_stream(self.device).wait_stream(side)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self.logits = model(self.ids, self.positions, self.batch)
        self.graph = graph
