"""The writing side of ggml's blocks: parameters for weights, codes for parameters, and the bytes of both.

The layouts are drawn in `_ggml_plain` and `_ggml_k`; what is here is the inverse of their `take_apart`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from fewbit.formats import Params
from fewbit.formats import _ggml_fit as fitting
from fewbit.formats._cores import GPU_SLICE_WEIGHTS, SLICE_WEIGHTS, on_all_cores

if TYPE_CHECKING:
    from fewbit.formats._ggml_block import GgmlFormat

Fit = Callable[[Tensor, Tensor | None, bool], Params]


def _symmetric(bits: int) -> Fit:
    def fit(g: Tensor, h: Tensor | None, search: bool) -> Params:
        return fitting.symmetric(g, h, bits) if search else fitting.plain_symmetric(g, bits)

    return fit


FITS: Final[dict[str, Fit]] = {
    "gguf:q4_0": _symmetric(4),
    "gguf:q5_0": _symmetric(5),
    "gguf:q8_0": _symmetric(8),
    "gguf:q4_1": lambda g, h, search: fitting.with_minimum(g, h, 4, search),
    "gguf:q5_1": lambda g, h, search: fitting.with_minimum(g, h, 5, search),
    "gguf:q4_k": lambda g, h, search: fitting.two_level_minimum(g, h, 4, search),
    "gguf:q5_k": lambda g, h, search: fitting.two_level_minimum(g, h, 5, search),
    "gguf:q6_k": fitting.two_level_symmetric,
}


def fit(fmt: GgmlFormat, w: Tensor, importance: Tensor | None, search: bool) -> Params:
    """Parameters of w float32 [out, in] as `unpack` gives them, [out, n]."""
    rows = max(1, (SLICE_WEIGHTS if w.device.type == "cpu" else GPU_SLICE_WEIGHTS) // w.shape[1])
    h = None if importance is None else importance.expand_as(w)

    def fit_slice(start: int) -> Params:
        part = slice(start, start + rows)
        g = w[part].float()
        weights = None if h is None else h[part].reshape(-1, fmt.block)
        found = FITS[fmt.spec](g.reshape(-1, fmt.block), weights, search)
        return {name: p.reshape(len(g), -1) for name, p in found.items()}

    pieces = on_all_cores(fit_slice, range(0, len(w), rows), w.device)
    return {name: torch.cat([p[name] for p in pieces]) for name in pieces[0]}


def nearest_codes(fmt: GgmlFormat, w: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """uint8 codes of w [out, in] under the scale, and maybe the offset, of each span; of a scale of 0 the zero code."""
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    rows = max(1, SLICE_WEIGHTS // w.shape[1])
    for start in range(0, len(w), rows):
        part = slice(start, start + rows)
        s = scale[part].float()[..., None]
        g = w[part].float().reshape(*s.shape[:-1], fmt.span)
        if offset is not None:
            g = g - offset[part].float()[..., None]
        q = (g / torch.where(s == 0, torch.ones_like(s), s)).mul_(s != 0).round_()
        codes[part] = q.add_(fmt.zero).clamp_(0, 2**fmt.bits - 1).flatten(1).to(torch.uint8)
    return codes


def put_together(fmt: GgmlFormat, codes: Tensor, params: Params) -> Tensor:
    """Blocks uint8 [out, blocks * bytes]: what `take_apart` takes apart."""
    by_block = codes.unflatten(1, (-1, fmt.block))
    count = by_block.shape[1]
    stored = {name: p.unflatten(1, (count, -1)) for name, p in params.items()}
    return torch.cat([part.view(torch.uint8) for part in _PARTS[fmt.spec](by_block, stored)], -1).flatten(1)


def together(numbers: Tensor, run: int, bits: int, count: int) -> Tensor:
    """The inverse of `fields`: numbers [out, blocks, n * count] of `bits` bits each, `count` to a byte."""
    parts: Tensor = numbers.unflatten(-1, (-1, count, run))
    packed: Tensor = parts[..., 0, :] & ((1 << bits) - 1)
    for i in range(1, count):
        packed = packed | (parts[..., i, :] & ((1 << bits) - 1)) << (bits * i)
    return packed.flatten(-2)


Parts = Callable[[Tensor, Params], list[Tensor]]


def _four(codes: Tensor, p: Params) -> list[Tensor]:
    halves = [p[name].contiguous() for name in ("scale", "minimum") if name in p]
    return [*halves, together(codes, 16, 4, 2)]


def _five(codes: Tensor, p: Params) -> list[Tensor]:
    *halves, low = _four(codes, p)
    return [*halves, together(codes >> 4, 1, 1, 8), low]


def _eight(codes: Tensor, p: Params) -> list[Tensor]:
    return [p["scale"].contiguous(), codes ^ 128]


def _six_bit_steps(p: Params) -> list[Tensor]:
    steps, minima = p["steps"], p["minimum_steps"]
    first = steps[..., :4] | steps[..., 4:] >> 4 << 6
    second = minima[..., :4] | minima[..., 4:] >> 4 << 6
    low = steps[..., 4:] & 15 | minima[..., 4:] << 4
    return [p["scale"].contiguous(), p["minimum"].contiguous(), first, second, low]


def _q4_k(codes: Tensor, p: Params) -> list[Tensor]:
    return [*_six_bit_steps(p), together(codes, 32, 4, 2)]


def _q5_k(codes: Tensor, p: Params) -> list[Tensor]:
    return [*_six_bit_steps(p), together(codes >> 4, 32, 1, 8), together(codes, 32, 4, 2)]


def _q6_k(codes: Tensor, p: Params) -> list[Tensor]:
    low, high = together(codes, 64, 4, 2), together(codes >> 4, 32, 2, 4)
    return [low, high, p["steps"].contiguous(), p["scale"].contiguous()]


_PARTS: Final[dict[str, Parts]] = {
    "gguf:q4_0": _four,
    "gguf:q4_1": _four,
    "gguf:q5_0": _five,
    "gguf:q5_1": _five,
    "gguf:q8_0": _eight,
    "gguf:q4_k": _q4_k,
    "gguf:q5_k": _q5_k,
    "gguf:q6_k": _q6_k,
}
