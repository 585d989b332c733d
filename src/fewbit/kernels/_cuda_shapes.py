"""Which blocks a product is cut into: measured once, shipped as a table; nothing is tuned at start."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fewbit.kernels._cuda_layout import Kind

# blocks of 32 rows, tiles of 128 columns
MANY_BLOCKS, SOME_BLOCKS, FEW_BLOCKS = 448, 224, 132
LONG_TILES = 64


@dataclass(frozen=True)
class Shape:
    """A block of row_warps x column_warps warps, each with row_blocks x 32 rows and `stages` tiles in shared memory.

    x_ahead: how early activations are read (see product.cu).
    """

    row_warps: int
    column_warps: int
    row_blocks: int = 1
    stages: int = 2
    x_ahead: int = 1

    def defines(self) -> dict[str, object]:
        """For the compiler."""
        return {
            "WN": self.row_warps,
            "WK": self.column_warps,
            "RB": self.row_blocks,
            "STAGES": self.stages,
            "XAHEAD": self.x_ahead,
        }

    @property
    def warps(self) -> int:
        """Of a block."""
        return self.row_warps * self.column_warps

    def shared(self, kind: Kind) -> int:
        """Bytes of shared memory of a block: its tiles, later their sums."""
        groups = 128 // kind.span if kind.span else 0
        tile = kind.bits * 512 + groups * ((128, 64, 64)[kind.scales] + (0, 32, 128)[kind.shifts])
        return self.warps * max(self.stages * self.row_blocks * tile, 8 * 36 * 4)


def shape_for(kind: Kind, blocks: int, tiles: int, wide: int, most_shared: int) -> Shape:
    """For `blocks` x `tiles` tiles of a kind, 8 * `wide` tokens, and `most_shared` bytes of shared memory a block."""
    shape = _best(kind.bits, blocks, tiles, wide)
    while shape.column_warps > 1 and (shape.column_warps >= 2 * tiles or shape.shared(kind) > most_shared):
        shape = replace(shape, column_warps=shape.column_warps // 2)
    return shape


def _best(bits: int, blocks: int, tiles: int, wide: int) -> Shape:
    """The fastest of some 15 tried on one H100 over the shapes of 8B and 70B models, at groups of 128 columns."""
    # rows for several rounds of all multiprocessors, or hardly for one
    many, few = blocks >= MANY_BLOCKS, blocks <= FEW_BLOCKS
    if wide == 1:
        if many and bits <= 4:
            return Shape(1, 8, 2, 2, 1) if bits == 2 else Shape(1, 8, 1, 2, 1)
        if few and tiles >= LONG_TILES and bits <= 4:
            return Shape(1, 32, 1, 2, 1)
        return Shape(1, 16, 1, 2, 1) if bits <= 4 or few or blocks >= SOME_BLOCKS else Shape(1, 8, 1, 3, 1)
    if wide == 2:
        if few:
            return Shape(1, 16, 1, 2, 0)
        if bits > 4 or blocks < SOME_BLOCKS:
            return Shape(1, 8, 1, 3, 1)
        if many:
            return Shape(1, 4, 2, 3, 1) if bits == 4 else Shape(2, 4, 2, 3, 2)
        return Shape(1, 16, 2, 2, 0)
    if few:
        return Shape(1, 8, 1, 3, 0)
    return Shape(1, 4, 2, 2, 2) if many else Shape(1, 8, 2, 2, 2)
