"""What each part of a model loses at each number of bits: measured on calibration text, before anything is written.

A weight that changes by E changes its outputs by E x, and the predictions by a divergence of about g^2 (E x)^2 / 2
nats a token, g the loss's gradient there (the Fisher information: LeCun, Denker, Solla 1990, Optimal Brain Damage,
section 2; Martens 2020, New Insights and Perspectives on the Natural Gradient Method, section 5). Summed over the
channels and tokens of the calibration text, that is g^2 tr(E H E^T) / 2 with H the mean of x x^T. The output head
needs no such step: its divergence is found by computing it.
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
from fewbit.checkpoint._writer import Planned
from fewbit.formats import parse
from fewbit.formats.integer import IntegerFormat
from fewbit.methods import Stats, Target, rtn
from fewbit.passes import collect, propagate
from fewbit.sensitivity import PROBES, Head, Probe, Report, Sensitivity
from fewbit.source import Source
from fewbit.walk import quantized

# which spec a part gets, by its name
Config = Callable[[str], str]


@dataclass(frozen=True)
class Part:
    """Tensors that share a choice: matrices of one input, or the embedding (with the head, where they are one)."""

    name: str
    tensors: tuple[str, ...]
    item: Item
    # whether it belongs to a block
    inside: bool


@dataclass(frozen=True)
class Joint:
    """All parts rounded at once: the spec of each, and the mean divergence in nats a token on text held out."""

    picks: dict[str, str]
    kl: float


@dataclass
class _Stream:
    """Held-out text on its way through the model, rounded as a config says."""

    config: Config
    hidden: Tensor
    picks: dict[str, str]


class Meter:
    """Measures a full-precision model block by block, every matrix at every one of `specs`.

    The method is run at the `anchors` alone, which must be among the specs, and at what configurations ask for.
    """

    def __init__(
        self,
        source: Source,
        method: ModuleType,
        target: Target,
        device: torch.device,
        product: torch.dtype,
        report: Report,
        anchors: Sequence[str],
    ) -> None:
        self.anchors = anchors
        self.source, self.method, self.target = source, method, target
        self.device, self.product, self.report = device, product, report

    @torch.no_grad()
    def measure(
        self,
        windows: Tensor,
        specs: Sequence[str],
        folder: Path,
        held_out: Tensor | None = None,
        configs: Sequence[Config] = (),
    ) -> tuple[list[Part], list[Joint]]:
        """The losses of every part at every spec, and the divergences of whole configurations.

        windows, held_out  int64 [n, length]: text to measure on, other text for the configurations
        folder             takes a scratch file
        """
        sensitivity = Probe(self.source, self.device, self.product, self._share(0.0, 0.2)).measure(windows, folder)
        hidden = torch.cat(list(embed(self.source, windows)))
        streams = self._streams(held_out, configs)
        parts: list[Part] = []
        blocks = self.source.args.num_hidden_layers
        for i in range(blocks):
            self.report(f"what bits are worth: block {i + 1} of {blocks}", 0.2 + 0.7 * i / blocks)
            block = FloatBlock(self.source, i, windows.shape[1], self.device, product=self.product)
            stats = collect(block, hidden, None, sensitivity.positions[i])
            propagate(block, hidden)
            rounded: list[dict[str, Tensor]] = []
            found: dict[str, list[tuple[FloatLinear, list[Choice]]]] = {}
            shares = _shares(block, stats)
            for j, linear in enumerate(block.linears):
                wanted = {stream.config(block.kinds[j]) for stream in streams[1:]}
                scale = float(sensitivity.scales[i][j]) * shares[j]
                choices, weights = self._linear(linear, stats[j], scale, specs, wanted)
                found.setdefault(block.kinds[j], []).append((linear, choices))
                rounded.append(weights)
            parts += [_together(kind, members) for kind, members in found.items()]
            self._advance(block, rounded, streams)
        self.report("what bits are worth: embedding and head", 0.9)
        parts += self._ends(windows, hidden, sensitivity, specs)
        return parts, self._judged(streams)

    def _streams(self, held_out: Tensor | None, configs: Sequence[Config]) -> list[_Stream]:
        """The original's, then one for each config, behind the embedding."""
        if held_out is None or not configs:
            return []
        name = next(w.name for w in self.source.weights if w.role == "embedding")
        exact = torch.cat(list(embed(self.source, held_out)))
        streams = [_Stream(lambda _: "", exact, {})]
        for config in configs:
            spec = config(name)
            changes = torch.cat(self._rounded(name, spec))
            streams.append(_Stream(config, exact + changes[held_out], {name: spec}))
        return streams

    def _advance(self, block: FloatBlock, rounded: list[dict[str, Tensor]], streams: list[_Stream]) -> None:
        """Every stream through the block, with the weights that its config asks for."""
        originals = [linear.weight for linear in block.linears]
        for k, stream in enumerate(streams):
            stream.picks |= {kind: stream.config(kind) for kind in block.kinds}
            for linear, kind, weights, original in zip(block.linears, block.kinds, rounded, originals, strict=True):
                linear.weight = weights[stream.picks[kind]].to(original) if k else original
            propagate(block, stream.hidden)

    def _judged(self, streams: list[_Stream]) -> list[Joint]:
        """The divergences of the streams' predictions from the first one's, over the later half of each window."""
        if not streams:
            return []
        head = Head(self.source, self.device, self.product)
        named = {w.role: w for w in self.source.weights if w.block is None}
        name = named.get("head", named["embedding"]).name
        middle = streams[0].hidden.shape[1] // 2
        exact = head.normed(streams[0].hidden[:, middle:].flatten(0, 1).to(self.device))
        found = []
        for stream in streams[1:]:
            stream.picks[name] = stream.config(name)
            other = head.changed(self._rounded(name, stream.picks[name]))
            moved = head.normed(stream.hidden[:, middle:].flatten(0, 1).to(self.device))
            found.append(Joint(stream.picks, head.divergence(exact, moved, other)))
        return found

    def _share(self, start: float, length: float) -> Report:
        return lambda text, share: self.report(text, start + length * share)

    def _linear(
        self, linear: FloatLinear, stats: Stats, scale: float, specs: Sequence[str], wanted: set[str]
    ) -> tuple[list[Choice], dict[str, Tensor]]:
        """The losses, and the rounded weights of the `wanted` specs in 16 bits."""
        choices, kept = [], {}
        # an expert that no token came to
        method = self.method if "hessian" in stats else rtn
        plain = {spec: self._off(linear, rtn, stats, spec)[1] for spec in specs}
        solved: dict[str, float] = {}
        for spec in {*self.anchors, *wanted}:
            rounded, solved[spec] = self._off(linear, method, stats, spec)
            if spec in wanted:
                kept[spec] = rounded.to(torch.bfloat16).cpu()
        for spec in specs:
            anchor = spec if spec in solved else min(self.anchors, key=lambda a: abs(_bits(a) - _bits(spec)))
            # what the method gains on plain rounding is much the same for formats of like widths
            gained = solved[anchor] / plain[anchor] if plain.get(anchor) else 1.0
            loss = scale / 2 * (solved[spec] if spec in solved else plain[spec] * gained)
            choices.append(Choice(spec, self._nbytes(spec, linear.names), max(0.0, loss)))
        return choices, kept

    def _off(self, linear: FloatLinear, method: ModuleType, stats: Stats, spec: str) -> tuple[Tensor, float]:
        """The weights rounded by a method, and tr(E H E^T) of what that changes; 0 where no token came."""
        fmt = parse(spec)
        rounded = fmt.dequantize(method.quantize(linear.weight, fmt, dict(stats), self.target))
        if "hessian" not in stats:
            return rounded, 0.0
        off = rounded - linear.weight
        return rounded, float((off @ stats["hessian"]).mul_(off).sum(dtype=torch.float64))

    def _nbytes(self, spec: str, names: Sequence[str]) -> int:
        shapes = {w.name.removesuffix(".weight"): w.shape for w in self.source.weights}
        return sum(parse(spec).nbytes(shapes[name], self.source.dtype) for name in names)

    def _ends(self, windows: Tensor, hidden: Tensor, sensitivity: Sensitivity, specs: Sequence[str]) -> list[Part]:
        """Embedding and head; one part where they are one matrix."""
        named = {w.role: w for w in self.source.weights if w.block is None}
        costs: dict[str, list[Callable[[list[Tensor]], float]]] = {}
        costs.setdefault(named["embedding"].name, []).append(self._entrance(windows, sensitivity))
        costs.setdefault(named.get("head", named["embedding"]).name, []).append(self._exit(hidden))
        parts = []
        for name, lost in costs.items():
            choices = []
            for spec in specs:
                changes = self._rounded(name, spec)
                nbytes = self._nbytes(spec, [name.removesuffix(".weight")])
                choices.append(Choice(spec, nbytes, sum(cost(changes) for cost in lost)))
            parts.append(Part(name, (name,), Item(name, tuple(choices)), False))
        return parts

    def _entrance(self, windows: Tensor, sensitivity: Sensitivity) -> Callable[[list[Tensor]], float]:
        """Changes of the embedding, in slices of rows -> loss by what it gives."""
        shape = (self.source.args.vocab_size, self.source.args.hidden_size)
        # g^2 summed by token: rows that do not occur cost nothing
        squares = sensitivity.entrance.float().cpu().repeat(len(windows), 1)
        costs = torch.zeros(shape).index_add_(0, windows.flatten(), squares) / windows.numel()

        def lost(changes: list[Tensor]) -> float:
            pieces = zip(changes, costs.split([len(off) for off in changes]), strict=True)
            return sum(float((off.square() * cost).sum(dtype=torch.float64)) / 2 for off, cost in pieces)

        return lost

    def _exit(self, hidden: Tensor) -> Callable[[list[Tensor]], float]:
        """Changes of the head -> divergence of the predictions with them, at last hidden states of a few windows."""
        head = Head(self.source, self.device, self.product)
        states = head.normed(hidden[:PROBES].flatten(0, 1).to(self.device))

        return lambda changes: head.divergence(states, states, head.changed(changes))

    def _rounded(self, name: str, spec: str) -> list[Tensor]:
        """What rounding to nearest changes, float32 [rows, in], in slices of rows."""
        shape = next(w.shape for w in self.source.weights if w.name == name)
        found, row = [], 0
        for q in quantized(self.source, Planned(name, spec, shape), rtn, self.target):
            original = self.source.read(name, (row, row + q.shape[0]))
            found.append(parse(spec).dequantize(q) - parse(original.spec).dequantize(original))
            row += q.shape[0]
        return found


def _shares(block: FloatBlock, stats: Sequence[Stats]) -> list[float]:
    """Of the gradients of a kind of matrices, what share is each one's: experts' by the tokens that came to them."""
    tokens = [float(found["tokens"]) if "tokens" in found else 0.0 for found in stats]
    total: dict[str, float] = {}
    for kind, count in zip(block.kinds, tokens, strict=True):
        total[kind] = total.get(kind, 0.0) + count
    members = [block.kinds.count(kind) for kind in block.kinds]
    return [
        count / total[kind] if n > 1 and total[kind] else 1.0
        for kind, count, n in zip(block.kinds, tokens, members, strict=True)
    ]


def _together(kind: str, members: Sequence[tuple[FloatLinear, list[Choice]]]) -> Part:
    """One part of all matrices of a kind: the experts of a block share a choice."""
    names = tuple(f"{name}.weight" for linear, _ in members for name in linear.names)
    choices = tuple(
        Choice(same[0].spec, sum(c.nbytes for c in same), sum(c.loss for c in same))
        for same in zip(*(choices for _, choices in members), strict=True)
    )
    return Part(kind, names, Item(kind, choices), True)


def _bits(spec: str) -> float:
    fmt = parse(spec)
    return float(fmt.bits) if isinstance(fmt, IntegerFormat) else 16.0
