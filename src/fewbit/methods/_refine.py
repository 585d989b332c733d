"""Refining codes and scales in turn after they were chosen, on the objective of GPTQ: E H E^T with E = Q - W.

Coordinate descent over columns finds for each the best code while all others stay (QuantEase, Behdin et al. 2023,
section 3); between sweeps each group's scale moves to its least squares value, rounded as it is stored. Neither step
can raise the error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.formats import Format, Params
from fewbit.methods._columns import ColumnLoop, column_major
from fewbit.methods._second_order import in_order

LAZY = 128


def refine(
    w: Tensor, hessian: Tensor, fmt: Format, codes: Tensor, params: Params, order: Tensor, rounds: int
) -> tuple[Tensor, Params]:
    """`rounds` times: scales, then codes. Formats that round several columns jointly are left as they are."""
    if fmt.step != (1, 1):
        return codes, params
    for _ in range(rounds):
        params = rescaled(w, hessian, fmt, codes, params)
        codes = swept(w, hessian, fmt, codes, params, order)
    if rounds:
        params = rescaled(w, hessian, fmt, codes, params)
    return codes, params


def rescaled(w: Tensor, hessian: Tensor, fmt: Format, codes: Tensor, params: Params) -> Params:
    """Each group's scale in turn at its best value while codes and the other scales stay (Gauss-Seidel)."""
    found = fmt.scaled(codes, params)
    if found is None:
        return params
    scale = found.scale.clone()
    # gradient of half the error: E H
    pull = (found.levels * scale[:, found.group] - w) @ hessian
    for g in range(scale.shape[1]):
        columns = _span(found.group, g)
        levels = found.levels[:, columns]
        curve = ((levels @ hessian[columns, columns]) * levels).sum(1)
        slope = (pull[:, columns] * levels).sum(1)
        wanted = torch.where(curve > 0, scale[:, g] - slope / curve.clamp(min=1e-30), scale[:, g])
        stored = fmt.with_scale(params, wanted[:, None])["scale"].float().squeeze(1)
        # rounding to the stored dtype may undo the gain: then the old one stays
        move = stored - scale[:, g]
        gain = move * (2 * slope + move * curve)
        move = torch.where(gain < 0, move, torch.zeros_like(move))
        scale[:, g] += move
        pull += (levels * move[:, None]) @ hessian[columns]
    return fmt.with_scale(params, scale)


def _span(group: Tensor, g: int) -> slice:
    """The neighbouring columns of group `g`."""
    columns = (group == g).nonzero().flatten()
    return slice(int(columns[0]), int(columns[-1]) + 1)


def swept(w: Tensor, hessian: Tensor, fmt: Format, codes: Tensor, params: Params, order: Tensor) -> Tensor:
    """One sweep of coordinate descent over the columns in `order`."""
    view, p = fmt.at(params, order)
    p = {name: column_major(t.float()) for name, t in p.items()}
    h = in_order(hessian, order)
    codes = codes[:, order]
    values = column_major(view.value(codes, p))
    pull = column_major((values - w[:, order]) @ h)
    columns = w.shape[1]

    def loop(t: dict[str, Tensor]) -> None:
        for i in range(t["values"].shape[1]):
            old = t["values"][:, i : i + 1]
            best = old - t["pull"][:, i : i + 1] / t["h"][i, i]
            move = view.nearest(best, {name: t[name][:, i : i + 1] for name in p}) - old
            old += move
            t["pull"] += move @ t["h"][i : i + 1]
            t["moves"][:, i : i + 1] = move

    run = ColumnLoop(loop, columns // LAZY)
    for start in range(0, columns, LAZY):
        stop = min(start + LAZY, columns)
        part = {"values": values[:, start:stop], "pull": pull[:, start:stop].clone()}
        part |= {"moves": torch.zeros_like(part["pull"]), "h": h[start:stop, start:stop]}
        run(part | {name: t[:, start:stop] for name, t in p.items()})
        pull += part["moves"] @ h[start:stop]
    found = view.round(values, p)
    back = torch.empty_like(found)
    back[:, order] = found
    return back
