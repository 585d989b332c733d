"""What an unfinished output remembers: which run it belongs to, and which of its units are whole.

A unit is committed after its tensors reached the disk, by replacing the journal in one rename; whatever happens in
between, the journal never claims what is not there. Whoever holds the lock file's lock owns the folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from fewbit.errors import FewbitError

NAME = "journal.json"
LOCK = "lock"
# a folder without a lock file is younger than this while somebody is about to make one
SECONDS_TO_LOCK = 60.0


class Journal:
    """The journal of the unfinished folder `folder`; only one process holds it at a time."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any], done: list[str], lock: IO[str]) -> None:
        self.folder, self.fingerprint, self.done, self._lock = folder, fingerprint, done, lock

    @classmethod
    def begin(cls, folder: Path, fingerprint: dict[str, Any]) -> Journal:
        """The journal of a new folder of our own."""
        made = cls(folder, fingerprint, [], _locked(folder))
        made.save()
        return made

    @classmethod
    def reopen(cls, folder: Path) -> Journal | None:
        """The journal of a folder some run left, now held; None where it is not an unfinished output of this user."""
        if not _is_ours(folder) or not (folder / LOCK).is_file() or (folder / LOCK).is_symlink():
            return None
        lock = _locked(folder)
        if (found := _read(folder)) is None:
            lock.close()
            return None
        return cls(folder, *found, lock)

    def save(self) -> None:
        """Write beside, bring to the disk, rename."""
        beside = self.folder / f"{NAME}.new"
        with beside.open("w", encoding="utf-8") as file:
            json.dump({"fingerprint": self.fingerprint, "done": self.done}, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(self.folder / NAME)
        sync_folder(self.folder)

    def commit(self, unit: str) -> None:
        """`unit` is whole on the disk."""
        self.done.append(unit)
        self.save()

    def rename(self, to: Path) -> None:
        """Give the folder another name; OSError where something lies there."""
        self.folder.rename(to)
        self.folder = to
        sync_folder(to.parent)

    def close(self) -> None:
        """Let others have the folder."""
        self._lock.close()

    def remove(self) -> None:
        """The output is whole and has its name: nothing of the journal stays in it."""
        (self.folder / LOCK).unlink(missing_ok=True)
        # last: as long as it is there, `tidy` knows what to do
        (self.folder / NAME).unlink(missing_ok=True)
        self.close()

    def discard(self) -> None:
        """Remove the folder. It loses its name first: a removal that is killed leaves nothing in anyone's way."""
        # what is left of it is swept by the next run
        aside = Path(tempfile.mkdtemp(prefix=f"{self.folder.name}.", suffix=".new", dir=self.folder.parent))
        self.folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
        self.close()


def _is_ours(folder: Path) -> bool:
    return not folder.is_symlink() and folder.is_dir() and folder.stat().st_uid == os.getuid()


def _locked(folder: Path) -> IO[str]:
    lock = (folder / LOCK).open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        lock.close()
        raise busy(folder) from e
    return lock


def busy(folder: Path) -> FewbitError:
    """Somebody else is at it."""
    return FewbitError(
        "Another process is writing this output.",
        f"It holds {folder}.",
        "Wait until it is done, or choose another output.",
    )


def tidy(out: Path) -> None:
    """Remove the journal of a whole output whose maker was killed right after it gave the folder its name."""
    if not _is_ours(out) or _read(out) is None:
        return
    if (out / LOCK).is_file():
        _locked(out).close()
    (out / LOCK).unlink(missing_ok=True)
    (out / NAME).unlink(missing_ok=True)


def _read(folder: Path) -> tuple[dict[str, Any], list[str]] | None:
    """Fingerprint and finished units; None where there is no journal, or not one of ours."""
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
        fingerprint, done = found["fingerprint"], found["done"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(fingerprint, dict) or not isinstance(done, list):
        return None
    return fingerprint, [str(unit) for unit in done]


def sweep(pattern: str, parent: Path) -> None:
    """Remove folders that match and that a killed process of this user began and never named."""
    for folder in parent.glob(pattern):
        if not _is_ours(folder):
            continue
        try:
            if (folder / LOCK).is_file():
                _locked(folder).close()
            elif time.time() - folder.stat().st_mtime < SECONDS_TO_LOCK:
                continue
        except (FewbitError, OSError):
            continue
        shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def differences(before: dict[str, Any], now: dict[str, Any], inside: str = "") -> list[str]:
    """`name: before -> now` of every entry that differs, in words."""
    found = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{inside}{name} ")
        elif old != new:
            found.append(f"{inside}{name}: {_shown(old)} before, {_shown(new)} now")
    return found


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else f"{text[:57]}..."
