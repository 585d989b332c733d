"""One GGUF file as bytes: header, metadata, and where each tensor lies (ggml/docs/gguf.md).

Versions 2 and 3, little endian:

    "GGUF" | version u32 | tensors u64 | metadata pairs u64
    metadata  key string, type u32, value                          string: length u64, bytes
    tensors   name string, rank u32, dims u64 x rank (fastest first), type u32, offset u64
    padding to `general.alignment` (32), then the data, which the offsets count from

The file is mapped, not read. Every count and length is checked against the bytes that are left before it is used.
"""

from __future__ import annotations

import mmap
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn, overload

import torch

from fewbit import formats
from fewbit.errors import FewbitError

# ggml_type -> name (ggml.h)
# fmt: off
TYPE_NAMES: Final[dict[int, str]] = {
    0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 9: "q8_1", 10: "q2_k", 11: "q3_k",
    12: "q4_k", 13: "q5_k", 14: "q6_k", 15: "q8_k", 16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs", 19: "iq1_s",
    20: "iq4_nl", 21: "iq3_s", 22: "iq2_s", 23: "iq4_xs", 24: "i8", 25: "i16", 26: "i32", 27: "i64", 28: "f64",
    29: "iq1_m", 30: "bf16", 34: "tq1_0", 35: "tq2_0", 39: "mxfp4", 40: "nvfp4",
    41: "q1_0", 42: "q2_0",
}
# activations while they are multiplied (q8_1, q8_k), plain numbers, and types no public file was seen to hold
UNREAD: Final = {"q8_1", "q8_k", "i8", "i16", "i32", "i64", "f64", "q1_0", "q2_0"}
# metadata value type -> struct code; 8 is a string, 9 an array
SCALARS: Final[dict[int, str]] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}
# fmt: on
# ggml_type -> spec: what can be read
SPECS: Final[dict[int, str]] = {
    number: name if name in ("f32", "f16", "bf16") else f"gguf:{name}"
    for number, name in TYPE_NAMES.items()
    if name not in UNREAD
}
STRING, ARRAY = 8, 9
# longer arrays (vocabularies) are decoded when asked for
EAGER_LENGTH = 1024
# smallest possible records: an empty key with a byte; an empty name with one dimension
PAIR_BYTES, TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
MAX_RANK, MAX_NESTING = 4, 2
# Linux: a private writable map is charged against memory unless told otherwise (mmap(2)); the module lacks the name
MAP_NORESERVE = 0x4000


class LazyArray(Sequence[Any]):
    """A long metadata array, decoded at first use."""

    def __init__(self, cursor: Cursor, kind: int, count: int) -> None:
        self._cursor = cursor
        self._kind = kind
        self._count = count
        self._items: list[Any] | None = None

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._decoded()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._decoded())

    def __repr__(self) -> str:
        return f"LazyArray({self._count} items)"

    def _decoded(self) -> list[Any]:
        if self._items is None:
            # a copy, so that several threads may decode at once
            self._items = self._cursor.copy().items(self._kind, self._count, nesting=1)
        return self._items


class Cursor:
    """A position in the mapped file that never passes its end."""

    def __init__(self, data: mmap.mmap, path: Path, at: int = 0) -> None:
        self.data = data
        self.path = path
        self.at = at

    def copy(self) -> Cursor:
        return Cursor(self.data, self.path, self.at)

    def fail(self, what: str) -> NoReturn:
        raise broken(self.path, f"{what} (header offset {self.at}, file size {len(self.data)} bytes).")

    def need(self, size: int, what: str) -> None:
        left = len(self.data) - self.at
        if size > left:
            self.fail(f"{what} needs {size} bytes and {left} are left")

    def scalar(self, code: str, what: str) -> Any:
        size = struct.calcsize("<" + code)
        self.need(size, what)
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += size
        return value

    def string(self, what: str) -> str:
        size = self.scalar("Q", f"the length of {what}")
        self.need(size, what)
        raw = self.data[self.at : self.at + size]
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8: {error.reason} at its byte {error.start}")
        self.at += size
        return text

    def value(self, kind: int, key: str) -> Any:
        """One metadata value; a long array of scalars or strings is stepped over and returned lazily."""
        if kind == STRING:
            return self.string(key)
        if kind != ARRAY:
            return self.scalar(self._code(kind, key), key)
        item, count = self._array(key)
        if count <= EAGER_LENGTH or item == ARRAY:
            return self.items(item, count, nesting=1, key=key)
        lazy = LazyArray(self.copy(), item, count)
        if item == STRING:
            self._strings(count, key, keep=False)
        else:
            self.at += count * struct.calcsize("<" + self._code(item, key))
        return lazy

    def items(self, kind: int, count: int, nesting: int, key: str = "an array") -> list[Any]:
        """`count` values of one type, whose bytes `_array` has checked."""
        if kind == STRING:
            return self._strings(count, key)
        if kind == ARRAY:
            if nesting >= MAX_NESTING:
                self.fail(f"{key} nests arrays more than {MAX_NESTING} deep")
            return [self.items(*self._array(key), nesting=nesting + 1, key=key) for _ in range(count)]
        packed = struct.Struct(f"<{count}{self._code(kind, key)}")
        values = list(packed.unpack_from(self.data, self.at))
        self.at += packed.size
        return values

    def _array(self, key: str) -> tuple[int, int]:
        """Item type and count of an array whose items can be in the file."""
        kind = self.scalar("I", f"the type of {key}")
        count = self.scalar("Q", f"the count of {key}")
        least = 8 if kind == STRING else 12 if kind == ARRAY else struct.calcsize("<" + self._code(kind, key))
        self.need(count * least, f"{key} with {count} items")
        return kind, count

    def _strings(self, count: int, key: str, keep: bool = True) -> list[str]:
        """The same as `count` times `string`, without its cost for each item; only stepped over unless `keep`."""
        read, data, at, end = struct.Struct("<Q").unpack_from, self.data, self.at, len(self.data)
        found = []
        for index in range(count):
            start = at + 8
            if start > end or (at := start + read(data, at)[0]) > end:
                self.fail(f"{key} ends inside item {index} of {count}")
            if keep:
                try:
                    found.append(data[start:at].decode())
                except UnicodeDecodeError as error:
                    self.fail(f"item {index} of {key} is not UTF-8: {error.reason}")
        self.at = at
        return found

    def _code(self, kind: int, key: str) -> str:
        if kind not in SCALARS:
            self.fail(f"{key} has the unknown value type {kind}")
        return SCALARS[kind]


@dataclass(frozen=True)
class Entry:
    """A tensor as the header describes it; `start` counts from the beginning of the file."""

    kind: int
    shape: tuple[int, ...]
    start: int


class GgufFile:
    """A mapped file, its metadata and the places of its tensors.

    Tensors made of `data` are views of a private mapping: writing to one never reaches the file.
    """

    def __init__(self, path: Path) -> None:
        """FewbitError where the header is broken or foreign."""
        self.path = path
        with path.open("rb") as file:
            self.data = _map(file, path)
        cursor = Cursor(self.data, path)
        tensors, pairs = _counts(cursor)
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = cursor.string("a metadata key")
            if key in self.metadata:
                cursor.fail(f"the metadata key {key[:80]!r} appears twice")
            self.metadata[key] = cursor.value(cursor.scalar("I", f"the type of {key[:80]!r}"), repr(key[:80]))
        self.entries = _entries(cursor, tensors, _alignment(cursor, self.metadata))


def type_name(kind: int) -> str:
    return TYPE_NAMES.get(kind, f"type {kind}")


def broken(path: Path, facts: str) -> FewbitError:
    return FewbitError(
        f"{path.name} is not a whole GGUF file.",
        facts,
        "Download or convert it again and compare its size or checksum with the publisher's.",
    )


def _map(file: BinaryIO, path: Path) -> mmap.mmap:
    """The whole file, private and writable, so that tensors can be made of it without a copy."""
    size = file.seek(0, 2)
    if size < 24:
        raise broken(path, f"It has {size} bytes, fewer than the 24 of the shortest header.")
    if sys.platform == "linux":
        access = mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE | MAP_NORESERVE, prot=access)
    return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)


def _counts(cursor: Cursor) -> tuple[int, int]:
    """Numbers of tensors and metadata pairs, after the magic and the version."""
    magic = cursor.data[:4]
    if magic != b"GGUF":
        raise broken(cursor.path, f"It begins with {magic!r}, not b'GGUF'.")
    cursor.at = 4
    version = cursor.scalar("I", "the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        raise FewbitError(
            f"fewbit does not read this kind of GGUF: {cursor.path.name}.",
            f"It is big endian, version {swapped}." if swapped in (2, 3) else f"It is of version {version}.",
            "fewbit reads versions 2 and 3, little endian: convert the model again with a current llama.cpp.",
        )
    tensors, pairs = cursor.scalar("Q", "the tensor count"), cursor.scalar("Q", "the metadata count")
    cursor.need(tensors * TENSOR_BYTES + pairs * PAIR_BYTES, f"a header of {tensors} tensors and {pairs} pairs")
    return tensors, pairs


def _alignment(cursor: Cursor, config: dict[str, Any]) -> int:
    """Bytes that tensors are aligned to; a multiple of 8 as the format demands, so numbers lie on their own size."""
    alignment = config.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
        cursor.fail(f"general.alignment is {str(alignment)[:40]}, not a power of two from 8 to 1048576")
    return alignment


def _entries(cursor: Cursor, count: int, alignment: int) -> dict[str, Entry]:
    """The tensor table, each tensor inside the file."""
    found: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(count):
        name = cursor.string("a tensor name")
        label = repr(name[:80])
        if name in found:
            cursor.fail(f"the tensor {label} appears twice")
        rank = cursor.scalar("I", f"the rank of {label}")
        if not 1 <= rank <= MAX_RANK:
            cursor.fail(f"{label} has {rank} dimensions, not 1 to {MAX_RANK}")
        shape = tuple(cursor.scalar("Q", f"the shape of {label}") for _ in range(rank))[::-1]
        if 0 in shape:
            cursor.fail(f"{label} has the empty shape {shape}")
        kind = cursor.scalar("I", f"the type of {label}")
        found[name] = (kind, shape, cursor.scalar("Q", f"the offset of {label}"))
    base = -(-cursor.at // alignment) * alignment
    for name, (kind, shape, offset) in found.items():
        _check_place(cursor, name[:80], kind, shape, base, offset, alignment)
    return {name: Entry(kind, shape, base + offset) for name, (kind, shape, offset) in found.items()}


def _check_place(
    cursor: Cursor, name: str, kind: int, shape: tuple[int, ...], base: int, offset: int, alignment: int
) -> None:
    """A tensor's bytes must lie in the file; of a type that can't be read, at least its first byte."""
    size = 1
    if kind in SPECS:
        form = formats.parse(SPECS[kind])
        reason = form.accepts(shape)
        if reason:
            cursor.fail(f"{name!r} of shape {shape}: {reason}")
        size = form.nbytes(shape, torch.float32)
    if offset % alignment:
        cursor.fail(f"{name!r} lies at {offset}, not a multiple of {alignment}")
    if base + offset + size > len(cursor.data):
        cursor.fail(f"{name!r} of shape {shape} ({type_name(kind)}) ends at {base + offset + size}")
