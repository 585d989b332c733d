"""Writes a GGUF file (version 3, little endian) tensor by tensor, under another name until it is whole.

The layout is drawn in `_gguf_file`. Sizes and offsets follow from names, types and shapes, so the header comes first
and the data after it in order.
"""

from __future__ import annotations

import os
import shlex
import shutil
import struct
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from fewbit.checkpoint._gguf_file import ARRAY, SPECS, STRING
from fewbit.errors import FewbitError
from fewbit.formats import parse

ALIGNMENT = 32
NUMBERS = {spec: number for number, spec in SPECS.items()}
# metadata value types: u32, i32, f32, bool, u64
U32, I32, F32, BOOL, U64 = 4, 5, 6, 7, 10
Value = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float] | Sequence[bool]


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file: ggml's name, spec, and shape with the rows first."""

    name: str
    spec: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data, without padding."""
        return parse(self.spec).nbytes(self.shape, torch.float32)


class GgufWriter:
    """A file beside `path`, renamed when every tensor is written; used as a context manager."""

    def __init__(self, path: Path, metadata: Mapping[str, Value], tensors: Sequence[GgufTensor]) -> None:
        self.path, self.tensors = path.absolute(), list(tensors)
        self._header = header(metadata, self.tensors)
        # tensors still to come, and bytes the first of them still wants
        self._next, self._wanted = 0, self.tensors[0].nbytes if self.tensors else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return len(self._header) + sum(t.nbytes + -t.nbytes % ALIGNMENT for t in self.tensors)

    def __enter__(self) -> GgufWriter:
        self._check_absent()
        parent = self.path.parent
        if not parent.is_dir():
            raise FewbitError(
                f"The output's folder {str(parent)!r} does not exist.",
                f"Asked for {self.path}.",
                f"Make it first: mkdir -p {shlex.quote(str(parent))}",
            )
        free = shutil.disk_usage(parent).free
        if free < self.nbytes:
            raise FewbitError(
                "The disk is too full for the output.",
                f"{self.nbytes:,} bytes are needed, {free:,} are free at {parent}.",
                "Free some space, or choose an output on another disk.",
            )
        handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", suffix=".new", dir=parent)
        self._beside = Path(name)
        self._file = os.fdopen(handle, "wb")
        self._file.write(self._header)
        return self

    def _check_absent(self) -> None:
        if self.path.exists() or self.path.is_symlink():
            raise FewbitError(
                f"The output {str(self.path)!r} exists already.",
                "fewbit never overwrites a model.",
                f"Choose another name, or remove it first: rm -r {shlex.quote(str(self.path))}",
            )

    def write(self, name: str, piece: Tensor) -> None:
        """The next rows of the tensor `name`; tensors come in the order they were named in."""
        if self._next >= len(self.tensors) or self.tensors[self._next].name != name:
            raise ValueError(f"{name} is not the next tensor")
        data = piece.contiguous().reshape(-1).view(torch.uint8).numpy().data
        if len(data) > self._wanted:
            raise ValueError(f"{name} got more bytes than it was planned for")
        self._file.write(data)
        self._wanted -= len(data)
        if not self._wanted:
            self._file.write(b"\0" * (-self.tensors[self._next].nbytes % ALIGNMENT))
            self._next += 1
            self._wanted = self.tensors[self._next].nbytes if self._next < len(self.tensors) else 0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                if self._next < len(self.tensors):
                    raise ValueError(f"tensors without all of their bytes: {self.tensors[self._next].name} and after")
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                # another process may have been faster
                self._check_absent()
                self._beside.chmod(0o644)
                self._beside.rename(self.path)
        finally:
            with suppress(OSError):
                self._file.close()
            self._beside.unlink(missing_ok=True)


def header(metadata: Mapping[str, Value], tensors: Sequence[GgufTensor]) -> bytes:
    """Everything before the data, padded."""
    out = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        kind = _kind(value)
        out += [_string(key), struct.pack("<I", kind), _encoded(value, kind)]
    offset = 0
    for t in tensors:
        dims = t.shape[::-1]
        out += [_string(t.name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, NUMBERS[t.spec], offset)]
        offset += t.nbytes + -t.nbytes % ALIGNMENT
    text = b"".join(out)
    return text + b"\0" * (-len(text) % ALIGNMENT)


def _kind(value: Value) -> int:
    """The metadata type of a value: counts are u32 where they fit."""
    if isinstance(value, str):
        return STRING
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, int):
        return (U32 if value < 1 << 32 else U64) if value >= 0 else I32
    return F32 if isinstance(value, float) else ARRAY


def _encoded(value: Value, kind: int) -> bytes:
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, bool):
        return struct.pack("<?", value)
    if isinstance(value, int):
        return struct.pack({U32: "<I", U64: "<Q", I32: "<i"}[kind], value)
    if isinstance(value, float):
        return struct.pack("<f", value)
    first = value[0] if value else 0
    # token types and the like are i32, as other writers have them
    item = I32 if isinstance(first, int) and not isinstance(first, bool) else _kind(first)
    begin = struct.pack("<IQ", item, len(value))
    if item == STRING:
        return begin + b"".join(_string(str(text)) for text in value)
    return begin + struct.pack(f"<{len(value)}{ {I32: 'i', F32: 'f', BOOL: '?'}[item] }", *value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
