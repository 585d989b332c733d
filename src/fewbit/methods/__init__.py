"""Which codes to choose. A method knows no format; the file name is the registry.

A module has `NEEDS`, what it wants of the walk ("hessian"; "goals", what the full-precision model's block gives), and

    quantize(w, fmt, stats, target) -> QTensor            one matrix, or several of the same input stacked by rows

and may have

    prepare(feeds, fmt, target)                           rewrites a block without changing what it computes
    tune(part, target) -> list[QTensor]                   improves the quantized linears of a block together

`a+b` names two of them: a's `prepare`, then b's `quantize` and `tune`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewbit.formats import Format
from fewbit.qtensor import QTensor

# statistics by name, as the walk collected them for one linear:
#   hessian     float32 [in, in], mean of x x^T over calibration tokens (x: what the quantized prefix hands on)
#   cross       float32 [in, in], mean of y x^T, y what the full-precision model has in x's place
Stats = dict[str, Tensor]


def silent(text: str) -> None:
    """Nobody is told."""


@dataclass(frozen=True)
class Target:
    """How parameters are chosen: the dtype scales are stored in, whether they are searched or plain min/max, how much
    work may be spent (effort 0 to 3), and whom to tell about a fallback.
    """

    dtype: torch.dtype
    search: bool = True
    effort: int = 1
    note: Callable[[str], None] = silent


class Linear(Protocol):
    """One product for stacked matrices of the same input; `weight` float32 [out, in] is what runs."""

    weight: Tensor


@dataclass
class Feed:
    """Linears with the same input, and what produces that input channel by channel.

    linears  matrices [out_i, in] that read it, changed in place
    stats    of that input, changed with it
    share    factors float32 [in] -> those the producer can apply: heads that share a channel share its factor
    divide   divides the producer's channels by such factors and gives those it did apply (a norm's weight is stored in
             16 bits)
    """

    linears: Sequence[Tensor]
    stats: Stats
    share: Callable[[Tensor], Tensor]
    divide: Callable[[Tensor], Tensor]


@dataclass
class BlockPart:
    """A block for methods that look at all of its linears together.

    run        inputs float32 [n, length, d] -> outputs, with the linears' present weights
    linears    with the weights as they are stored now; originals: what they were; solved: format and tensor of each
    batches    a random batch of inputs and of the outputs the full-precision model has, on the block's device
    channels   how much a squared error of each channel [d] of the outputs counts, of mean 1
    """

    run: Callable[[Tensor], Tensor]
    linears: Sequence[Linear]
    originals: Sequence[Tensor]
    solved: Sequence[tuple[Format, QTensor]]
    batches: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    channels: Tensor
    windows: int
    progress: Callable[[int, int], None]

    def loss(self, inputs: Tensor, goals: Tensor) -> Tensor:
        """Mean squared difference between the block's outputs and `goals`, by channel."""
        return ((self.run(inputs) - goals).square() * self.channels).mean()
