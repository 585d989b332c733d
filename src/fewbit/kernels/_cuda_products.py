"""Which kernel makes a product on a card, and how it is launched."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import torch
from torch import Tensor

from fewbit.kernels import _cuda_hopper, _nvrtc
from fewbit.kernels._cuda_halves import Halves
from fewbit.kernels._cuda_hopper import Swizzled
from fewbit.kernels._cuda_layout import Kind
from fewbit.kernels._cuda_matrix import Part
from fewbit.kernels._cuda_shapes import Shape, Tile, most_fused, room, shape_for, tile_for
from fewbit.kernels._nvrtc import Arguments, Kernel

# tokens that product.cu multiplies; beyond, many.cu does
FEW_TOKENS = 16


class Weights(ctypes.Structure):
    """As in tiles.cuh."""

    _fields_ = (("codes", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("shifts", ctypes.c_void_p))


class Output(ctypes.Structure):
    """As in output.cuh."""

    _fields_ = (
        ("token_scales", ctypes.c_void_p),
        ("add", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("stride", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("pair", ctypes.c_int),
    )


def weights(part: Part) -> Weights:
    """Where a part's weights lie."""
    return Weights(part.codes.data_ptr(), part.scales.data_ptr(), 0 if part.shifts is None else part.shifts.data_ptr())


def fused_tokens(part: Part) -> int:
    """How many tokens `product` takes before weights written out as halves and cuBLAS are faster."""
    arch = _nvrtc.card_arch(part.codes.device.index)
    return sys.maxsize if arch == _cuda_hopper.ARCH else most_fused(arch)


def exact_tokens(part: Part) -> int:
    """How many tokens `product` takes with weights that are not rounded."""
    arch = _nvrtc.card_arch(part.codes.device.index)
    return _cuda_hopper.LEAST_TOKENS - 1 if arch == _cuda_hopper.ARCH else most_fused(arch)


def product(part: Part, x: Halves | Swizzled, out: int, add: int, stride: int, gated: bool) -> None:
    """One launch: `part` times all tokens of x, to the address `out`, plus what lies at `add` unless that is 0.

    `stride`: floats between tokens there. The kernel is launched as dependent on what ran before it.
    """
    if isinstance(x, Swizzled) or _cuda_hopper.takes(part.codes.device.index, x.tokens):
        _cuda_hopper.product(part, x, out, add, stride, gated)
        return
    output = Output(0 if x.scales is None else x.scales.data_ptr(), add, out, stride, part.rows, part.pair)
    if x.tokens <= FEW_TOKENS:
        _few(part, x, output, gated)
    else:
        _many(part, x, output, gated)


def _few(part: Part, x: Halves, output: Output, gated: bool) -> None:
    device = part.codes.device.index
    wide = 1 if x.tokens <= 8 else 2
    shape = shape_for(part.kind, part.blocks, part.tiles, wide, _nvrtc.most_shared(device))
    counts = [ctypes.c_int(n) for n in (part.blocks, part.tiles, x.tokens)]
    args = Arguments(weights(part), ctypes.c_void_p(x.values.data_ptr()), output, *counts)
    grid = (-(-part.blocks // (shape.row_warps * shape.row_blocks)), 1, 1)
    kernel = _few_kernel(part.kind, shape, wide, gated, device)
    kernel.launch(grid, (32 * shape.warps, 1, 1), args, shape.shared(part.kind), dependent=True)


def _many(part: Part, x: Halves, output: Output, gated: bool) -> None:
    device = part.codes.device.index
    card = (_nvrtc.most_shared(device), processors(device))
    tile, count = tile_for(part.kind, part.blocks, part.tiles, x.tokens, *card)
    counts = [ctypes.c_int(n) for n in (part.blocks, part.tiles, -(-part.tiles // count), x.tokens)]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in partial_room(device)]
    args = Arguments(weights(part), ctypes.c_void_p(x.values.data_ptr()), output, *pointers, *counts)
    grid = (-(-x.tokens // (8 * tile.wide)), -(-part.blocks // tile.tall), count)
    kernel = _many_kernel(part.kind, tile, gated, device)
    kernel.launch(grid, (32 * tile.warps, 1, 1), args, tile.shared(part.kind), dependent=True)


@cache
def processors(device: int) -> int:
    """Multiprocessors of a card."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def partial_room(device: int) -> tuple[Tensor, Tensor]:
    """For partial sums, and counts of blocks that arrived, which each launch leaves 0.

    To be made before a CUDA graph is recorded. One launch at a time uses it: a card's products are all on one stream.
    """
    sums, counts = room(processors(device))
    on = f"cuda:{device}"
    return torch.empty(sums, device=on), torch.zeros(counts, dtype=torch.int32, device=on)


@cache
def _few_kernel(kind: Kind, shape: Shape, wide: int, gated: bool, device: int) -> Kernel:
    defines = kind.defines() | shape.defines() | {"NT": wide, "GATED": int(gated)}
    return _nvrtc.module("product.cu", ("product",), defines, device)["product"]


@cache
def _many_kernel(kind: Kind, tile: Tile, gated: bool, device: int) -> Kernel:
    defines = kind.defines() | tile.defines() | {"GATED": int(gated)}
    return _nvrtc.module("many.cu", ("many",), defines, device)["many"]
