"""Who multiplies. `reference` is the definition; other backends must agree with it or refuse.

Each module of this package (but `ops`) has `backend() -> Backend | None`: None where this machine can't run it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fewbit.qtensor import QTensor


@dataclass(frozen=True)
class Packed:
    """Weights in a backend's own layout: one or several matrices of equal width stacked by rows.

    shape    (sum of outs, in)
    splits   the outs of the stacked matrices
    data     the backend's own object
    nbytes   bytes held in memory
    """

    shape: tuple[int, int]
    splits: tuple[int, ...]
    data: Any
    nbytes: int


class Backend(ABC):
    """Multiplies activations by stored weights on one kind of device."""

    name: str

    @abstractmethod
    def refuses(self, q: QTensor) -> str | None:
        """None where `q` can be prepared here, otherwise the reason in words."""

    @abstractmethod
    def prepare(self, tensors: list[QTensor]) -> Packed:
        """Stack tensors of equal width (q/k/v, gate/up) into one product's layout."""

    @abstractmethod
    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        """x [T, in] float32 times the transposed weights -> [T, out] float32."""

    @abstractmethod
    def rows(self, packed: Packed, ids: Tensor) -> Tensor:
        """Rows `ids` (int64 [T]) as float32 [T, in]: a quantized embedding."""
