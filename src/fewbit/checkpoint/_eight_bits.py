"""Matrices of whole 8-bit numbers with their scales beside them, as several tools lay them out.

`x.weight` int8 or float8_e4m3fn [N, K]; its scale of one number, [N, 1], [N, groups], or one for each block of rows and
columns [ceil(N / rows), ceil(K / columns)]. A scale for blocks of rows is read as one for each row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.checkpoint._safetensors import Shards
from fewbit.errors import FewbitError
from fewbit.formats._bitstream import pack_rows
from fewbit.qtensor import QTensor

FLOAT, INTEGER = torch.float8_e4m3fn, torch.int8
SCALES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e8m0fnu)


@dataclass(frozen=True)
class EightBits:
    """One matrix by its header: `rows` share a scale with their neighbours, `columns` (None: all) with theirs.

    bits: of integers, whose codes may be narrower than the byte they lie in.
    """

    name: str
    scale: str
    zero: str | None
    shape: tuple[int, int]
    rows: int
    columns: int | None
    bits: int
    kind: torch.dtype

    @property
    def spec(self) -> str:
        """What it is to fewbit."""
        group = f"g{self.columns}" if self.columns else ""
        return f"fp8{group}" if self.kind == FLOAT else f"int{self.bits}{group}{'a' if self.zero else ''}"


def plan(
    shards: Shards, name: str, scale: str, block: tuple[int, int] | None = None, bits: int = 8, zero: str | None = None
) -> EightBits:
    """How a matrix lies, from the header; `block` is what the config says of blocks.

    FewbitError where its parts do not fit together.
    """
    shape, kind = shards.shape(name), shards.dtype(name)
    found = shards.shape(scale) if scale in shards else None
    if found is None or len(shape) != 2 or min(shape) <= 0 or kind not in (FLOAT, INTEGER):
        raise _apart(name, f"it is {kind} of shape {shape}, its scale {scale.rpartition('.')[2]!r} of {found}")
    if shards.dtype(scale) not in SCALES:
        raise _apart(name, f"its scale is stored as {shards.dtype(scale)}")
    n, k = shape
    rows, columns = _shared(name, (n, k), found, block)
    if zero is not None and (shards.shape(zero) != found or shards.dtype(zero) != INTEGER):
        raise _apart(name, f"its zero points are {shards.dtype(zero)} of {shards.shape(zero)}, the scales {found}")
    return EightBits(name, scale, zero, (n, k), rows, columns, bits, kind)


def _shared(
    name: str, shape: tuple[int, int], scale: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[int, int | None]:
    """Rows and columns (None: all of a row) that share a scale."""
    n, k = shape
    if torch.Size(scale).numel() == 1:
        return n, None
    if block is not None and scale == (-(-n // block[0]), -(-k // block[1])):
        return block[0], block[1] if scale[1] > 1 else None
    if scale in ((n,), (n, 1)):
        return 1, None
    if len(scale) == 2 and scale[0] == n and k % scale[1] == 0:
        return 1, k // scale[1]
    raise _apart(name, f"it is {n} x {k}, its scales {scale}" + (f", blocks {block} are said" if block else ""))


def read(shards: Shards, matrix: EightBits, rows: tuple[int, int] | None = None) -> QTensor:
    """The matrix, or its rows [start, stop)."""
    start, stop = rows or (0, matrix.shape[0])
    numbers = shards.read(matrix.name, rows)
    scale = _spread(shards.read(matrix.scale), matrix, start, stop)
    if scale.dtype == torch.float8_e8m0fnu:
        scale = scale.float()
    shape = (stop - start, matrix.shape[1])
    if matrix.kind == FLOAT:
        return QTensor(matrix.spec, shape, {"weight": numbers, "scale": scale})
    low = 1 << (matrix.bits - 1)
    parts = {"packed": pack_rows(_codes(matrix.name, numbers, low), matrix.bits), "scale": scale}
    if matrix.zero is not None:
        zeros = _codes(matrix.name, _spread(shards.read(matrix.zero), matrix, start, stop), low)
        parts["zero"] = pack_rows(zeros.t().contiguous(), matrix.bits).t().contiguous()
    return QTensor(matrix.spec, shape, parts)


def _codes(name: str, numbers: Tensor, low: int) -> Tensor:
    """Signed numbers as codes from 0 on, uint8."""
    least, most = int(numbers.min()), int(numbers.max())
    if least < -low or most >= low:
        raise _apart(name, f"it holds numbers from {least} to {most}, and -{low} to {low - 1} are said")
    return (numbers.to(torch.int16) + low).to(torch.uint8)


def _spread(scale: Tensor, matrix: EightBits, start: int, stop: int) -> Tensor:
    """[stop - start, groups]: every row its own."""
    if scale.dtype == torch.float8_e8m0fnu:
        # no indexing for it
        scale = scale.float()
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(stop - start, 1).contiguous()
    by_row = scale.reshape(len(scale), -1)
    return by_row[torch.arange(start, stop) // matrix.rows].contiguous()


def _apart(name: str, facts: str) -> FewbitError:
    return FewbitError(
        f"The quantized tensor {name!r} does not fit together.",
        f"{facts[0].upper()}{facts[1:]}."[:400],
        "Download the model again, or check where the folder came from.",
    )
