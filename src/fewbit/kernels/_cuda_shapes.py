"""Which blocks a product is cut into: measured once, shipped as a table; nothing is tuned at start."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fewbit.kernels._cuda_layout import Kind

# blocks of 32 rows, tiles of 128 columns
MANY_BLOCKS, SOME_BLOCKS, FEW_BLOCKS = 448, 224, 132
LONG_TILES = 64
# of columns: at most so many parts, each of at least so many tiles a warp; what a block's start and adding parts up cost,
# in tiles
MOST_PARTS, LEAST_TILES, START_TILES, PART_TILES = 16, 2, 3, 3
# partial sums, and counts of blocks, for each of a card's multiprocessors
BLOCK_SUMS, BLOCK_COUNTS = 2 * 64 * 256, 8


@dataclass(frozen=True)
class Shape:
    """A block of row_warps x column_warps warps, each with row_blocks x 32 rows and `stages` tiles in shared memory.

    x_ahead: how early activations are read (see product.cu); blocks: on a multiprocessor at a time.
    """

    row_warps: int
    column_warps: int
    row_blocks: int = 1
    stages: int = 2
    x_ahead: int = 1
    blocks: int = 1

    def defines(self) -> dict[str, object]:
        """For the compiler."""
        return {
            "WN": self.row_warps,
            "WK": self.column_warps,
            "RB": self.row_blocks,
            "STAGES": self.stages,
            "XAHEAD": self.x_ahead,
            "BLOCKS": self.blocks,
        }

    @property
    def warps(self) -> int:
        """Of a block."""
        return self.row_warps * self.column_warps

    def shared(self, kind: Kind) -> int:
        """Bytes of shared memory of a block: its tiles, later their sums."""
        return self.warps * max(self.stages * self.row_blocks * _tile_bytes(kind), 8 * 36 * 4)


@dataclass(frozen=True)
class Tile:
    """A block of `many`: row_warps x column_warps warps, each with row_blocks x 32 rows, for 8 * `wide` tokens.

    stages: a warp's tiles in shared memory; x_rounds, x_stages: the block's activations there; blocks: on a
    multiprocessor at a time; less: how codes are centred (see many.cu).
    """

    wide: int
    row_warps: int
    column_warps: int
    row_blocks: int
    stages: int
    x_rounds: int
    x_stages: int
    blocks: int
    less: int

    def defines(self) -> dict[str, object]:
        """For the compiler."""
        return {
            "NT": self.wide,
            "WN": self.row_warps,
            "WK": self.column_warps,
            "RB": self.row_blocks,
            "STAGES": self.stages,
            "XT": self.x_rounds,
            "XSTAGES": self.x_stages,
            "BLOCKS": self.blocks,
            "LESS": self.less,
        }

    @property
    def warps(self) -> int:
        """Of a block."""
        return self.row_warps * self.column_warps

    @property
    def tall(self) -> int:
        """Blocks of 32 rows that a block has."""
        return self.row_warps * self.row_blocks

    @property
    def sums(self) -> int:
        """Floats that a block gives."""
        return self.tall * 32 * 8 * self.wide

    def shared(self, kind: Kind) -> int:
        """Bytes of shared memory of a block: activations and tiles, later sums."""
        x = self.x_stages * self.x_rounds * self.column_warps * 2048 * self.wide
        return max(x + self.warps * self.stages * self.row_blocks * _tile_bytes(kind), self.warps * 8 * 36 * 4)


def parts(tile: Tile, blocks: int, tiles: int, tokens: int, processors: int) -> int:
    """Into how many parts columns are cut, so that the card's multiprocessors are busy alike.

    More than one only as far as `room(processors)` has floats and counts for it.
    """
    grid = -(-blocks // tile.tall) * -(-tokens // (8 * tile.wide))
    sums, counts = room(processors)
    best, least = 1, 0.0
    for count in range(1, MOST_PARTS + 1):
        each = -(-tiles // count)
        too_short = each < LEAST_TILES * tile.column_warps
        if count > 1 and (too_short or grid > counts or grid * count * tile.sums > sums):
            break
        waves = -(-grid * count // (processors * tile.blocks))
        cost = waves * (each / tile.column_warps + START_TILES) + (count > 1) * PART_TILES
        if count == 1 or cost < least:
            best, least = count, cost
    # no part is empty
    return -(-tiles // -(-tiles // best))


def room(processors: int) -> tuple[int, int]:
    """Floats of partial sums, and counts of blocks, that launches have room for."""
    return processors * BLOCK_SUMS, processors * BLOCK_COUNTS


def _tile_bytes(kind: Kind) -> int:
    groups = 128 // kind.span if kind.span else 0
    return kind.bits * 512 + groups * ((128, 64, 64)[kind.scales] + (0, 32, 128)[kind.shifts])


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


MOST_FUSED = {90: 512}
# tokens a block has at most: with offsets that are no whole numbers of scales, and without
MOST_WIDE = {True: 4, False: 8}


def most_fused(arch: int) -> int:
    """Tokens from which on writing weights out costs less than it gains, on cards of a compute capability such as 86."""
    return MOST_FUSED.get(arch, 1024)


def wide_for(kind: Kind, tokens: int) -> int:
    """Eights of tokens that a block takes, so that few are empty."""
    most = MOST_WIDE[kind.shifts == 2]
    count = -(-tokens // (8 * most))
    return min(most, -(-tokens // (16 * count)) * 2)


def tile_for(kind: Kind, blocks: int, tiles: int, tokens: int, most_shared: int) -> Tile:
    """For `blocks` x `tiles` tiles of a kind, so many tokens, and `most_shared` bytes of shared memory a block."""
    wide = wide_for(kind, tokens)
    less = int(kind.shifts != 2)
    if wide <= 2:
        tile = Tile(wide, 4, 2, 2, 3, 1, 3, 1, 0)
    elif wide <= 4:
        tile = Tile(wide, 4, 2, 2, 3, 1, 3, 1, less)
    else:
        tile = Tile(wide, 8, 1, 1, 3, 1, 3, 1, less)
    return fitted(tile, kind, most_shared)


def fitted(tile: Tile, kind: Kind, most_shared: int) -> Tile:
    """With fewer stages, then fewer warps, as far as shared memory asks for it."""
    while tile.shared(kind) > most_shared:
        if tile.stages > 2:
            tile = replace(tile, stages=tile.stages - 1, x_stages=min(tile.x_stages, tile.stages - 1))
        elif tile.column_warps > 1:
            tile = replace(tile, column_warps=tile.column_warps // 2)
        elif tile.row_warps > 1:
            tile = replace(tile, row_warps=tile.row_warps // 2)
        else:
            tile = replace(tile, row_blocks=1)
    return tile
