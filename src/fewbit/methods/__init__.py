"""Which codes to choose. A method knows no format; the file name is the registry.

A module has `NEEDS`, the statistics it wants of a linear's inputs, and

    quantize(w, fmt, stats, target) -> QTensor            one matrix, or several of the same input stacked by rows

and may have

    prepare(block, stats, target)                         rewrites a block without changing what it computes
    tune(block, inputs, goals, solved, target)            improves a whole quantized block

`a+b` names two of them: a's `prepare`, then b's `quantize`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# statistics by name, as the walk collected them for one linear:
#   hessian     float32 [in, in], mean of x x^T over calibration tokens (x: what the quantized prefix hands on)
#   cross       float32 [in, in], mean of y x^T, y what the full-precision model has in x's place
#   importance  float32 [in] or [out, in], weighs squared errors in the scale search
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
