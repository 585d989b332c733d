"""Tokens chosen on an NVIDIA card."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int
from functools import lru_cache

import torch
from torch import Tensor

from fewbit.kernels import _nvrtc
from fewbit.kernels._nvrtc import pointers, run


class Choice:
    """Tokens that are being chosen: `ids` int64 [W] on the card for whoever runs there, `tokens` for the host."""

    def __init__(self, chosen: Tensor) -> None:
        self.ids = chosen[1]
        self._host = torch.empty(chosen.shape[1], dtype=torch.int64, pin_memory=True)
        self._host.copy_(chosen[0], non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def tokens(self) -> list[int]:
        """Waits for them; -1 where a logit is NaN or infinite."""
        self._copied.synchronize()
        found: list[int] = self._host.tolist()
        return found


class Chooser:
    """Draws tokens on the card; one number comes back to the host for each row of logits."""

    PARTS = 64

    def __init__(self, device: torch.device) -> None:
        self._kernels = _nvrtc.module("choose.cu", ("largest", "draw", "settle"), None, device.index)
        self.device = device

    def __call__(
        self, logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, points: Sequence[float]
    ) -> Choice:
        """A token for each row of float32 [W, vocab].

        Temperature 0 takes the likeliest. `points` are uniform numbers from 0 to 1, one a row. Tokens of equal
        probability at the border of top-k or top-p all pass.
        """
        with torch.cuda.device(self.device):
            return self._started(logits.contiguous(), temperature, top_k, top_p, min_p, points)

    def _started(
        self, logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, points: Sequence[float]
    ) -> Choice:
        rows, vocab = logits.shape
        found = torch.zeros(4, rows, dtype=torch.int64, device=self.device)
        best, drawn, chosen = found[0], found[1], found[2:]
        run(self._kernels["largest"], (self.PARTS, rows, 1), 256, *pointers(logits), c_int(vocab), *pointers(best))
        if temperature > 0:
            point = torch.tensor(list(points), dtype=torch.float64).to(self.device)
            settings = c_float(1 / temperature), c_int(min(top_k, vocab)), c_float(top_p), c_float(min_p)
            args = *pointers(logits), c_int(vocab), *settings, *pointers(point, best, drawn)
            run(self._kernels["draw"], (rows, 1, 1), 1024, *args)
        which = drawn if temperature > 0 else best
        run(self._kernels["settle"], (-(-rows // 64), 1, 1), 64, *pointers(which, *chosen), c_int(rows))
        return Choice(chosen)


@lru_cache(maxsize=8)
def chooser(device: torch.device) -> Chooser | None:
    """None where nothing can be compiled for the card."""
    if _nvrtc.missing():
        return None
    with torch.cuda.device(device):
        return Chooser(device)
