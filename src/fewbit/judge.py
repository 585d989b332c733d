"""How far written models are from their original on some text, block by block: no more than a block is in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.blocks import FloatBlock, embed
from fewbit.passes import propagate
from fewbit.sensitivity import Head, Report
from fewbit.source import Source


@dataclass(frozen=True)
class Verdict:
    """Mean divergence from the original in nats a token, and its standard error over windows."""

    kl: float
    error: float


@torch.no_grad()
def judge(
    source: Source,
    candidates: Sequence[Source],
    windows: Tensor,
    device: torch.device,
    product: torch.dtype,
    report: Report,
) -> list[Verdict]:
    """windows int64 [n, length], at least two, each run alone; predictions in its later half count.

    Weights run as floats, as `evaluate(exact=True)` does; the original's matrices are multiplied in `product`, the
    candidates' too.
    """
    models = [source, *candidates]
    hidden = [torch.cat(list(embed(model, windows))) for model in models]
    blocks = source.args.num_hidden_layers
    for i in range(blocks):
        report(f"comparing what was written: block {i + 1} of {blocks}", i / blocks)
        for model, states in zip(models, hidden, strict=True):
            propagate(FloatBlock(model, i, windows.shape[1], device, product=product), states)
    middle = windows.shape[1] // 2
    exact = Head(source, device, product)
    read = exact.normed(hidden[0][:, middle:].to(device))
    return [
        _verdict(exact, read, Head(m, device, product), h[:, middle:])
        for m, h in zip(candidates, hidden[1:], strict=True)
    ]


def _verdict(exact: Head, read: Tensor, head: Head, states: Tensor) -> Verdict:
    moved = head.normed(states.to(exact.device))
    by_window = torch.tensor([exact.divergence(x, y, head.logits) for x, y in zip(read, moved, strict=True)])
    return Verdict(float(by_window.mean()), float(by_window.std() / len(by_window) ** 0.5))
