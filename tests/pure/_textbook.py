"""The methods as textbooks have them: plain loops in float64 that share no code with the package.

Where a weight lies within TIE of a step from the middle of two codes, float32 and float64 may round it differently.
There the loops go on from the value the package chose, if it is one of the two, and count it: `Grid.ties`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewbit.formats import Params, parse
from fewbit.formats.integer import IntegerFormat

Array = NDArray[np.float64]
# in steps of the grid
TIE = 1e-3
WIDTHS = (2, 3, 4, 5, 6, 8)


def array(x: Tensor) -> Array:
    """Any tensor as float64."""
    return x.detach().double().numpy()


class Grid:
    """The values each weight may take: scale * (code - zero) for codes 0 .. 2^bits - 1, a scale for `group` columns."""

    def __init__(self, scale: Array, zero: Array, bits: int, group: int) -> None:
        self.scale, self.zero, self.codes, self.group = scale, zero, np.arange(2.0**bits), group
        self.ties = 0

    def values(self, column: int) -> Array:
        """[out, codes]: what the weights of a column may become."""
        g = column // self.group
        return self.scale[:, g, None] * (self.codes - self.zero[:, g, None])

    def step(self, column: int) -> Array:
        """[out]: the distance of neighbours."""
        return np.abs(self.scale[:, column // self.group])

    def nearest(self, w: Array, column: int, found: Array | None = None) -> Array:
        """The nearest value for each weight [out] of a column, by trying all of them."""
        distance = np.abs(self.values(column) - w[:, None])
        return self.least(distance, TIE * self.step(column), column, found)

    def least(self, cost: Array, slack: Array, column: int, found: Array | None) -> Array:
        """The value of least cost [out, codes]; `found` where that costs at most `slack` more."""
        values, rows, best = self.values(column), np.arange(len(cost)), cost.argmin(1)
        if found is not None:
            theirs = np.abs(values - found[:, None]).argmin(1)
            tied = (theirs != best) & (cost[rows, theirs] - cost[rows, best] <= slack)
            self.ties += int(tied.sum())
            best = np.where(tied, theirs, best)
        return values[rows, best]


def grid(params: Params, bits: int, group: int | None, columns: int) -> Grid:
    """The grid of stored parameters."""
    scale = array(params["scale"])
    zero = array(params["zero"]) if "zero" in params else np.full(scale.shape, 2.0 ** (bits - 1))
    return Grid(scale, zero, bits, min(group or columns, columns))


def spec(bits: int, group: int | None, asymmetric: bool) -> str:
    """How a format is spelled."""
    return f"int{bits}{f'g{group}' if group else ''}{'a' if asymmetric else ''}"


def integer(name: str) -> IntegerFormat:
    """The integer format of a spec, with its bits and groups to look at."""
    fmt = parse(name)
    assert isinstance(fmt, IntegerFormat)
    return fmt


def dampened(hessian: Array, share: float = 0.01) -> Array:
    """A hundredth of the mean diagonal added to the diagonal; the whole mean where an input never occurs."""
    h, mean = hessian.copy(), float(np.mean(np.diag(hessian))) or 1.0
    for i in range(len(h)):
        h[i, i] += mean if hessian[i, i] <= 0 else share * mean
    return h


def falling(diagonal: Array) -> list[int]:
    """Columns from the most to the least active input; equals stay in order."""
    return sorted(range(len(diagonal)), key=lambda i: -diagonal[i])


def obq(w: Array, hessian: Array, g: Grid, order: Sequence[int], found: Array | None = None) -> Array:
    """Optimal brain quantization in a given order (Frantar et al. 2022, equations 2 and 3): fix a column, move those
    still free by -error / [F^-1]_00 * [F^-1]_0: with F the Hessian of the free ones, inverted anew for each column.
    """
    w, free = w.copy(), list(order)
    while free:
        c = free[0]
        inverse = np.linalg.inv(hessian[np.ix_(free, free)])
        q = g.nearest(w[:, c], c, None if found is None else found[:, c])
        error = (w[:, c] - q) / inverse[0, 0]
        for k, other in enumerate(free):
            w[:, other] -= error * inverse[0, k]
        w[:, c] = q
        free.remove(c)
    return w


def cost(difference: Array, hessian: Array) -> Array:
    """E H E^T of each row [out]."""
    return np.array([e @ hessian @ e for e in difference])


def descended(w: Array, hessian: Array, g: Grid, start: Array, order: Sequence[int], found: Array | None) -> Array:
    """Coordinate descent: for one column after the other every code is tried, and the whole objective taken of each."""
    q = start.copy()
    for c in order:
        tried = []
        for value in g.values(c).T:
            e = q - w
            e[:, c] = value - w[:, c]
            tried.append(((e @ hessian) * e).sum(1))
        # at `TIE` steps from the middle the costs of two codes differ by this much
        slack = 2 * TIE * hessian[c, c] * g.step(c) ** 2
        q[:, c] = g.least(np.stack(tried, 1), slack, c, None if found is None else found[:, c])
    return q


def best_scale(w: Array, hessian: Array, levels: Array, scale: Array, columns: Array, row: int) -> float:
    """The scale of one group of a row, scales [in] of it given, that brings its objective down most: least squares on
    explicit inputs R with R^T R = H.
    """
    values, vectors = np.linalg.eigh(hessian)
    inputs = np.sqrt(values.clip(0))[:, None] * vectors.T
    others = levels[row] * scale
    others[columns] = 0
    known = inputs[:, columns] @ levels[row, columns]
    return float(np.linalg.lstsq(known[:, None], inputs @ (w[row] - others), rcond=None)[0][0])


def gram(x: Array) -> Array:
    """Mean of x x^T over inputs [n, in]."""
    return x.T @ x / len(x)


def inputs(count: int, columns: int, seed: int, spread: float = 1.0) -> Tensor:
    """Inputs float32 [count, columns] that depend on one another, of unequal sizes."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.5 * columns**-0.5 * torch.randn(columns, columns, generator=random)
    sizes = (spread * 0.5 * torch.randn(columns, generator=random)).exp()
    return torch.randn(count, columns, generator=random) @ mix * sizes


def case(rows: int, columns: int, seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Weights [rows, columns] and the Hessian of four inputs a column."""
    random = torch.Generator().manual_seed(1000 + seed)
    x = inputs(4 * columns, columns, seed, spread)
    return torch.randn(rows, columns, generator=random) * 0.05, x.t() @ x / len(x)


def levels_of(fmt: IntegerFormat, codes: Tensor, params: Params) -> Array:
    """Whole numbers [out, in] that the scales multiply."""
    columns = codes.shape[1]
    spread = np.repeat(array(params["scale"]), fmt.group or columns, 1)[:, :columns]
    return np.round(array(fmt.value(codes, params)) / spread)


def falls(costs: Sequence[Array], slack: float = 1e-6) -> bool:
    """Whether no row's cost ever rises, up to `slack` of the first."""
    return all(bool((after <= before + slack * np.abs(costs[0])).all()) for before, after in pairwise(costs))
