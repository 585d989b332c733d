"""One block of the calibrated walk: what its linears see, what a method makes of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fewbit.blocks import FloatBlock, FloatLinear
from fewbit.feeds import feeds_of
from fewbit.formats import Format, parse
from fewbit.methods import BlockPart, Stats, Target, rtn
from fewbit.methods._second_order import output_error
from fewbit.qtensor import QTensor
from fewbit.source import FLOATS, Source

# tuning a block takes about this many times as long as finding what it begins with
TUNING = 10
# evenly spread rows that round to nearest is tried on beside the method
COMPARED_ROWS = 128


@dataclass(frozen=True)
class Line:
    """What came of one matrix: squared output error relative to the output, of the method and of round to nearest, on
    COMPARED_ROWS of its rows. `calibrated`: whether calibration text came to it; an expert may see none, and is rounded
    to nearest.
    """

    block: int
    name: str
    spec: str
    error: float
    rtn_error: float
    seconds: float
    calibrated: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the log."""
        return asdict(self)


@dataclass(frozen=True)
class Goals:
    """What the full-precision model's block gives [n, length, d], and how much each channel [d] of it counts."""

    outputs: Tensor
    channels: Tensor


@dataclass
class Solved:
    """A finished block: its tensors by full name, and a line for each matrix."""

    tensors: dict[str, QTensor]
    lines: list[Line] = field(default_factory=list)
    # linears that no calibration token came to
    unseen: list[str] = field(default_factory=list)


class BlockSolver:
    """Quantizes one block with the modules of a method: `first.prepare`, `last.quantize`, `last.tune`."""

    def __init__(self, source: Source, modules: list[ModuleType], target: Target, spec: Callable[[str], str]) -> None:
        self.source, self.modules, self.target, self.spec = source, modules, target, spec

    def solve(
        self,
        block: FloatBlock,
        stats: list[Stats],
        hidden: Tensor,
        goals: Goals | None,
        report: Callable[[str, int, int], None],
    ) -> Solved:
        """Every tensor of the block in its format; `block` holds the quantized weights afterwards."""
        self._prepare(block, stats)
        done = Solved({})
        originals: list[Tensor] = []
        solved: list[list[tuple[Format, QTensor]]] = []
        seconds = []
        tunes = goals is not None and hasattr(self.modules[-1], "tune")
        for i, (linear, found) in enumerate(zip(block.linears, stats, strict=True)):
            report(linear.names[-1], i, (TUNING if tunes else 1) * len(block.linears))
            start = time.perf_counter()
            original, parts = linear.weight, self._quantized(linear, found)
            linear.weight = torch.cat([fmt.dequantize(q) for fmt, q in parts])
            seconds.append(time.perf_counter() - start)
            if tunes:
                originals.append(original)
                solved.append(parts)
            else:
                self._record(done, block, linear, original, parts, found, seconds[-1])
                # those of a wide linear take more than the block, and nobody asks for them any more
                found.clear()
        if goals is not None and tunes:
            start = time.perf_counter()
            solved = self._tuned(block, originals, solved, hidden, goals, report)
            seconds = [s + (time.perf_counter() - start) / len(seconds) for s in seconds]
            for linear, original, parts, found, took in zip(
                block.linears, originals, solved, stats, seconds, strict=True
            ):
                self._record(done, block, linear, original, parts, found, took)
        for name, vector in block.vectors.items():
            done.tensors[name] = self._stored(name, vector.cpu(), block.offsets.get(name, 0.0))
        return done

    def _stored(self, name: str, vector: Tensor, offset: float) -> QTensor:
        """A norm, a bias or a router as files have it: without what the architecture adds."""
        fmt = parse(self.spec(name))
        if offset:
            q = self.source.read(name)
            if q.spec == fmt.spec and torch.equal(parse(q.spec).dequantize(q) + offset, vector):
                # taking off what was added would move its last bits
                return q
            vector = vector - offset
        return fmt.pack(fmt.round(vector, {}), {})

    def _spec_groups(self, linear: FloatLinear) -> list[tuple[str, int, int]]:
        """(spec, first row, last row) of neighbours in the stack that share a format: solved together."""
        groups: list[tuple[str, int, int]] = []
        row = 0
        for name, rows in zip(linear.names, linear.splits, strict=True):
            spec = self.spec(f"{name}.weight")
            if groups and groups[-1][0] == spec:
                groups[-1] = (spec, groups[-1][1], row + rows)
            else:
                groups.append((spec, row, row + rows))
            row += rows
        return groups

    def _quantized(self, linear: FloatLinear, stats: Stats) -> list[tuple[Format, QTensor]]:
        found = []
        for spec, first, last in self._spec_groups(linear):
            fmt, w = parse(spec), linear.weight[first:last]
            if spec in FLOATS:
                found.append((fmt, fmt.pack(fmt.round(w, {}), {})))
            else:
                # an expert that no token came to
                method = self.modules[-1] if "hessian" in stats else rtn
                found.append((fmt, method.quantize(w, fmt, dict(stats), self.target)))
        return found

    def _prepare(self, block: FloatBlock, stats: list[Stats]) -> None:
        rewriters = [m for m in self.modules if hasattr(m, "prepare")]
        if not rewriters:
            return
        feeds = feeds_of(self.source, block, stats, self.spec)
        fmt = parse(self.spec(f"{block.linears[0].names[0]}.weight"))
        for module in rewriters:
            module.prepare(feeds, fmt, self.target)

    def _tuned(
        self,
        block: FloatBlock,
        originals: list[Tensor],
        solved: list[list[tuple[Format, QTensor]]],
        hidden: Tensor,
        goals: Goals,
        report: Callable[[str, int, int], None],
    ) -> list[list[tuple[Format, QTensor]]]:
        if any(len(parts) > 1 for parts in solved):
            self.target.note("linears that share an input differ in format: not tuned")
            return solved

        def batch(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
            pick = torch.randperm(len(hidden), generator=random)[:count]
            return hidden[pick].to(block.device, torch.float32), goals.outputs[pick].to(block.device, torch.float32)

        part = BlockPart(
            block,
            block.linears,
            originals,
            [parts[0] for parts in solved],
            batch,
            goals.channels.to(block.device),
            len(hidden),
            lambda done, total: report("tuning", total + (TUNING - 1) * done, TUNING * total),
        )
        found = self.modules[-1].tune(part, self.target)
        for linear, (fmt, _), q in zip(block.linears, part.solved, found, strict=True):
            linear.weight = fmt.dequantize(q)
        return [[(parts[0][0], q)] for parts, q in zip(solved, found, strict=True)]

    def _record(
        self,
        done: Solved,
        block: FloatBlock,
        linear: FloatLinear,
        original: Tensor,
        parts: list[tuple[Format, QTensor]],
        stats: Stats,
        seconds: float,
    ) -> None:
        row, hessian = 0, stats.get("hessian")
        if hessian is None:
            done.unseen += linear.names
        stack = iter(parts)
        fmt, q = next(stack)
        first = 0
        for name, rows in zip(linear.names, linear.splits, strict=True):
            if row - first >= q.shape[0]:
                fmt, q = next(stack)
                first = row
            taken = fmt.take(q, torch.arange(row - first, row - first + rows, device=block.device))
            some = torch.arange(0, rows, -(-rows // COMPARED_ROWS), device=block.device)
            w = original[row : row + rows][some]
            scale = max(_error(w, hessian), 1e-30)
            error = _error(fmt.dequantize(fmt.take(taken, some)) - w, hessian) / scale
            plain = 0.0
            if q.spec not in FLOATS:
                plain = _error(fmt.dequantize(rtn.quantize(w, fmt, {}, self.target)) - w, hessian) / scale
            done.tensors[f"{name}.weight"] = QTensor(
                taken.spec, taken.shape, {k: p.cpu() for k, p in taken.parts.items()}
            )
            share = seconds * rows / sum(linear.splits)
            done.lines.append(
                Line(block.index, name.removeprefix(block.prefix), q.spec, error, plain, share, hessian is not None)
            )
            row += rows


def _error(e: Tensor, hessian: Tensor | None) -> float:
    """What errors e [out, in] do to outputs; of inputs that nobody has seen, as if all counted the same."""
    return float(e.double().square().sum()) if hessian is None else output_error(e, hessian)
