"""GPTQ: round one column after the other, each error made good by the columns still free (Frantar et al. 2022).

Columns go from the most to the least active input, while groups stay where they are and their scales are fixed before
the first column is rounded, so that the result needs no index of columns (what compressed-tensors calls
`actorder: weight`). Afterwards codes and scales are refined in turn on the same objective, as far as `effort` allows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.formats import Format, Params
from fewbit.methods import Stats, Target
from fewbit.methods._columns import ColumnLoop, column_major
from fewbit.methods._refine import refine
from fewbit.methods._second_order import damped, drift_corrected, inverse_factor
from fewbit.qtensor import QTensor

NEEDS = frozenset({"hessian"})
# columns whose corrections are applied to the rest together: one large product instead of many small ones
LAZY = 32
# rounds of refinement by effort
ROUNDS = (0, 0, 2, 4)


def quantize(w: Tensor, fmt: Format, stats: Stats, target: Target) -> QTensor:
    """w float32 [out, in], stats["hessian"] [in, in] -> codes of small output error."""
    hessian = stats["hessian"]
    if "cross" in stats:
        w = drift_corrected(w, hessian, stats["cross"])
    order = hessian.diagonal().argsort(descending=True, stable=True)
    params = fmt.fit(w, importance(hessian), target.dtype, target.search)
    codes = rounded(w, fmt, params, order, inverse_factor(hessian, target.note, order))
    if rounds := ROUNDS[target.effort]:
        codes, params = refine(w, damped(hessian), fmt, codes, params, order, rounds)
    return fmt.pack(codes, params)


def importance(hessian: Tensor) -> Tensor:
    """What a squared error in each column costs before corrections: the inputs' mean squares [in], never all zero."""
    diagonal = hessian.diagonal()
    return diagonal if bool((diagonal > 0).any()) else torch.ones_like(diagonal)


def rounded(w: Tensor, fmt: Format, params: Params, order: Tensor, factor: Tensor) -> Tensor:
    """Codes [out, in] of `w` under fixed `params`: columns in `order`, errors passed on through `factor` [in, in], the
    upper Cholesky factor of the inverse Hessian with rows and columns in that order (algorithm 1 of the paper).
    """
    view, p = fmt.at(params, order)
    p = {name: column_major(t.float()) for name, t in p.items()}
    free = column_major(w[:, order])
    columns, step = w.shape[1], fmt.step[1]

    def loop(t: dict[str, Tensor]) -> None:
        width = t["free"].shape[1]
        for i in range(0, width, step):
            j = min(i + step, width)
            column = t["free"][:, i:j]
            nearest = view.nearest(column, {name: t[name][:, i:j] for name in p})
            error = _passed_on(column - nearest, t["factor"][i:j, i:j])
            t["free"][:, j:] -= error @ t["factor"][i:j, j:]
            column.copy_(nearest)
            t["errors"][:, i:j] = error

    run = ColumnLoop(loop, columns // LAZY)
    for start in range(0, columns, LAZY):
        stop = min(start + LAZY, columns)
        block = free[:, start:stop]
        errors = torch.zeros_like(block)
        inner = factor[start:stop, start:stop]
        run({"free": block, "errors": errors, "factor": inner} | {n: t[:, start:stop] for n, t in p.items()})
        free[:, stop:] -= errors @ factor[start:stop, stop:]
    codes = view.round(free, p)
    back = torch.empty_like(codes)
    back[:, order] = codes
    return back


def _passed_on(difference: Tensor, corner: Tensor) -> Tensor:
    """The error of columns rounded together, in units of the factor's rows."""
    if difference.shape[1] == 1:
        return difference / corner
    solved: Tensor = torch.linalg.solve_triangular(corner, difference, upper=True, left=False)
    return solved
