"""What a card gives at most: a plain read of its memory, and cuBLAS on a large f16 product."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_longlong, c_void_p

import torch

from fewbit.kernels import Ceiling, _nvrtc

# far beyond any card's cache, and a product that fills every card
MOST_BYTES = 2 << 30
SIDE = 8192
PASSES = 5


class CardCeilings:
    """Measures whenever asked; what it reads and multiplies is allocated for that time only."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.isa = f"sm_{_nvrtc.card_arch(device.index)}"
        self._read_all = _nvrtc.module("read.cu", ("read_all",), None, device.index)["read_all"]
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count

    def measure(self) -> Ceiling:
        """The best of some passes of each kind; multiply-adds are those of f16 products with float32 sums."""
        return Ceiling(self._read_rate(), self._product_rate())

    def _read_rate(self) -> float:
        free, _ = torch.cuda.mem_get_info(self.device)
        count = min(MOST_BYTES, free // 2) & -4096
        memory = torch.empty(count, dtype=torch.uint8, device=self.device).random_()
        out = torch.zeros(1, dtype=torch.int32, device=self.device)
        args = c_void_p(memory.data_ptr()), c_longlong(count // 16), c_void_p(out.data_ptr())
        grid = (8 * self._processors, 1, 1)
        return count / min(self._seconds(lambda: self._read_all.launch(grid, (512, 1, 1), args)) for _ in range(PASSES))

    def _product_rate(self) -> float:
        x, w = (torch.randn(SIDE, SIDE, dtype=torch.float16, device=self.device) for _ in range(2))
        return SIDE**3 / min(self._seconds(lambda: torch.mm(x, w)) for _ in range(PASSES))

    def _seconds(self, call: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def card_ceilings(device: torch.device) -> CardCeilings | None:
    """None where nothing can be compiled for the card."""
    return None if _nvrtc.missing() else CardCeilings(device)
