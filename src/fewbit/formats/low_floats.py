"""Floating point of 8 and 4 bits with a scale for groups of columns, as some models are published: read only.

`fp8` and `fp8gM`: e4m3 numbers (float8_e4m3fn), a scale a row or for M of its columns: w = number * scale.
`mxfp4`: e2m1 numbers, two to a byte, the first in the low half, and a power of two for 32 columns
(OCP Microscaling Formats 1.0, section 5.3): w = number * 2^(scale - 127).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.formats import Format, Layout, Params, Shape, Tabled
from fewbit.qtensor import QTensor

MX_BLOCK = 32
# twice the values of e2m1, so that they are whole numbers; the sign is the top bit
HALVES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@dataclass(frozen=True)
class Fp8(Format):
    """Parts: weight float8_e4m3fn [out, in]; scale [out, groups], of any floating dtype."""

    group: int | None

    @property
    def spec(self) -> str:  # type: ignore[override]
        return f"fp8g{self.group}" if self.group else "fp8"

    def accepts(self, shape: Shape) -> str | None:
        return None if len(shape) == 2 else f"{self.spec} stores matrices, not shape {shape}"

    def layout(self, shape: Shape, dtype: torch.dtype) -> Layout:
        groups = -(-shape[1] // (self.group or shape[1]))
        return {"weight": (torch.float8_e4m3fn, shape), "scale": (dtype, (shape[0], groups))}

    def unpack(self, q: QTensor) -> tuple[Tensor, Params]:
        """The numbers as they are, and their scales."""
        return q.parts["weight"], {"scale": q.parts["scale"]}

    def value(self, codes: Tensor, params: Params) -> Tensor:
        """number * scale."""
        scale, columns = params["scale"].float(), codes.shape[1]
        if self.group and scale.shape[1] > 1:
            scale = scale.repeat_interleave(self.group, 1)[:, :columns]
        return codes.float().mul_(scale)

    def take(self, q: QTensor, rows: Tensor) -> QTensor:
        # torch has no indexing of 8-bit floats on every device; bytes are as good
        weight = q.parts["weight"].view(torch.uint8)[rows].view(torch.float8_e4m3fn)
        return QTensor(q.spec, (len(rows), q.shape[1]), {"weight": weight, "scale": q.parts["scale"][rows]})


class MxFp4(Format):
    """Parts: packed uint8 [..., in / 2]; scale uint8 [..., in / 32], exponents above -127. Leading axes are free."""

    spec = "mxfp4"

    def accepts(self, shape: Shape) -> str | None:
        """Rows must be whole blocks."""
        return f"mxfp4 needs a multiple of {MX_BLOCK} columns, not {shape[-1]}" if shape[-1] % MX_BLOCK else None

    def layout(self, shape: Shape, dtype: torch.dtype) -> Layout:
        *outer, columns = shape
        return {
            "packed": (torch.uint8, (*outer, columns // 2)),
            "scale": (torch.uint8, (*outer, columns // MX_BLOCK)),
        }

    def unpack(self, q: QTensor) -> tuple[Tensor, Params]:
        """Codes uint8 [out, in] below 16; leading axes are stacked by rows."""
        packed, scale = (q.parts[name].flatten(0, -2) for name in ("packed", "scale"))
        return torch.stack((packed & 15, packed >> 4), -1).flatten(1), {"scale": scale}

    def value(self, codes: Tensor, params: Params) -> Tensor:
        """number * 2^(scale - 127); a scale of 255 is NaN."""
        numbers = torch.tensor(HALVES, dtype=torch.float32, device=codes.device)[codes.int()]
        w: Tensor = numbers.unflatten(1, (-1, MX_BLOCK)).mul_(_powers(params["scale"])[..., None])
        return w.flatten(1)

    def tabled(self, q: QTensor) -> Tabled:
        """Twice the numbers, and half the scales."""
        codes, params = self.unpack(q)
        return Tabled(codes, HALVES, _powers(params["scale"]), MX_BLOCK, 4)

    def take(self, q: QTensor, rows: Tensor) -> QTensor:
        return QTensor(q.spec, (len(rows), *q.shape[1:]), {name: part[rows] for name, part in q.parts.items()})


def _powers(scale: Tensor) -> Tensor:
    """2^(scale - 128) float32, half the scale, as the levels are doubled; NaN for 255."""
    # ldexp of an integer power is exact down to the smallest numbers
    powers = torch.ldexp(torch.ones(scale.shape, device=scale.device), scale.int() - 128)
    return torch.where(scale == 255, torch.full_like(powers, torch.nan), powers)


def parse(spec: str) -> Format | None:
    """`fp8`, `fp8g128`, `mxfp4`; None for anything else."""
    if spec == "mxfp4":
        return MxFp4()
    m = re.fullmatch(r"fp8(?:g([1-9]\d{0,6}))?", spec)
    return Fp8(int(m[1]) if m[1] else None) if m else None
