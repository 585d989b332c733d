"""Native CPU kernels: packed weights of 2 to 8 bits times activations rounded to int8.

Weights take the bits they are stored with (7-bit codes a byte), beside the scales in their own dtype. Each
call rounds its activations once, symmetrically in groups of 32 inputs (scale = absmax / 127), multiplies in integers
and scales in float32. Results do not depend on the number of threads, nor a row's on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import FewbitError
from fewbit.formats import Affine, parse
from fewbit.kernels import KeepingBackend, Packed, Room
from fewbit.kernels._cores import most_threads, physical_cores
from fewbit.kernels._cpu_ops import CpuOps
from fewbit.qtensor import QTensor

DEVICES = ("cpu",)
# columns whose activations share a scale, and which a span must not cut
BLOCK = 32
# larger tensors are unpacked and packed again in slices of rows, to bound the memory that takes
SLICE_WEIGHTS = 1 << 24
SCALE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# of what a group adds to scale * code; uint8 stands for zero points
OFFSET_TYPES = {None: 0, torch.float32: 1, torch.float16: 2, torch.uint8: 3}


def _load() -> ModuleType | None:
    try:
        from fewbit import _cpu
    except ImportError:
        return None
    return _cpu


_native = _load()


@dataclass(frozen=True)
class _Kind:
    """What rows must agree in to lie in one block of the native layout."""

    span: int
    code_bits: int
    scale_type: int
    zero: int
    offset_type: int

    @classmethod
    def of(cls, a: Affine) -> _Kind:
        columns = a.codes.shape[1]
        span = a.span if a.span < columns else columns
        offsets = _offsets(a)
        offset_type = OFFSET_TYPES[None if offsets is None else offsets.dtype]
        return cls(span, 8 if a.bits == 7 else a.bits, SCALE_TYPES[a.scale.dtype], a.zero or 0, offset_type)


class Cpu(KeepingBackend):
    """Everything that is `scale * code + offset` with groups of whole blocks of 32 columns.

    Threads, until told otherwise: the physical cores, but no more than torch uses (it obeys OMP_NUM_THREADS).
    """

    name = "cpu"
    priority = 20

    def __init__(self, native: ModuleType) -> None:
        self.native = native
        self.ops = CpuOps(native)
        self.layout = f"cpu {native.layout}"
        native.set_threads(min(physical_cores(), torch.get_num_threads()))

    @property
    def threads(self) -> int:
        """Threads that take part in a call; after the first call, those that the system granted."""
        return int(self.native.threads())

    def set_threads(self, count: int) -> None:
        """Use `count` threads from now on; ValueError where it is below 1 or beyond `most_threads`."""
        if count < 1:
            raise ValueError(f"threads must be at least 1, got {count}")
        if count > (most := most_threads()):
            raise ValueError(f"threads must be at most {most} on this machine, got {count}")
        self.native.set_threads(count)

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return str(self.native.isa())

    def instruction_sets(self) -> dict[str, str | None]:
        """Every instruction set, best last, with the reason it can't run here, or None where it can."""
        return {name: reason or None for name, reason in self.native.instruction_sets()}

    def set_isa(self, name: str) -> None:
        """Use another instruction set; ValueError where it is unknown or this CPU lacks it."""
        self.native.set_isa(name)

    def refuses(self, q: QTensor) -> str | None:
        """None where the tensor is affine with groups of whole blocks."""
        if len(q.shape) != 2:
            return f"{q.spec} of shape {q.shape} is not a matrix"
        # a single row has the tensor's whole structure
        if "g_idx" in q.parts:
            return f"{q.spec} has groups of scattered columns (activation order)"
        a = parse(q.spec).affine(parse(q.spec).take(q, torch.zeros(1, dtype=torch.int64)))
        if a is None:
            return f"{q.spec} is not scale times code plus offset"
        if a.span % BLOCK and a.span < q.shape[1]:
            return f"{q.spec} has groups of {a.span} columns, and the kernel takes multiples of {BLOCK}"
        if a.scale.dtype not in SCALE_TYPES:
            return f"{q.spec} has scales of {a.scale.dtype}"
        return None

    def prepare(self, tensors: list[QTensor], room: Room | None = None) -> Packed:
        """Pack and stack; rows that agree in width, span, scale type and zero share a block. FewbitError if refused."""
        columns = tensors[0].shape[1]
        for q in tensors:
            if reason := self.refuses(q):
                raise FewbitError("The CPU kernel can't take this tensor.", reason + ".", "Use the reference kernel.")
            if q.shape[1] != columns:
                raise ValueError(f"stacked matrices need equal widths, got {columns} and {q.shape[1]}")
        matrix = self.native.Matrix(columns)
        kinds = [_Kind.of(next(_slices(q, 1))[1]) for q in tensors]
        places: list[tuple[int, int]] = []
        block, first = -1, 0
        for i, (q, kind) in enumerate(zip(tensors, kinds, strict=True)):
            if i == 0 or kind != kinds[i - 1]:
                same = next((j for j in range(i, len(kinds)) if kinds[j] != kind), len(kinds))
                rows = sum(t.shape[0] for t in tensors[i:same])
                block, first = self._add_block(matrix, rows, kind), 0
            places.append((block, first))
            first += q.shape[0]
        found = room(matrix.nbytes) if room else None
        if found is None:
            matrix.allocate()
        else:
            matrix.place_new(*found, matrix.nbytes)
        for q, kind, (block, first) in zip(tensors, kinds, places, strict=True):
            self._fill(matrix, block, first, q, kind)
        return Packed((matrix.row_count, columns), tuple(q.shape[0] for q in tensors), matrix, matrix.nbytes)

    def describe(self, packed: Packed) -> dict[str, Any]:
        """Columns, the outs that were stacked, and what `add_block` was told."""
        return {"columns": packed.shape[1], "splits": list(packed.splits), "blocks": packed.data.blocks()}

    def restore(self, description: dict[str, Any], buffer: Any, offset: int, count: int) -> Packed:
        """The native side checks each number, and that the blocks take `count` bytes exactly."""
        columns, splits = description["columns"], tuple(description["splits"])
        matrix = self.native.Matrix(columns)
        for block in description["blocks"]:
            matrix.add_block(*block)
        if any(type(s) is not int for s in splits) or min(splits, default=0) < 1 or sum(splits) != matrix.row_count:
            raise ValueError(f"matrices of {splits} rows do not stack to {matrix.row_count}")
        matrix.place(buffer, offset, count)
        return Packed((matrix.row_count, columns), splits, matrix, matrix.nbytes)

    def checksum(self, buffer: Any, offset: int, count: int) -> int:
        """Of `count` bytes from `offset` on; ValueError where they leave the buffer."""
        return int(self.native.checksum(buffer, offset, count))

    def _add_block(self, matrix: object, rows: int, kind: _Kind) -> int:
        add = matrix.add_block  # type: ignore[attr-defined]
        return int(add(rows, kind.span, kind.code_bits, kind.scale_type, kind.zero, kind.offset_type))

    def _fill(self, matrix: object, block: int, first: int, q: QTensor, kind: _Kind) -> None:
        for start, a in _slices(q, max(1, SLICE_WEIGHTS // q.shape[1])):
            count = len(a.codes)
            groups = -(-q.shape[1] // kind.span)
            codes, scale = a.codes.contiguous(), a.scale.contiguous()
            offset = _offsets(a)
            _expect("codes", codes, torch.uint8, (count, q.shape[1]))
            _expect("scales", scale, scale.dtype, (count, groups))
            if offset is not None:
                offset = offset.contiguous()
                _expect("offsets", offset, offset.dtype, (count, groups))
            if _Kind.of(a) != kind:
                raise ValueError(f"rows of one {q.spec} tensor disagree: {_Kind.of(a)} and {kind}")
            offset_address = 0 if offset is None else offset.data_ptr()
            fill = matrix.fill  # type: ignore[attr-defined]
            fill(block, first + start, count, codes.data_ptr(), scale.data_ptr(), offset_address)

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        """x [T, in] float32 -> [T, out] float32; ValueError where x has another shape, dtype or device."""
        rows, columns = packed.shape
        if x.dtype is not torch.float32 or x.dim() != 2 or x.shape[1] != columns or not x.is_cpu:
            raise ValueError(
                f"x must be float32 [T, {columns}] on the CPU, got {x.dtype} {list(x.shape)} on {x.device}"
            )
        if not x.is_contiguous():
            x = x.contiguous()
        tokens = x.shape[0]
        y = torch.empty(tokens, rows)
        packed.data.multiply(x.data_ptr(), tokens, y.data_ptr())
        return y

    def rows(self, packed: Packed, ids: Tensor) -> Tensor:
        """Rows `ids` int64 [T] -> float32 [T, in]; IndexError where one is out of range."""
        if ids.dtype is not torch.int64 or ids.dim() != 1 or not ids.is_cpu:
            raise ValueError(f"ids must be int64 [T] on the CPU, got {ids.dtype} {list(ids.shape)} on {ids.device}")
        ids = ids.contiguous()
        y = torch.empty(len(ids), packed.shape[1])
        if not packed.data.rows(ids.data_ptr(), len(ids), y.data_ptr()):
            raise IndexError(
                f"row ids must lie in 0 .. {packed.shape[0] - 1}, got {int(ids.min())} .. {int(ids.max())}"
            )
        return y


def _offsets(a: Affine) -> Tensor | None:
    """In the fewest bytes."""
    return a.offset if a.zeros is None else a.zeros


def _slices(q: QTensor, rows: int) -> Iterator[tuple[int, Affine]]:
    """The tensor in slices of `rows` rows as (first row, affine); whole where it is no longer than that."""
    fmt = parse(q.spec)
    for start in range(0, q.shape[0], rows):
        stop = min(q.shape[0], start + rows)
        part = q if stop - start == q.shape[0] else fmt.take(q, torch.arange(start, stop))
        a = fmt.affine(part)
        if a is None:
            raise ValueError(f"{q.spec} is not affine")
        yield start, a


def _expect(what: str, t: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if t.dtype != dtype or tuple(t.shape) != shape or not t.is_cpu:
        raise ValueError(
            f"{what} must be {dtype} {list(shape)} on the CPU, got {t.dtype} {list(t.shape)} on {t.device}"
        )


@lru_cache(maxsize=1)
def backend() -> Cpu | None:
    """None where the native extension was not built or can't be loaded; one instance, as threads are the process's."""
    return Cpu(_native) if _native is not None else None
