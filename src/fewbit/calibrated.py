"""One block of the calibrated walk: what its linears see, what a method makes of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fewbit.blocks import FloatBlock, FloatLinear
from fewbit.errors import FewbitError
from fewbit.formats import Format, parse
from fewbit.methods import BlockPart, Feed, Stats, Target, rtn
from fewbit.methods._second_order import output_error
from fewbit.qtensor import QTensor
from fewbit.source import FLOATS, Source

# tokens that run through a block at once: bounds the activations' memory
BATCH_TOKENS = 2048
# tuning a block takes about this many times as long as finding what it begins with
TUNING = 10
# evenly spread rows that round to nearest is tried on beside the method
COMPARED_ROWS = 128
# x^T x is symmetric: computed in strips of rows it takes 5/8 of the work, and narrower strips multiply slower
STRIPS, LEAST_STRIP = 4, 128


@dataclass(frozen=True)
class Line:
    """What came of one matrix: squared output error relative to the output, of the method and of round to nearest, on
    COMPARED_ROWS of its rows.
    """

    block: int
    name: str
    spec: str
    error: float
    rtn_error: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the log."""
        return {k: getattr(self, k) for k in ("block", "name", "spec", "error", "rtn_error", "seconds")}


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


def batches(hidden: Tensor, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Hidden states [n, length, d] a few windows at a time, on the device; nobody waits for pinned ones."""
    step = max(1, BATCH_TOKENS // hidden.shape[1])
    for start in range(0, len(hidden), step):
        part = slice(start, start + step)
        yield part, hidden[part].to(device, torch.float32, non_blocking=True)


@torch.no_grad()
def propagate(block: FloatBlock, hidden: Tensor) -> None:
    """Run the block over the hidden states, in place. FewbitError where it gives NaN or infinity."""
    sums: list[tuple[slice, Tensor]] = []
    for part, x in batches(hidden, block.device):
        y = block(x)
        hidden[part].copy_(y, non_blocking=True)
        sums.append((part, y.sum()))
    # at the end: each look waits for the card, and this one for the last copy too
    for part, total in sums:
        # a sum is not finite where a value is not; it may overflow where none is
        if not bool(total.isfinite()) and not bool(hidden[part].isfinite().all()):
            raise _not_finite(block.index, hidden[part], part.start)


class _SeenAll(Exception):  # noqa: N818
    """Every linear of a block was shown its input."""


@torch.no_grad()
def collect(block: FloatBlock, hidden: Tensor, reference: Tensor | None, weights: Tensor | None = None) -> list[Stats]:
    """Statistics of each linear's input, in the order of `block.linears`.

    hidden     [n, length, d], what the quantized prefix hands on
    reference  the same of the full-precision model: then `cross` is collected too
    weights    what each position of a window counts in a linear's means [linears, length]; None: all the same
    """
    sums: list[Stats] = [{} for _ in block.linears]
    place = {id(linear): i for i, linear in enumerate(block.linears)}
    seen: list[Tensor] = [torch.empty(0)] * len(sums)
    # sums are made of what a linear multiplies; of bfloat16, a batch's is off by less than damping adds, but by more
    # than the prefix may have drifted
    products = [linear.product if reference is None else torch.float32 for linear in block.linears]
    even = torch.ones(len(sums), hidden.shape[1])
    roots = (even if weights is None else weights).sqrt().to(block.device)

    def keep(linear: FloatLinear, x: Tensor) -> None:
        seen[place[id(linear)]] = x
        if linear is block.linears[-1]:
            # nobody asks for its product
            raise _SeenAll

    def run(x: Tensor) -> None:
        with suppress(_SeenAll):
            block(x)

    with block.watched(keep):
        for part, x in batches(hidden, block.device):
            run(x)
            ours = list(seen)
            if reference is not None:
                run(reference[part].to(block.device, torch.float32, non_blocking=True))
            for i, (stats, x_in, y_in) in enumerate(zip(sums, ours, seen, strict=True)):
                weigh = roots[i].repeat(len(x))[:, None]
                weighted = (x_in * weigh).to(products[i])
                _add_gram(stats, weighted)
                if reference is not None:
                    _add_cross(stats, (y_in * weigh).to(products[i]), weighted)
    tokens = hidden.shape[0] * hidden.shape[1]
    for i, stats in enumerate(sums):
        upper = stats["hessian"].triu_()
        stats["hessian"] = upper + upper.triu(1).t()
        for total in stats.values():
            total /= tokens
        if not bool(stats["hessian"].isfinite().all()):
            raise FewbitError(
                f"Calibration text gives NaN or infinity in block {block.index}.",
                f"At the input of {', '.join(block.linears[i].names)}.",
                "The checkpoint is damaged, or its activations overflow: check it with `fewbit eval`.",
            )
    return sums


def _add_gram(stats: Stats, x: Tensor) -> None:
    """x^T x, in strips from the diagonal to the right: the rest is its mirror image."""
    columns = x.shape[1]
    if "hessian" not in stats:
        stats["hessian"] = torch.zeros(columns, columns, device=x.device)
    strip = max(LEAST_STRIP, -(-columns // STRIPS))
    for start in range(0, columns, strip):
        rows = slice(start, start + strip)
        total = stats["hessian"][rows, start:]
        if x.dtype == total.dtype:
            total.addmm_(x[:, rows].t(), x[:, start:])
        else:
            total += _product(x[:, rows].t(), x[:, start:])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In float32 on a card, which rounds nothing on the way out; on a CPU in the type of a and b."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a @ b


def _add_cross(stats: Stats, y: Tensor, x: Tensor) -> None:
    if "cross" not in stats:
        stats["cross"] = torch.zeros(y.shape[1], x.shape[1], device=x.device)
    stats["cross"] += _product(y.t(), x)


def _not_finite(index: int, y: Tensor, window: int) -> FewbitError:
    count = int((~y.isfinite()).sum())
    return FewbitError(
        f"Calibration text gives NaN or infinity in block {index}.",
        f"{count:,} of {y.numel():,} values in the windows from {window} on.",
        "The checkpoint is damaged, or its activations overflow: check it with `fewbit eval`.",
    )


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
                self._record(done, block, linear, original, parts, found["hessian"], seconds[-1])
                # those of a wide linear take more than the block, and nobody asks for them any more
                found.clear()
        if goals is not None and tunes:
            start = time.perf_counter()
            solved = self._tuned(block, originals, solved, hidden, goals, report)
            seconds = [s + (time.perf_counter() - start) / len(seconds) for s in seconds]
            for linear, original, parts, found, took in zip(
                block.linears, originals, solved, stats, seconds, strict=True
            ):
                self._record(done, block, linear, original, parts, found["hessian"], took)
        for name, vector in block.vectors.items():
            fmt = parse(self.spec(name))
            done.tensors[name] = fmt.pack(fmt.round(vector.cpu(), {}), {})
        return done

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
                found.append((fmt, self.modules[-1].quantize(w, fmt, dict(stats), self.target)))
        return found

    def _prepare(self, block: FloatBlock, stats: list[Stats]) -> None:
        rewriters = [m for m in self.modules if hasattr(m, "prepare")]
        if not rewriters:
            return
        feeds = [feed for i in range(len(block.linears)) if (feed := self._feed(block, i, stats[i])) is not None]
        fmt = parse(self.spec(f"{block.linears[0].names[0]}.weight"))
        for module in rewriters:
            module.prepare(feeds, fmt, self.target)

    def _feed(self, block: FloatBlock, i: int, stats: Stats) -> Feed | None:
        linear, module = block.linears[i], self.source.module
        name = linear.names[0].removeprefix(block.prefix)
        producer = module.FEEDS.get(name)
        if producer is None:
            return None
        channel = module.producers(self.source.args, name).to(block.device)
        norm = f"{block.prefix}{producer}.weight"
        if norm in block.vectors:
            return Feed(
                [linear.weight], stats, lambda s: s, _norm_divider(block.vectors[norm], FLOATS[self.spec(norm)])
            )
        rows = _rows_of(block, f"{block.prefix}{producer}")
        bias = f"{block.prefix}{producer}.bias"
        stored = FLOATS[self.spec(bias)] if bias in block.vectors else torch.float32
        return Feed([linear.weight], stats, _sharer(channel, len(rows[0])), _rows_divider(rows, channel, stored))

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
        hessian: Tensor,
        seconds: float,
    ) -> None:
        row = 0
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
            scale = max(output_error(w, hessian), 1e-30)
            error = output_error(fmt.dequantize(fmt.take(taken, some)) - w, hessian) / scale
            plain = 0.0
            if q.spec not in FLOATS:
                plain = output_error(fmt.dequantize(rtn.quantize(w, fmt, {}, self.target)) - w, hessian) / scale
            done.tensors[f"{name}.weight"] = QTensor(
                taken.spec, taken.shape, {k: p.cpu() for k, p in taken.parts.items()}
            )
            share = seconds * rows / sum(linear.splits)
            done.lines.append(Line(block.index, name.removeprefix(block.prefix), q.spec, error, plain, share))
            row += rows


def _norm_divider(norm: Tensor, stored: torch.dtype) -> Callable[[Tensor], Tensor]:
    def divide(s: Tensor) -> Tensor:
        # what the stored norm loses by rounding, the linears make good
        smaller = (norm / s).to(stored).float()
        kept = torch.where((smaller == 0) | ~smaller.isfinite(), norm, smaller)
        applied = torch.where(kept == 0, torch.ones_like(norm), norm / kept)
        norm.copy_(kept)
        return applied

    return divide


def _rows_of(block: FloatBlock, name: str) -> list[Tensor]:
    """The rows of a matrix within its stack, and of its bias where it has one; views, changed in place."""
    for linear in block.linears:
        if name in linear.names:
            at = linear.names.index(name)
            first = sum(linear.splits[:at])
            rows = slice(first, first + linear.splits[at])
            found = [linear.weight[rows]]
            if linear.bias is not None:
                found.append(linear.bias[rows])
                if f"{name}.bias" in block.vectors:
                    found.append(block.vectors[f"{name}.bias"])
            return found
    raise ValueError(f"{name} is no linear of block {block.index}")


def _sharer(channel: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    def share(s: Tensor) -> Tensor:
        # channels that one row feeds get their geometric mean
        total = torch.zeros(rows, device=s.device).index_add_(0, channel, s.log())
        count = torch.zeros_like(total).index_add_(0, channel, torch.ones_like(s))
        return (total / count.clamp(min=1)).exp()[channel]

    return share


def _rows_divider(rows: list[Tensor], channel: Tensor, stored: torch.dtype) -> Callable[[Tensor], Tensor]:
    def divide(s: Tensor) -> Tensor:
        by_row = torch.ones(len(rows[0]), device=s.device)
        by_row[channel] = s
        weight, *biases = rows
        weight /= by_row[:, None]
        for bias in biases:
            # what runs here is what will be stored
            bias.copy_((bias / by_row).to(stored))
        return s

    return divide
