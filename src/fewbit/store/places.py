"""Folders, the files that make up a model, and one process at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fewbit.gguf_parts import all_parts


def cache_dir() -> Path:
    """What can be fetched or made again: XDG_CACHE_HOME or ~/.cache, then fewbit."""
    return _xdg("XDG_CACHE_HOME", ".cache")


def data_dir() -> Path:
    """What can't: XDG_DATA_HOME or ~/.local/share, then fewbit."""
    return _xdg("XDG_DATA_HOME", ".local/share")


def prepared_dir() -> Path:
    """Where packed weights are kept from one load to the next (`fewbit.prepared`)."""
    return cache_dir() / "prepared"


def compiled_dir() -> Path:
    """Where kernels compiled for cards are kept (`fewbit.kernels._nvrtc`)."""
    return cache_dir() / "cuda"


def quantized_dir() -> Path:
    """Where models lie that were quantized because a command asked for them in few bits (`fewbit.on_demand`)."""
    return cache_dir() / "quantized"


def prepared_bytes() -> int:
    """What the kept weights of all models take."""
    return folder_bytes(prepared_dir())


def folder_bytes(folder: Path) -> int:
    """Bytes of the files right in a folder; links count themselves. 0 where there is none."""
    total = 0
    with suppress(OSError):
        for file in folder.iterdir():
            with suppress(OSError):
                total += file.lstat().st_size
    return total


def content_files(model: Path) -> list[Path]:
    """What decides what a model computes: all weights and all settings of a folder, or a file and its parts."""
    if model.is_file():
        return [part for part in all_parts(model) if part.is_file()]
    return sorted(f for f in model.iterdir() if f.suffix in (".safetensors", ".json") and f.is_file())


def stamp(files: Sequence[Path]) -> list[Any]:
    """Changes with the files, as far as the system's clock tells; plain values for JSON."""
    facts = [(f.name, f.stat()) for f in files if f.exists()]
    return [[name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in facts]


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One process at a time in `folder`. Where there is no flock two may fetch at once; renaming keeps that safe."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def size_text(count: int) -> str:
    """Bytes in the unit that suits them, 10^9 a GB."""
    if count >= 999_500_000:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count} bytes"


def _xdg(variable: str, default: str) -> Path:
    """The XDG base directory specification: a value that is not absolute is ignored."""
    base = Path(os.environ.get(variable, ""))
    return (base if base.is_absolute() else Path.home() / default) / "fewbit"
