"""What this machine gives at most: the rates that a product's reading and multiplying are held against.

Both are taken by plain loops in the products' own instructions, on the products' own threads (csrc/ceilings.inl): one
reads a buffer far larger than the caches, the other multiplies registers. AVX2 has no instruction that adds four
products to a sum at once; its loop is vpmaddubsw, vpmaddwd and vpaddd.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from fewbit.kernels import Ceiling
from fewbit.kernels.cpu import Cpu, backend

# a buffer of this many bytes, or as many last-level caches
LEAST_BYTES = 512 << 20
CACHES = 8
# seconds that one pass of multiplying should take: long beside waking a thread
DOT_SECONDS = 0.02
_SYSTEM = Path("/")


class Ceilings:
    """Measures ceilings whenever asked, so that they can be taken between other measurements.

    `size`: bytes of the buffer to read, held as long as this object lives.
    """

    def __init__(self, cpu: Cpu, size: int | None = None) -> None:
        self.cpu = cpu
        self._memory = mmap.mmap(-1, size or max(LEAST_BYTES, CACHES * last_cache()))
        # weights lie on huge pages too where the system has them
        with suppress(OSError, AttributeError):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._buffer = torch.frombuffer(self._memory, dtype=torch.uint8).fill_(1)
        self._codes = torch.ones(64, dtype=torch.uint8)
        self._rounds = 1000

    @property
    def isa(self) -> str:
        """The instruction set whose products these are the ceilings of."""
        return self.cpu.isa

    def measure(self, passes: int = 3) -> Ceiling:
        """The best of some passes of each kind."""
        # rounds grow until a pass is long enough
        while (seconds := _seconds(self._multiply)) < DOT_SECONDS / 2:
            self._rounds = max(2 * self._rounds, int(self._rounds * DOT_SECONDS / seconds / 2))
        done = self._multiply()
        return Ceiling(
            read_rate=len(self._buffer) / min(_seconds(self._read) for _ in range(passes)),
            dot_rate=done / min(_seconds(self._multiply) for _ in range(passes)),
        )

    def _read(self) -> None:
        self.cpu.native.read_all(self._buffer.data_ptr(), len(self._buffer))

    def _multiply(self) -> int:
        done, _ = self.cpu.native.dot_all(self._rounds, self._codes.data_ptr(), self._codes.data_ptr())
        return int(done)


def ceilings(size: int | None = None) -> Ceilings | None:
    """None where the native kernels are not there."""
    cpu = backend()
    return Ceilings(cpu, size) if cpu else None


def last_cache(root: Path = _SYSTEM) -> int:
    """Bytes of all last-level caches together, 0 where the system does not say.

    A CPU of several dies has one for each, and every thread would else read from its own.
    """
    found: dict[str, int] = {}
    for cpu in (root / "sys/devices/system/cpu").glob("cpu[0-9]*"):
        sizes = [(_cache_bytes(file), file) for file in cpu.glob("cache/index*/size")]
        if sizes:
            size, file = max(sizes)
            shared = file.with_name("shared_cpu_list")
            found[shared.read_text(encoding="utf-8") if shared.exists() else ""] = size
    return sum(found.values())


def _cache_bytes(file: Path) -> int:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except OSError:
        return 0
    digits, unit = text[:-1], text[-1:]
    return int(digits) << (10 if unit == "K" else 20) if digits.isdigit() and unit in ("K", "M") else 0


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
