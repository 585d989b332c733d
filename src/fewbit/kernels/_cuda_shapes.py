"""Which blocks a product is cut into: measured once, shipped as a table; nothing is tuned at start."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from fewbit.kernels._cuda_layout import Kind

# blocks of 32 rows, tiles of 128 columns
MANY_BLOCKS, FEW_BLOCKS = 448, 132
LONG_TILES = 64
# of columns: at most so many parts, each of at least so many tiles a warp; what a block's start and adding a part up
# cost, in rounds
MOST_PARTS, LEAST_TILES, START_ROUNDS, PART_ROUNDS = 16, 2, 4, 1
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


def _tile_bytes(kind: Kind) -> int:
    groups = 128 // kind.span if kind.span else 0
    return kind.bits * 512 + groups * ((128, 64, 64)[kind.scales] + (0, 32, 128)[kind.shifts])


def shape_for(kind: Kind, blocks: int, tiles: int, wide: int, most_shared: int) -> Shape:
    """For `blocks` x `tiles` tiles of a kind, 8 * `wide` tokens (1 or 2), and `most_shared` bytes of shared memory."""
    shape = (_for_eight if wide == 1 else _for_sixteen)(kind.bits, blocks, tiles)
    if kind.shifts == 2 or kind.span == 32:
        # these want more registers
        shape = replace(shape, blocks=1)
    while shape.column_warps > 1 and (shape.column_warps >= 2 * tiles or shape.shared(kind) > most_shared):
        shape = replace(shape, column_warps=shape.column_warps // 2)
    return shape


def _for_eight(bits: int, blocks: int, tiles: int) -> Shape:
    """The fastest of some 100 tried on one H100 with 1 token over the shapes of 8B and 70B models, groups of 128."""
    if blocks <= FEW_BLOCKS:
        return Shape(1, 16, 1, 2, 1)
    if bits > 4:
        return Shape(1, 8, 1, 2, 1, 2)
    if blocks >= MANY_BLOCKS:
        return Shape(1, 8, 1, 2, 1 if bits == 3 else 2, 4)
    return Shape(1, 16, 1, 2 if tiles >= LONG_TILES else 3, 2, 2)


def _for_sixteen(bits: int, blocks: int, tiles: int) -> Shape:
    """The same with 16 tokens.

    Shapes that leave room on a multiprocessor are not taken: launches that follow each other fill it where they do not
    depend on each other, as when one product is timed again and again, and only there.
    """
    if blocks <= FEW_BLOCKS:
        return Shape(1, 16, 1, 2, 1)
    if bits > 4:
        return Shape(1, 4, 1, 2, 1, 4) if blocks >= MANY_BLOCKS else Shape(1, 8, 1, 2, 1, 2)
    if blocks >= MANY_BLOCKS:
        return Shape(1, 4, 2, 2, 1, 4) if bits == 4 else Shape(2, 4, 2, 2, 0, 2)
    if bits < 4 and tiles >= 2 * LONG_TILES:
        return Shape(1, 16, 2, 2, 0)
    return Shape(1, 8, 1, 2, 1, 2)


# tokens up to which writing weights out costs more than it gains, by compute capability. Measured on an H100. Elsewhere
# from rates: on consumer cards a product of the matrix units, summed in float32, takes 32 cycles, several times what
# the packed weights ask for beside it, so that it runs near their rate and saves writing and reading the halves.
MOST_FUSED = {86: 2048, 89: 2048, 90: 384, 100: 384, 103: 384, 120: 2048}
MOST_FUSED_ELSEWHERE = 1024
# eights of tokens a block has at most: with offsets that are no whole numbers of scales, and without
MOST_WIDE = {True: 4, False: 8}


def most_fused(arch: int) -> int:
    """How many tokens packed weights are multiplied with, on cards of a compute capability such as 86."""
    return MOST_FUSED.get(arch, MOST_FUSED_ELSEWHERE)


def wide_for(kind: Kind, tokens: int) -> int:
    """Eights of tokens that a block takes, so that few are empty."""
    most = MOST_WIDE[kind.shifts == 2]
    count = -(-tokens // (8 * most))
    return min(most, -(-tokens // (16 * count)) * 2)


@lru_cache(maxsize=4096)
def tile_for(kind: Kind, blocks: int, tiles: int, tokens: int, most_shared: int, processors: int) -> tuple[Tile, int]:
    """A tile for `blocks` x `tiles` tiles of a kind, and into how many parts columns are cut.

    `most_shared`: bytes of shared memory that a block may have; `processors`: multiprocessors of the card. Of tiles
    that are about as fast the one that leaves them least idle.
    """
    wide = wide_for(kind, tokens)
    tried = [fitted(tile, kind, most_shared) for tile in _tiles(kind, wide)]
    found = [(*_parts(tile, kind, blocks, tiles, tokens, most_shared, processors), tile) for tile in tried]
    _, count, tile = min(found, key=lambda entry: entry[0])
    return tile, count


def _tiles(kind: Kind, wide: int) -> list[Tile]:
    """Those that were fast on one H100 of some 20 tried for each width."""
    if kind.shifts == 2:
        return [Tile(wide, 4, 2, 1, 2, 1, 2, 1, 0)]
    if wide <= 4:
        return [Tile(wide, 4, 2, 1, 2, 1, 2, 2, 1)]
    if wide <= 6:
        return [
            Tile(wide, 4, 2, 1, 3, 1, 3, 1, 1),
            Tile(wide, 4, 1, 1, 3, 1, 3, 2, 1),
            Tile(wide, 6, 2, 1, 3, 1, 3, 1, 1),
            Tile(wide, 4, 1, 1, 2, 1, 2, 3, 1),
        ]
    return [
        Tile(wide, 4, 2, 1, 3, 1, 3, 1, 1),
        Tile(wide, 8, 1, 1, 2, 1, 2, 1, 1),
        Tile(wide, 4, 1, 1, 2, 1, 2, 2, 1),
    ]


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


def _parts(
    tile: Tile, kind: Kind, blocks: int, tiles: int, tokens: int, most_shared: int, processors: int
) -> tuple[float, int]:
    """The cost, in rounds of 8 warps with 64 tokens each, and the parts of columns that make it least.

    A round takes as long as there are warps on a multiprocessor; more than one part only as far as `room` goes.
    """
    grid = -(-blocks // tile.tall) * -(-tokens // (8 * tile.wide))
    sums, counts = room(processors)
    # 1 KB of each block is the driver's
    at_once = max(1, min(tile.blocks, (most_shared + 1024) // (tile.shared(kind) + 1024)))
    found: list[tuple[float, int]] = []
    for count in range(1, MOST_PARTS + 1):
        each = -(-tiles // count)
        too_short = each < LEAST_TILES * tile.column_warps
        if count > 1 and (too_short or grid > counts or grid * count * tile.sums > sums):
            break
        waves = -(-grid * count // (processors * at_once))
        rounds = -(-each // tile.column_warps) + START_ROUNDS
        weight = at_once * tile.warps * tile.row_blocks * tile.wide / 64
        # no part is empty
        found.append((waves * rounds * weight + (count - 1) * PART_ROUNDS, -(-tiles // each)))
    return min(found)


def room(processors: int) -> tuple[int, int]:
    """Floats of partial sums, and counts of blocks, that launches have room for."""
    return processors * BLOCK_SUMS, processors * BLOCK_COUNTS
