"""Which exceptions are a user's to act on, in three parts; any other is a bug and keeps its traceback."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from fewbit.errors import FewbitError


class UsageError(Exception):
    """A command line that can't be understood; carries the three parts."""

    def __init__(self, error: FewbitError) -> None:
        super().__init__(error)
        self.error = error


@dataclass(frozen=True)
class Failure:
    """What is printed, and the exit code."""

    error: FewbitError
    exit_code: int


def explain(error: BaseException, command: str, seconds: float) -> Failure | None:
    """The three parts of `error`, or None where it is a bug. `command` is the line that was typed."""
    if isinstance(error, UsageError):
        return Failure(error.error, 2)
    # what is kept of the work is noted on the error by whoever did it
    kept = "; ".join(getattr(error, "__notes__", ()))
    if isinstance(error, KeyboardInterrupt):
        facts = f"Stopped after {seconds:.1f} s; {kept or 'no unfinished output was left behind'}."
        return Failure(FewbitError("Interrupted.", facts, f"To {'go on' if kept else 'start again'}: {command}"), 130)
    found: FewbitError | None = None
    if isinstance(error, FewbitError):
        found = error
    elif isinstance(error, MemoryError) or _is_torch_out_of_memory(error):
        found = _out_of_memory(error)
    elif isinstance(error, OSError):
        found = _file_trouble(error)
    if found is None:
        return None
    if kept:
        found = FewbitError(found.what, f"{found.facts} {kept}.", f"{found.next_step} To go on then: {command}")
    return Failure(found, 1)


def _is_torch_out_of_memory(error: BaseException) -> bool:
    # PyTorch's CPU allocator raises a bare RuntimeError, its GPU allocator a class of its own, known by name here:
    # torch may not even be loaded
    if not isinstance(error, RuntimeError):
        return False
    return "DefaultCPUAllocator" in str(error) or type(error).__name__ == "OutOfMemoryError"


def _out_of_memory(error: BaseException) -> FewbitError:
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = (os.sysconf(name) * page / 2**30 for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    lines = str(error).splitlines()
    asked = f" ({lines[0]})" if lines else ""
    return FewbitError(
        "There is not enough memory.",
        f"The machine has {total:.1f} GiB, {free:.1f} GiB of it free now{asked}.",
        "Close other programs, take a smaller model, or lower what the command has of --context and --windows.",
    )


def _file_trouble(error: OSError) -> FewbitError | None:
    place = str(error.filename) if error.filename is not None else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        import shutil

        at = _existing_parent(place)
        free = shutil.disk_usage(at).free / 1e9
        return FewbitError(
            "The disk is full.", f"{free:.2f} GB are free at {str(at)!r}.", "Free some space, or write to another disk."
        )
    advice = {
        errno.EACCES: "Change its permissions, or choose another path.",
        errno.EPERM: "Change its permissions, or choose another path.",
        errno.EROFS: "Choose a path on a disk that can be written.",
        errno.ENOENT: "Check the path.",
        errno.EISDIR: "Give a file, not a folder.",
        errno.ENOTDIR: "Check the path: one of its folders is a file.",
        errno.ENAMETOOLONG: "Choose a shorter path.",
        errno.EIO: "Check the disk: it could not be read or written.",
        errno.EFBIG: "Write to a disk that takes larger files, or raise the limit (ulimit -f).",
    }.get(error.errno or 0)
    # an open file that fails does not tell its name
    nameless = error.errno in (errno.EIO, errno.EFBIG)
    if advice is None or not (place or nameless):
        return None
    what = f"{place!r} can't be used." if place else "A file can't be read or written."
    return FewbitError(what, f"The system says: {error.strerror}.", advice)


def _existing_parent(place: str) -> Path:
    path = Path(place).absolute()
    while not path.exists():
        path = path.parent
    return path
