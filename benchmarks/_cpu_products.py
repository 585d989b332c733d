"""One matrix times M tokens at every width: microseconds, and the share of what the machine gives."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from fewbit.formats import parse
from fewbit.formats.integer import IntegerFormat
from fewbit.kernels import Packed
from fewbit.kernels._ceilings import Ceilings, last_cache
from fewbit.kernels.cpu import Cpu
from fewbit.qtensor import QTensor

SHAPES = ((2048, 8192), (8192, 2048))
TOKENS = (1, 2, 4, 8, 512)
# tokens from here on are bound by multiplying: the same copy may be used again
MANY = 32
# copies of a matrix fill this many last-level caches, so that none is left there when its turn comes again
CACHES = 3


@dataclass(frozen=True)
class Product:
    """As many copies of one matrix as caches can't hold."""

    spec: str
    shape: tuple[int, int]
    copies: list[Packed]

    def seconds(self, tokens: int, x: torch.Tensor) -> float:
        """Of one product, over all copies in turn (over two, where multiplying bounds it)."""
        copies = self.copies[:2] if tokens >= MANY else self.copies
        # as in a model, results go to memory that is kept; new memory would be paid for page by page
        y = torch.zeros(tokens, self.shape[0])
        start = time.perf_counter()
        for packed in copies:
            packed.data.multiply(x.data_ptr(), tokens, y.data_ptr())
        return (time.perf_counter() - start) / len(copies)


def random_tensor(spec: str, shape: tuple[int, int]) -> QTensor:
    """Random codes under scales of one size."""
    fmt = parse(spec)
    assert isinstance(fmt, IntegerFormat)
    codes = torch.randint(0, 2**fmt.bits, shape, dtype=torch.uint8)
    scale = torch.full((shape[0], fmt.groups(shape[1])), 0.01, dtype=torch.bfloat16)
    return fmt.pack(codes, {"scale": scale})


def prepared(cpu: Cpu, spec: str, shape: tuple[int, int]) -> Product:
    """The copies of one width and shape [out, in]."""
    q = random_tensor(spec, shape)
    first = cpu.prepare([q])
    count = max(2, -(-CACHES * max(last_cache(), 1 << 20) // first.nbytes))
    return Product(spec, shape, [first, *(cpu.prepare([q]) for _ in range(count - 1))])


def measure_products(cpu: Cpu, ceilings: Ceilings, specs: list[str], rounds: int) -> dict[str, Any]:
    """Figures by width and shape, medians of interleaved rounds; shares are of the ceiling taken just before."""
    products = [prepared(cpu, spec, shape) for spec in specs for shape in SHAPES]
    inputs = {(t, c): torch.randn(t, c) for t in TOKENS for _, c in SHAPES}
    seconds: dict[tuple[str, str, int], list[float]] = {}
    reads: dict[tuple[str, str], list[float]] = {}
    dots: dict[tuple[str, str], list[float]] = {}
    read_ceilings, dot_ceilings = [], []
    for i in range(rounds + 1):
        for p in products:
            rows, columns = p.shape
            name = (p.spec, f"{rows}x{columns}")
            ceiling = ceilings.measure()
            taken = {t: p.seconds(t, inputs[t, columns]) for t in TOKENS}
            if not i:
                continue
            read_ceilings.append(ceiling.read_rate)
            dot_ceilings.append(ceiling.dot_rate)
            for t, s in taken.items():
                seconds.setdefault((*name, t), []).append(s)
            reads.setdefault(name, []).append(p.copies[0].nbytes / taken[1] / ceiling.read_rate)
            done = TOKENS[-1] * rows * columns
            dots.setdefault(name, []).append(done / taken[TOKENS[-1]] / ceiling.dot_rate)
    found: dict[str, Any] = {}
    for p in products:
        name = (p.spec, f"{p.shape[0]}x{p.shape[1]}")
        microseconds = {str(t): 1e6 * statistics.median(seconds[*name, t]) for t in TOKENS}
        found.setdefault(p.spec, {})[name[1]] = {
            "bytes": p.copies[0].nbytes,
            "microseconds": microseconds,
            "read_share": statistics.median(reads[name]),
            "dot_share": statistics.median(dots[name]),
            "four_over_one": microseconds["4"] / microseconds["1"],
        }
    rates = {"read": statistics.median(read_ceilings), "dots": statistics.median(dot_ceilings)}
    return {"ceilings": rates, "rows": found}
