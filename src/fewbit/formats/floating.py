"""Plain floating point: `f32`, `f16`, `bf16`. Rounding to the dtype is the only loss."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fewbit.formats import Format, Layout, Params, Shape
from fewbit.qtensor import QTensor

DTYPES: Final[dict[str, torch.dtype]] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class Floating(Format):
    """One part, `weight`, of the logical shape (any rank). The codes are the numbers themselves, without parameters."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.dtype = DTYPES[spec]

    def accepts(self, shape: Shape) -> str | None:
        """Every shape."""
        return None

    def layout(self, shape: Shape, dtype: torch.dtype) -> Layout:
        """The weight in this format's own dtype; there are no scales for `dtype` to apply to."""
        return {"weight": (self.dtype, shape)}

    def fit(
        self, w: Tensor, importance: Tensor | None = None, dtype: torch.dtype = torch.float32, search: bool = True
    ) -> Params:
        """No parameters."""
        return {}

    def round(self, w: Tensor, params: Params) -> Tensor:
        """To the nearest number of the dtype, ties to even; beyond its range to infinity."""
        return w.to(self.dtype)

    def pack(self, codes: Tensor, params: Params) -> QTensor:
        """The codes as they are."""
        return QTensor(self.spec, tuple(codes.shape), {"weight": codes.contiguous()})

    def unpack(self, q: QTensor) -> tuple[Tensor, Params]:
        """The weight as it is, without a copy."""
        return q.parts["weight"], {}

    def value(self, codes: Tensor, params: Params) -> Tensor:
        """float32, exactly."""
        return codes.float()

    def take(self, q: QTensor, rows: Tensor) -> QTensor:
        """Rows along the first axis, whatever the rank."""
        return QTensor(q.spec, (rows.numel(), *q.shape[1:]), {"weight": q.parts["weight"][rows]})


def parse(spec: str) -> Format | None:
    """The format `spec` names, or None where it is none of these."""
    return Floating(spec) if spec in DTYPES else None
