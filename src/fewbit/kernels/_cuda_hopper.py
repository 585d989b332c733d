"""Products for many tokens on Hopper cards (compute capability 9.0), through their asynchronous matrix units.

The packed weights are those of every card. Activations lie in an order of their own (`swizzled`), which `halve` writes.
Chosen at run time; what other cards do stays beside it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fewbit.kernels import _nvrtc
from fewbit.kernels._cuda_layout import COLUMNS, Kind, tiles_of
from fewbit.kernels._cuda_matrix import Part
from fewbit.kernels._nvrtc import Arguments, Kernel

ARCH = 90
# 32-row blocks of a block of threads, and its threads
BLOCKS, THREADS = 4, 384
HALVE_THREADS = 1024
# bytes in which a block turns the sums of a token round, half of its tokens at a time; a slot's barriers
ROOM, BARRIERS = 132 * 4, 16
MOST_X, LEAST_X, CODES = 8, 4, 3
# tiles of 128 columns that each block of a cluster should have
LEAST_TILES = 4


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
class Swizzled:
    """Activations as `multiply` takes them.

    values  float16 [columns / 64, tokens filled up to eights, 64]; the order within 64 is said in wgmma.cu
    scales  float32 [tokens] that products are multiplied by, or None where all are 1
    """

    values: Tensor
    scales: Tensor | None
    tokens: int
    columns: int


def _code_bytes(kind: Kind) -> int:
    groups = COLUMNS // kind.span if kind.span else 0
    return BLOCKS * (kind.bits * 512 + groups * ((128, 64, 64)[kind.scales] + (0, 32, 128)[kind.shifts]))


def filled(kind: Kind, tokens: int, cluster: int, at_once: int, most_shared: int) -> Cut:
    """The cut with as many slots as there is room for."""
    # a multiprocessor keeps 1 KB for each block
    room = (most_shared + 1024) // at_once - 1024 - tokens // 2 * ROOM
    each = _code_bytes(kind) + BARRIERS
    slots = {codes: (room - codes * each) // (tokens * 128 + BARRIERS) for codes in (CODES, CODES - 1)}
    codes = CODES if slots[CODES] >= LEAST_X else CODES - 1
    return Cut(tokens, min(MOST_X, slots[codes]), codes, cluster, at_once)


def words_of(x: Tensor) -> Tensor:
    """float16 [tokens, columns], a multiple of 64 columns -> [columns / 64, tokens filled up to eights, 64]."""
    tokens, columns = x.shape
    filled = torch.nn.functional.pad(x, (0, 0, 0, -tokens % 8))
    # 32 columns: thread, member, pair; a token's words of eight are exchanged by token % 8
    words = filled.view(-1, columns // 32, 4, 4, 2).transpose(2, 3).reshape(-1, columns // 64, 8, 8)
    order = torch.arange(8)[None, :] ^ (torch.arange(len(filled)) % 8)[:, None]
    at = order.to(x.device)[:, None, :, None].expand(words.shape)
    return words.gather(2, at).transpose(0, 1).reshape(columns // 64, len(filled), 64).contiguous()


def halve(x: Tensor) -> Swizzled:
    """x [T, in] float32 on a card, rows at any distance -> what `multiply` takes."""
    if x.stride(1) != 1:
        x = x.contiguous()
    tokens, columns = x.shape
    padded = -(-tokens // 8) * 8
    wide = tiles_of(columns) * 2
    values = torch.empty(wide, padded, 64, dtype=torch.float16, device=x.device)
    scales = torch.empty(tokens, device=x.device)
    args = (
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_uint64(x.stride(0)),
        ctypes.c_int(columns),
        ctypes.c_int(wide * 8),
        ctypes.c_void_p(values.data_ptr()),
        ctypes.c_int(padded),
        ctypes.c_void_p(scales.data_ptr()),
    )
    _halving(x.device.index).launch((tokens, 1, 1), (HALVE_THREADS, 1, 1), args, dependent=True)
    return Swizzled(values, scales, tokens, columns)


def multiply(part: Part, x: Swizzled, out: int, add: int, stride: int, gated: bool, cut: Cut | None = None) -> None:
    """One launch: `part` times all tokens of x into address `out` (float32, `stride` between tokens), plus `add`."""
    device = part.codes.device.index
    processors, most = _processors(device), _nvrtc.most_shared(device)
    cut = cut or filled(part.kind, 256, 1, 1, most)
    scales = 0 if x.scales is None else x.scales.data_ptr()
    weights = (part.codes.data_ptr(), part.scales.data_ptr(), 0 if part.shifts is None else part.shifts.data_ptr())
    pieces = -(-part.blocks // BLOCKS) * -(-x.tokens // cut.tokens)
    shape = (stride, part.rows, part.pair, 0, part.blocks, part.tiles, x.tokens, 0, pieces, part.factor)
    task = _Task(*weights, x.values.data_ptr(), scales, add, out, *shape)
    grid = pieces * cut.cluster if cut.cluster > 1 else min(pieces, processors * cut.at_once)
    kernel = _multiplying(part.kind, cut, gated, device)
    kernel.launch((grid, 1, 1), (THREADS, 1, 1), Arguments(task), cut.shared(part.kind), dependent=True)


@cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def _halving(device: int) -> Kernel:
    return _nvrtc.module("wgmma_halve.cu", ("halve_many",), {}, device)["halve_many"]


@cache
def _multiplying(kind: Kind, cut: Cut, gated: bool, device: int) -> Kernel:
    defines = kind.defines() | cut.defines() | {"GATED": int(gated)}
    return _nvrtc.module("wgmma.cu", ("crowd",), defines, device)["crowd"]
