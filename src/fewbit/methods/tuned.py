"""Tuned rounding: GPTQ's codes and scales of a whole block, moved by gradients until the block gives what it gave.

What is minimized is the squared difference between the quantized block's outputs, on what the quantized prefix hands
on, and the full-precision model's outputs, channels weighted by what they count. Each weight has a real level that is
rounded in the forward pass and takes the gradient as if it were not; scales move relative to where they were. Steps
have the gradient's sign and a length that falls to zero (SignRound, Cheng et al. 2023, section 3): at 3 bits that ends
lower than Adam does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.formats import Format
from fewbit.methods import BlockPart, Stats, Target, gptq
from fewbit.qtensor import QTensor

NEEDS = frozenset({"hessian", "goals"})
# by effort: steps of a block
STEPS = (50, 100, 100, 200)
WINDOWS = 8
# lengths of the first step times the number of steps: all together a level moves by up to half its cell
LEVEL_REACH, SCALE_REACH = 1.0, 0.2
# levels start where the weight lies, but within the cell GPTQ chose
CELL = 0.49


def quantize(w: Tensor, fmt: Format, stats: Stats, target: Target) -> QTensor:
    """The codes tuning begins with: GPTQ's."""
    return gptq.quantize(w, fmt, stats, target)


class Levels:
    """A linear's weights as scale x level, both free to move."""

    def __init__(self, fmt: Format, q: QTensor, original: Tensor) -> None:
        self.fmt = fmt
        codes, self.params = fmt.unpack(q)
        found = fmt.scaled(codes, self.params)
        if found is None:
            raise ValueError(f"{fmt.spec} is not linear in its scales")
        self.group, (self.low, self.high) = found.group, found.limits
        self.base = found.scale
        self.span = int((self.group == 0).sum())
        inside = (original / self.base[:, self.group] - found.levels).clamp_(-CELL, CELL)
        self.level = (found.levels + inside).requires_grad_(True)
        self.change = torch.zeros_like(self.base).requires_grad_(True)

    def weight(self) -> Tensor:
        """Differentiable weights: rounding passes gradients through, clipping stops them."""
        rounded = self.level + (self.level.detach().round() - self.level.detach())
        return rounded.clamp(self.low, self.high) * self._spread(self.base * (1 + self.change))

    def _spread(self, scale: Tensor) -> Tensor:
        """[out, groups] -> [out, in]. By expanding, not indexing: its gradient is a plain sum, the same every time."""
        wide = scale[:, :, None].expand(-1, -1, self.span).flatten(1)
        return wide[:, : self.level.shape[1]]

    @torch.no_grad()
    def clip(self) -> None:
        """Keep levels where a gradient can bring them back."""
        self.level.clamp_(self.low - CELL, self.high + CELL)

    @torch.no_grad()
    def stored(self) -> QTensor:
        """Codes and scales as they are stored; codes are the levels' nearest, whatever rounding did to the scale."""
        params = self.fmt.with_scale(self.params, self.base * (1 + self.change))
        levels = self.level.round().clamp(self.low, self.high)
        values = levels * params["scale"].float()[:, self.group]
        return self.fmt.pack(self.fmt.round(values, params), params)


def tune(part: BlockPart, target: Target) -> list[QTensor]:
    """The block's linears after STEPS steps; a block that tuning does not improve stays as it was."""
    if any(fmt.scaled(*fmt.unpack(q)) is None for fmt, q in part.solved):
        target.note("the format has no scales to tune: GPTQ's codes stay")
        return [q for _, q in part.solved]
    with torch.enable_grad():
        return _tune(part, STEPS[target.effort])


def _tune(part: BlockPart, steps: int) -> list[QTensor]:
    free = [Levels(fmt, q, w) for (fmt, q), w in zip(part.solved, part.originals, strict=True)]
    moved = [f.level for f in free] + [f.change for f in free]
    reaches = [LEVEL_REACH] * len(free) + [SCALE_REACH] * len(free)
    random = torch.Generator().manual_seed(0)
    before = _loss(part)
    for step in range(steps):
        inputs, goals = part.batches(WINDOWS, random)
        for linear, f in zip(part.linears, free, strict=True):
            linear.weight = f.weight()
        # an expert that no token of these windows came to has none
        gradients = torch.autograd.grad(part.loss(inputs, goals), moved, allow_unused=True)
        with torch.no_grad():
            for x, g, reach in zip(moved, gradients, reaches, strict=True):
                if g is not None:
                    x.sub_(g.sign(), alpha=reach / steps * (1 - step / steps))
        for f in free:
            f.clip()
        part.progress(step + 1, steps)
    stored = [f.stored() for f in free]
    for linear, f, q in zip(part.linears, free, stored, strict=True):
        linear.weight = f.fmt.dequantize(q)
    return stored if _loss(part) < before else [q for _, q in part.solved]


@torch.no_grad()
def _loss(part: BlockPart) -> float:
    """On up to 32 windows, the same each time."""
    random = torch.Generator().manual_seed(1)
    total, count = 0.0, max(1, min(part.windows, 32) // WINDOWS)
    for _ in range(count):
        inputs, goals = part.batches(WINDOWS, random)
        total += float(part.loss(inputs, goals))
    return total / count
