"""What an unfinished output remembers: which run it belongs to, and which of its units are whole.

A unit is committed after its tensors reached the disk, by replacing the journal in one rename; whatever happens in
between, the journal never claims what is not there.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from fewbit.errors import FewbitError

NAME = "journal.json"
LOCK = "lock"


class Journal:
    """The journal of the unfinished folder `folder`; only one process holds it at a time."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any], done: list[str]) -> None:
        self.folder, self.fingerprint, self.done = folder, fingerprint, done
        self._lock = (folder / LOCK).open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self._lock.close()
            raise FewbitError(
                "Another process is writing this output.",
                f"It holds {folder}.",
                "Wait until it is done, or choose another output.",
            ) from e

    def save(self) -> None:
        """Write beside, bring to the disk, rename."""
        beside = self.folder / f"{NAME}.new"
        with beside.open("w", encoding="utf-8") as file:
            json.dump({"fingerprint": self.fingerprint, "done": self.done}, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(self.folder / NAME)

    def commit(self, unit: str) -> None:
        """`unit` is whole on the disk."""
        self.done.append(unit)
        self.save()

    def close(self) -> None:
        """Let others have the folder."""
        self._lock.close()

    def remove(self) -> None:
        """The output is whole: nothing of the journal stays in it."""
        (self.folder / NAME).unlink()
        (self.folder / LOCK).unlink()
        self.close()


def read(folder: Path) -> tuple[dict[str, Any], list[str]] | None:
    """Fingerprint and finished units of an unfinished folder of ours; None where it is not one."""
    if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
        return None
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
        fingerprint, done = found["fingerprint"], found["done"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(fingerprint, dict) or not isinstance(done, list):
        return None
    return fingerprint, [str(unit) for unit in done]


def sweep(pattern: str, parent: Path) -> None:
    """Remove folders that match and that a process of this user began and, killed at once, never named; a living
    process holds the lock of its own.
    """
    for folder in parent.glob(pattern):
        if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
            continue
        try:
            Journal(folder, {}, []).close()
        except (FewbitError, OSError):
            continue
        shutil.rmtree(folder, ignore_errors=True)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`name: before -> now` of every entry that differs, in words."""
    return [
        f"{name}: {_shown(before.get(name))} before, {_shown(now.get(name))} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else f"{text[:57]}..."
