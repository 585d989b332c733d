"""Safetensors shards, read lazily through the safetensors library and written tensor by tensor.

The library can only write a file from tensors that are all in memory. Here the header is written first, from names,
dtypes and shapes alone, and each tensor's bytes go to their place when they are ready.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewbit.checkpoint import Extent
from fewbit.errors import FewbitError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
# what the library bounds a header by
MAX_HEADER = 100_000_000
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Shards:
    """The tensors of one or several safetensors files under one roof. Files are mapped, tensors read when asked for."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.home: dict[str, Any] = {}
        self._file: dict[str, Path] = {}
        self._ranges: dict[Path, dict[str, tuple[int, int]]] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        for file in files:
            opened = self._open(file)
            self.metadata[file.name] = opened.metadata() or {}
            for name in opened.offset_keys():
                if name in self.home:
                    raise FewbitError(
                        f"The tensor {name!r} appears in two files.",
                        f"The second is {file.name}.",
                        "Remove the file that does not belong to the model.",
                    )
                self.home[name], self._file[name] = opened, file

    @staticmethod
    def _open(file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, ValueError) as e:
            raise FewbitError(
                f"{file.name} is not a whole safetensors file.",
                f"{file}: {file.stat().st_size:,} bytes; {e}.",
                "Download or copy the file again; compare its size with the original's.",
            ) from e
        except OSError as e:
            raise FewbitError(
                f"{file.name} can't be read.", f"{file}: {e}.", "Check that the file exists and may be read."
            ) from e

    def __contains__(self, name: str) -> bool:
        return name in self.home

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header alone."""
        return tuple(self.home[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """From the header alone; FewbitError for a dtype fewbit can't read."""
        code = self.home[name].get_slice(name).get_dtype()
        if code not in DTYPES:
            raise FewbitError(
                f"The tensor {name!r} is stored as {code}.",
                f"fewbit reads {', '.join(DTYPES)} from safetensors files.",
                "Convert the checkpoint to bf16 first.",
            )
        return DTYPES[code]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or its rows [start, stop)."""
        opened = self.home[name]
        found: Tensor = opened.get_tensor(name) if rows is None else opened.get_slice(name)[rows[0] : rows[1]]
        return found

    def extent(self, name: str) -> Extent:
        """Where a tensor's bytes lie."""
        file = self._file[name]
        if file not in self._ranges:
            self._ranges[file] = _ranges(file)
        dtype, shape = self.dtype(name), self.shape(name)
        begin, end = self._ranges[file].get(name, (0, -1))
        found = Extent(file, begin, dtype, shape)
        if end - begin != found.nbytes:
            raise _changed(file)
        return found


def _ranges(file: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor's bytes begin and end in a file that the library has opened, and so checked."""
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header: dict[str, Any] = json.loads(opened.read(min(size, MAX_HEADER)))
        offsets = {name: facts["data_offsets"] for name, facts in header.items() if name != "__metadata__"}
        return {name: (8 + size + int(begin), 8 + size + int(end)) for name, (begin, end) in offsets.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise _changed(file) from e


def _changed(file: Path) -> FewbitError:
    return FewbitError(
        f"{file.name} changed while it was being read.",
        f"{file}: its header is not the one that was checked.",
        "Load the model again when nothing writes to it.",
    )


def laid_out(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, list[int]], int]:
    """What a file of these tensors begins with, where behind that each lies [begin, end), and where the last ends."""
    # widest dtype first, as the library writes them: every tensor is then aligned
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    place: dict[str, list[int]] = {}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        place[name] = [begin, end]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, place, end


class ShardWriter:
    """One safetensors file whose tensors are written in any order, by pieces along the first axis."""

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: dict[str, str],
        resume: bool = False,
    ) -> None:
        """`resume` goes on with a file that another run began with the same arguments; FewbitError where it differs."""
        beginning, self.place, end = laid_out(tensors, metadata)
        self.start = len(beginning)
        damaged = FewbitError(
            "The unfinished output is damaged.",
            f"{path} is not the file this command began.",
            "Start again: the same command with --restart.",
        )
        if resume and (path.is_symlink() or not path.is_file()):
            raise damaged
        self.file = path.open("r+b" if resume else "w+b")
        if resume:
            if self.file.read(len(beginning)) != beginning or path.stat().st_size != self.start + end:
                self.file.close()
                raise damaged
        else:
            self.file.write(beginning)
            self.file.truncate(self.start + end)

    def write(self, name: str, piece: Tensor) -> None:
        """Append the next rows of a tensor."""
        data = piece.contiguous().reshape(-1).view(torch.uint8).numpy().data
        place = self.place[name]
        if place[0] + len(data) > place[1]:
            raise ValueError(f"{name} got more bytes than it was planned for")
        self.file.seek(self.start + place[0])
        self.file.write(data)
        place[0] += len(data)

    def kept(self, name: str) -> None:
        """The tensor was written whole by an earlier run."""
        self.place[name][0] = self.place[name][1]

    def sync(self) -> None:
        """Bring what was written to the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(self) -> None:
        """Bring everything to the disk; every planned byte must have been written."""
        missing = [name for name, (at, end) in self.place.items() if at != end]
        if missing:
            raise ValueError(f"tensors without all of their bytes: {', '.join(missing)}")
        self.sync()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            with self.file:
                self.finish()
            return
        # what could not be written must not hide why
        with suppress(OSError):
            self.file.close()
