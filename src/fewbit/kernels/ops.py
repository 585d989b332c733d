"""The short list of operations around the products, each with its reference definition.

A backend overrides the ones it has a faster way for by subclassing `Ops`; all of them take and return float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fewbit.kernels._layer import Experts, Layer, Product, no_product

__all__ = ["Experts", "Layer", "Product", "no_product"]


@dataclass(frozen=True)
class Batch:
    """Where the flat tokens of one step lie: S sequences, T tokens in all, a paged cache. Static tensors only.

    slots    int64 [T]     cache row each token is written to: page * page_size + offset in the page
    pages    int64 [S, P]  page table; a contiguous cache is the identity table
    lengths  int64 [S]     tokens of each sequence in the cache after this step
    starts   int64 [S + 1] first token of each sequence in the flat batch
    wanted   int64 [W]     tokens whose logits are wanted, or None for all
    """

    slots: Tensor
    pages: Tensor
    lengths: Tensor
    starts: Tensor
    page_size: int
    wanted: Tensor | None = None


# keys and values of one layer, as `cached` makes them: float [R, KV, D] each, or int8 or INT4 [R, KV, cached_width]
Cache = tuple[Tensor, Tensor]
# the dtype of a cache in 4 bits: its elements are bytes
INT4 = torch.uint8
# numbers that share a scale in it
INT4_GROUP = 32
# magnitudes beyond float16's largest are held there: an infinity would make all scores NaN
LARGEST_CACHED = torch.finfo(torch.float16).max


class Ops:
    """The definitions, in torch."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, n] over the root of its mean square, times weight [n] (Zhang and Sennrich 2019, eq. 4)."""
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        """gate_up [T, 2n], gate first -> activation(gate) * up [T, n] (Shazeer 2020, section 2)."""
        gate, up = gate_up.chunk(2, dim=-1)
        if activation == "silu":
            return F.silu(gate) * up
        if activation == "gelu_tanh":
            return F.gelu(gate, approximate="tanh") * up
        raise ValueError(f"unknown gated activation {activation!r}")

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
        """Rotate q [T, H, D] and k [T, KV, D] by cos, sin [T, D/2] (Su et al. 2021; halves, not pairs); write the
        rotated k and v [T, KV, D] to rows `slots` of the caches as `cached` says; return the rotated q [T, H, D].

        In int8 and INT4, keys are spread before they are rounded, and q with them: their products stay what they are.
        In INT4 values are, too, and what `attend` makes of them is spread back.
        """
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if k_cache.dtype in (torch.int8, INT4):
            q, k = spread(q), spread(k)
        if v_cache.dtype is INT4:
            v = spread(v)
        k_cache[slots] = cached(k, k_cache.dtype)
        v_cache[slots] = cached(v, v_cache.dtype)
        return q

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
        """Causal grouped-query attention of q [T, H, D] over the cached rows of each token's sequence -> [T, H * D].

        Token i of a sequence with n new tokens and length L sees its first L - n + i + 1 rows, the last `window` of
        them where that is not 0.
        """
        tokens, heads, width = q.shape
        out = torch.empty(tokens, heads * width, dtype=q.dtype, device=q.device)
        starts, lengths = batch.starts.tolist(), batch.lengths.tolist()
        for s, length in enumerate(lengths):
            first, last = starts[s], starts[s + 1]
            used = batch.pages[s, : -(-length // batch.page_size)]
            k, v = (uncached(_gather(c, used, batch.page_size, length), q.dtype) for c in (k_cache, v_cache))
            fresh = last - first
            mask = visible(length, fresh, window, q.device) if fresh > 1 or 0 < window < length else None
            new, k, v = (x.transpose(0, 1)[None] for x in (q[first:last], k, v))
            y = attention(new, k, v, mask, scale, soft_cap)[0].transpose(0, 1)
            out[first:last] = (spread(y) if v_cache.dtype is INT4 else y).reshape(fresh, heads * width)
        return out

    def layer(self, x: Tensor, layer: Layer, cache: Cache, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        """x [T, d] + attention of its norm, then + the gated product of that one's norm -> [T, d]."""
        x = x + self._after(self.attention(x, layer, cache, cos, sin, batch), layer.attention_after, layer.eps)
        return x + self._after(self.feed_forward(x, layer), layer.mlp_after, layer.eps)

    def attention(self, x: Tensor, layer: Layer, cache: Cache, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        """What a layer's attention makes of x [T, d] -> [T, d]."""
        heads, kv = layer.heads, layer.kv_heads
        qkv = layer.qkv(self._after(x, layer.attention_norm, layer.eps))
        q, k, v = qkv.unflatten(1, (heads + 2 * kv, layer.width)).split((heads, kv, kv), dim=1)
        q, k = self.norm_heads(q, layer.q_norm, layer.eps), self.norm_heads(k, layer.k_norm, layer.eps)
        q = self.rotate_append(q, k, v, cos, sin, batch.slots, *cache)
        return layer.o(self.attend(q, *cache, batch, layer.score_scale, layer.window, layer.soft_cap))

    def feed_forward(self, x: Tensor, layer: Layer) -> Tensor:
        """What a layer's gated product, or its experts, make of x [T, d] -> [T, d]."""
        x = self._after(x, layer.mlp_norm, layer.eps)
        if layer.experts is not None:
            return self.mixture(x, layer.experts, layer.activation)
        return layer.down(self.gated(layer.gate_up(x), layer.activation))

    def norm_heads(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """x [T, H, D], each head's norm for a weight [D], or that of all together for [H * D]; None: x."""
        if weight is None:
            return x
        columns = weight.shape[0]
        return self.rms_norm(x.reshape(-1, columns), weight, eps).view(x.shape)

    def mixture(self, x: Tensor, experts: Experts, activation: str) -> Tensor:
        """x [T, d] -> [T, d]: each token through its experts, an expert's tokens together."""
        chosen, weights = self.route(x, experts)
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        tokens = (order // experts.used).split(flat.bincount(minlength=len(experts.down)).tolist())
        parts = [
            self.expert(x.index_select(0, mine), experts, e, mine, activation)
            for e, mine in enumerate(tokens)
            if len(mine)
        ]
        # back in the order of tokens: adding up where they lie would have no fixed order on a card
        found = torch.cat(parts)[order.argsort()].unflatten(0, chosen.shape)
        summed: Tensor = (found * weights[..., None]).sum(1)
        return summed

    def route(self, x: Tensor, experts: Experts, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The experts each token of x [T, d] takes, int64 [T, used], and what each counts, float32 [T, used].

        `chosen`: those it takes in any case.
        """
        probabilities = F.linear(x, experts.router).softmax(-1)
        if chosen is None:
            chosen = probabilities.topk(experts.used, dim=-1).indices
        weights = probabilities.gather(-1, chosen)
        return chosen, weights / weights.sum(-1, keepdim=True) if experts.normalized else weights

    def expert(self, x: Tensor, experts: Experts, e: int, tokens: Tensor, activation: str) -> Tensor:
        """x [n, d] through expert `e` -> [n, d]; `tokens` int64 [n] are their places in the step."""
        return experts.down[e](self.gated(experts.gate_up[e](x), activation))

    def _after(self, x: Tensor, norm: Tensor | None, eps: float) -> Tensor:
        return x if norm is None else self.rms_norm(x, norm, eps)

    def stack(self, layers: Sequence[Layer]) -> Stack:
        """`layers` made ready to run one after the other."""
        return Stack(self, layers)


class Stack:
    """Layers that run one after the other, with their caches, on the device of their weights."""

    # whether a step of one new token a sequence may be recorded and run again: it never asks the host anything
    replays = False

    def __init__(self, ops: Ops, layers: Sequence[Layer]) -> None:
        self.ops, self.layers = ops, tuple(layers)
        self.caches: list[Cache] = []
        self.allocate(0, torch.float32)

    def allocate(self, rows: int, dtype: torch.dtype) -> None:
        """Room for `rows` tokens. Memory is only touched when written, so a large context costs nothing unused."""
        self.caches = []
        for layer in self.layers:
            on = layer.norm.device
            keys, values = (empty_cache(rows, layer.kv_heads, layer.width, dtype, on) for _ in range(2))
            self.caches.append((keys, values))

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        """x [T, d], cos and sin [T, D/2] of the tokens' positions -> [T, d]; appends to the caches.

        A model of several rotations gives those of each, [rotations, T, D/2].
        """
        for layer, cache in zip(self.layers, self.caches, strict=True):
            x = self.ops.layer(x, layer, cache, rotation(cos, layer), rotation(sin, layer), batch)
        return x


def rotation(angles: Tensor, layer: Layer) -> Tensor:
    """The cosines or sines [T, D/2] that turn a layer's heads."""
    return angles[layer.rotation] if angles.dim() == 3 else angles


def visible(length: int, fresh: int, window: int, device: torch.device) -> Tensor:
    """Which of `length` rows the last `fresh` tokens see, bool [fresh, length]."""
    last = torch.arange(length - fresh, length, device=device)[:, None]
    rows = torch.arange(length, device=device)[None]
    seen = rows <= last
    return seen & (rows > last - window) if window else seen


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, soft_cap: float = 0.0) -> Tensor:
    """q [n, H, T, D], k and v [n, KV, L, D], mask bool [T, L] or None -> [n, H, T, D]."""
    if not soft_cap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = soft_cap * (q @ k.transpose(-1, -2) * (scale / soft_cap)).tanh()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weighted: Tensor = scores.softmax(-1) @ v
    return weighted


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D] turned by cos, sin [T, D/2]: the two halves of a head are the pairs. Fewer angles turn the numbers a
    head begins with.
    """
    turned = 2 * cos.shape[-1]
    if turned < x.shape[-1]:
        return torch.cat((rotate(x[..., :turned], cos, sin), x[..., turned:]), dim=-1)
    a, b = x.chunk(2, dim=-1)
    c, s = cos[:, None], sin[:, None]
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1)


def spread(x: Tensor) -> Tensor:
    """x [..., D] times a Hadamard matrix over its root, in blocks of the largest power of two in D: orthogonal, and a
    channel far larger than the others is shared out among its block (Ashkboos et al. 2024, section 4).
    """
    width = x.shape[-1]
    block, distance = width & -width, 1
    while distance < block:
        a, b = x.unflatten(-1, (-1, 2, distance)).unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        distance *= 2
    shared: Tensor = x * block**-0.5
    return shared


def cached_width(width: int, dtype: torch.dtype) -> int:
    """Elements that a head of `width` numbers, an even number, takes in a cache of this dtype."""
    if dtype is INT4:
        return width // 2 + 4 * -(-width // INT4_GROUP)
    return width + 2 if dtype is torch.int8 else width


def heads_apart(width: int, dtype: torch.dtype, device: str) -> int:
    """Elements from one head of a cache to the next on a kind of device: a card reads eight codes of 8 bits at once."""
    count = cached_width(width, dtype)
    return -(-count // 8) * 8 if dtype is torch.int8 and device != "cpu" else count


def empty_cache(rows: int, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for the keys or the values of `rows` tokens [rows, heads, cached_width]."""
    whole = torch.empty(rows, heads, heads_apart(width, dtype, device.type), dtype=dtype, device=device)
    return whole[..., : cached_width(width, dtype)]


def cached(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values x [..., D] as a cache of this dtype holds them.

    int8 [..., D + 2]: a head's scale is its largest magnitude / 127 in bfloat16 (two bytes behind the codes, their low
    one first), its codes x / scale rounded to nearest. NaN makes the scale NaN, and so the whole head.
    INT4: two codes a byte, the first in the low half, then for each group of 32 numbers its scale and its least number,
    float16: x is scale * code + least, the scale a 15th of the group's range, codes rounded to nearest.
    """
    if dtype is INT4:
        return _nibbles(x.clamp(-LARGEST_CACHED, LARGEST_CACHED))
    if dtype is torch.int8:
        largest = x.abs().amax(-1, keepdim=True).clamp(max=LARGEST_CACHED)
        scale = (largest / 127).bfloat16()
        codes = (x / scale.float()).round().clamp(-127, 127)
        # a head without a magnitude has the code 0, and so has one that is NaN
        codes = torch.where(scale > 0, codes, 0)
        return torch.cat((codes.to(torch.int8), scale.view(torch.int8)), dim=-1)
    if dtype is torch.float16:
        x = x.clamp(-LARGEST_CACHED, LARGEST_CACHED)
    return x.to(dtype)


def uncached(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """What `cached` made of [..., D], in the dtype of the computation."""
    if rows.dtype is INT4:
        return _of_nibbles(rows).to(dtype)
    if rows.dtype is not torch.int8:
        return rows.to(dtype)
    scale = rows[..., -2:].contiguous().view(torch.bfloat16)
    return rows[..., :-2].to(dtype) * scale.to(dtype)


def _nibbles(x: Tensor) -> Tensor:
    codes, numbers = [], []
    for group in x.float().split(INT4_GROUP, -1):
        least, most = group.amin(-1, keepdim=True), group.amax(-1, keepdim=True)
        # of two zeros the positive one
        params = torch.cat(((most - least) / 15, least + 0.0), dim=-1).half()
        scale, least = params.float().split(1, -1)
        # a group of one number everywhere has the code 0, and so has one that is NaN
        codes.append(torch.where(scale > 0, ((group - least) / scale).round().clamp(0, 15), 0).to(torch.uint8))
        numbers.append(params.view(torch.uint8))
    low, high = torch.cat(codes, -1).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat((low | high << 4, *numbers), dim=-1)


def _of_nibbles(rows: Tensor) -> Tensor:
    # the width follows from the bytes: a whole group has 16 and 4, the last one may be shorter
    groups = -(-rows.shape[-1] // (INT4_GROUP // 2 + 4))
    pairs, params = rows.split((rows.shape[-1] - 4 * groups, 4 * groups), -1)
    codes = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2).float()
    scale, least = params.clone().view(torch.float16).float().unflatten(-1, (groups, 2)).unbind(-1)
    parts = zip(codes.split(INT4_GROUP, -1), scale.split(1, -1), least.split(1, -1), strict=True)
    return torch.cat([part * by + start for part, by, start in parts], dim=-1)


def _gather(cache: Tensor, pages: Tensor, page_size: int, length: int) -> Tensor:
    """The first `length` cached rows of a sequence."""
    found: Tensor = cache.unflatten(0, (-1, page_size))[pages].flatten(0, 1)[:length]
    return found
