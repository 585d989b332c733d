"""The outside of a file of prepared weights (`fewbit.prepared`): what it was made for can be read without a kernel."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from pathlib import Path
from typing import Any, BinaryIO

MAGIC = b"fewbit prepared\n"
# counted up when the file's own structure changes
FORMAT = 1
START = struct.Struct("<16sQQ32s")
MAX_HEADER = 1 << 24
SUFFIX = ".layout"


class UselessError(Exception):
    """A file that is not to be used; `damaged` where it is not what fewbit wrote, rather than out of date."""

    def __init__(self, reason: str, damaged: bool = True) -> None:
        super().__init__(reason)
        self.damaged = damaged


def opened_layout(file: Path) -> BinaryIO:
    """A regular file; a pipe of its name does not block."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UselessError("it is not a file")
    return os.fdopen(descriptor, "rb")


def read_header(opened: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header, and where it begins."""
    size = os.fstat(opened.fileno()).st_size
    start = opened.read(START.size)
    if len(start) < START.size:
        raise UselessError(f"it ends after {size} bytes")
    magic, end, length, digest = START.unpack(start)
    if magic != MAGIC or length > MAX_HEADER or end + length != size:
        raise UselessError(f"{size} bytes, a header of {length} at {end}")
    opened.seek(end)
    text = opened.read(length)
    if hashlib.sha256(text).digest() != digest:
        raise UselessError("its header is not the one that was written")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UselessError(f"its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise UselessError("its header is no JSON object")
    if header.get("format") != FORMAT:
        raise UselessError("another version's", damaged=False)
    return header, end
