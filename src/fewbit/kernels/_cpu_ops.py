"""The operations around the products in native code, one by one or a whole stack of layers in one call."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fewbit.kernels.ops import INT4, Batch, Layer, Ops, Product, Stack, cached_width

# a step of more tokens is a native call for each layer, between which Python looks for signals (Ctrl-C)
MOST_TOKENS_AT_ONCE = 16
# the caches that native code reads and writes, and its numbers for them
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
CACHES = {torch.float32: 0, torch.float16: 1, torch.int8: 2, INT4: 3}


def _is_rows(t: Tensor, columns: int) -> bool:
    """float32 [T, columns] on the CPU, contiguous."""
    return t.dtype is torch.float32 and t.dim() == 2 and t.shape[1] == columns and t.is_cpu and t.is_contiguous()


def _are_heads(t: Tensor, tokens: int, width: int) -> bool:
    """float32 [tokens, heads, width] on the CPU; heads side by side, tokens at any distance."""
    shape, strides = t.shape, t.stride()
    return (
        t.dtype is torch.float32
        and shape[0] == tokens
        and shape[2] == width
        and strides[2] == 1
        and strides[1] == width
        and t.is_cpu
    )


def _are_indices(*tensors: Tensor) -> bool:
    return all(t.dtype is torch.int64 and t.is_cpu and t.is_contiguous() for t in tensors)


class CpuOps(Ops):
    """Native overrides; whatever they do not take goes to the definitions."""

    def __init__(self, native: ModuleType) -> None:
        self.native = native

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, n], weight [n]."""
        n = weight.shape[0]
        if not _is_rows(x, n) or weight.dtype is not torch.float32 or not weight.is_contiguous():
            return super().rms_norm(x, weight, eps)
        y = torch.empty_like(x)
        self.native.rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.shape[0], n, eps)
        return y

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        """gate_up [T, 2n] -> [T, n]."""
        n = gate_up.shape[-1] // 2
        if activation not in ACTIVATIONS or not _is_rows(gate_up, 2 * n):
            return super().gated(gate_up, activation)
        y = torch.empty(gate_up.shape[0], n)
        self.native.gated(ACTIVATIONS[activation], gate_up.data_ptr(), y.data_ptr(), gate_up.shape[0], n)
        return y

    def rotate_append(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> Tensor:
        """q [T, H, D], k and v [T, KV, D]; IndexError where a slot is out of range."""
        tokens, heads, width = q.shape
        kv = k.shape[1]
        taken = (
            all(_are_heads(t, tokens, width) for t in (q, k, v))
            and v.shape[1] == kv
            and width % 2 == 0
            and all(_is_rows(t, width // 2) and t.shape[0] == tokens for t in (cos, sin))
            and _are_indices(slots)
            and slots.shape == (tokens,)
            and _are_caches(k_cache, v_cache, kv, width)
        )
        if not taken:
            return super().rotate_append(q, k, v, cos, sin, slots, k_cache, v_cache)
        out = torch.empty(tokens, heads, width)
        written = self.native.rotate_append(
            q.data_ptr(),
            q.stride(0),
            heads,
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            kv,
            cos.data_ptr(),
            sin.data_ptr(),
            slots.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            CACHES[k_cache.dtype],
            k_cache.shape[0],
            tokens,
            width,
            out.data_ptr(),
        )
        if not written:
            raise _slots_out_of_range(slots, k_cache.shape[0])
        return out

    def attend(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: Batch,
        scale: float,
        window: int = 0,
        soft_cap: float = 0.0,
    ) -> Tensor:
        """q [T, H, D] -> [T, H * D]; IndexError where the batch leaves the cache."""
        tokens, heads, width = q.shape
        kv = k_cache.shape[1]
        taken = (
            width % 16 == 0
            and heads % kv == 0
            and q.dtype is torch.float32
            and q.is_cpu
            and q.is_contiguous()
            and _are_caches(k_cache, v_cache, kv, width)
            and _is_paged(batch)
        )
        if not taken:
            return super().attend(q, k_cache, v_cache, batch, scale, window, soft_cap)
        out = torch.empty(tokens, heads * width)
        attended = self.native.attend(
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            CACHES[k_cache.dtype],
            k_cache.shape[0],
            kv,
            batch.pages.data_ptr(),
            batch.pages.shape[1],
            batch.page_size,
            batch.lengths.data_ptr(),
            batch.starts.data_ptr(),
            len(batch.pages),
            tokens,
            heads,
            width,
            scale,
            window,
            soft_cap,
            out.data_ptr(),
        )
        if not attended:
            raise _batch_out_of_range(batch, k_cache.shape[0])
        return out

    def stack(self, layers: Sequence[Layer]) -> Stack:
        """A step is native as a whole where the native code takes every part of every layer."""
        taken = layers and all(_takes(self.native, layer, layers[0].norm.shape[0]) for layer in layers)
        return NativeStack(self, layers) if taken else super().stack(layers)


class NativeStack(Stack):
    """Layers that native code runs: all in one call, or with the many tokens of a prompt one by one."""

    def __init__(self, ops: CpuOps, layers: Sequence[Layer]) -> None:
        self.native: Any = ops.native.Stack()
        for i, layer in enumerate(layers):
            self.native.add(
                *_addresses(layer.attention_norm, layer.mlp_norm),
                layer.eps,
                *(_matrix(ops.native, p) for p in (layer.qkv, layer.o, layer.gate_up, layer.down)),
                layer.heads,
                layer.kv_heads,
                layer.width,
            )
            if not layer.is_plain or any(_biases(layer)) or layer.activation != "silu":
                self.native.set_extras(
                    i,
                    *_addresses(layer.attention_after, layer.mlp_after, layer.q_norm, layer.k_norm),
                    layer.q_norm is not None and layer.q_norm.shape[0] > layer.width,
                    *_biases(layer),
                    layer.scale or 0.0,
                    layer.soft_cap,
                    layer.window,
                    layer.rotation,
                    ACTIVATIONS[layer.activation],
                )
        self._rotations = 1 + max(layer.rotation for layer in layers)
        super().__init__(ops, layers)

    def allocate(self, rows: int, dtype: torch.dtype) -> None:
        """Room for `rows` tokens; ValueError where `dtype` is not float32, float16, int8 or INT4."""
        if dtype not in CACHES:
            raise ValueError(f"caches must be float32, float16, int8 or uint8 (4 bits), got {dtype}")
        super().allocate(rows, dtype)
        for i, (keys, values) in enumerate(self.caches):
            self.native.set_cache(i, keys.data_ptr(), values.data_ptr(), CACHES[dtype], rows)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        """x [T, d] -> [T, d]; IndexError where a slot or a page leaves the cache, with nothing written."""
        tokens, first = x.shape[0], self.layers[0]
        taken = (
            _is_rows(x, first.norm.shape[0])
            and all(_are_angles(t, self._rotations, tokens, first.width // 2) for t in (cos, sin))
            and _are_indices(batch.slots)
            and batch.slots.shape == (tokens,)
            and _is_paged(batch)
        )
        if not taken:
            return self._one_by_one(x, cos, sin, batch)
        count = len(self.layers)
        if tokens <= MOST_TOKENS_AT_ONCE:
            return self._run(0, count, x, cos, sin, batch)
        for i in range(count):
            x = self._run(i, i + 1, x, cos, sin, batch)
        return x

    def _run(self, first: int, last: int, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        """The layers from `first` to before `last`."""
        y = torch.empty_like(x)
        done = self.native.run(
            first,
            last,
            x.data_ptr(),
            x.shape[0],
            cos.data_ptr(),
            sin.data_ptr(),
            batch.slots.data_ptr(),
            batch.pages.data_ptr(),
            batch.pages.shape[1],
            batch.page_size,
            batch.lengths.data_ptr(),
            batch.starts.data_ptr(),
            len(batch.pages),
            y.data_ptr(),
        )
        if not done:
            rows = self.caches[0][0].shape[0]
            inside = ((batch.slots >= 0) & (batch.slots < rows)).all()
            raise _batch_out_of_range(batch, rows) if inside else _slots_out_of_range(batch.slots, rows)
        return y

    def _one_by_one(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        return super().__call__(x, cos, sin, batch)


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _biases(layer: Layer) -> list[int]:
    """Where those of the four products lie, 0 for none."""
    return _addresses(*(getattr(p, "bias", None) for p in (layer.qkv, layer.o, layer.gate_up, layer.down)))


def _matrix(native: ModuleType, product: Product) -> Any:
    """The native matrix of a product, or None: another backend's, or one with a bias that native code does not add."""
    packed, bias = getattr(product, "packed", None), getattr(product, "bias", None)
    if packed is None or not isinstance(packed.data, native.Matrix):
        return None
    return packed.data if bias is None or _is_rows(bias[None], packed.shape[0]) else None


def _are_angles(t: Tensor, rotations: int, tokens: int, half: int) -> bool:
    """Cosines or sines of at least so many rotations; of one, without its axis."""
    shape = t.shape if t.dim() == 3 else (1, *t.shape)
    return (
        len(shape) == 3
        and shape[0] >= rotations
        and tuple(shape[1:]) == (tokens, half)
        and t.dtype is torch.float32
        and t.is_cpu
        and t.is_contiguous()
    )


def _takes(native: ModuleType, layer: Layer, d: int) -> bool:
    """Whether the native code runs this layer, over a hidden state of width `d`."""
    qkv, o, gate_up, down = (_matrix(native, p) for p in (layer.qkv, layer.o, layer.gate_up, layer.down))
    if qkv is None or o is None or gate_up is None or down is None:
        return False
    heads, kv, inner = layer.heads * layer.width, layer.kv_heads * layer.width, down.column_count
    shapes = [(m.row_count, m.column_count) for m in (qkv, o, gate_up, down)]
    norms = (layer.attention_norm, layer.mlp_norm, layer.attention_after, layer.mlp_after)
    return (
        shapes == [(heads + 2 * kv, d), (d, heads), (2 * inner, d), (d, inner)]
        and all(norm is None or _is_rows(norm[None], d) for norm in norms)
        and any(_norms_heads(layer, whole) for whole in (False, True))
        and layer.turned is None
        and layer.activation in ACTIVATIONS
        and layer.width % 16 == 0
        and layer.heads % layer.kv_heads == 0
    )


def _norms_heads(layer: Layer, whole: bool) -> bool:
    """Whether the norms of q and k are over all heads together, or each, or not there."""
    sizes = [(n if whole else 1) * layer.width for n in (layer.heads, layer.kv_heads)]
    pairs = zip((layer.q_norm, layer.k_norm), sizes, strict=True)
    return all(norm is None or _is_rows(norm[None], size) for norm, size in pairs)


def _is_paged(batch: Batch) -> bool:
    """Tables whose shapes agree; what they say is checked by the native code."""
    sequences = batch.pages.shape[0]
    return (
        _are_indices(batch.pages, batch.lengths, batch.starts)
        and batch.pages.dim() == 2
        and batch.lengths.shape == (sequences,)
        and batch.starts.shape == (sequences + 1,)
        and batch.page_size > 0
    )


def _slots_out_of_range(slots: Tensor, rows: int) -> IndexError:
    return IndexError(f"slots must lie in 0 .. {rows - 1}, got {slots.tolist()}")


def _batch_out_of_range(batch: Batch, rows: int) -> IndexError:
    return IndexError(
        f"the batch leaves the cache: lengths {batch.lengths.tolist()}, starts {batch.starts.tolist()}, "
        f"pages up to {int(batch.pages.max())} of {batch.page_size} in {rows} rows"
    )


def _are_caches(k_cache: Tensor, v_cache: Tensor, heads: int, width: int) -> bool:
    """Two contiguous caches of one dtype that the native code has, for so many heads of `width`."""
    dtype, shape = k_cache.dtype, k_cache.shape
    return (
        dtype in CACHES
        and dtype is v_cache.dtype
        and shape == v_cache.shape
        and shape[1] == heads
        and shape[2] == cached_width(width, dtype)
        and k_cache.is_cpu
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
    )
