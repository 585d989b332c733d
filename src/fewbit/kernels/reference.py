"""The definition: every format, dequantized once, multiplied in float32 (`--exact`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fewbit.formats import parse
from fewbit.kernels import Backend, Packed
from fewbit.qtensor import QTensor

DEVICES = ("cpu", "cuda")


class Reference(Backend):
    """Holds float32 weights; rounds no activation."""

    name = "reference"

    def refuses(self, q: QTensor) -> str | None:
        """Only what is not a matrix."""
        return None if len(q.shape) == 2 else f"{q.spec} of shape {q.shape} is not a matrix"

    def prepare(self, tensors: list[QTensor]) -> Packed:
        """One float32 matrix [sum of outs, in]."""
        splits, columns = tuple(q.shape[0] for q in tensors), tensors[0].shape[1]
        device = next(iter(tensors[0].parts.values())).device
        weight = torch.empty(sum(splits), columns, device=device)
        for part, q in zip(weight.split(splits), tensors, strict=True):
            part.copy_(parse(q.spec).dequantize(q))
        return Packed((len(weight), columns), splits, weight, weight.numel() * weight.element_size())

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        """x [T, in] float32 -> [T, out]."""
        return F.linear(x, packed.data)

    def rows(self, packed: Packed, ids: Tensor) -> Tensor:
        """Rows `ids` [T] -> float32 [T, in]; IndexError where one is out of range."""
        weight: Tensor = packed.data
        return weight[ids]


def backend() -> Reference:
    """Runs everywhere."""
    return Reference()
