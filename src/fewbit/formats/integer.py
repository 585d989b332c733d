"""Integers of 2 to 8 bits with one scale for a group of columns, or for a whole row.

`int4g64` is symmetric: codes -8 .. 7, stored as code + 8, and a signed scale. `int4g64a` is asymmetric: codes 0 .. 15
and a zero point of 4 bits, w = (code - zero) * scale, which is the textbook map
scale = (max - min) / (2^bits - 1), code = round((w - min) / scale) with min moved to the nearest multiple of scale.

Parts of a tensor [out, in] with G = ceil(in / group) groups; a last group may be shorter:
    packed  int32 [out, ceil(in * bits / 32)]     codes along the row, see _bitstream
    scale   [out, G] in the model's dtype
    zero    int32 [ceil(out * bits / 32), G]      asymmetric only: zero points, packed down the column
    g_idx   int32 [in]                            optional, read only: each column's group, where they are not in order
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.formats import Affine, Format, Layout, Params, Scaled, Shape
from fewbit.formats import _scale_search as scales
from fewbit.formats._bitstream import pack_rows, unpack_rows, words
from fewbit.formats._cores import GPU_SLICE_WEIGHTS, SLICE_WEIGHTS, on_all_cores
from fewbit.qtensor import QTensor


@dataclass(frozen=True)
class IntegerFormat(Format):
    """`bits` from 2 to 8; `group` columns share a scale, None for the whole row."""

    bits: int
    group: int | None
    asymmetric: bool = False

    @property
    def spec(self) -> str:  # type: ignore[override]
        return f"int{self.bits}{f'g{self.group}' if self.group else ''}{'a' if self.asymmetric else ''}"

    def accepts(self, shape: Shape) -> str | None:
        return None if len(shape) == 2 else f"{self.spec} stores matrices, not shape {shape}"

    def groups(self, columns: int) -> int:
        """Groups in a row."""
        return -(-columns // self.span(columns))

    def span(self, columns: int) -> int:
        """Columns that share a scale in a row of `columns`."""
        return min(self.group or columns, columns)

    def layout(self, shape: Shape, dtype: torch.dtype) -> Layout:
        out, columns = shape
        groups = self.groups(columns)
        parts: Layout = {
            "packed": (torch.int32, (out, words(columns, self.bits))),
            "scale": (dtype, (out, groups)),
        }
        if self.asymmetric:
            parts["zero"] = (torch.int32, (words(out, self.bits), groups))
        return parts

    def fit(
        self, w: Tensor, importance: Tensor | None = None, dtype: torch.dtype = torch.float32, search: bool = True
    ) -> Params:
        rows = max(1, (SLICE_WEIGHTS if w.device.type == "cpu" else GPU_SLICE_WEIGHTS) // w.shape[1])
        h = None if importance is None else importance.expand_as(w)

        def fit_slice(start: int) -> Params:
            part = slice(start, start + rows)
            return self._fit_rows(w[part].float(), None if h is None else h[part], dtype, search)

        pieces = on_all_cores(fit_slice, range(0, len(w), rows), w.device)
        return {name: torch.cat([p[name] for p in pieces]) for name in pieces[0]}

    def _fit_rows(self, w: Tensor, h: Tensor | None, dtype: torch.dtype, search: bool) -> Params:
        shape = (len(w), self.groups(w.shape[1]))
        g = self._grouped(w)
        hg = None if h is None else self._grouped(h)
        zero = None
        if self.asymmetric:
            scale, zero = (
                scales.search_asymmetric(g, hg, self.bits, dtype)
                if search
                else scales.minmax_asymmetric(g, self.bits, dtype)
            )
        elif search:
            scale = scales.search_symmetric(g, hg, self.bits, dtype)
        else:
            scale = scales.minmax_symmetric(g, self.bits, dtype)
        params = {"scale": scale.reshape(shape).to(dtype)}
        if zero is not None:
            params["zero"] = zero.reshape(shape).to(torch.uint8)
        return params

    def _grouped(self, x: Tensor) -> Tensor:
        """[n, in] as rows of one group each; a short last group is filled with zeros, which cost no error."""
        span = self.span(x.shape[1])
        return torch.nn.functional.pad(x, (0, -x.shape[1] % span)).reshape(-1, span)

    def _spread(self, per_group: Tensor, columns: int, g_idx: Tensor | None = None) -> Tensor:
        """[n, G] -> [n, in]: every column its group's entry."""
        if g_idx is not None:
            return per_group[:, g_idx.long()]
        span = self.span(columns)
        if per_group.shape[1] == 1:
            return per_group.expand(-1, columns)
        return per_group.repeat_interleave(span, dim=1)[:, :columns]

    def _zero(self, params: Params, columns: int) -> Tensor | float:
        if not self.asymmetric:
            return float(2 ** (self.bits - 1))
        return self._spread(params["zero"].float(), columns, params.get("g_idx"))

    def round(self, w: Tensor, params: Params) -> Tensor:
        columns = w.shape[1]
        codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
        for part, p in _slices(w, params):
            q = (w[part].float() / self._spread(p["scale"].float(), columns, p.get("g_idx"))).round_()
            codes[part] = q.add_(self._zero(p, columns)).clamp_(0, 2**self.bits - 1).to(torch.uint8)
        return codes

    def value(self, codes: Tensor, params: Params) -> Tensor:
        columns = codes.shape[1]
        out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for part, p in _slices(codes, params):
            shifted = codes[part].float().sub_(self._zero(p, columns))
            out[part] = shifted.mul_(self._spread(p["scale"].float(), columns, p.get("g_idx")))
        return out

    def at(self, params: Params, columns: Tensor) -> tuple[Format, Params]:
        whole = int(columns.max()) + 1
        spread = {name: self._spread(p, whole)[:, columns] for name, p in params.items()}
        return IntegerFormat(self.bits, 1, self.asymmetric), spread

    def nearest(self, w: Tensor, params: Params) -> Tensor:
        columns, top = w.shape[1], 2**self.bits - 1
        scale, zero = self._spread(params["scale"].float(), columns), self._zero(params, columns)
        return (w / scale).round_().clamp_(-zero, top - zero).mul_(scale)

    def scaled(self, codes: Tensor, params: Params) -> Scaled:
        columns = codes.shape[1]
        zero = self._zero(params, columns)
        if not isinstance(zero, Tensor):
            zero = torch.full((1, 1), zero, device=codes.device)
        group = torch.arange(columns, device=codes.device) // self.span(columns)
        limits = (-zero, 2**self.bits - 1 - zero)
        return Scaled(codes.float() - zero, params["scale"].float(), group, limits)

    def with_scale(self, params: Params, scale: Tensor) -> Params:
        dtype = params["scale"].dtype
        return params | {"scale": scales.storable(scale, dtype).to(dtype)}

    def pack(self, codes: Tensor, params: Params) -> QTensor:
        parts = {"packed": pack_rows(codes, self.bits), "scale": params["scale"].contiguous()}
        if self.asymmetric:
            parts["zero"] = pack_rows(params["zero"].t().contiguous(), self.bits).t().contiguous()
        return QTensor(self.spec, tuple(codes.shape), parts | _order(params))

    def unpack(self, q: QTensor) -> tuple[Tensor, Params]:
        return unpack_rows(q.parts["packed"], self.bits, q.shape[1]), self._params(q) | _order(q.parts)

    def _params(self, q: QTensor) -> Params:
        params = {"scale": q.parts["scale"]}
        if self.asymmetric:
            down = q.parts["zero"].t().contiguous()
            params["zero"] = unpack_rows(down, self.bits, q.shape[0]).t().contiguous()
        return params

    def take(self, q: QTensor, rows: Tensor) -> QTensor:
        parts = {"packed": q.parts["packed"][rows], "scale": q.parts["scale"][rows]}
        if self.asymmetric:
            zero = unpack_rows(q.parts["zero"].t().contiguous(), self.bits, q.shape[0])[:, rows]
            parts["zero"] = pack_rows(zero.contiguous(), self.bits).t().contiguous()
        return QTensor(self.spec, (len(rows), q.shape[1]), parts | _order(q.parts))

    def affine(self, q: QTensor) -> Affine | None:
        if "g_idx" in q.parts:
            # a group's columns lie scattered, and kernels take neighbours
            return None
        codes = unpack_rows(q.parts["packed"], self.bits, q.shape[1])
        return self.affine_of(codes, q)

    def affine_of(self, codes: Tensor, q: QTensor) -> Affine:
        """What is affine in `q`, of codes that were unpacked or only have the shape and the device for it."""
        params, span = self._params(q), self.span(q.shape[1])
        if not self.asymmetric:
            return Affine(codes, params["scale"], 2 ** (self.bits - 1), None, span, self.bits)
        offset = -params["scale"].float() * params["zero"].float()
        return Affine(codes, params["scale"], None, offset, span, self.bits, params["zero"])


def _slices(w: Tensor, params: Params) -> Iterator[tuple[slice, Params]]:
    """Row slices small enough for a core's cache, with their parameters."""
    rows = max(1, SLICE_WEIGHTS // w.shape[1])
    for start in range(0, len(w), rows):
        part = slice(start, start + rows)
        yield part, {name: p[part] for name, p in params.items() if name != "g_idx"} | _order(params)


def _order(parts: Params) -> Params:
    """The part that belongs to the columns, where there is one."""
    return {"g_idx": parts["g_idx"]} if "g_idx" in parts else {}


def parse(spec: str) -> IntegerFormat | None:
    """`int4`, `int4g64`, `int4g64a`; None for anything else."""
    m = re.fullmatch(r"int([2-8])(?:g([1-9]\d{0,6}))?(a?)", spec)
    return IntegerFormat(int(m[1]), int(m[2]) if m[2] else None, bool(m[3])) if m else None
