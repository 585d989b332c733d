"""Files kept in the cache directory: drafts that get their names when they are whole, and only so many of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

PREFIX, ENDING = ".", ".part"


def begin(folder: Path) -> tuple[IO[bytes], Path]:
    """A draft, locked as long as it is open: whoever can lock it knows that its writer is gone."""
    descriptor, name = tempfile.mkstemp(prefix=PREFIX, suffix=ENDING, dir=folder)
    opened = os.fdopen(descriptor, "r+b")
    try:
        lock(opened)
    except OSError:
        opened.close()
        Path(name).unlink(missing_ok=True)
        raise
    return opened, Path(name)


@contextmanager
def written(file: Path) -> Iterator[IO[bytes]]:
    """What is written inside gets its name when all of it is; left by any error, Ctrl-C included, nothing is there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    opened, draft = begin(file.parent)
    try:
        with opened:
            yield opened
            opened.flush()
            draft.replace(file)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def used(file: Path) -> None:
    """Note that a file was used: those used longest ago go first."""
    with suppress(OSError):
        os.utime(file)


def sizes(folder: Path, suffix: str) -> Iterator[tuple[int, int, Path]]:
    """(when it was used, bytes, file) of all files."""
    for file in folder.glob(f"*{suffix}"):
        with suppress(OSError):
            facts = file.lstat()
            yield facts.st_mtime_ns, facts.st_size, file


def tidy(folder: Path, suffix: str, newest: Path, limit: int, useful: Callable[[Path], bool] | None = None) -> None:
    """Remove all but `newest` of what is not `useful` or was used longest ago beyond `limit` bytes, and what killed
    processes left.
    """
    for left in folder.glob(f"{PREFIX}*{ENDING}"):
        with suppress(OSError), left.open("rb") as opened:
            lock(opened)
            left.unlink()
    if useful is not None:
        for _, _, file in sizes(folder, suffix):
            if file != newest and not useful(file):
                with suppress(OSError):
                    file.unlink()
    files = sorted(sizes(folder, suffix))
    total = sum(nbytes for _, nbytes, _ in files)
    for _, nbytes, file in files:
        if total > limit and file != newest:
            with suppress(OSError):
                file.unlink()
                total -= nbytes


def lock(file: Any) -> None:
    """OSError where another process has it locked; where files can't be locked, nobody's draft is taken for a dead
    one's.
    """
    try:
        import fcntl
    except ImportError:
        if file.mode == "rb":
            raise OSError("files can't be locked on this system") from None
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
