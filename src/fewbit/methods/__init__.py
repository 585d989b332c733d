"""Which codes to choose. A method knows no format; the file name is the registry.

A module has `NEEDS` (statistics it wants: "hessian", "inputs", "reference_inputs", or none) and
`quantize(w, fmt, stats, target) -> QTensor`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# statistics by name, as the walk collected them for one linear
Stats = dict[str, Tensor]


@dataclass(frozen=True)
class Target:
    """How parameters are chosen: the dtype scales are stored in, and whether they are searched or plain min/max."""

    dtype: torch.dtype
    search: bool = True
