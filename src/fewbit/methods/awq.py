"""AWQ: channels that carry much are scaled up before rounding, and what feeds them down (Lin et al. 2023).

The factors are s = a^ratio, a the root mean square of each channel, with the ratio of least output error of the rounded
matrices (section 3.2 of the paper, which takes the mean magnitude and runs the layer; E H E^T says the same without
running it). Clipping is the format's own scale search, weighted by the channels' mean squares.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewbit.formats import Format
from fewbit.methods import Feed, Stats, Target
from fewbit.methods._second_order import output_error
from fewbit.methods.gptq import importance
from fewbit.qtensor import QTensor

NEEDS = frozenset({"hessian"})
# 19 powers between 0 and 1, and leaving the channels alone
RATIOS = 20
# largest factor over smallest: what divides them must stay storable in 16 bits
SPREAD = 65536.0


def quantize(w: Tensor, fmt: Format, stats: Stats, target: Target) -> QTensor:
    """Round to nearest, with scales searched for least error weighted by the inputs' mean squares."""
    params = fmt.fit(w, importance(stats["hessian"]), target.dtype, target.search)
    return fmt.pack(fmt.round(w, params), params)


def prepare(feeds: Sequence[Feed], fmt: Format, target: Target) -> None:
    """Scale every feed's linears by the best factors found, and what produces their input the other way."""
    for feed in feeds:
        hessian = feed.stats.get("hessian")
        if hessian is None or not bool((hessian.diagonal() > 0).any()):
            continue
        best = _best(feed, fmt, target)
        if best is None:
            continue
        applied = feed.divide(best)
        for w in feed.linears:
            w *= applied
        for name in ("hessian", "cross"):
            if name in feed.stats:
                feed.stats[name] = feed.stats[name] / (applied[:, None] * applied)


def factors(hessian: Tensor, ratio: float) -> Tensor:
    """a^ratio [in] over their geometric mean; channels that carry nothing get one."""
    diagonal = hessian.diagonal()
    live = diagonal > 0
    size = torch.where(live, diagonal, diagonal[live].log().mean().exp()).sqrt()
    s: Tensor = (size / size[live].log().mean().exp()) ** ratio
    return s.clamp(SPREAD**-0.5, SPREAD**0.5)


def _best(feed: Feed, fmt: Format, target: Target) -> Tensor | None:
    """The factors of least error, or None where leaving the channels alone is best."""
    hessian = feed.stats["hessian"]
    best, least = None, _error(feed, hessian, None, fmt, target)
    for i in range(1, RATIOS):
        s = feed.share(factors(hessian, i / RATIOS))
        error = _error(feed, hessian, s, fmt, target)
        if error < least:
            best, least = s, error
    return best


def _error(feed: Feed, hessian: Tensor, s: Tensor | None, fmt: Format, target: Target) -> float:
    total = 0.0
    for w in feed.linears:
        scaled = w if s is None else w * s
        weights = importance(hessian) if s is None else importance(hessian / (s[:, None] * s))
        # the textbook's scales: twenty full searches would take longer than everything else
        params = fmt.fit(scaled, weights, target.dtype, search=False)
        rounded = fmt.nearest(scaled, params)
        total += output_error((rounded if s is None else rounded / s) - w, hessian)
    return total
