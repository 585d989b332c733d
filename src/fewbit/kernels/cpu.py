"""Native CPU kernels: packed weights of 2 to 8 bits times activations rounded to int8.

Weights take the bits they are stored with (7-bit codes a byte), beside the scales in their own dtype. Each
call rounds its activations once, symmetrically in groups of 32 inputs (scale = absmax / 127), multiplies in integers
and scales in float32. Results do not depend on the number of threads, nor a row's on the rows beside it.
"""

from __future__ import annotations

from dataclasses import astuple
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import FewbitError
from fewbit.kernels import KeepingBackend, Packed, Room
from fewbit.kernels._cores import most_threads, physical_cores
from fewbit.kernels._cpu_ops import CpuOps
from fewbit.kernels._cpu_rows import Kind, refuses, slices
from fewbit.qtensor import QTensor

DEVICES = ("cpu",)
# larger tensors are unpacked and packed again in slices of rows, to bound the memory that takes
SLICE_WEIGHTS = 1 << 24


def _load() -> ModuleType | None:
    try:
        from fewbit import _cpu
    except ImportError:
        return None
    return _cpu


_native = _load()


class Cpu(KeepingBackend):
    """All that is `scale * code + offset` or `scale * level`, with groups of whole blocks of 32 columns or of half.

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
        """None where the tensor is affine or has a table, with groups of whole blocks or of half a block."""
        return refuses(q)

    def prepare(self, tensors: list[QTensor], room: Room | None = None) -> Packed:
        """Pack and stack; rows that agree in width, span, scale type and zero share a block. FewbitError if refused."""
        columns = tensors[0].shape[1]
        for q in tensors:
            if reason := self.refuses(q):
                raise FewbitError("The CPU kernel can't take this tensor.", reason + ".", "Use the reference kernel.")
            if q.shape[1] != columns:
                raise ValueError(f"stacked matrices need equal widths, got {columns} and {q.shape[1]}")
        matrix = self.native.Matrix(columns)
        kinds = [next(slices(q, 1))[1].kind for q in tensors]
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

    def _add_block(self, matrix: Any, rows: int, kind: Kind) -> int:
        return int(matrix.add_block(rows, *astuple(kind)[:-1], list(kind.levels)))

    def _fill(self, matrix: Any, block: int, first: int, q: QTensor, kind: Kind) -> None:
        for start, rows in slices(q, max(1, SLICE_WEIGHTS // q.shape[1])):
            if rows.kind != kind:
                raise ValueError(f"rows of one {q.spec} tensor disagree: {rows.kind} and {kind}")
            # held until they are copied
            parts = rows.parts()
            addresses = [0 if part is None else part.data_ptr() for part in parts]
            matrix.fill(block, first + start, len(rows.codes), *addresses)

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


@lru_cache(maxsize=1)
def backend() -> Cpu | None:
    """None where the native extension was not built or can't be loaded; one instance, as threads are the process's."""
    return Cpu(_native) if _native is not None else None
