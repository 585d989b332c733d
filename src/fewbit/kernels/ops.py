"""The short list of operations around the products, each with its reference definition.

A backend overrides the ones it has a faster way for by subclassing `Ops`; all of them take and return float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


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
        rotated k and v [T, KV, D] to rows `slots` of the caches [R, KV, D]; return the rotated q [T, H, D].
        """
        k_cache[slots] = _cached(rotate(k, cos, sin), k_cache.dtype)
        v_cache[slots] = _cached(v, v_cache.dtype)
        return rotate(q, cos, sin)

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch, scale: float) -> Tensor:
        """Causal grouped-query attention of q [T, H, D] over the cached rows of each token's sequence -> [T, H * D].

        Token i of a sequence with n new tokens and length L sees its first L - n + i + 1 rows.
        """
        tokens, heads, width = q.shape
        out = torch.empty(tokens, heads * width, dtype=q.dtype, device=q.device)
        starts, lengths = batch.starts.tolist(), batch.lengths.tolist()
        for s, length in enumerate(lengths):
            first, last = starts[s], starts[s + 1]
            used = batch.pages[s, : -(-length // batch.page_size)]
            k, v = (_gather(c, used, batch.page_size, length).to(q.dtype) for c in (k_cache, v_cache))
            fresh = last - first
            mask = None
            if fresh > 1:
                allowed = torch.arange(length - fresh, length, device=q.device)
                mask = torch.arange(length, device=q.device)[None] <= allowed[:, None]
            y = F.scaled_dot_product_attention(
                q[first:last].transpose(0, 1)[None],
                k.transpose(0, 1)[None],
                v.transpose(0, 1)[None],
                attn_mask=mask,
                scale=scale,
                enable_gqa=True,
            )
            out[first:last] = y[0].transpose(0, 1).reshape(fresh, heads * width)
        return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D] turned by cos, sin [T, D/2]: the two halves of a head are the pairs."""
    a, b = x.chunk(2, dim=-1)
    c, s = cos[:, None], sin[:, None]
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1)


def _cached(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In the cache's dtype; float16 holds at its largest what is beyond: an infinity would make all scores NaN."""
    if dtype is torch.float16:
        limit = torch.finfo(dtype).max
        x = x.clamp(-limit, limit)
    return x.to(dtype)


def _gather(cache: Tensor, pages: Tensor, page_size: int, length: int) -> Tensor:
    """The first `length` rows of a sequence [length, KV, D]."""
    found: Tensor = cache.unflatten(0, (-1, page_size))[pages].flatten(0, 1)[:length]
    return found
