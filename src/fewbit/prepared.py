"""Packed weights, kept in a file of the cache directory and mapped from there: nothing is packed twice or held twice.

A file has 64 bytes (MAGIC, where the header begins, its length, its SHA-256), the weights of each matrix on a page's
border, and the header: JSON of what the file was made for and what lies where. While a model loads for the first time
its weights are packed straight into the file, which gets its name when the load is done. A file is used when every
number in it fits, it was made for these very source files by this version and these backends, and each matrix has the
sum that was noted; otherwise it is as if it were not there. The sums also find what a power failure left unwritten, so
nothing waits for the disk.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit import __version__, store
from fewbit.kept import begin, sizes, tidy, used
from fewbit.kernels import Backend, KeepingBackend, Packed
from fewbit.qtensor import QTensor
from fewbit.store.layout_files import FORMAT, MAGIC, START, SUFFIX, UselessError, opened_layout, read_header

# matrices begin on a page's border, whatever size the system's pages have
PAGE = 1 << 16
# by which an unfinished file grows
STEP = 1 << 26
# Smaller models are packed at each load: at 70 MB/s (Q4_1) to 150 MB/s (int4g64), one thread of a busy machine, that
# takes half a second, as reading a tokenizer does, and a file for each of many small models would serve nobody.
SMALL_BYTES = 64 << 20
# all files together take no more than this, nor than a quarter of what would be free without them
MAX_BYTES = 64 << 30
# packed weights take at most 2.2 times the room of stored ones (IQ1_S), most 1.1, and small matrices are padded
MOST_GROWTH, MOST_PADDING = 3, 64 << 20

Names = tuple[str, ...]


@dataclass(frozen=True)
class _Kept:
    """A matrix that lies in a draft."""

    names: Names
    backend: KeepingBackend
    packed: Packed
    offset: int


class PreparedLayouts:
    """The packed matrices of one model: found in the cache, or put there while the model loads.

    `get` before reading a matrix's tensors, `prepare` where it gave nothing, `keep` when the model is whole, and
    `close` at last in any case. `note` says in a sentence why nothing is kept, or what was found damaged.
    """

    def __init__(
        self, model: Path, weight_bytes: int, shapes: Mapping[str, tuple[int, ...]], backends: Sequence[Backend]
    ) -> None:
        """`shapes` are those of all weights by canonical name, `weight_bytes` what they take in the model's files."""
        self.note: str | None = None
        self._model, self._weight_bytes, self._shapes = model, weight_bytes, shapes
        self._backends = {b.name: b for b in backends if isinstance(b, KeepingBackend)}
        self._found: dict[Names, tuple[Backend, Packed]] = {}
        self._new: list[_Kept] = []
        self._draft: _Draft | None = None
        self._open = bool(self._backends) and sys.platform == "linux" and weight_bytes >= SMALL_BYTES
        if not self._open:
            return
        layouts = [b.layout if isinstance(b, KeepingBackend) else b.name for b in backends]
        self.file = store.prepared_dir() / _file_name(model)
        try:
            self._purpose = {"version": __version__, "backends": layouts, **_source(model)}
        except OSError as error:
            self.note = f"The prepared layout of this model is not kept: {error}."
            self._open = False
            return
        try:
            self._found = self._read()
            self._open = False
        except FileNotFoundError:
            pass
        except OSError as error:
            self.note = f"The prepared layout of this model can't be read: {self.file}: {error.strerror or error}."
        except UselessError as useless:
            if useless.damaged:
                self.note = f"The prepared layout of this model was damaged and is made anew: {self.file}: {useless}."

    @property
    def names(self) -> set[str]:
        """What need not be read from the model."""
        return {name for names in self._found for name in names}

    def get(self, names: Names) -> tuple[Backend, Packed] | None:
        """The matrices `names`, stacked, and who multiplies by them; None where they are not in the cache."""
        return self._found.get(names)

    def prepare(self, backend: Backend, names: Names, tensors: list[QTensor]) -> Packed:
        """`backend.prepare(tensors)`, into the file where one is being made."""
        if not self._open or not isinstance(backend, KeepingBackend):
            return backend.prepare(tensors)
        offset: int | None = None

        def room(count: int) -> tuple[Any, int] | None:
            nonlocal offset
            offset = self._reserve(count)
            return None if offset is None or self._draft is None else (self._draft.memory, offset)

        packed = backend.prepare(tensors, room)
        if offset is not None:
            self._new.append(_Kept(names, backend, packed, offset))
        return packed

    def keep(self) -> None:
        """The model is whole: give the file its name. Nothing happens where there is none."""
        if not self._draft:
            return
        try:
            # not where the model changed under the load
            if self._purpose | _source(self._model) == self._purpose:
                self._draft.finish(self._header(self._draft.memory), self.file)
            _tidy(self.file.parent, self.file)
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """Remove what has no name. Weights in use stay: a mapping outlives its file."""
        self._open = False
        if self._draft:
            self._draft.close()
            self._draft = None

    def _reserve(self, count: int) -> int | None:
        """Where in the draft `count` bytes have room; the draft is begun when the first are wanted."""
        try:
            if not self._draft:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                limit = _limit(self.file.parent)
                if self._weight_bytes > limit:
                    self.note = (
                        f"The prepared layout of this model is not kept: it takes about {self._weight_bytes / 1e9:.1f} "
                        f"GB, and {self.file.parent} may grow to {limit / 1e9:.1f} GB."
                    )
                    self.close()
                    return None
                most = min(MOST_GROWTH * self._weight_bytes, limit) + MOST_PADDING
                self._draft = _Draft(self.file.parent, most)
            return self._draft.reserve(count)
        except (OSError, ValueError) as error:
            self._fail(error)
            return None

    def _fail(self, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) else None
        self.note = f"The prepared layout of this model is not kept: {self.file.parent}: {reason or error}."
        self.close()

    def _header(self, memory: mmap.mmap) -> dict[str, Any]:
        matrices = [
            {
                "names": kept.names,
                "backend": kept.backend.name,
                "weights": kept.backend.describe(kept.packed),
                "offset": kept.offset,
                "bytes": kept.packed.nbytes,
                "sum": kept.backend.checksum(memory, kept.offset, kept.packed.nbytes),
            }
            for kept in self._new
        ]
        return {"format": FORMAT, "purpose": self._purpose, "matrices": matrices}

    def _read(self) -> dict[Names, tuple[Backend, Packed]]:
        """Everything in the file; OSError or UselessError."""
        with opened_layout(self.file) as opened:
            header, end = read_header(opened)
            if header.get("purpose") != self._purpose:
                raise UselessError("made for something else", damaged=False)
            try:
                memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as error:
                raise UselessError("it became empty") from error
        if len(memory) < end:
            raise UselessError("it became shorter")
        _wish_for_huge_pages(memory)
        found: dict[Names, tuple[Backend, Packed]] = {}
        before = START.size
        items = header.get("matrices")
        matrices: list[Any] = items if isinstance(items, list) else [None]
        for item in matrices:
            try:
                offset, count = item["offset"], item["bytes"]
                numbers = type(offset) is int and type(count) is int
                if not numbers or count < 1 or not before <= offset <= end - count:
                    raise UselessError(f"{count} bytes at {offset} of {end}")
                before = offset + count
                names = tuple(item["names"])
                backend = self._backends[item["backend"]]
                packed = backend.restore(item["weights"], memory, offset, count)
                self._check(names, packed)
                damaged = backend.checksum(memory, offset, count) != item["sum"]
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise UselessError(f"{type(error).__name__}: {error}") from error
            if damaged:
                raise UselessError(f"the weights of {', '.join(names)} are not those that were written")
            if names in found:
                raise UselessError(f"{', '.join(names)} twice")
            found[names] = backend, packed
        used(self.file)
        return found

    def _check(self, names: Names, packed: Packed) -> None:
        """The model's own files say what shapes there are."""
        shapes = [(rows, packed.shape[1]) for rows in packed.splits]
        if shapes != [self._shapes[f"{name}.weight"] for name in names]:
            raise UselessError(f"{', '.join(names)} have other shapes than in the model")


class _Draft:
    """A file without its name that grows up to `most` bytes under one mapping.

    OSError where the disk or the folder refuses.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self._file, self.path = begin(folder)
        self._size = self._end = PAGE
        try:
            self._file.truncate(most)
            self.memory = mmap.mmap(self._file.fileno(), most)
            self._file.truncate(self._end)
        except BaseException:
            self.close()
            raise
        _wish_for_huge_pages(self.memory)

    def reserve(self, count: int) -> int:
        """Where `count` zeroed bytes begin; ValueError where they would leave the mapping.

        Writing to a mapping without blocks behind it would end the process, so the disk is asked for them now, for
        more at a time than a huge page.
        """
        offset, end = self._end, self._end + -(-count // PAGE) * PAGE
        if end > len(self.memory):
            raise ValueError(f"the weights take more than {len(self.memory):,} bytes")
        if end > self._size:
            size = -(-end // STEP) * STEP
            try:
                os.posix_fallocate(self._file.fileno(), self._size, size - self._size)
            except OSError:
                # a full disk may have granted a part, which would be held as long as the weights before it are in use
                self._file.truncate(self._end)
                raise
            self._size = size
        self._end = end
        return offset

    def finish(self, header: dict[str, Any], name: Path) -> None:
        """Write the header behind all that was reserved, and give the file its name."""
        text = json.dumps(header).encode()
        self._file.truncate(self._end)
        self._file.seek(self._end)
        self._file.write(text)
        self._file.seek(0)
        self._file.write(START.pack(MAGIC, self._end, len(text), hashlib.sha256(text).digest()))
        self._file.flush()
        self.path.replace(name)

    def close(self) -> None:
        """What has not got its name is removed."""
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


def _file_name(model: Path) -> str:
    return hashlib.sha256(os.fsencode(model.resolve())).hexdigest()[:32] + SUFFIX


def _source(model: Path) -> dict[str, Any]:
    """The source's place and state, as JSON gives them back."""
    # a GGUF file of the hub's cache is a link to a file of another name
    place = model.resolve()
    return {"path": str(place), "files": store.stamp(store.content_files(place))}


def _tidy(folder: Path, kept: Path) -> None:
    """Remove what killed processes left, what belongs to no source, and what was used longest ago beyond the limit."""
    tidy(folder, SUFFIX, kept, _limit(folder), _has_source)


def _has_source(file: Path) -> bool:
    """Whether the model a file was made for is still what it was."""
    try:
        with opened_layout(file) as opened:
            purpose = read_header(opened)[0]["purpose"]
        return bool(purpose["files"] == _source(Path(purpose["path"]))["files"])
    except (OSError, UselessError, KeyError, TypeError, ValueError):
        return False


def _limit(folder: Path) -> int:
    """Bytes that all files together may take."""
    held = sum(nbytes for _, nbytes, _ in sizes(folder, SUFFIX))
    return min(MAX_BYTES, (shutil.disk_usage(folder).free + held) // 4)


def _wish_for_huge_pages(memory: mmap.mmap) -> None:
    """Reading is up to a tenth faster; where the system or the file system refuses, small pages serve."""
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
