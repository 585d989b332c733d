"""Products for many tokens on Hopper cards (compute capability 9.0), through their asynchronous matrix units.

The packed weights are those of every card; they are rounded to halves on the way, in registers. Activations lie in an
order of their own (`Swizzled`). Chosen at run time; what other cards do stays beside it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from fewbit.kernels import _nvrtc
from fewbit.kernels._cuda_halves import Halves
from fewbit.kernels._cuda_layout import COLUMNS, Kind, tiles_of
from fewbit.kernels._cuda_matrix import Part
from fewbit.kernels._nvrtc import Arguments, Kernel

ARCH = 90
# fewer tokens are multiplied by exact weights, and about as fast
LEAST_TOKENS = 33
# 32-row blocks of a block of threads, and its threads
BLOCKS, THREADS = 4, 384
HALVE_THREADS, REORDER_THREADS = 1024, 256
# bytes in which a block turns the sums of a token round, half of its tokens at a time; a slot's barriers
ROOM, BARRIERS = 132 * 4, 16
MOST_X, LEAST_X, CODES = 8, 4, 3
# What `plan` reckons with, microseconds, measured on one H100 at 4 bits: a tile of a block alone on its multiprocessor,
# and of one of two; a piece's end; sums brought together by a cluster; one launch behind another.
ALONE, PAIRED = {64: 0.72, 128: 0.82, 256: 1.3}, {64: 1.16}
PIECE, MEETING, LAUNCH = {64: 1.5, 128: 2.0, 256: 3.0}, {1: 0.0, 2: 3.5, 4: 6.0}, 10.0
# the share of the multiprocessors that clusters of so many blocks reach
REACHED = {1: 1.0, 2: 1.0, 4: 0.75}
# tiles of 128 columns that each block of a cluster should have
LEAST_TILES = 4


@dataclass(frozen=True)
class Cut:
    """How a product is cut. tokens: of a block, 32 to 256; x_slots of 64 columns, code_slots of 128; cluster: blocks
    that share the columns of a piece; at_once: blocks on a multiprocessor.
    """

    tokens: int
    x_slots: int
    code_slots: int = CODES
    cluster: int = 1
    at_once: int = 1

    def defines(self) -> dict[str, object]:
        """For the compiler."""
        slots = {"XS": self.x_slots, "CS": self.code_slots}
        return {"NT": self.tokens, **slots, "KS": self.cluster, "AT_ONCE": self.at_once}

    def shared(self, kind: Kind) -> int:
        """Bytes of shared memory of a block."""
        slots = self.x_slots * (self.tokens * 128 + BARRIERS) + self.code_slots * (_code_bytes(kind) + BARRIERS)
        return slots + self.tokens // 2 * ROOM


@dataclass(frozen=True)
class Launch:
    """The pieces first .. end of a product, cut in one way."""

    cut: Cut
    first: int
    end: int

    def grid(self, processors: int) -> int:
        """Blocks of threads; a cluster of several has one piece."""
        count = (self.end - self.first) * self.cut.cluster
        return count if self.cut.cluster > 1 else min(count, processors * self.cut.at_once)


@dataclass(frozen=True)
class Swizzled:
    """Activations in the order that wgmma.cu takes them in.

    values  float16 [columns / 64, tokens filled up to eights, 64]; the order within 64 is said there
    scales  float32 [tokens] that products are multiplied by, or None where all are 1
    """

    values: Tensor
    scales: Tensor | None
    tokens: int
    columns: int


class _Task(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("shifts", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("token_scales", ctypes.c_void_p),
        ("add", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("stride", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("pair", ctypes.c_int),
        ("unused", ctypes.c_int),
        ("blocks", ctypes.c_int),
        ("tiles", ctypes.c_int),
        ("tokens", ctypes.c_int),
        ("first", ctypes.c_int),
        ("end", ctypes.c_int),
        ("by", ctypes.c_float),
    )


def takes(device: int, tokens: int) -> bool:
    """Whether a product of so many tokens on a card is made here."""
    return tokens >= LEAST_TOKENS and _nvrtc.card_arch(device) == ARCH


def _code_bytes(kind: Kind) -> int:
    groups = COLUMNS // kind.span if kind.span else 0
    return BLOCKS * (kind.bits * 512 + groups * ((128, 64, 64)[kind.scales] + (0, 32, 128)[kind.shifts]))


def filled(kind: Kind, tokens: int, cluster: int, most_shared: int) -> Cut:
    """The cut with as many slots as there is room for; blocks of up to 64 tokens are two on a multiprocessor."""
    at_once = 2 if tokens <= 64 else 1
    # a multiprocessor keeps 1 KB for each block
    room = (most_shared + 1024) // at_once - 1024 - tokens // 2 * ROOM
    each = _code_bytes(kind) + BARRIERS
    slots = {codes: (room - codes * each) // (tokens * 128 + BARRIERS) for codes in (CODES, CODES - 1)}
    codes = CODES if slots[CODES] >= LEAST_X else CODES - 1
    return Cut(tokens, min(MOST_X, slots[codes]), codes, cluster, at_once)


def pieces(blocks: int, tokens: int, wide: int) -> int:
    """Of 128 rows x `wide` tokens, in a product."""
    return -(-blocks // BLOCKS) * -(-tokens // wide)


def _cost(wide: int, cluster: int, count: int, tiles: int, processors: int) -> float:
    """What so many pieces should take, microseconds; infinite where clusters have no room beside each other."""
    room = int(processors * (2 if wide in PAIRED else 1) * REACHED[cluster])
    blocks = count * cluster
    if cluster > 1 and (blocks > room or cluster * LEAST_TILES > tiles):
        return float("inf")
    step = PAIRED[wide] if wide in PAIRED and blocks > processors else ALONE[wide]
    return -(-blocks // room) * (-(-tiles // cluster) * step + PIECE[wide]) + MEETING[cluster]


@lru_cache(maxsize=1024)
def plan(kind: Kind, blocks: int, tiles: int, tokens: int, processors: int, most_shared: int) -> tuple[Launch, ...]:
    """The launches that should be fastest for `blocks` x `tiles` tiles of a kind, on a card of so many multiprocessors
    and bytes of shared memory a block. Pieces that are left when all multiprocessors have had as many as fit are shared
    out by columns where that pays.
    """
    best: tuple[Launch, ...] = ()
    least = float("inf")
    for wide in ALONE:
        count = pieces(blocks, tokens, wide)
        each = processors * (2 if wide in PAIRED else 1)
        for cluster in REACHED:
            for whole in {0, count // each * each} - {count}:
                if whole and cluster == 1:
                    continue
                cost = _cost(wide, cluster, count - whole, tiles, processors)
                cost += LAUNCH + _cost(wide, 1, whole, tiles, processors) if whole else 0.0
                if cost >= least:
                    continue
                cuts = [filled(kind, wide, c, most_shared) for c in (1, cluster)]
                rest = Launch(cuts[1], whole, count)
                best, least = (Launch(cuts[0], 0, whole), rest) if whole else (rest,), cost
    return best


def words_of(x: Tensor) -> Tensor:
    """float16 [tokens, columns], a multiple of 64 columns -> [columns / 64, tokens filled up to eights, 64]."""
    tokens, columns = x.shape
    padded = torch.nn.functional.pad(x, (0, 0, 0, -tokens % 8))
    # 32 columns: thread, member, pair; a token's words of eight are exchanged by token % 8
    words = padded.view(-1, columns // 32, 4, 4, 2).transpose(2, 3).reshape(-1, columns // 64, 8, 8)
    order = torch.arange(8)[None, :] ^ (torch.arange(len(padded)) % 8)[:, None]
    at = order.to(x.device)[:, None, :, None].expand(words.shape)
    return words.gather(2, at).transpose(0, 1).reshape(columns // 64, len(padded), 64).contiguous()


def _room(tokens: int, columns: int, device: torch.device) -> Tensor:
    return torch.empty(tiles_of(columns) * 2, -(-tokens // 8) * 8, 64, dtype=torch.float16, device=device)


def halve(x: Tensor) -> Swizzled:
    """x [T, in] float32 on a card, rows at any distance -> what `product` takes."""
    if x.stride(1) != 1:
        x = x.contiguous()
    tokens, columns = x.shape
    values = _room(tokens, columns, x.device)
    scales = torch.empty(tokens, device=x.device)
    args = (
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_uint64(x.stride(0)),
        ctypes.c_int(columns),
        ctypes.c_int(values.shape[0] * 8),
        ctypes.c_void_p(values.data_ptr()),
        ctypes.c_int(values.shape[1]),
        ctypes.c_void_p(scales.data_ptr()),
    )
    _halving(x.device.index)["halve_many"].launch((tokens, 1, 1), (HALVE_THREADS, 1, 1), args, dependent=True)
    return Swizzled(values, scales, tokens, columns)


def reordered(x: Halves) -> Swizzled:
    """The same activations in the order of this kernel."""
    values = _room(x.tokens, x.columns, x.values.device)
    words = x.values.shape[0] * x.tokens * 4
    args = (
        ctypes.c_void_p(x.values.data_ptr()),
        ctypes.c_void_p(values.data_ptr()),
        ctypes.c_int(x.tokens),
        ctypes.c_int(values.shape[1]),
        ctypes.c_uint64(words),
    )
    grid = (-(-words // REORDER_THREADS), 1, 1)
    _halving(x.values.device.index)["reorder"].launch(grid, (REORDER_THREADS, 1, 1), args, dependent=True)
    return Swizzled(values, x.scales, x.tokens, x.columns)


def product(
    part: Part,
    x: Halves | Swizzled,
    out: int,
    add: int,
    stride: int,
    gated: bool,
    launches: tuple[Launch, ...] | None = None,
) -> None:
    """`part` times all tokens of x, to the address `out`, plus what lies at `add` unless that is 0.

    `stride`: floats between tokens there. Launched as dependent on what ran before it.
    """
    if isinstance(x, Halves):
        x = reordered(x)
    device = part.codes.device.index
    processors, most = _processors(device), _nvrtc.most_shared(device)
    scales = 0 if x.scales is None else x.scales.data_ptr()
    weights = (part.codes.data_ptr(), part.scales.data_ptr(), 0 if part.shifts is None else part.shifts.data_ptr())
    for launch in launches or plan(part.kind, part.blocks, part.tiles, x.tokens, processors, most):
        shape = (stride, part.rows, part.pair, 0, part.blocks, part.tiles, x.tokens, launch.first, launch.end)
        task = _Task(*weights, x.values.data_ptr(), scales, add, out, *shape, part.factor)
        kernel = _multiplying(part.kind, launch.cut, gated, device)
        grid = (launch.grid(processors), 1, 1)
        kernel.launch(grid, (THREADS, 1, 1), Arguments(task), launch.cut.shared(part.kind), dependent=True)


@cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def _halving(device: int) -> dict[str, Kernel]:
    return _nvrtc.module("wgmma_halve.cu", ("halve_many", "reorder"), {}, device)


@cache
def _multiplying(kind: Kind, cut: Cut, gated: bool, device: int) -> Kernel:
    defines = kind.defines() | cut.defines() | {"GATED": int(gated)}
    return _nvrtc.module("wgmma.cu", ("crowd",), defines, device)["crowd"]
