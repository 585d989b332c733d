"""Weights in floating point, kept in the dtype they are stored in and multiplied in it, but for f16.

f16 weights are widened to float32 slice by slice: activations can be larger than the largest f16.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fewbit.kernels import Backend, Packed
from fewbit.qtensor import QTensor

DEVICES = ("cpu", "cuda")
SPECS = ("f32", "f16", "bf16")
# f16 weights that are widened at a time
SLICE_WEIGHTS = 1 << 22


class Dense(Backend):
    """f32, f16 and bf16 through torch; activations are rounded to bf16 for bf16 weights."""

    name = "dense"
    priority = 10

    def refuses(self, q: QTensor) -> str | None:
        """Anything but a floating-point matrix."""
        if q.spec not in SPECS:
            return f"{q.spec} is not one of {', '.join(SPECS)}"
        return None if len(q.shape) == 2 else f"{q.spec} of shape {q.shape} is not a matrix"

    def prepare(self, tensors: list[QTensor]) -> Packed:
        """One matrix [sum of outs, in]; of different dtypes, in the one torch promotes them to."""
        weights = [q.parts["weight"] for q in tensors]
        splits, columns = tuple(len(w) for w in weights), weights[0].shape[1]
        dtype = weights[0].dtype
        for w in weights[1:]:
            dtype = torch.promote_types(dtype, w.dtype)
        # a single matrix is used where it lies: often that is a memory-mapped file
        stacked = weights[0].contiguous() if len(weights) == 1 else torch.cat([w.to(dtype) for w in weights])
        return Packed((len(stacked), columns), splits, stacked, stacked.numel() * stacked.element_size())

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        """x [T, in] float32 -> [T, out] float32."""
        weight: Tensor = packed.data
        if weight.dtype != torch.float16:
            return F.linear(x.to(weight.dtype), weight).float()
        rows = max(1, SLICE_WEIGHTS // weight.shape[1])
        return torch.cat([F.linear(x, part.float()) for part in weight.split(rows)], dim=1)

    def rows(self, packed: Packed, ids: Tensor) -> Tensor:
        """Rows `ids` [T] -> float32 [T, in]; IndexError where one is out of range."""
        weight: Tensor = packed.data
        return weight[ids].float()


def backend() -> Dense:
    """Runs everywhere."""
    return Dense()
