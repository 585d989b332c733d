"""What rounding did to the weights themselves: the error of each matrix, and a look at a few of them.

Matrices are read one at a time, in slices of rows, so memory does not grow with the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.formats import Affine, parse
from fewbit.models import WeightInfo
from fewbit.qtensor import QTensor
from fewbit.source import Source

# weights that are dequantized at once
SLICE_WEIGHTS = 1 << 24
# a group wider than this is shown in part
SHOWN_COLUMNS = 128
# relative difference of a norm that storing it in bfloat16 does not explain
ROUNDED_NORM = 2**-7
# bars of a histogram, about
BARS = 256


@dataclass(frozen=True)
class LayerError:
    """One matrix W of the reference beside a candidate's W': `lost` is ||W - W'||^2, `total` ||W||^2."""

    name: str
    kind: str
    block: int | None
    spec: str
    lost: float
    total: float

    @property
    def relative(self) -> float | None:
        """||W - W'||^2 / ||W||^2; None where it is not a number."""
        return ratio(self.lost, self.total)


@dataclass(frozen=True)
class Rounding:
    """A matrix before and after, in steps of each group's own scale, and one group in its own units.

    before      (left edge in steps, share of the weights per step) of bars `width` steps wide
    after       (code, share of the weights)
    outside     share of the weights that lie half a step or more beyond the grid
    grid        the values a code of the group can have
    group       (weight before, weight after) of the group's first columns
    place       row, first column and width of the group, and how many of its columns are in `group`
    """

    layer: LayerError
    width: float
    before: list[tuple[float, float]]
    after: list[tuple[int, float]]
    outside: float
    grid: list[float]
    group: list[tuple[float, float]]
    place: tuple[int, int, int, int]


def ratio(part: float, whole: float) -> float | None:
    """part / whole, 0 / 0 taken as 0; None where the outcome is not finite."""
    if part == 0 and math.isfinite(whole):
        return 0.0
    found = part / whole if whole else math.inf
    return found if math.isfinite(found) else None


def kind(info: WeightInfo) -> str:
    """`q` of model.layers.0.self_attn.q_proj.weight; `embedding` and `head` for these."""
    return info.name.split(".")[-2].removesuffix("_proj") if info.role == "linear" else info.role


def unlike(reference: Source, candidate: Source) -> str:
    """Why the candidate's matrices can't be laid beside the reference's one by one, as a sentence; "" where they can.

    A method that folds scales into the norms (AWQ) multiplies columns of the linears by what it divides the norms by:
    the models agree, their matrices do not, and the difference is no rounding.
    """
    shapes = {w.name: w.shape for w in candidate.weights}
    inside = [w for w in _matrices(reference) if w.role not in ("embedding", "head")]
    if any(shapes.get(w.name) != w.shape for w in inside):
        return "its matrices have other shapes than the reference's"
    for info in reference.weights:
        if info.role == "norm" and shapes.get(info.name) == info.shape:
            one, two = (_dequantized(s.read(info.name)).double() for s in (reference, candidate))
            # not finite: damaged, which the matrices will show as well
            if float((one - two).norm()) > ROUNDED_NORM * float(one.norm()):
                return "this candidate rescaled channels, so weights are not comparable matrix by matrix"
    return ""


def layer_errors(reference: Source, candidates: Sequence[Source]) -> list[list[LayerError]]:
    """The error of every matrix that reference and candidate both have, a list for each candidate."""
    found: list[list[LayerError]] = [[] for _ in candidates]
    for info in _matrices(reference):
        having = [i for i, c in enumerate(candidates) if info.shape == _shape(c, info.name)]
        lost, total = dict.fromkeys(having, 0.0), 0.0
        for rows in _slices(info.shape):
            w = _dequantized(reference.read(info.name, rows))
            total += _squares(w)
            for i in having:
                lost[i] += _squares(_dequantized(candidates[i].read(info.name, rows)) - w)
        for i in having:
            spec = candidates[i].spec(info.name)
            found[i].append(LayerError(info.name, kind(info), info.block, spec, lost[i], total))
    return found


def notable(layers: Sequence[LayerError]) -> list[tuple[str, LayerError]]:
    """The matrix of a block with the largest error and one with the middle error, each with its description."""
    inside = [layer for layer in layers if layer.block is not None and layer.relative is not None and layer.lost > 0]
    inside.sort(key=lambda layer: layer.relative or 0.0)
    if not inside:
        return []
    worst, middle = inside[-1], inside[(len(inside) - 1) // 2]
    return [("Largest error", worst)] + ([("Median error", middle)] if middle is not worst else [])


def rounding(reference: Source, candidate: Source, layer: LayerError) -> Rounding | None:
    """A look at one matrix; None where its format has no grid of evenly spaced values."""
    shape = next(w.shape for w in reference.weights if w.name == layer.name)
    edges: tuple[float, float] | None = None
    before = after = torch.zeros(0)
    count = outside = 0
    group: tuple[list[float], list[tuple[float, float]], tuple[int, int, int, int]] | None = None
    for rows in _slices(shape):
        w = _dequantized(reference.read(layer.name, rows))
        q = candidate.read(layer.name, rows)
        affine = parse(q.spec).affine(q)
        if affine is None:
            return None
        levels = 2**affine.bits
        per_step = max(1, min(8, BARS // levels))
        position = _position(w, affine)
        bins = ((position + 1.5) * per_step).floor().clamp(0, (levels + 2) * per_step - 1)
        counted = torch.bincount(bins.flatten().long(), minlength=(levels + 2) * per_step)
        codes = torch.bincount(affine.codes.flatten().long(), minlength=levels)
        before, after = (counted, codes) if edges is None else (before + counted, after + codes)
        outside += int(((position < -0.5) | (position > levels - 0.5)).sum())
        count += w.numel()
        edges = (-1.5 - (affine.zero or 0), 1 / per_step)
        group = group or _group(w, affine, rows[0])
    if edges is None or group is None:
        return None
    first, width = edges
    return Rounding(
        layer,
        width,
        [(first + i * width, n / count / width) for i, n in enumerate(before.tolist())],
        [(round(first + 1.5) + i, n / count) for i, n in enumerate(after.tolist())],
        outside / count,
        *group,
    )


def _group(
    w: Tensor, affine: Affine, first_row: int
) -> tuple[list[float], list[tuple[float, float]], tuple[int, int, int, int]]:
    """The group whose relative error is the median of all: its grid, its weights, its place."""
    span, whole = affine.span, w.shape[1] // affine.span
    scale, offset = _scale_offset(affine)
    after = affine.codes * _spread(scale, affine, w.shape[1]) + _spread(offset, affine, w.shape[1])
    pieces = w[:, : whole * span].reshape(len(w), whole, span)
    lost = (pieces - after[:, : whole * span].reshape_as(pieces)).square().sum(-1) / pieces.square().sum(-1)
    flat = lost.flatten().nan_to_num(0.0, 0.0, 0.0)
    row, index = divmod(int(flat.argsort()[(len(flat) - 1) // 2]), whole)
    shown = min(span, SHOWN_COLUMNS)
    columns = slice(index * span, index * span + shown)
    grid = torch.arange(2**affine.bits) * scale[row, index] + offset[row, index]
    values = list(zip(w[row, columns].tolist(), after[row, columns].tolist(), strict=True))
    return sorted(grid[grid.isfinite()].tolist()), values, (first_row + row, index * span, span, shown)


def _position(w: Tensor, affine: Affine) -> Tensor:
    """Where each weight lies on its group's grid, in codes; a group of scale 0 lies on the code it was given."""
    scale, offset = (_spread(x, affine, w.shape[1]) for x in _scale_offset(affine))
    return torch.where(scale == 0, affine.codes.float(), (w - offset) / scale).nan_to_num(0.0)


def _scale_offset(affine: Affine) -> tuple[Tensor, Tensor]:
    scale = affine.scale.float()
    return scale, -scale * (affine.zero or 0) if affine.offset is None else affine.offset


def _spread(per_group: Tensor, affine: Affine, columns: int) -> Tensor:
    return per_group.repeat_interleave(affine.span, dim=1)[:, :columns]


def _matrices(source: Source) -> list[WeightInfo]:
    return [w for w in source.weights if len(w.shape) > 1]


def _shape(source: Source, name: str) -> tuple[int, ...] | None:
    return next((w.shape for w in source.weights if w.name == name), None)


def _slices(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    rows = max(1, SLICE_WEIGHTS // max(1, torch.Size(shape[1:]).numel()))
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])


def _dequantized(q: QTensor) -> Tensor:
    return parse(q.spec).dequantize(q)


def _squares(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64) ** 2)
