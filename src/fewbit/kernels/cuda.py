"""fewbit's own kernels for NVIDIA cards from sm_80 on: packed weights of 2 to 8 bits times activations in half.

Activations are rounded to halves once, each token first scaled by a power of two where its magnitude asks for it;
weights are exact; sums are in float32. Up to `fused_tokens` the packed weights are multiplied as they are (see
_cuda_products.py). More tokens: weights are written out as halves, rounded, in slices of at most 64 MB, and multiplied
by cuBLAS. On Hopper cards more than 32 tokens have a kernel of their own (_cuda_hopper.py), which rounds weights to
halves on the way. A token's results may depend on how many tokens are beside it, never on what they are. 7-bit codes
take a byte. The sources are compiled at first use (see _nvrtc.py).

Tensors on the CPU are copied to the card and the results back.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from fewbit.errors import FewbitError
from fewbit.kernels import Backend, Packed, _cuda_hopper, _cuda_matrix, _nvrtc
from fewbit.kernels._cuda_halves import Halves
from fewbit.kernels._cuda_hopper import Swizzled
from fewbit.kernels._cuda_layout import COLUMNS, Kind, tiles_of
from fewbit.kernels._cuda_matrix import Part
from fewbit.kernels._cuda_products import exact_tokens, fused_tokens, partial_room, product, weights
from fewbit.kernels._nvrtc import Kernel
from fewbit.qtensor import QTensor

DEVICES = ("cuda",)
# tokens that every card multiplies without writing the weights out
FUSED_TOKENS = 128
# bytes of weights that are written out at a time
EXPANDED_BYTES = 64 << 20
LEAST_ARCH = 80
# of halve.cu
HALVE_THREADS = 1024


class Cuda(Backend):
    """Everything that is `scale * code + offset` with groups of multiples of 32 columns, or of a row."""

    name = "cuda"
    priority = 40

    def refuses(self, q: QTensor) -> str | None:
        """None where the tensor is affine with groups that a tile has."""
        found = _cuda_matrix.kind(q)
        return found if isinstance(found, str) else None

    def prepare(self, tensors: list[QTensor]) -> Packed:
        """Stack on torch's current card; FewbitError where a tensor is refused. Two of a shape may be `gated`."""
        columns = tensors[0].shape[1]
        kinds: list[Kind] = []
        for q in tensors:
            found = _cuda_matrix.kind(q)
            if isinstance(found, str):
                raise FewbitError("The CUDA kernels can't take this tensor.", found + ".", "Use the reference kernel.")
            if q.shape[1] != columns:
                raise ValueError(f"stacked matrices need equal widths, got {columns} and {q.shape[1]}")
            kinds.append(found)
        device = torch.device("cuda", torch.cuda.current_device())
        parts = _cuda_matrix.build(tensors, kinds, device)
        partial_room(device.index)
        splits = tuple(q.shape[0] for q in tensors)
        return Packed((sum(splits), columns), splits, parts, sum(p.nbytes for p in parts))

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        """x [T, in] float32 -> [T, out] float32 on x's device; ValueError where x has another shape or dtype."""
        rows, columns = packed.shape
        if x.dtype is not torch.float32 or x.dim() != 2 or x.shape[1] != columns:
            raise ValueError(f"x must be float32 [T, {columns}], got {x.dtype} {list(x.shape)}")
        there = x.to(_device(packed))
        if len(x) == 0:
            return torch.empty(0, rows, device=x.device)
        few = len(x) <= self.fused_tokens(packed)
        y = self.multiply(self.halve(there), packed) if few else self._dense(there, packed)
        return y.to(x.device)

    def fused_tokens(self, packed: Packed) -> int:
        """How many tokens are multiplied without writing the weights out."""
        return min(fused_tokens(part) for part in packed.data)

    def exact_tokens(self, packed: Packed) -> int:
        """How many tokens are multiplied by weights that are not rounded to halves."""
        return min(exact_tokens(part) for part in packed.data)

    def halve(self, x: Tensor) -> Halves | Swizzled:
        """x [T, in] float32 on a card, rows at any distance -> what `multiply` and `gated` take."""
        tokens, columns = x.shape
        if _cuda_hopper.takes(x.device.index, tokens):
            return _cuda_hopper.halve(x)
        padded = tiles_of(columns) * COLUMNS
        values = torch.empty(padded // 32, tokens, 32, dtype=torch.float16, device=x.device)
        return Halves(values, _halve(x, values, padded, tokens * 32, 32), columns)

    def multiply(
        self, x: Halves | Swizzled, packed: Packed, add: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """-> [T, out] float32, plus `add` (the same shape, contiguous) where given; into `out` (contiguous) if given.

        `out` may be `add`. The kernel is launched as dependent on what ran before it (see Kernel.launch).
        """
        shape = (x.tokens, packed.shape[0])
        y = torch.empty(shape, device=x.values.device) if out is None else out
        _check(x, packed, {"out": y, "add": add}, shape)
        for part in packed.data:
            skip = part.first * 4
            product(part, x, y.data_ptr() + skip, 0 if add is None else add.data_ptr() + skip, shape[1], gated=False)
        return y

    def can_gate(self, packed: Packed) -> bool:
        """Whether `gated` takes it: two matrices of one shape and kind, of a multiple of 16 rows."""
        return len(packed.data) == 1 and packed.data[0].pair > 0

    def gated(self, x: Halves | Swizzled, packed: Packed, out: Tensor | None = None) -> Tensor:
        """silu(first matrix' product) * second's -> [T, out / 2] float32; ValueError where not `can_gate`."""
        if not self.can_gate(packed):
            raise ValueError("gated wants two matrices of one shape and kind")
        shape = (x.tokens, packed.shape[0] // 2)
        y = torch.empty(shape, device=x.values.device) if out is None else out
        _check(x, packed, {"out": y}, shape)
        product(packed.data[0], x, y.data_ptr(), 0, shape[1], gated=True)
        return y

    def _dense(self, x: Tensor, packed: Packed) -> Tensor:
        """Many tokens: weights as halves, slice by slice, through cuBLAS."""
        tokens, columns = x.shape
        padded = tiles_of(columns) * COLUMNS
        halves = torch.empty(tokens, padded, dtype=torch.float16, device=x.device)
        scales = _halve(x, halves, padded, 32, padded)
        y = torch.empty(tokens, packed.shape[0], device=x.device)
        for part in packed.data:
            _dense_part(part, halves, y)
            if part.factor != 1:
                y[:, part.first : part.first + part.rows] *= 1 / part.factor
        args = (_pointer(y), ctypes.c_uint64(y.stride(0)), ctypes.c_int(y.shape[1]), _pointer(scales))
        _plain(x.device.index)["rescale"].launch((tokens, 1, 1), (HALVE_THREADS, 1, 1), args)
        return y

    def rows(self, packed: Packed, ids: Tensor) -> Tensor:
        """Rows `ids` int64 [T] -> float32 [T, in] on ids' device; rows of ids that are out of range are NaN."""
        if ids.dtype is not torch.int64 or ids.dim() != 1:
            raise ValueError(f"ids must be int64 [T], got {ids.dtype} {list(ids.shape)}")
        there = ids.to(_device(packed)).contiguous()
        y = torch.full((len(ids), packed.shape[1]), torch.nan, device=there.device)
        for part in packed.data if len(ids) else ():
            kernel = _expanding(part.kind, there.device.index)["gather"]
            sizes = [ctypes.c_int(n) for n in (part.rows, part.columns, part.tiles, part.pair, part.first)]
            args = (weights(part), _pointer(there), _pointer(y), *sizes)
            kernel.launch((len(ids), -(-part.tiles // 32), 1), (128, 1, 1), args)
        return y.to(ids.device)


def _device(packed: Packed) -> torch.device:
    part: Part = packed.data[0]
    return part.codes.device


def _check(x: Halves | Swizzled, packed: Packed, tensors: dict[str, Tensor | None], shape: tuple[int, int]) -> None:
    if x.columns != packed.shape[1] or x.values.device != _device(packed):
        raise ValueError(
            f"activations of {x.columns} columns on {x.values.device}, "
            f"weights of {packed.shape[1]} on {_device(packed)}"
        )
    for name, t in tensors.items():
        if t is None:
            continue
        if (
            t.dtype is not torch.float32
            or tuple(t.shape) != shape
            or not t.is_contiguous()
            or t.device != x.values.device
        ):
            raise ValueError(f"{name} must be contiguous float32 {list(shape)}, got {t.dtype} {list(t.shape)}")


def _pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def _halve(x: Tensor, halves: Tensor, padded: int, block_step: int, token_step: int) -> Tensor:
    """Column c of a token goes to c // 32 * block_step + token * token_step + c % 32; -> scales [T]."""
    if x.stride(1) != 1:
        x = x.contiguous()
    scales = torch.empty(len(x), device=x.device)
    args = (
        _pointer(x),
        ctypes.c_uint64(x.stride(0)),
        ctypes.c_int(x.shape[1]),
        ctypes.c_int(padded),
        _pointer(halves),
        ctypes.c_int(block_step),
        ctypes.c_int(token_step),
        _pointer(scales),
    )
    _plain(x.device.index)["halve"].launch((len(x), 1, 1), (HALVE_THREADS, 1, 1), args, dependent=True)
    return scales


def _dense_part(part: Part, halves: Tensor, y: Tensor) -> None:
    width = part.tiles * COLUMNS
    count = max(1, EXPANDED_BYTES // (64 * width))
    room = torch.empty(min(count, part.blocks) * 32, width, dtype=torch.float16, device=y.device)
    kernel = _expanding(part.kind, y.device.index)["expand"]
    for first in range(0, part.blocks, count):
        blocks = min(count, part.blocks - first)
        sizes = [ctypes.c_int(n) for n in (first, blocks, part.tiles, part.pair)]
        args = (weights(part), _pointer(room), *sizes, ctypes.c_float(part.factor))
        kernel.launch((blocks, -(-part.tiles // 4), 1), (128, 1, 1), args)
        if part.pair:
            rows = min(16 * blocks, part.pair - 16 * first)
            ranges = [(0, part.first + 16 * first, rows), (16 * blocks, part.first + part.pair + 16 * first, rows)]
        else:
            ranges = [(0, part.first + 32 * first, min(32 * blocks, part.rows - 32 * first))]
        for start, to, rows in ranges:
            torch.mm(halves, room[start : start + rows].t(), torch.float32, out=y[:, to : to + rows])


@cache
def _plain(device: int) -> dict[str, Kernel]:
    return _nvrtc.module("halve.cu", ("halve", "rescale"), {}, device)


@cache
def _expanding(kind: Kind, device: int) -> dict[str, Kernel]:
    return _nvrtc.module("expand.cu", ("expand", "gather"), kind.defines(), device)


def backend() -> Cuda | None:
    """None where torch's current card is older than sm_80, or nothing can be compiled for it."""
    if _nvrtc.missing() is not None or _nvrtc.card_arch(torch.cuda.current_device()) < LEAST_ARCH:
        return None
    return Cuda()
