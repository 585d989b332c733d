"""Which blocks a product is cut into: measured once, shipped as a table; nothing is tuned at start."""

from __future__ import annotations

from dataclasses import dataclass

from fewbit.kernels._cuda_layout import Kind


@dataclass(frozen=True)
class Shape:
    """row_warps x column_warps warps a block; tiles that a warp has on their way."""

    row_warps: int
    column_warps: int
    ahead: int

    def defines(self) -> dict[str, object]:
        """For the compiler."""
        return {"WN": self.row_warps, "WK": self.column_warps, "AHEAD": self.ahead}


def shape_for(kind: Kind, blocks: int, tiles: int, wide: int) -> Shape:
    """For `blocks` x `tiles` tiles of a kind, and 8 * `wide` tokens."""
    column_warps = 8 if tiles > 4 else 4
    return Shape(1 if wide < 2 else 2, column_warps, 2)
