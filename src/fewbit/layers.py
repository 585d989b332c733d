"""The pieces models are built of. A layer holds packed weights and the backend that multiplies by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.errors import FewbitError
from fewbit.formats import parse
from fewbit.kernels import Backend, Packed
from fewbit.kernels.ops import Ops
from fewbit.prepared import PreparedLayouts
from fewbit.qtensor import QTensor

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Weights:
    """Where layers get their weights: `read` gives a tensor by its canonical name, `has` says whether there is one.

    `backends` are tried in order; the first that refuses none of a layer's tensors runs it.
    """

    read: Callable[[str], QTensor]
    has: Callable[[str], bool]
    backends: Sequence[Backend]
    ops: Ops
    # one line for each reason why the slow reference had to run something
    notes: list[str]
    # packed matrices that are kept from one load to the next
    prepared: PreparedLayouts | None = None
    # where the weights are to lie
    device: torch.device = CPU
    # the most tokens a sequence may have: some rotations follow from it
    context: int = 0

    def dense(self, name: str) -> Tensor:
        """A small tensor (norm, bias) in float32."""
        q = self.read(name)
        return parse(q.spec).dequantize(q).contiguous().to(self.device)

    def norm(self, name: str, offset: float = 0.0) -> Tensor:
        """A norm's weight in float32, with what the architecture adds to all weights of norms."""
        return self.dense(name) + offset if offset else self.dense(name)

    def router(self, name: str) -> Tensor:
        """The small matrix [experts, in] that chooses experts, in float32."""
        return self.dense(name)

    def linear(self, *names: str) -> Linear:
        """One product for several stacked matrices of the same input, `x.weight` for each name, biases included."""
        backend, packed = (self.prepared and self.prepared.get(names)) or self._packed(names)
        bias = None
        if any(self.has(f"{name}.bias") for name in names):
            bias = torch.cat(
                [
                    self.dense(f"{name}.bias") if self.has(f"{name}.bias") else torch.zeros(rows, device=self.device)
                    for name, rows in zip(names, packed.splits, strict=True)
                ]
            )
        return Linear(backend, packed, bias)

    def _packed(self, names: tuple[str, ...]) -> tuple[Backend, Packed]:
        tensors = [_on(self.read(f"{name}.weight"), self.device) for name in names]
        backend = self._choose(names, tensors)
        packed = self.prepared.prepare(backend, names, tensors) if self.prepared else backend.prepare(tensors)
        return backend, packed

    def _choose(self, names: Sequence[str], tensors: list[QTensor]) -> Backend:
        reasons: list[str] = []
        for backend in self.backends:
            refusals = [reason for q in tensors if (reason := backend.refuses(q))]
            if not refusals:
                if backend.priority == 0 and reasons and reasons[0] not in self.notes:
                    self.notes.append(reasons[0])
                return backend
            reasons.append(f"{backend.name}: {refusals[0]}")
        raise FewbitError(
            f"No kernel can multiply by {', '.join(names)}.",
            "; ".join(reasons) or "There is no backend on this machine.",
            "Load with exact=True (`--exact`), which runs every format through the reference kernel.",
        )


def _on(q: QTensor, device: torch.device) -> QTensor:
    if all(part.device == device for part in q.parts.values()):
        return q
    return QTensor(q.spec, q.shape, {name: part.to(device) for name, part in q.parts.items()})


class Linear:
    """x [T, in] -> [T, out], where out stacks several matrices; also an embedding, read by rows."""

    def __init__(self, backend: Backend, packed: Packed, bias: Tensor | None = None) -> None:
        self.backend, self.packed, self.bias = backend, packed, bias

    def __call__(self, x: Tensor) -> Tensor:
        y = self.backend.matmul(x, self.packed)
        return y if self.bias is None else y + self.bias

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` as float32 [T, in]."""
        return self.backend.rows(self.packed, ids)


class RMSNorm:
    """Root-mean-square norm over the last dimension."""

    def __init__(self, weight: Tensor, eps: float, ops: Ops) -> None:
        self.weight, self.eps, self.ops = weight, eps, ops

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)
