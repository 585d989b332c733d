"""The operations around the products on an NVIDIA card: steps of one new token a sequence, which can be recorded as a
CUDA graph, and prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int, c_longlong
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fewbit.kernels import Packed, _nvrtc
from fewbit.kernels._cuda_attention import BITS, WIDTHS, Attention, Spans
from fewbit.kernels._cuda_halves import Halves
from fewbit.kernels._nvrtc import pointers, run
from fewbit.kernels.cuda import FUSED_TOKENS, Cuda
from fewbit.kernels.ops import Batch, Cache, Layer, Ops, Product, Stack

# a token's hidden state lies in the registers of one block
MOST_HIDDEN = 1024 * 16
STEPS = ("add_norm", "gated_silu")


class CudaOps(Ops):
    """Kernels of `_cuda/steps.cu`; what they do not take goes to the definitions."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kernels: dict[str, Any] = {}

    def kernels(self) -> dict[str, Any]:
        """The compiled functions."""
        if not self._kernels:
            self._kernels = _nvrtc.module("steps.cu", STEPS, None, self.device.index)
        return self._kernels

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, n], weight [n]."""
        if not _is_rows(x, weight.shape[0]) or not _fits(weight):
            return super().rms_norm(x, weight, eps)
        return self.add_norm(x, None, weight, eps)

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
        """x [T, n] += delta [T, n], in place; the norm of that [T, n]."""
        out = torch.empty_like(x)
        self._add_norm(x, delta, weight, eps, out, None, None)
        return out

    def norm_halves(self, x: Tensor, weight: Tensor | None, eps: float) -> Halves:
        """The norm of x [T, n] as the products take it."""
        tokens, n = x.shape
        found = _no_halves(tokens, n, x.device)
        self._add_norm(x, None, weight, eps, None, found.values, found.scales)
        return found

    def _add_norm(
        self,
        x: Tensor,
        delta: Tensor | None,
        weight: Tensor | None,
        eps: float,
        out: Tensor | None,
        halves: Tensor | None,
        scales: Tensor | None,
    ) -> None:
        tokens, n = x.shape
        threads = next(t for t in (128, 256, 512, 1024) if 4 * t >= n or t == 1024)
        args = pointers(x, delta, weight, out, halves, scales)
        run(self.kernels()["add_norm"], (tokens, 1, 1), threads, *args, c_int(n), c_float(eps))

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        """gate_up [T, 2n] -> [T, n]."""
        n = gate_up.shape[-1] // 2
        if activation != "silu" or n % 4 or not _is_rows(gate_up, 2 * n):
            return super().gated(gate_up, activation)
        out = torch.empty(gate_up.shape[0], n, device=gate_up.device)
        blocks = min(-(-out.numel() // 1024), 4096)
        args = *pointers(gate_up, out), c_int(n), c_longlong(out.numel())
        run(self.kernels()["gated_silu"], (blocks, 1, 1), 256, *args)
        return out

    def stack(self, layers: Sequence[Layer]) -> Stack:
        """Layers of SiLU, widths and heads that the kernels take; others run by the definitions."""
        return CudaStack(self, layers) if layers and all(_takes(layer) for layer in layers) else Stack(Ops(), layers)


class CudaStack(Stack):
    """Decoder layers over a residual that is added to where it lies, next to each norm."""

    replays = True

    def __init__(self, ops: CudaOps, layers: Sequence[Layer]) -> None:
        self.cuda = ops
        # what multiplies every layer of few tokens, where that is one backend
        self._fused = all(_is_fused(layer) for layer in layers)
        self._attention: Attention | None = None
        super().__init__(ops, layers)

    def allocate(self, rows: int, dtype: torch.dtype) -> None:
        """Room for `rows` tokens in float16, int8 or INT4; ValueError where `dtype` is something else."""
        if rows and dtype not in BITS:
            raise ValueError(f"caches on a card must be float16, int8 or uint8 (4 bits), got {dtype}")
        super().allocate(rows, dtype)
        if rows and self._attention is None:
            most = (max(getattr(layer, name) for layer in self.layers) for name in ("heads", "width"))
            self._attention = Attention(self.cuda.device, *most)

    @property
    def attention(self) -> Attention:
        """What attends; ValueError before there is a cache."""
        if self._attention is None:
            raise ValueError("allocate room for the cache first")
        return self._attention

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        """x [T, d] -> [T, d], in its place; nothing is asked of the host where every sequence has one new token."""
        spans = None if x.shape[0] == batch.pages.shape[0] else Spans(batch)
        if self._fused and spans is None and x.shape[0] <= FUSED_TOKENS:
            for layer, cache in zip(self.layers, self.caches, strict=True):
                self._fused_layer(x, layer, cache, cos, sin, batch)
            return x
        delta: Tensor | None = None
        for layer, cache in zip(self.layers, self.caches, strict=True):
            qkv = layer.qkv(self.cuda.add_norm(x, delta, layer.attention_norm, layer.eps))
            if spans is None:
                attended = self.attention.one(layer, qkv, cos, sin, cache, batch)
            else:
                attended = self.attention.many(layer, qkv, cos, sin, cache, batch, spans)
            delta = layer.o(attended)
            delta = layer.down(self._gated(layer, self.cuda.add_norm(x, delta, layer.mlp_norm, layer.eps)))
        return x if delta is None else x.add_(delta)

    def _gated(self, layer: Layer, x: Tensor) -> Tensor:
        """x [T, d], after its norm -> activation(gate) * up [T, n], of one product where that takes so many tokens."""
        if self._fused:
            backend, packed = _backend(layer), _packed(layer.gate_up)
            if backend.can_gate(packed) and len(x) <= backend.fused_tokens(packed):
                return backend.gated(backend.halve(x), packed)
        return self.cuda.gated(layer.gate_up(x), layer.activation)

    def _fused_layer(self, x: Tensor, layer: Layer, cache: Cache, cos: Tensor, sin: Tensor, batch: Batch) -> None:
        """Adds a layer's parts to x [S, d] where it lies; activations go from kernel to kernel as halves."""
        backend, ops = _backend(layer), self.cuda
        qkv = backend.multiply(ops.norm_halves(x, layer.attention_norm, layer.eps), _packed(layer.qkv))
        columns = layer.heads * layer.width
        attended = _no_halves(len(x), columns, x.device)
        self.attention.one(layer, qkv, cos, sin, cache, batch, attended.values)
        backend.multiply(Halves(attended.values, None, columns), _packed(layer.o), add=x, out=x)
        normed, gate_up = ops.norm_halves(x, layer.mlp_norm, layer.eps), _packed(layer.gate_up)
        if backend.can_gate(gate_up):
            gated = backend.gated(normed, gate_up)
        else:
            gated = ops.gated(backend.multiply(normed, gate_up), layer.activation)
        backend.multiply(backend.halve(gated), _packed(layer.down), add=x, out=x)


@lru_cache(maxsize=8)
def cuda_ops(device: torch.device) -> CudaOps | None:
    """None where nothing can be compiled for the card."""
    return None if _nvrtc.missing() else CudaOps(device)


def _no_halves(tokens: int, columns: int, device: torch.device) -> Halves:
    """Room for the activations of some tokens."""
    values = torch.empty(-(-columns // 128) * 4, tokens, 32, dtype=torch.float16, device=device)
    return Halves(values, torch.empty(tokens, device=device), columns)


def _is_rows(t: Tensor, columns: int) -> bool:
    """float32 [T, columns] on a card, contiguous, in whole quadruples."""
    return (
        t.dtype is torch.float32
        and t.dim() == 2
        and t.shape[1] == columns
        and columns % 4 == 0
        and t.is_cuda
        and t.is_contiguous()
    )


def _fits(norm: Tensor | None) -> bool:
    if norm is None:
        return False
    return norm.dtype is torch.float32 and norm.is_cuda and norm.shape[0] % 4 == 0 and norm.shape[0] <= MOST_HIDDEN


def _takes(layer: Layer) -> bool:
    return (
        layer.is_plain
        and layer.activation == "silu"
        and layer.width in WIDTHS
        and layer.heads % layer.kv_heads == 0
        and _fits(layer.attention_norm)
        and _fits(layer.mlp_norm)
    )


def _packed(product: Product) -> Packed:
    packed: Packed = product.packed  # type: ignore[attr-defined]
    return packed


def _backend(layer: Layer) -> Cuda:
    backend: Cuda = layer.qkv.backend  # type: ignore[attr-defined]
    return backend


def _is_fused(layer: Layer) -> bool:
    """Whether all four products are the cuda backend's, without biases."""
    products = (layer.qkv, layer.o, layer.gate_up, layer.down)
    return layer.activation == "silu" and all(
        isinstance(getattr(p, "backend", None), Cuda) and getattr(p, "bias", None) is None for p in products
    )
