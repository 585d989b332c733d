"""Who multiplies. `reference` is the definition; other backends must agree with it or refuse.

Each module of this package (but `ops`) has `backend() -> Backend | None`: None where this machine can't run it, and
`DEVICES`, the kinds of devices it multiplies on.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.kernels.ops import Ops
from fewbit.lookup import names
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
    # backends are tried from the highest to the lowest; the reference, which refuses nothing, has 0
    priority: int = 0
    # operations around the products; a backend with faster ones overrides them
    ops: Ops = Ops()

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

    def set_threads(self, count: int) -> None:
        """Threads the backend's own code may use; torch's are set apart."""
        return


# zeroed bytes that are kept: room(count) -> (a writable buffer, where in it they begin), or None where there is no more
Room = Callable[[int], tuple[Any, int] | None]


class KeepingBackend(Backend):
    """A backend whose packed weights are plain bytes, which may be kept in a file and mapped from there.

    `layout` names how the bytes lie; it changes with that, and says the same on every machine that may read them.
    """

    layout: str

    @abstractmethod
    def prepare(self, tensors: list[QTensor], room: Room | None = None) -> Packed:
        """As every backend's; the weights lie in `room`, or in memory of their own where there is none."""

    @abstractmethod
    def describe(self, packed: Packed) -> dict[str, Any]:
        """Plain values for JSON from which, with the bytes, `restore` makes the same weights."""

    @abstractmethod
    def restore(self, description: dict[str, Any], buffer: Any, offset: int, count: int) -> Packed:
        """Weights over `count` bytes of a buffer, which are not copied.

        The description may be anyone's: KeyError, TypeError or ValueError where it and the bytes make no weights.
        """

    @abstractmethod
    def checksum(self, buffer: Any, offset: int, count: int) -> int:
        """A number that tells damaged bytes, found as fast as they can be read."""


def available(exact: bool = False, device: str = "cpu") -> list[Backend]:
    """The backends of this machine for a kind of device, the preferred one first; with `exact` only the reference."""
    modules = (importlib.import_module(f"{__name__}.{name}") for name in names(__name__) if name != "ops")
    # a card is not woken up for what runs on the CPU
    found = [module.backend() for module in modules if device in module.DEVICES]
    usable = sorted((b for b in found if b is not None), key=lambda b: -b.priority)
    return [b for b in usable if b.name == "reference"] if exact else usable


def set_threads(count: int) -> None:
    """CPU threads of torch and of every backend."""
    torch.set_num_threads(count)
    for backend in available():
        backend.set_threads(count)
