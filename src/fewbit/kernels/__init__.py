"""Who multiplies. `reference` is the definition; other backends must agree with it or refuse.

Each module of this package (but `ops`) has `backend() -> Backend | None`: None where this machine can't run it, and
`DEVICES`, the kinds of devices it multiplies on. What is done on a device beside products is asked for here as well:
`missing`, `slower`, `refuses_groups`, `ops_on`, `chooser`, `ceilings`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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


class Choice(Protocol):
    """Tokens that are being chosen on a device."""

    @property
    def ids(self) -> Tensor:
        """int64 [W], there, for whoever runs there next; 0 where there is none."""

    def tokens(self) -> list[int]:
        """Waits for them; -1 where a logit is NaN or infinite."""


class Chooser(Protocol):
    """Draws tokens where their logits lie."""

    def __call__(
        self, logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, points: Sequence[float]
    ) -> Choice:
        """A token for each row of float32 [W, vocab]; temperature 0 takes the likeliest.

        `points` are uniform numbers from 0 to 1, one a row.
        """


@dataclass(frozen=True)
class Ceiling:
    """Bytes read and multiply-adds done a second, of all that a device has at once."""

    read_rate: float
    dot_rate: float


class Ceilings(Protocol):
    """Measures what a device gives at most, whenever asked."""

    @property
    def isa(self) -> str:
        """The instruction set, or the card's architecture."""

    def measure(self) -> Ceiling:
        """The best of some passes of each kind."""


# what belongs to cards is imported when one is used: it takes torch's own part for cards with it


def missing(device: str) -> str | None:
    """Why nothing of fewbit's can multiply on this kind of device, in words; None where something can."""
    if device == "cpu":
        return None
    from fewbit.kernels import _nvrtc, triton

    reason = _nvrtc.missing()
    return f"{reason}; {without}" if reason and (without := triton.missing()) else None


def slower(device: str) -> str | None:
    """A sentence where Triton stands in for the CUDA kernels."""
    from fewbit.kernels import _nvrtc

    if device == "cpu" or not (reason := _nvrtc.missing()):
        return None
    return (
        f"Products run through Triton, more slowly than they could: {reason}; `pip install '{_nvrtc.extra()}'` helps."
    )


def refuses_groups(device: str, span: int, columns: int) -> bool:
    """Whether nothing but the reference multiplies matrices of `columns` whose groups have `span` of them."""
    from fewbit.kernels import triton
    from fewbit.kernels._cuda_layout import stored_span

    return device != "cpu" and stored_span(span, columns) is None and triton.missing() is not None


def ops_on(device: torch.device, exact: bool = False) -> Ops:
    """The operations around the products, for tensors of this device; with `exact` their definitions."""
    if device.type == "cpu" or exact:
        return available(exact)[0].ops
    from fewbit.kernels._cuda_ops import cuda_ops

    return cuda_ops(device) or Ops()


def chooser(device: torch.device) -> Chooser | None:
    """What chooses tokens on this device; None on the CPU, where the sampler does, and where nothing can."""
    if device.type == "cpu":
        return None
    from fewbit.kernels import _cuda_choice

    return _cuda_choice.chooser(device)


def ceilings(device: torch.device) -> Ceilings | None:
    """None where the native kernels of this device are not there."""
    if device.type == "cpu":
        from fewbit.kernels import _ceilings

        return _ceilings.ceilings()
    from fewbit.kernels import _card_ceilings

    return _card_ceilings.card_ceilings(device)
