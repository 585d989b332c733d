"""The operations around the products on an NVIDIA card: steps of one new token a sequence, which can be recorded as a
CUDA graph, and prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int, c_longlong, c_void_p
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from fewbit.kernels import Packed, _nvrtc
from fewbit.kernels.cuda import FUSED_TOKENS, Cuda, Halves
from fewbit.kernels.ops import Batch, Cache, Layer, Ops, Product, Stack

# csrc of these numbers: _cuda/steps.cu
TILE = 64
MOST_SPLITS = 32
ATTEND_THREADS = 256
WIDTHS = (16, 32, 64, 128, 256)
# query heads that a block of attention serves; its registers hold as many numbers for each dimension of a lane
MOST_SHARING = 8
MOST_SHARED_NUMBERS = 1024
# sequences of one step whose partial sums have room
SEQUENCES = 16
# a token's hidden state lies in the registers of one block
MOST_HIDDEN = 1024 * 16
STEPS = ("add_norm", "gated_silu", "rotate_append", "attend_one")


def sharing(heads: int, kv_heads: int, width: int) -> int:
    """Query heads that one block serves: the most that divide those of a key-value head and fit its registers."""
    group = heads // kv_heads
    most = min(MOST_SHARING, MOST_SHARED_NUMBERS // width)
    return next(n for n in range(min(group, most), 0, -1) if group % n == 0)


class CudaOps(Ops):
    """Kernels of `_cuda/steps.cu`; what they do not take goes to the definitions."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # by width and sharing: kernels that have nothing to do with heads come with any
        self._modules: dict[tuple[int, int], dict[str, Any]] = {}

    def kernels(self, width: int = WIDTHS[0], shared: int = 1) -> dict[str, Any]:
        """The compiled functions for heads of a width."""
        key = (width, shared)
        if key not in self._modules:
            defines = {"WIDTH": width, "SHARING": shared}
            self._modules[key] = _nvrtc.module("steps.cu", STEPS, defines, self.device.index)
        return self._modules[key]

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
        args = _pointers(x, delta, weight, out, halves, scales)
        _run(self.kernels()["add_norm"], (tokens, 1, 1), threads, *args, c_int(n), c_float(eps))

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        """gate_up [T, 2n] -> [T, n]."""
        n = gate_up.shape[-1] // 2
        if activation != "silu" or n % 4 or not _is_rows(gate_up, 2 * n):
            return super().gated(gate_up, activation)
        out = torch.empty(gate_up.shape[0], n, device=gate_up.device)
        blocks = min(-(-out.numel() // 1024), 4096)
        args = *_pointers(gate_up, out), c_int(n), c_longlong(out.numel())
        _run(self.kernels()["gated_silu"], (blocks, 1, 1), 256, *args)
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
        self._room: tuple[Tensor, Tensor, Tensor] | None = None
        super().__init__(ops, layers)

    def allocate(self, rows: int, dtype: torch.dtype) -> None:
        """Room for `rows` tokens in float16; ValueError where `dtype` is something else."""
        if rows and dtype is not torch.float16:
            raise ValueError(f"caches on a card must be float16, got {dtype}")
        super().allocate(rows, dtype)
        if not rows:
            return
        sums = max(layer.heads * layer.width for layer in self.layers)
        heads, on = max(layer.heads for layer in self.layers), self.cuda.device
        self._room = (
            torch.empty(SEQUENCES * sums * MOST_SPLITS, device=on),
            torch.empty(SEQUENCES * heads * MOST_SPLITS, 2, device=on),
            torch.zeros(SEQUENCES * heads, dtype=torch.int32, device=on),
        )

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        """x [T, d] -> [T, d], in its place; nothing is asked of the host where every sequence has one new token."""
        places = None if x.shape[0] == batch.pages.shape[0] else _Places(batch)
        if self._fused and places is None and x.shape[0] <= FUSED_TOKENS:
            for layer, cache in zip(self.layers, self.caches, strict=True):
                self._fused_layer(x, layer, cache, cos, sin, batch)
            return x
        delta: Tensor | None = None
        for layer, cache in zip(self.layers, self.caches, strict=True):
            qkv = layer.qkv(self.cuda.add_norm(x, delta, layer.attention_norm, layer.eps))
            if places is None:
                attended = self._attend_one(layer, qkv, cos, sin, cache, batch)
            else:
                attended = self._attend_many(layer, qkv, cos, sin, cache, batch, places)
            delta = layer.o(attended)
            gate_up = layer.gate_up(self.cuda.add_norm(x, delta, layer.mlp_norm, layer.eps))
            delta = layer.down(self.cuda.gated(gate_up, layer.activation))
        return x if delta is None else x.add_(delta)

    def _fused_layer(self, x: Tensor, layer: Layer, cache: Cache, cos: Tensor, sin: Tensor, batch: Batch) -> None:
        """Adds a layer's parts to x [S, d] where it lies; activations go from kernel to kernel as halves."""
        backend, ops = _backend(layer), self.cuda
        qkv = backend.multiply(ops.norm_halves(x, layer.attention_norm, layer.eps), _packed(layer.qkv))
        columns = layer.heads * layer.width
        attended = _no_halves(len(x), columns, x.device)
        self._attend_one(layer, qkv, cos, sin, cache, batch, attended.values)
        backend.multiply(Halves(attended.values, None, columns), _packed(layer.o), add=x, out=x)
        normed, gate_up = ops.norm_halves(x, layer.mlp_norm, layer.eps), _packed(layer.gate_up)
        if backend.can_gate(gate_up):
            gated = backend.gated(normed, gate_up)
        else:
            gated = ops.gated(backend.multiply(normed, gate_up), layer.activation)
        backend.multiply(backend.halve(gated), _packed(layer.down), add=x, out=x)

    def _attend_one(
        self,
        layer: Layer,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: Cache,
        batch: Batch,
        halves: Tensor | None = None,
    ) -> Tensor:
        """qkv [S, (H + 2 KV) * D] -> [S, H * D], or `halves` as the products take them; appends to the cache."""
        if self._room is None:
            raise ValueError("allocate room for the cache first")
        heads, kv, width = layer.heads, layer.kv_heads, layer.width
        shared, tokens = sharing(heads, kv, width), len(qkv)
        out = torch.empty(0 if halves is not None else tokens, heads * width, device=qkv.device)
        splits = min(MOST_SPLITS, -(-batch.pages.shape[1] * batch.page_size // TILE))
        kernel = self.cuda.kernels(width, shared)["attend_one"]
        for first in range(0, tokens, SEQUENCES):
            here = slice(first, first + SEQUENCES)
            grid = (heads // shared, min(SEQUENCES, tokens - first), splits)
            tables = (t[here] for t in (qkv, cos, sin, batch.slots, batch.lengths, batch.pages))
            args = [*_pointers(*tables), c_int(batch.pages.shape[1]), c_int(batch.page_size), *_pointers(*cache)]
            args += [c_int(heads), c_int(kv), c_float(width**-0.5), *_pointers(*self._room)]
            args += [*_pointers(out[here], halves), c_int(tokens), c_int(first)]
            _run(kernel, grid, ATTEND_THREADS, *args)
        return out

    def _attend_many(
        self, layer: Layer, qkv: Tensor, cos: Tensor, sin: Tensor, cache: Cache, batch: Batch, places: _Places
    ) -> Tensor:
        """The same for any number of new tokens, sequence by sequence through torch's flash attention."""
        tokens, heads, width = len(qkv), layer.heads, layer.width
        q = torch.empty(tokens, heads, width, dtype=torch.float16, device=qkv.device)
        kernel = self.cuda.kernels(width, sharing(heads, layer.kv_heads, width))["rotate_append"]
        args = _pointers(qkv, cos, sin, batch.slots, q, *cache)
        _run(kernel, (tokens, 1, 1), 256, *args, c_int(heads), c_int(layer.kv_heads))
        out = torch.empty(tokens, heads * width, device=qkv.device)
        for s, (first, last, length) in enumerate(places.spans):
            k, v = (places.rows(c, s, batch) for c in cache)
            new = last - first
            y = F.scaled_dot_product_attention(
                q[first:last].transpose(0, 1)[None],
                k.transpose(0, 1)[None],
                v.transpose(0, 1)[None],
                attn_mask=causal_lower_right(new, length) if new < length else None,
                is_causal=new == length,
                scale=width**-0.5,
                enable_gqa=heads != layer.kv_heads,
            )
            out[first:last] = y[0].transpose(0, 1).reshape(new, heads * width)
        return out


class _Places:
    """Where the sequences of a step lie, asked of the card once for all layers."""

    def __init__(self, batch: Batch) -> None:
        starts, lengths, self.pages = batch.starts.tolist(), batch.lengths.tolist(), batch.pages.tolist()
        # first new token, the one behind the last, tokens in the cache
        self.spans = list(zip(starts, starts[1:], lengths, strict=False))

    def rows(self, cache: Tensor, s: int, batch: Batch) -> Tensor:
        """The cached rows of sequence `s` [length, KV, D]; neighbouring pages are not copied."""
        length, size = self.spans[s][2], batch.page_size
        used = self.pages[s][: -(-length // size)]
        if used == list(range(used[0], used[0] + len(used))):
            return cache[used[0] * size : used[0] * size + length]
        found: Tensor = cache.unflatten(0, (-1, size))[batch.pages[s, : len(used)]].flatten(0, 1)[:length]
        return found


class Choice:
    """Tokens that are being chosen: `ids` int64 [W] on the card for whoever runs there, `tokens` for the host."""

    def __init__(self, chosen: Tensor) -> None:
        self.ids = chosen[1]
        self._host = torch.empty(chosen.shape[1], dtype=torch.int64, pin_memory=True)
        self._host.copy_(chosen[0], non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def tokens(self) -> list[int]:
        """Waits for them; -1 where a logit is NaN or infinite."""
        self._copied.synchronize()
        found: list[int] = self._host.tolist()
        return found


class Chooser:
    """Draws tokens on the card; one number comes back to the host for each row of logits."""

    PARTS = 64

    def __init__(self, device: torch.device) -> None:
        self._kernels = _nvrtc.module("choose.cu", ("largest", "draw", "settle"), None, device.index)
        self.device = device

    def __call__(
        self, logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, points: Sequence[float]
    ) -> Choice:
        """A token for each row of float32 [W, vocab].

        Temperature 0 takes the likeliest. `points` are uniform numbers from 0 to 1, one a row. Tokens of equal
        probability at the border of top-k or top-p all pass.
        """
        with torch.cuda.device(self.device):
            return self._started(logits.contiguous(), temperature, top_k, top_p, min_p, points)

    def _started(
        self, logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, points: Sequence[float]
    ) -> Choice:
        rows, vocab = logits.shape
        found = torch.zeros(4, rows, dtype=torch.int64, device=self.device)
        best, drawn, chosen = found[0], found[1], found[2:]
        _run(self._kernels["largest"], (self.PARTS, rows, 1), 256, *_pointers(logits), c_int(vocab), *_pointers(best))
        if temperature > 0:
            point = torch.tensor(list(points), dtype=torch.float64).to(self.device)
            settings = c_float(1 / temperature), c_int(min(top_k, vocab)), c_float(top_p), c_float(min_p)
            args = *_pointers(logits), c_int(vocab), *settings, *_pointers(point, best, drawn)
            _run(self._kernels["draw"], (rows, 1, 1), 1024, *args)
        which = drawn if temperature > 0 else best
        _run(self._kernels["settle"], (-(-rows // 64), 1, 1), 64, *_pointers(which, *chosen), c_int(rows))
        return Choice(chosen)


@lru_cache(maxsize=8)
def cuda_ops(device: torch.device) -> CudaOps | None:
    """None where nothing can be compiled for the card."""
    return None if _nvrtc.missing() else CudaOps(device)


@lru_cache(maxsize=8)
def chooser(device: torch.device) -> Chooser | None:
    """None where nothing can be compiled for the card."""
    if _nvrtc.missing():
        return None
    with torch.cuda.device(device):
        return Chooser(device)


def _run(kernel: Any, grid: tuple[int, int, int], threads: int, *args: Any) -> None:
    # all kernels here wait for the one before by themselves, so each may start early
    kernel.launch(grid, (threads, 1, 1), args, dependent=True)


def _no_halves(tokens: int, columns: int, device: torch.device) -> Halves:
    """Room for the activations of some tokens."""
    values = torch.empty(-(-columns // 128) * 4, tokens, 32, dtype=torch.float16, device=device)
    return Halves(values, torch.empty(tokens, device=device), columns)


def _pointers(*tensors: Tensor | None) -> list[c_void_p]:
    return [c_void_p(0 if t is None else t.data_ptr()) for t in tensors]


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
