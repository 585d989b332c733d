"""Scales of ggml's blocks for the least weighted squared error: q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k and q6_k.

Every function takes blocks as rows of weights g float32 [n, columns] with their importance h of the same shape, and
gives parameters as they are stored. Scales of two levels are found in turns: codes for the parameters there are, the
best whole numbers of each group for those codes, the best halves of the block for those numbers (least squares, two
unknowns), each kept where it is better after rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.formats import Params
from fewbit.formats import _scale_search as scales

# turns over codes, steps and halves
TURNS = 4
# shares of the range to try as scale, for groups with a minimum and 16 codes; with more codes clipping pays less
SHARES = (1.04, 1.0, 0.96, 0.92, 0.88, 0.84, 0.79, 0.73)
# sizes of a symmetric scale to try, by bits: more codes leave fewer between the textbook and one that clips too much
SIZES = {4: 22, 5: 12, 6: 8, 8: 6}
HALF = torch.float16


def symmetric(g: Tensor, h: Tensor | None, bits: int) -> Params:
    """w = scale * (code - 2^(bits-1)): the signed scale f16 [n] of each block."""
    return {"scale": scales.search_symmetric(g, h, bits, HALF, SIZES[bits]).to(HALF)}


def plain_symmetric(g: Tensor, bits: int) -> Params:
    """The textbook's: the weight farthest from zero gets the lowest code."""
    extreme = g.gather(1, g.abs().argmax(1, keepdim=True)).squeeze(1)
    return {"scale": scales.storable(-extreme / 2 ** (bits - 1), HALF).to(HALF)}


def with_minimum(g: Tensor, h: Tensor | None, bits: int, search: bool = True) -> Params:
    """w = scale * code + minimum, any f16 pair [n]."""
    scale, minimum = _ranges(g, h, 2**bits - 1, HALF, search, at_most=None)
    return {"scale": scale.to(HALF), "minimum": minimum.to(HALF)}


def _ranges(
    g: Tensor, h: Tensor | None, top: int, dtype: torch.dtype, search: bool, at_most: float | None
) -> tuple[Tensor, Tensor]:
    """The best scale and minimum of each row, float32 rounded to `dtype`; minima are at most `at_most`."""
    low, high = g.amin(1), g.amax(1)
    if at_most is not None:
        low = low.clamp(max=at_most)
        high = torch.maximum(high, low)

    def rounded(scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
        if at_most is not None:
            minimum = minimum.clamp(max=at_most)
        most = torch.finfo(dtype).max
        return scales.storable(scale, dtype), minimum.clamp(-most, most).to(dtype).float()

    best = rounded((high - low) / top, low)
    error, codes = _cost(g, h, *best, top)
    if not search:
        return best
    shares = [1 - (1 - share) * 16 / (top + 1) for share in SHARES]
    candidates = [(share, end) for share in shares for end in (0.0, 0.5, 1.0)]
    for share, end in candidates:
        scale = (high - low) * (share / top)
        found = rounded(scale, low + ((high - low) - scale * top) * end)
        error, codes, best = _keep(g, h, top, error, codes, best, found)
    for _ in range(TURNS):
        error, codes, best = _keep(g, h, top, error, codes, best, rounded(*_line(g, h, codes)))
    return best


Pair = tuple[Tensor, Tensor]


def _keep(
    g: Tensor, h: Tensor | None, top: int, error: Tensor, codes: Tensor, best: Pair, found: Pair
) -> tuple[Tensor, Tensor, Pair]:
    """The better of two pairs, row by row."""
    cost, rounded = _cost(g, h, *found, top)
    better = cost < error
    error = torch.where(better, cost, error)
    codes = torch.where(better[:, None], rounded, codes)
    return error, codes, (torch.where(better, found[0], best[0]), torch.where(better, found[1], best[1]))


def _cost(g: Tensor, h: Tensor | None, scale: Tensor, minimum: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Weighted squared error of each row, and its codes as float32."""
    codes = ((g - minimum[:, None]) * (1.0 / scale)[:, None]).round_().clamp_(0, top)
    off = codes * scale[:, None] + minimum[:, None] - g
    weighted = off if h is None else off * h
    return torch.linalg.vecdot(weighted, off), codes


def _line(g: Tensor, h: Tensor | None, codes: Tensor) -> Pair:
    """Least squares of g on codes: slope and intercept of each row; the slope of a constant row is its own size."""
    weights = torch.ones_like(g) if h is None else h
    total = weights.sum(1).clamp(min=1e-30)
    mean_q, mean_w = (weights * codes).sum(1) / total, (weights * g).sum(1) / total
    q, w = codes - mean_q[:, None], g - mean_w[:, None]
    square = (weights * q * q).sum(1)
    slope = torch.where(square > 0, (weights * q * w).sum(1) / square.clamp(min=1e-30), torch.ones_like(square))
    slope = torch.where(slope == 0, torch.ones_like(slope), slope)
    return slope, mean_w - slope * mean_q


def two_level_minimum(g: Tensor, h: Tensor | None, bits: int, search: bool = True) -> Params:
    """Q4_K and Q5_K: w = d * step * code - m * minimum_step, steps of 6 bits for each 32 of 256 columns.

    scale, minimum f16 [n]; steps, minimum_steps uint8 [n, 8].
    """
    top, most = 2**bits - 1, 63
    groups = g.reshape(-1, 32)
    weights = None if h is None else h.reshape(-1, 32)
    slope, low = _ranges(groups, weights, top, torch.float32, search, at_most=0.0)
    slope, depth = slope.reshape(-1, 8), -low.reshape(-1, 8)

    best: Params = {}
    error = torch.full((len(g),), torch.inf, device=g.device)
    # the largest step is 63, or a little less: the others then fall better or worse
    for largest in (63, 62, 60, 57) if search else (63,):
        d, m = _half(slope.amax(1) / largest), _half(depth.amax(1) / largest)
        steps, minima = _whole(slope, d, most), _whole(depth, m, most)
        for turn in range(TURNS if search else 1):
            codes = _codes(g, d, m, steps, minima, top)
            if turn:
                # the best numbers for these codes; then the best halves for those
                line, start = _line(groups, weights, codes.reshape(-1, 32))
                steps = _whole(line.reshape(-1, 8), d, most)
                minima = _whole(-start.reshape(-1, 8), m, most)
            d, m = _halves(g, h, codes, steps, minima, d, m)
            found = {"scale": d, "minimum": m, "steps": steps, "minimum_steps": minima}
            error, best = _better(g, h, top, error, best, found)
    return {k: v.to(HALF) if v.dim() == 1 else v.to(torch.uint8) for k, v in best.items()}


def _half(x: Tensor) -> Tensor:
    """Rounded to f16, not zero."""
    return scales.storable(x, HALF)


def _whole(wanted: Tensor, unit: Tensor, most: int) -> Tensor:
    """Multiples of `unit` [n] nearest to `wanted` [n, groups], as float32 from 0 to `most`."""
    return (wanted / unit[:, None]).round_().clamp_(0, most)


def _codes(g: Tensor, d: Tensor, m: Tensor, steps: Tensor, minima: Tensor, top: int) -> Tensor:
    """Nearest codes float32 [n, columns]; a group whose step is 0 has code 0."""
    scale, low = _spread(d, steps, g.shape[1]), _spread(m, minima, g.shape[1])
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.where(scale == 0, torch.zeros_like(g), ((g + low) / safe).round_().clamp_(0, top))


def _spread(unit: Tensor, steps: Tensor, columns: int) -> Tensor:
    return (unit[:, None] * steps).repeat_interleave(columns // steps.shape[1], 1)


def _halves(
    g: Tensor, h: Tensor | None, codes: Tensor, steps: Tensor, minima: Tensor, d: Tensor, m: Tensor
) -> tuple[Tensor, Tensor]:
    """Least squares of g on step * code and -minimum_step, two unknowns a block; the old ones where it has none."""
    ones = torch.ones_like(d)
    a, b = _spread(ones, steps, g.shape[1]) * codes, -_spread(ones, minima, g.shape[1])
    ha, hb = (a, b) if h is None else (a * h, b * h)
    aa, ab, bb = (torch.linalg.vecdot(x, y) for x, y in ((ha, a), (ha, b), (hb, b)))
    ag, bg = torch.linalg.vecdot(ha, g), torch.linalg.vecdot(hb, g)
    det = aa * bb - ab * ab
    solvable = det > 1e-6 * aa * bb
    safe = torch.where(solvable, det, ones)
    both_d, both_m = (ag * bb - bg * ab) / safe, (aa * bg - ab * ag) / safe
    alone = ag / aa.clamp(min=1e-30)
    new_d = torch.where(solvable, both_d, torch.where(bb == 0, alone, d))
    new_m = torch.where(solvable, both_m, m)
    good = (new_d > 0) & (new_m > 0)
    return _half(torch.where(good, new_d, d)), _half(torch.where(good, new_m, m))


def _better(g: Tensor, h: Tensor | None, top: int, error: Tensor, best: Params, found: Params) -> tuple[Tensor, Params]:
    """The better parameters of each block, by the error after rounding to their codes."""
    d, m, steps, minima = found["scale"], found["minimum"], found["steps"], found["minimum_steps"]
    codes = _codes(g, d, m, steps, minima, top)
    off = codes * _spread(d, steps, g.shape[1]) - _spread(m, minima, g.shape[1]) - g
    cost = torch.linalg.vecdot(off if h is None else off * h, off)
    return _chosen(error, cost, best, found)


def _chosen(error: Tensor, cost: Tensor, best: Params, found: Params) -> tuple[Tensor, Params]:
    better = cost < error
    if not best:
        return cost, dict(found)
    kept = {k: torch.where(better if v.dim() == 1 else better[:, None], v, best[k]) for k, v in found.items()}
    return torch.where(better, cost, error), kept


def two_level_symmetric(g: Tensor, h: Tensor | None, search: bool = True) -> Params:
    """Q6_K: w = d * step * (code - 32), signed steps of 8 bits for each 16 of 256 columns.

    scale f16 [n]; steps int8 [n, 16].
    """
    groups = g.reshape(-1, 16)
    weights = None if h is None else h.reshape(-1, 16)
    if search:
        ideal = scales.search_symmetric(groups, weights, 6, torch.float32, SIZES[6])
    else:
        ideal = plain_symmetric(groups, 6)["scale"].float()
    # a group of zeros wants no scale
    ideal = torch.where(groups.abs().amax(1) > 0, ideal, torch.zeros_like(ideal)).reshape(-1, 16)
    largest = ideal.gather(1, ideal.abs().argmax(1, keepdim=True)).squeeze(1)
    best: Params = {}
    error = torch.full((len(g),), torch.inf, device=g.device)
    for most in (-128, 127, -121, -113) if search else (-128,):
        d = _half(largest / most)
        steps = (ideal / d[:, None]).round_().clamp_(-128, 127)
        for turn in range(TURNS if search else 1):
            scale = _spread(d, steps, 256)
            safe = torch.where(scale == 0, torch.ones_like(scale), scale)
            codes = torch.where(scale == 0, torch.zeros_like(g), (g / safe).round_().clamp_(-32, 31))
            off = codes * scale - g
            cost = torch.linalg.vecdot(off if h is None else off * h, off)
            error, best = _chosen(error, cost, best, {"scale": d, "steps": steps})
            if turn == TURNS - 1 or not search:
                break
            grouped = codes.reshape(-1, 16)
            hq = grouped if weights is None else grouped * weights
            square = torch.linalg.vecdot(hq, grouped)
            fitting = torch.where(square > 0, torch.linalg.vecdot(hq, groups) / square.clamp(min=1e-30), 0.0)
            steps = (fitting.reshape(-1, 16) / d[:, None]).round_().clamp_(-128, 127)
            level = codes * _spread(torch.ones_like(d), steps, 256)
            hl = level if h is None else level * h
            whole = torch.linalg.vecdot(hl, level)
            d = _half(torch.where(whole > 0, torch.linalg.vecdot(hl, g) / whole.clamp(min=1e-30), d))
    return {"scale": best["scale"].to(HALF), "steps": best["steps"].to(torch.int8)}
