"""What the loss makes of an error: how much each position and each channel counts in calibration's sums.

When a linear's weights change by E, its outputs change by E x and the loss by about (g . E x)^2 / 2, g the loss's
gradient there (Fisher information; GuidedQuant, Kim et al. 2025, section 3). What g^2 is depends above all on where a
token stands: attention rests on the first one of a text, whose key must be right and whose value hardly matters, while
its activations are the largest there are. So g^2 is measured on a few windows, and its mean by position taken for all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewbit.blocks import FloatBlock, FloatLinear, WindowOps, embed, load_block
from fewbit.formats import parse
from fewbit.layers import RMSNorm
from fewbit.passes import Seen, batches, propagate
from fewbit.scratch import mapped
from fewbit.source import FLOATS, Source

# windows that are run forward and backward
PROBES = 8
# logits computed at once
LOGITS = 1 << 24
HEAD_ROWS = 8192

# told what is being done, and which share of it is
Report = Callable[[str, float], None]


@dataclass(frozen=True)
class Sensitivity:
    """Weights of mean 1: of each block positions [linears, length] of a window, and channels [blocks, d] of blocks'
    outputs. Experts' matrices of a kind share theirs.

    What they are relative to: of each block `scales` [linears], the mean g^2 at outputs; `entrance` [length, d],
    the mean g^2 at what the embedding gives.
    """

    positions: list[Tensor]
    channels: Tensor
    scales: list[Tensor]
    entrance: Tensor

    def save(self, file: Path) -> None:
        """Whole or not at all, whatever happens meanwhile."""
        beside = file.with_suffix(".new")
        lists = {"positions": self.positions, "scales": self.scales}
        parts = {f"{name}.{i}": t.contiguous() for name, found in lists.items() for i, t in enumerate(found)}
        save_file({"channels": self.channels, "entrance": self.entrance.contiguous()} | parts, beside)
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.rename(file)

    @classmethod
    def load(cls, file: Path) -> Sensitivity:
        """What `save` wrote."""
        found = load_file(file)
        blocks = range((len(found) - 2) // 2)
        positions, scales = ([found[f"{name}.{i}"] for i in blocks] for name in ("positions", "scales"))
        return cls(positions, found["channels"], scales, found["entrance"])


class Head:
    """Final norm and output head, in 16 bits where the head is stored so; logits a slice of tokens at a time."""

    def __init__(self, source: Source, device: torch.device, product: torch.dtype) -> None:
        self.source, self.device, self.product = source, device, product
        roles = {w.role: w.name for w in source.weights if w.block is None}
        q = source.read(roles["norm"])
        self.norm = parse(q.spec).dequantize(q).to(device) + source.args.norm_offset
        name = roles.get("head", roles["embedding"])
        fmt, dtype = parse(source.spec(name)), FLOATS.get(source.spec(name), torch.float32)
        total = source.args.vocab_size
        self.parts = [
            fmt.dequantize(source.read(name, (i, min(i + HEAD_ROWS, total)))).to(device, dtype)
            for i in range(0, total, HEAD_ROWS)
        ]
        self.tokens = max(1, LOGITS // total)

    def normed(self, x: Tensor) -> Tensor:
        """What the head multiplies of last hidden states x [T, d]."""
        return RMSNorm(self.norm, self.source.args.rms_norm_eps, WindowOps(len(x)))(x)

    def logits(self, x: Tensor) -> Tensor:
        """Of normed states x [T, d], float32 [T, vocab]."""
        return self.capped(self._products(x))

    def _products(self, x: Tensor) -> Tensor:
        return torch.cat([(x.to(part.dtype) @ part.t()).float() for part in self.parts], 1)

    def capped(self, logits: Tensor) -> Tensor:
        """Where the model bounds them softly."""
        cap = self.source.args.final_soft_cap
        return (logits / cap).tanh_().mul_(cap) if cap else logits

    def divergence(self, exact: Tensor, moved: Tensor, other: Callable[[Tensor], Tensor]) -> float:
        """Mean KL in nats between this head's predictions of normed states `exact` [T, d] and those that the logits
        `other(moved)` make, a few tokens at a time.
        """
        total = 0.0
        for x, y in zip(exact.split(self.tokens), moved.split(self.tokens), strict=True):
            p, q = self.logits(x).log_softmax(1), other(y).log_softmax(1)
            total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        return max(0.0, total / len(exact))

    def changed(self, changes: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        """The logits of this head with `changes` added to its rows, given in slices."""
        placed = [off.to(self.device) for off in changes]
        return lambda x: self.capped(self._products(x).add_(torch.cat([x @ off.t() for off in placed], 1)))

    def pull(self, x: Tensor, draws: Tensor) -> Tensor:
        """Gradient at last hidden states x [T, d] of -log p(label), for labels drawn from the model's own predictions:
        where the sum of probabilities passes `draws` [T, 1].
        """
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            normed = self.normed(x)
        read = normed.detach().to(self.product)
        logits = torch.cat([(read @ part.to(self.product).t()).float() for part in self.parts], 1)
        cap, slope = self.source.args.final_soft_cap, None
        if cap:
            logits = (logits / cap).tanh_()
            # of tanh, at what it gave
            slope = 1 - logits.square()
            logits *= cap
        p = logits.softmax(1)
        labels = torch.searchsorted(p.cumsum(1), draws).clamp_(max=p.shape[1] - 1)
        p.scatter_add_(1, labels, torch.full_like(draws, -1.0))
        if slope is not None:
            p *= slope
        back = torch.zeros_like(normed)
        for piece, part in zip(
            p.to(self.product).split([len(part) for part in self.parts], 1), self.parts, strict=True
        ):
            back += (piece @ part.to(self.product)).float()
        return torch.autograd.grad(normed, x, back)[0]


class Probe:
    """Runs windows forward and backward through the full-precision model, block by block."""

    def __init__(self, source: Source, device: torch.device, product: torch.dtype, report: Report) -> None:
        self.source, self.device, self.product, self.report = source, device, product, report
        self.blocks = source.args.num_hidden_layers

    def measure(self, windows: Tensor, folder: Path) -> Sensitivity:
        """windows int64 [n, length]; `folder` takes a scratch file. Squared gradients of PROBES windows at most."""
        windows = windows[:PROBES]
        n, length = windows.shape
        inputs = mapped(folder / "states.bin", (self.blocks, n, length, self.source.args.hidden_size), torch.bfloat16)
        gradient = self._at_head(self._forward(windows, inputs))
        tokens: list[Tensor] = []
        channels: list[Tensor] = []
        for i in reversed(range(self.blocks)):
            self.report(f"what counts for the loss: block {i + 1} backward", 1 - 2 / 3 * (i + 1) / self.blocks)
            channels.insert(0, gradient.square().mean((0, 1)))
            tokens.insert(0, self._through(self._block(i, length), inputs[i], gradient))
        positions = [by_octave(t.unflatten(-1, (n, length)).mean(1)) for t in tokens]
        scales = [p.mean(-1) for p in positions]
        entrance = by_octave(gradient.square().mean(0).t()).t()
        return Sensitivity([mean_one(p) for p in positions], mean_one(torch.stack(channels)), scales, entrance)

    def _block(self, index: int, length: int) -> FloatBlock:
        return load_block(self.source, index, length, self.device, self.product)

    def _forward(self, windows: Tensor, inputs: Tensor) -> Tensor:
        """Hidden states [n, length, d] behind the last block; `inputs` takes what each block is given."""
        hidden = torch.cat(list(embed(self.source, windows)))
        for i in range(self.blocks):
            self.report(f"what counts for the loss: block {i + 1} forward", i / self.blocks / 3)
            inputs[i] = hidden
            propagate(self._block(i, windows.shape[1]), hidden)
        return hidden

    @torch.no_grad()
    def _at_head(self, hidden: Tensor) -> Tensor:
        """The gradient [n, length, d] at the last hidden states."""
        head = Head(self.source, self.device, self.product)
        gradient = torch.empty_like(hidden)
        for window, states in enumerate(hidden):
            draws = torch.rand(len(states), 1, generator=torch.Generator().manual_seed(window)).to(self.device)
            for start in range(0, len(states), head.tokens):
                part = slice(start, start + head.tokens)
                gradient[window, part] = head.pull(states[part].to(self.device), draws[part]).to(gradient)
        return gradient

    def _through(self, block: FloatBlock, inputs: Tensor, gradient: Tensor) -> Tensor:
        """Takes `gradient` back through a block, in place; mean squares at its linears' outputs [linears, tokens]."""
        found = []
        outputs: dict[int, Seen] = {}

        def keep(linear: FloatLinear, y: Tensor) -> None:
            outputs[id(linear)] = Seen(y, block.ops.tokens)

        for part, x in batches(inputs, self.device):
            x.requires_grad_()
            outputs.clear()
            with torch.enable_grad(), block.watched(after=keep):
                y = block(x)
            back, *squares = torch.autograd.grad(
                y, [x, *(seen.x for seen in outputs.values())], gradient[part].to(self.device)
            )
            # before the gradient is written over: the last linear's is a view of it
            found.append(_by_linear(block, outputs, [g.square().mean(1) for g in squares], len(y) * y.shape[1]).cpu())
            gradient[part] = back.to(gradient)
        return torch.cat(found, 1)


def _by_linear(block: FloatBlock, outputs: dict[int, Seen], squares: list[Tensor], tokens: int) -> Tensor:
    """Mean squared gradients [linears, tokens]; experts' matrices of a kind have those of all together."""
    of = {kind: torch.zeros(tokens, device=block.device) for kind in block.kinds}
    place = {id(linear): kind for linear, kind in zip(block.linears, block.kinds, strict=True)}
    for (linear, seen), square in zip(outputs.items(), squares, strict=True):
        total = of[place[linear]]
        if seen.tokens is None:
            total += square
        else:
            total.index_add_(0, seen.tokens, square)
    return torch.stack([of[kind] for kind in block.kinds])


def by_octave(x: Tensor) -> Tensor:
    """x [..., length] replaced by its means over positions 0, 1, 2 to 3, 4 to 7, 8 to 15 and so on."""
    found, start, stop = [], 0, 1
    while start < x.shape[-1]:
        part = x[..., start:stop]
        found.append(part.mean(-1, keepdim=True).expand(part.shape))
        start, stop = stop, 2 * stop
    return torch.cat(found, -1)


def mean_one(x: Tensor) -> Tensor:
    """x [..., n] over its mean; ones where that can't be told."""
    mean = x.mean(-1, keepdim=True)
    usable = (mean > 0) & mean.isfinite()
    return torch.where(usable, x / mean, torch.ones_like(x))
