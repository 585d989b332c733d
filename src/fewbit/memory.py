"""What the process holds in anonymous memory (its own allocations, not the files it maps), and what a card has left."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int:
    """RssAnon of this process; 0 where the system does not tell (anything but Linux)."""
    if not STATUS.exists():
        return 0
    for line in STATUS.read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def card_free(device: torch.device) -> int:
    """Bytes that this process could still take on a card: what is free there or held by torch for nobody, within the
    share that torch's allocator was given.
    """
    import torch

    free, total = torch.cuda.mem_get_info(device)
    held, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    return min(free + held, int(share * total)) - used


class PeakMemory:
    """Samples anonymous memory while a block of code runs; `peak` is bytes above its start.

    Sampling every few milliseconds can miss a shorter spike, but no allocation of that size is that short.
    """

    def __init__(self, interval: float = 0.005) -> None:
        self.interval = interval
        self.before = self.highest = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def peak(self) -> int:
        """Most bytes held above the start."""
        return max(0, self.highest - self.before)

    def _watch(self) -> None:
        while not self._done.wait(self.interval):
            self.highest = max(self.highest, anonymous_bytes())

    def __enter__(self) -> PeakMemory:
        self.before = self.highest = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        self.highest = max(self.highest, anonymous_bytes())
