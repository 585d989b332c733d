"""The hub's own cache on this machine, read without its library: which models lie there, and where.

A repository is a folder models--OWNER--NAME with blobs (contents by hash), snapshots (one folder a commit, links to
blobs) and refs (which commit a branch or tag was): https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.errors import FewbitError
from fewbit.store.hub_choice import CONFIG, MAX_SETTINGS, RemoteFile, choose
from fewbit.store.hub_names import MAIN, HubName

COMMIT = re.compile(r"[0-9a-f]{40}")
_SHORT = re.compile(r"[0-9a-f]{7,40}")
_FOLDER = re.compile(r"models--([^/]+?)--([^/]+)")
UNFINISHED = ".incomplete"


@dataclass(frozen=True)
class Snapshot:
    """What of a repository lies here at one commit. `ref` is the branch or tag that was last seen there."""

    repo: str
    commit: str
    path: Path
    ref: str | None

    @property
    def name(self) -> str:
        """How to ask for it."""
        if self.ref == MAIN:
            return self.repo
        return f"{self.repo}@{self.ref or self.commit[:8]}"

    def files(self) -> list[str]:
        """Relative names of what is there."""
        found = []
        for folder, _, names in os.walk(self.path):
            inside = Path(folder).relative_to(self.path)
            found += [(inside / n).as_posix() for n in names if (Path(folder) / n).exists()]
        return sorted(found)


def hub_dir() -> Path:
    """Where the hub's library keeps what it fetched: HF_HUB_CACHE, HF_HOME."""
    # reads the environment when it is first imported, and nothing else
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def repo_dir(repo: str) -> Path:
    """The folder of a repository."""
    return hub_dir() / f"models--{repo.replace('/', '--')}"


def repos() -> Iterator[tuple[str, Path]]:
    """Model repositories, by name."""
    with suppress(OSError):
        for folder in sorted(hub_dir().iterdir()):
            if (match := _FOLDER.fullmatch(folder.name)) and folder.is_dir() and not folder.is_symlink():
                yield f"{match[1]}/{match[2]}", folder


def snapshots(repo: str, folder: Path) -> list[Snapshot]:
    """The commits of a repository that lie here, main first."""
    refs = _refs(folder)
    by_commit: dict[str, str] = {}
    for ref, commit in refs.items():
        if ref == MAIN or commit not in by_commit:
            by_commit[commit] = ref
    found = []
    with suppress(OSError):
        found = [
            Snapshot(repo, f.name, f, by_commit.get(f.name))
            for f in (folder / "snapshots").iterdir()
            if COMMIT.fullmatch(f.name) and f.is_dir()
        ]
    return sorted(found, key=lambda s: (s.ref != MAIN, s.ref or "", s.commit))


def snapshot(wanted: HubName) -> Snapshot | None:
    """The snapshot of a branch, a tag, a commit or its first digits; None where it does not lie here."""
    found = snapshots(wanted.repo, repo_dir(wanted.repo))
    commit = _refs(repo_dir(wanted.repo)).get(wanted.revision)
    fitting = [s for s in found if s.commit == commit]
    if not fitting and _SHORT.fullmatch(wanted.revision):
        fitting = [s for s in found if s.commit.startswith(wanted.revision)]
    return fitting[0] if len(fitting) == 1 else None


def lookup(wanted: HubName, *, lacking_tokenizer: bool = False) -> Path | None:
    """The model where all of it lies here: a folder, or a GGUF file; nothing is asked of the network.

    A folder without a tokenizer counts only where `lacking_tokenizer` says so: another tool may have left it out.
    """
    found = snapshot(wanted)
    if found is None:
        return None
    names = found.files()
    listed = [RemoteFile(n, (found.path / n).stat().st_size) for n in names]
    try:
        choice = choose(wanted, listed, lambda f: (found.path / f.name).read_bytes())
    except (FewbitError, OSError):
        return None
    if choice.entry:
        return found.path / choice.entry
    return found.path if lacking_tokenizer or "tokenizer.json" in names else None


def describe(path: Path) -> dict[str, Any]:
    """config.json of a folder; empty where it can't be read."""
    file = path / CONFIG
    with suppress(OSError, ValueError, RecursionError):
        if file.stat().st_size <= MAX_SETTINGS:
            found = json.loads(file.read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
    return {}


def title(path: Path) -> str | None:
    """owner/name@commit[:file] of a path inside the cache, owner/name of its blobs; None for any other path."""
    with suppress(ValueError):
        parts = path.absolute().relative_to(hub_dir().absolute()).parts
        if len(parts) >= 3 and (match := _FOLDER.fullmatch(parts[0])):
            part = "/".join(parts[3:])
            if parts[1] != "snapshots":
                return f"{match[1]}/{match[2]}"
            return f"{match[1]}/{match[2]}@{parts[2]}{f':{part}' if part else ''}"
    return None


def unfinished(folder: Path) -> list[Path]:
    """Files of a repository of which a part is here."""
    with suppress(OSError):
        return [f for f in (folder / "blobs").iterdir() if f.name.endswith(UNFINISHED)]
    return []


def _refs(folder: Path) -> dict[str, str]:
    """Branch or tag -> commit."""
    found = {}
    base = folder / "refs"
    for inside, _, names in os.walk(base):
        for name in names:
            file = Path(inside) / name
            with suppress(OSError, UnicodeDecodeError):
                if file.stat().st_size <= 64 and COMMIT.fullmatch(commit := file.read_text(encoding="ascii").strip()):
                    found[file.relative_to(base).as_posix()] = commit
    return found


def remember_ref(wanted: HubName, commit: str) -> None:
    """Note which commit a branch or tag is, as the hub's library does."""
    if commit.startswith(wanted.revision):
        return
    file = repo_dir(wanted.repo) / "refs" / wanted.revision
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(commit, encoding="ascii")
    beside.replace(file)
