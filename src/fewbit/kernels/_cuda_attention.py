"""Attention on an NVIDIA card over caches in 16, 8 and 4 bits: kernels of `_cuda/attend.cu` and `_cuda/append.cu`."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int, c_void_p
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from fewbit.kernels import _nvrtc
from fewbit.kernels._nvrtc import pointers, run
from fewbit.kernels.ops import INT4, Batch, Cache, Layer

# of ranges.cuh
TILE = 64
MOST_SPLITS = 32
ATTEND_THREADS = 128
# query heads that a block serves
MOST_HEADS = 8
WIDTHS = (16, 32, 64, 128, 256)
# bits that a cache has for a number
BITS = {torch.float16: 16, torch.int8: 8, INT4: 4}
# sequences of one step whose partial sums have room
SEQUENCES = 16


class _New(Structure):
    _fields_ = (("qkv", c_void_p), ("cosines", c_void_p), ("sines", c_void_p))


class _Places(Structure):
    _fields_ = (
        ("slots", c_void_p),
        ("lengths", c_void_p),
        ("pages", c_void_p),
        ("pages_each", c_int),
        ("page_size", c_int),
    )


class _Caches(Structure):
    _fields_ = (("keys", c_void_p), ("values", c_void_p), ("heads", c_int), ("kv_heads", c_int))


class _Result(Structure):
    _fields_ = (
        ("partial", c_void_p),
        ("stats", c_void_p),
        ("counters", c_void_p),
        ("out", c_void_p),
        ("halves", c_void_p),
        ("tokens", c_int),
        ("first_token", c_int),
    )


def blocks(heads: int, kv_heads: int) -> int:
    """Blocks that serve the query heads of a sequence over one range: those of a key-value head in as few as can be."""
    return kv_heads * -(-(heads // kv_heads) // MOST_HEADS)


class Attention:
    """Attends, for the layers of one stack; they run one after the other and share the room for partial sums."""

    def __init__(self, device: torch.device, heads: int, width: int) -> None:
        """`heads` and `width`: the most that a layer has."""
        self.device = device
        self._partial = torch.empty(SEQUENCES * heads * width * MOST_SPLITS, device=device)
        self._stats = torch.empty(SEQUENCES * heads * MOST_SPLITS, 2, device=device)
        self._counters = torch.zeros(SEQUENCES * heads, dtype=torch.int32, device=device)

    def one(
        self,
        layer: Layer,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: Cache,
        batch: Batch,
        halves: Tensor | None = None,
    ) -> Tensor:
        """qkv [S, (H + 2 KV) * D] of one new token a sequence -> [S, H * D], or `halves` as the products take them.

        Appends to the cache.
        """
        heads, kv, width, tokens = layer.heads, layer.kv_heads, layer.width, len(qkv)
        out = torch.empty(0 if halves is not None else tokens, heads * width, device=qkv.device)
        splits = min(MOST_SPLITS, -(-batch.pages.shape[1] * batch.page_size // TILE))
        kernel = compiled("attend_one", self.device, width, cache[0].dtype)
        caches = _Caches(*_addresses(*cache), heads, kv)
        room = _addresses(self._partial, self._stats, self._counters)
        for first in range(0, tokens, SEQUENCES):
            here = slice(first, first + SEQUENCES)
            grid = (blocks(heads, kv), min(SEQUENCES, tokens - first), splits)
            made = _New(*_addresses(qkv[here], cos[here], sin[here]))
            tables = _addresses(batch.slots[here], batch.lengths[here], batch.pages[here])
            places = _Places(*tables, batch.pages.shape[1], batch.page_size)
            result = _Result(*room, *_addresses(out[here], halves), tokens, first)
            run(kernel, grid, ATTEND_THREADS, made, places, caches, result, c_float(width**-0.5))
        return out

    def many(
        self, layer: Layer, qkv: Tensor, cos: Tensor, sin: Tensor, cache: Cache, batch: Batch, spans: Spans
    ) -> Tensor:
        """The same for any number of new tokens, sequence by sequence through torch's flash attention."""
        tokens, heads, kv, width = len(qkv), layer.heads, layer.kv_heads, layer.width
        q = torch.empty(tokens, heads, width, dtype=torch.float16, device=qkv.device)
        kernel = compiled("rotate_append", self.device, width, cache[0].dtype)
        made, caches = _New(*_addresses(qkv, cos, sin)), _Caches(*_addresses(*cache), heads, kv)
        run(kernel, (tokens, 1, 1), 256, made, *pointers(batch.slots, q), caches)
        out = torch.empty(tokens, heads * width, device=qkv.device)
        for s, (first, last, length) in enumerate(spans.found):
            k, v = (self._rows(layer, c, i, s, batch, spans) for i, c in enumerate(cache))
            new = last - first
            y = F.scaled_dot_product_attention(
                q[first:last].transpose(0, 1)[None],
                k.transpose(0, 1)[None],
                v.transpose(0, 1)[None],
                attn_mask=causal_lower_right(new, length) if new < length else None,
                is_causal=new == length,
                scale=width**-0.5,
                enable_gqa=heads != kv,
            )
            out[first:last] = y[0].transpose(0, 1).reshape(new, heads * width)
        return out

    def _rows(self, layer: Layer, cache: Tensor, values: int, s: int, batch: Batch, spans: Spans) -> Tensor:
        """The cached rows of sequence `s` as halves [length, KV, D], not turned."""
        if cache.dtype is torch.float16:
            return spans.rows(cache, s, batch)
        kv, width, length = layer.kv_heads, layer.width, spans.found[s][2]
        out = torch.empty(length, kv, width, dtype=torch.float16, device=cache.device)
        kernel = compiled("expand_rows", self.device, width, cache.dtype)
        args = [*pointers(cache, batch.pages[s]), c_int(batch.page_size), c_int(length), c_int(kv), c_int(values)]
        run(kernel, (-(-length * kv // 8), 1, 1), 256, *args, *pointers(out))
        return out


class Spans:
    """Where the sequences of a step lie, asked of the card once for all layers."""

    def __init__(self, batch: Batch) -> None:
        starts, lengths, self.pages = batch.starts.tolist(), batch.lengths.tolist(), batch.pages.tolist()
        # first new token, the one behind the last, tokens in the cache
        self.found = list(zip(starts, starts[1:], lengths, strict=False))

    def rows(self, cache: Tensor, s: int, batch: Batch) -> Tensor:
        """The cached rows of sequence `s` [length, KV, D]; neighbouring pages are not copied."""
        length, size = self.found[s][2], batch.page_size
        used = self.pages[s][: -(-length // size)]
        if used == list(range(used[0], used[0] + len(used))):
            return cache[used[0] * size : used[0] * size + length]
        found: Tensor = cache.unflatten(0, (-1, size))[batch.pages[s, : len(used)]].flatten(0, 1)[:length]
        return found


@cache
def compiled(name: str, device: torch.device, width: int, dtype: torch.dtype) -> _nvrtc.Kernel:
    """A kernel for heads of a width in a cache of a dtype."""
    source = "attend.cu" if name == "attend_one" else "append.cu"
    return _nvrtc.module(source, (name,), {"WIDTH": width, "CACHE": BITS[dtype]}, device.index)[name]


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]
