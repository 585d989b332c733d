"""The pieces models are built of. A layer holds packed weights and the backend that multiplies by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.config_values import number, real, shown
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

    def dense(self, name: str) -> Tensor:
        """A small tensor (norm, bias) in float32."""
        q = self.read(name)
        return parse(q.spec).dequantize(q).contiguous().to(self.device)

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


@dataclass(frozen=True)
class RopeArgs:
    """Rotary embedding: base frequency and how it is stretched to longer contexts."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RopeArgs:
        """From `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before).

        Raises FewbitError for a kind of scaling fewbit does not know, and for numbers that make no frequencies.
        """
        found = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(found, dict):
            raise FewbitError(
                "The model's config has no usable rotary parameters.",
                f"rope_parameters (or rope_scaling) is {shown(found)} where a JSON object belongs.",
                "Check config.json against the original model's.",
            )
        kind = found.get("rope_type") or found.get("type") or "default"
        if kind not in ("default", "linear", "llama3"):
            raise FewbitError(
                f"Rotary scaling {shown(kind)} is not supported.",
                "fewbit knows default, linear and llama3.",
                "Use a checkpoint of the same model without that scaling.",
            )
        theta = real(found if "rope_theta" in found else config, "rope_theta", 10000.0, 1.0, 1e15)
        if kind == "default":
            return cls(theta)
        factor = real(found, "factor", 1.0, 1e-3, 1e6)
        if kind == "linear":
            return cls(theta, kind, factor)
        low = real(found, "low_freq_factor", 1.0, 0.0, 1e6)
        return cls(
            theta=theta,
            kind=kind,
            factor=factor,
            low_freq_factor=low,
            # the two bound a blend: it has no width where they are equal
            high_freq_factor=real(found, "high_freq_factor", 4.0, low + 1e-3, 2e6),
            original_context=number(found, "original_max_position_embeddings", 8192),
        )

    def frequencies(self, width: int) -> Tensor:
        """Angle a position, float32 [width / 2] (Su et al. 2021, section 3.4.2; llama3: Llama 3.1 model card code)."""
        freq = 1.0 / self.theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width)
        if self.kind == "linear":
            return freq / self.factor
        if self.kind == "llama3":
            # long waves are stretched, short ones kept, those between blended
            turns = self.original_context * freq / (2 * math.pi)
            blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            blend = blend.clamp(0, 1)
            return freq * (blend + (1 - blend) / self.factor)
        return freq


class Rope:
    """positions int64 [T] -> cos, sin float32 [T, width / 2], from a table that grows with the positions asked for.

    It is made in pieces of equal size: a position's angles are the same bits whenever they are asked for.
    """

    PIECE = 256

    def __init__(self, args: RopeArgs, width: int) -> None:
        self.freq = args.frequencies(width)
        self._table = (torch.empty(0, width // 2), torch.empty(0, width // 2))
        self._placed = False

    def place(self, positions: int, device: torch.device) -> None:
        """Angles of the positions below `positions`, and no others from now on, on a device that is not asked."""
        self._grow(positions)
        cos, sin = self._table
        self._table = cos.to(device), sin.to(device)
        self._placed = True

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        if not self._placed and positions.numel() and (last := int(positions.max())) >= len(self._table[0]):
            self._grow(last + 1)
        cos, sin = self._table
        return cos.index_select(0, positions), sin.index_select(0, positions)

    def _grow(self, positions: int) -> None:
        """Room for `positions`, at least twice what there was."""
        have = len(self._table[0])
        starts = range(have, max(positions, 2 * have), self.PIECE)
        angles = [torch.arange(i, i + self.PIECE).float()[:, None] * self.freq for i in starts]
        cos, sin = self._table
        self._table = torch.cat([cos, *(a.cos() for a in angles)]), torch.cat([sin, *(a.sin() for a in angles)])
