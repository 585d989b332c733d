"""Scales of integer groups: the textbook min/max map, and a search for the least weighted squared error.

Every function takes groups as rows: g float32 [n, span], h (importance) of the same shape or None, and gives one
scale a row, already rounded to the dtype it is stored in, because codes are chosen after that rounding.
With codes q the error of a row is  sum h (w - s q)^2 = sum h w^2 - 2 s sum h w q + s^2 sum h q^2,  so a candidate
costs two sums, and the best scale for fixed codes is  sum h w q / sum h q^2.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CANDIDATES = 22
REFINEMENTS = 3


def fractions(bits: int, count: int = CANDIDATES) -> list[float]:
    """Fractions of absmax / 2^(bits-1) to try as scale: from the textbook's absmax / (2^(bits-1) - 1) down.

    The fewer codes there are, the more clipping can pay.
    """
    half = 2 ** (bits - 1)
    low, high = max(0.15, 1 - 2.8 / half), half / (half - 1)
    return [high - (high - low) * i / (count - 1) for i in range(count)]


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 scales rounded to `dtype`, never zero and never infinite; a group of zeros gets scale 1."""
    # f16 keeps small scales as subnormals; the others' normals are small enough, and 1 / scale stays finite
    least = 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
    size = scale.abs().clamp(least, torch.finfo(dtype).max)
    signed = torch.where(scale < 0, -size, size).to(dtype).float()
    return torch.where(scale == 0, torch.ones_like(signed), signed)


def minmax_symmetric(g: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """absmax / (2^(bits-1) - 1): the textbook's symmetric scale."""
    return storable(g.abs().amax(1) / (2 ** (bits - 1) - 1), dtype)


def minmax_asymmetric(g: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """scale = (max - min) / (2^bits - 1) and the code of zero, round(-min / scale); the range includes zero."""
    low, high = g.amin(1).clamp(max=0), g.amax(1).clamp(min=0)
    scale = storable((high - low) / (2**bits - 1), dtype)
    return scale, (-low / scale).round_().clamp_(0, 2**bits - 1)


class _Best:
    """The best scale (and zero) so far of every row."""

    def __init__(self, g: Tensor, h: Tensor | None, bits: int, dtype: torch.dtype) -> None:
        self.g, self.h, self.bits, self.dtype = g, h, bits, dtype
        self.hg = g if h is None else g * h
        self.error = torch.full((len(g),), torch.inf, device=g.device)
        self.scale = torch.ones(len(g), device=g.device)
        self.zero = torch.zeros(len(g), device=g.device)
        self.ideal = torch.zeros(len(g), device=g.device)

    def offer(self, scale: Tensor, zero: Tensor | float) -> None:
        """Try one candidate a row; the better of it and the present one stays."""
        scale = storable(scale, self.dtype)
        shift = zero[:, None] if isinstance(zero, Tensor) else torch.tensor(zero, device=self.g.device)
        top = 2**self.bits - 1
        q = (self.g * (1.0 / scale)[:, None]).round_()
        q = q.clamp_(-shift, top - shift)
        hq = q if self.h is None else q * self.h
        cross, square = torch.linalg.vecdot(self.hg, q), torch.linalg.vecdot(hq, q)
        # up to sum h w^2, which no candidate changes
        error = scale * (scale * square - 2 * cross)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero if isinstance(zero, Tensor) else torch.full_like(scale, zero), self.zero)
        self.ideal = torch.where(better, cross / square.clamp(min=1e-30), self.ideal)


def search_symmetric(g: Tensor, h: Tensor | None, bits: int, dtype: torch.dtype, count: int = CANDIDATES) -> Tensor:
    """Signed scale of least weighted squared error for codes -2^(bits-1) .. 2^(bits-1) - 1; `count` sizes are tried."""
    best, half = _Best(g, h, bits, dtype), 2 ** (bits - 1)
    extreme = g.gather(1, g.abs().argmax(1, keepdim=True)).squeeze(1)
    for fraction in fractions(bits, count):
        for sign in (-1.0, 1.0):
            best.offer(extreme * (sign * fraction / half), half)
    for _ in range(REFINEMENTS):
        best.offer(best.ideal.clone(), half)
    return best.scale


def search_asymmetric(g: Tensor, h: Tensor | None, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero code of least weighted squared error for codes 0 .. 2^bits - 1."""
    best, top = _Best(g, h, bits, dtype), 2**bits - 1
    low, high = g.amin(1).clamp(max=0), g.amax(1).clamp(min=0)
    for scale, zero in _ranges(low, high, bits, dtype):
        best.offer(scale, zero)
    for _ in range(REFINEMENTS):
        for step in (0.0, -1.0, 1.0):
            best.offer(best.ideal.clone(), (best.zero + step).clamp(0, top))
    return best.scale, best.zero


def _ranges(low: Tensor, high: Tensor, bits: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """The textbook's range first, then narrower ones that keep its low end, its middle or its high end."""
    top = 2**bits - 1
    for fraction in [1.0, *fractions(bits)]:
        scale = storable((high - low) * (fraction / top), dtype)
        centred = (top - (high + low) / scale) / 2
        for zero in (-low / scale, centred, top - high / scale):
            yield scale, zero.round().clamp(0, top)
