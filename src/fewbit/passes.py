"""Passes of calibration text over a block: forward, and with the sums of what its linears are given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.blocks import FloatBlock, FloatLinear
from fewbit.errors import FewbitError
from fewbit.methods import Stats

# tokens that run through a block at once: bounds the activations' memory
BATCH_TOKENS = 2048
# x^T x is symmetric: computed in strips of rows it takes 5/8 of the work, and narrower strips multiply slower
STRIPS, LEAST_STRIP = 4, 128


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


@dataclass(frozen=True)
class Seen:
    """A linear's input [n, in], and which tokens of the batch that is; None: all of them."""

    x: Tensor
    tokens: Tensor | None


class _SeenAll(Exception):  # noqa: N818
    """Every linear of a block was shown its input."""


class _Watch:
    """Runs a block and keeps what its linears are given."""

    def __init__(self, block: FloatBlock) -> None:
        self.block = block
        self._place = {id(linear): i for i, linear in enumerate(block.linears)}
        self._seen: list[Seen | None] = []

    def run(self, x: Tensor) -> list[Seen | None]:
        """Hidden states [n, length, d] -> each linear's input; None for an expert that no token came to."""
        self._seen = [None] * len(self._place)
        with self.block.watched(self._keep), suppress(_SeenAll):
            self.block(x)
        return self._seen

    def _keep(self, linear: FloatLinear, x: Tensor) -> None:
        self._seen[self._place[id(linear)]] = Seen(x, self.block.ops.tokens)
        if linear is self.block.linears[-1] and not self.block.has_experts:
            # nobody asks for its product
            raise _SeenAll


@torch.no_grad()
def collect(block: FloatBlock, hidden: Tensor, reference: Tensor | None, weights: Tensor | None = None) -> list[Stats]:
    """Statistics of each linear's input, in the order of `block.linears`.

    Those of an expert are of the tokens that came to it, `tokens` of them, and empty where there were none.

    hidden     [n, length, d], what the quantized prefix hands on
    reference  the same of the full-precision model: then `cross` is collected too
    weights    what each position of a window counts in a linear's means [linears, length]; None: all the same
    """
    sums: list[Stats] = [{} for _ in block.linears]
    counts = [0] * len(sums)
    # sums are made of what a linear multiplies; of bfloat16, a batch's is off by less than damping adds, but by more
    # than the prefix may have drifted
    products = [linear.product if reference is None else torch.float32 for linear in block.linears]
    even = torch.ones(len(sums), hidden.shape[1])
    roots = (even if weights is None else weights).sqrt().to(block.device)
    watch = _Watch(block)
    for part, x in batches(hidden, block.device):
        ours = watch.run(x)
        theirs: list[Seen | None] = [None] * len(ours)
        if reference is not None:
            # of two models' routers, one decides: what is compared are inputs of the same tokens
            with block.ops.following():
                theirs = watch.run(reference[part].to(block.device, torch.float32, non_blocking=True))
        for i, (seen, other) in enumerate(zip(ours, theirs, strict=True)):
            if seen is None:
                continue
            weigh = roots[i].repeat(len(x))[:, None]
            weigh = weigh if seen.tokens is None else weigh[seen.tokens]
            weighted = (seen.x * weigh).to(products[i])
            _add_gram(sums[i], weighted)
            if other is not None:
                _add_cross(sums[i], (other.x * weigh).to(products[i]), weighted)
            counts[i] += len(seen.x)
    for linear, stats, count in zip(block.linears, sums, counts, strict=True):
        if count:
            _finish(block, linear, stats, count)
            if block.has_experts:
                stats["tokens"] = torch.tensor(float(count))
    return sums


def _finish(block: FloatBlock, linear: FloatLinear, stats: Stats, count: int) -> None:
    """Means of sums over `count` tokens; FewbitError where they are not finite."""
    upper = stats["hessian"].triu_()
    stats["hessian"] = upper + upper.triu(1).t()
    for total in stats.values():
        total /= count
    if not bool(stats["hessian"].isfinite().all()):
        raise FewbitError(
            f"Calibration text gives NaN or infinity in block {block.index}.",
            f"At the input of {', '.join(linear.names)}.",
            "The checkpoint is damaged, or its activations overflow: check it with `fewbit eval`.",
        )


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
