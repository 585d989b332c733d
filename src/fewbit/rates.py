"""What each part of a model loses at each number of bits: measured on calibration text, before anything is written.

A weight that changes by E changes its outputs by E x, and the predictions by a divergence of about g^2 (E x)^2 / 2 nats a
token, g the loss's gradient there (the Fisher information: Amari, Natural Gradient Works Efficiently in Learning, 1998,
section 2; for weights LeCun et al. 1990, Optimal Brain Damage). Summed over the channels and tokens of the calibration
text, that is g^2 tr(E H E^T) / 2 with H the mean of x x^T. The output head needs no such step: its divergence is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from fewbit.allocation import Choice, Item
from fewbit.blocks import FloatBlock, FloatLinear, embed
from fewbit.calibrated import collect, propagate
from fewbit.checkpoint._writer import Planned
from fewbit.formats import parse
from fewbit.methods import Stats, Target, rtn
from fewbit.sensitivity import PROBES, Head, Probe, Report, Sensitivity
from fewbit.source import Source
from fewbit.walk import quantized


@dataclass(frozen=True)
class Part:
    """Tensors that share a choice: matrices of one input, or the embedding (with the head, where they are one)."""

    name: str
    tensors: tuple[str, ...]
    item: Item


class Meter:
    """Measures a full-precision model block by block, every matrix at every one of `specs`."""

    def __init__(
        self,
        source: Source,
        method: ModuleType,
        target: Target,
        device: torch.device,
        product: torch.dtype,
        report: Report,
    ) -> None:
        self.source, self.method, self.target = source, method, target
        self.device, self.product, self.report = device, product, report

    @torch.no_grad()
    def measure(self, windows: Tensor, specs: Sequence[str], folder: Path) -> list[Part]:
        """windows int64 [n, length]; `folder` takes a scratch file. Losses are in nats a token."""
        sensitivity = Probe(self.source, self.device, self.product, self._share(0.0, 0.3)).measure(windows, folder)
        hidden = torch.cat(list(embed(self.source, windows)))
        parts: list[Part] = []
        blocks = self.source.args.num_hidden_layers
        for i in range(blocks):
            self.report(f"what bits are worth: block {i + 1} of {blocks}", 0.3 + 0.6 * i / blocks)
            block = FloatBlock(self.source, i, windows.shape[1], self.device, product=self.product)
            stats = collect(block, hidden, None, sensitivity.positions[i])
            for j, (linear, found) in enumerate(zip(block.linears, stats, strict=True)):
                parts.append(self._linear(linear, found, float(sensitivity.scales[i, j]), specs))
            propagate(block, hidden)
        self.report("what bits are worth: embedding and head", 0.9)
        return parts + self._ends(windows, hidden, sensitivity, specs)

    def _share(self, start: float, length: float) -> Report:
        return lambda text, share: self.report(text, start + length * share)

    def _linear(self, linear: FloatLinear, stats: Stats, scale: float, specs: Sequence[str]) -> Part:
        choices = []
        for spec in specs:
            fmt = parse(spec)
            off = fmt.dequantize(self.method.quantize(linear.weight, fmt, dict(stats), self.target)) - linear.weight
            loss = scale / 2 * float((off @ stats["hessian"]).mul_(off).sum(dtype=torch.float64))
            choices.append(Choice(spec, self._nbytes(spec, linear.names), max(0.0, loss)))
        names = tuple(f"{name}.weight" for name in linear.names)
        return Part(linear.names[0], names, Item(linear.names[0], tuple(choices)))

    def _nbytes(self, spec: str, names: Sequence[str]) -> int:
        shapes = {w.name.removesuffix(".weight"): w.shape for w in self.source.weights}
        return sum(parse(spec).nbytes(shapes[name], self.source.dtype) for name in names)

    def _ends(self, windows: Tensor, hidden: Tensor, sensitivity: Sensitivity, specs: Sequence[str]) -> list[Part]:
        """Embedding and head; one part where they are one matrix."""
        named = {w.role: w.name for w in self.source.weights if w.block is None}
        losses: dict[str, list[float]] = {}
        for role, lost in (("embedding", self._entrance(windows, sensitivity)), ("head", self._exit(hidden))):
            found = losses.setdefault(named.get(role, named["embedding"]), [0.0] * len(specs))
            for k, spec in enumerate(specs):
                found[k] += lost(spec)
        return [
            Part(
                name,
                (name,),
                Item(
                    name,
                    tuple(
                        Choice(spec, self._nbytes(spec, [name.removesuffix(".weight")]), loss)
                        for spec, loss in zip(specs, found, strict=True)
                    ),
                ),
            )
            for name, found in losses.items()
        ]

    def _entrance(self, windows: Tensor, sensitivity: Sensitivity) -> Callable[[str], float]:
        """spec -> loss by what the embedding gives."""
        w = next(w for w in self.source.weights if w.role == "embedding")
        # g^2 summed by token: rows that do not occur cost nothing
        costs = torch.zeros(w.shape).index_add_(
            0, windows.flatten(), sensitivity.entrance.float().cpu().repeat(len(windows), 1)
        )
        costs /= windows.numel()

        def lost(spec: str) -> float:
            total, row = 0.0, 0
            for off in self._rounded(w.name, w.shape, spec):
                total += float((off.square_() * costs[row : row + len(off)]).sum(dtype=torch.float64)) / 2
                row += len(off)
            return total

        return lost

    def _exit(self, hidden: Tensor) -> Callable[[str], float]:
        """spec -> divergence of the predictions with the head in it, at the last hidden states of a few windows."""
        head = Head(self.source, self.device, self.product)
        named = {w.role: w for w in self.source.weights if w.block is None}
        w = named.get("head", named["embedding"])
        states = head.normed(hidden[:PROBES].flatten(0, 1).to(self.device))

        def lost(spec: str) -> float:
            changes = [off.to(self.device) for off in self._rounded(w.name, w.shape, spec)]
            total = 0.0
            for x in states.split(head.tokens):
                exact = torch.cat([(x.to(part.dtype) @ part.t()).float() for part in head.parts], 1)
                moved = torch.cat([x @ off.t() for off in changes], 1).add_(exact)
                p, q = exact.log_softmax(1), moved.log_softmax(1)
                total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
            return max(0.0, total / len(states))

        return lost

    def _rounded(self, name: str, shape: tuple[int, ...], spec: str) -> list[Tensor]:
        """What rounding to nearest changes, float32 [rows, in], in slices of rows."""
        found, row = [], 0
        for q in quantized(self.source, Planned(name, spec, shape), rtn, self.target):
            original = self.source.read(name, (row, row + q.shape[0]))
            found.append(parse(spec).dequantize(q) - parse(original.spec).dequantize(original))
            row += q.shape[0]
        return found
