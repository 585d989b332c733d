"""Removes models and says what that really freed: a file that has another name, or another revision, stays.

First everything is planned, so that a mistyped name removes nothing; whoever carries a plan out asks before.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fewbit.errors import FewbitError
from fewbit.lookup import advice
from fewbit.store import aliases, hub_cache, places, written
from fewbit.store.hub_choice import gguf_names, gguf_parts
from fewbit.store.hub_names import HubName, parse
from fewbit.store.inventory import listing
from fewbit.store.places import size_text

# what fewbit writes into a model's folder
_OURS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "model.safetensors.index.json", "README.md",
)  # fmt: skip
# what a killed removal left
_ASIDE = ".removed-"


@dataclass(frozen=True)
class Removal:
    """Something to remove. `asks` says in a sentence what is about to go, where fewbit can't make it again."""

    name: str
    files: tuple[Path, ...]
    remove: Callable[[], None]
    asks: str | None = None
    # said when it is done
    note: str | None = None

    def carry_out(self) -> int:
        """Remove it -> bytes that the disk has again."""
        census = _Census(self.files)
        self.remove()
        return census.freed()


class _Census:
    """Files before a removal. What a link leads to elsewhere is no file of ours."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files: dict[Path, os.stat_result] = {}
        for file in files:
            with suppress(OSError):
                facts = file.lstat()
                if not file.is_dir() or file.is_symlink():
                    self._files[file] = facts

    def freed(self) -> int:
        """Bytes of those whose last name is gone."""
        names: dict[tuple[int, int], int] = {}
        sizes: dict[tuple[int, int], tuple[int, int]] = {}
        for file, facts in self._files.items():
            if not os.path.lexists(file):
                inode = facts.st_dev, facts.st_ino
                names[inode] = names.get(inode, 0) + 1
                sizes[inode] = facts.st_nlink, facts.st_blocks * 512
        return sum(size for inode, (links, size) in sizes.items() if names[inode] >= links)


def plan(name: str) -> Removal:
    """What removing `name` means; nothing is removed yet. FewbitError where there is nothing to remove."""
    if name in aliases.ALIASES and not Path(name).exists():
        return _alias(aliases.ALIASES[name])
    for entry in listing():
        if entry.kind in ("quantized", "unfinished") and entry.name == name and entry.path.name != "blobs":
            return _ours(name, entry.path)
    path = Path(name).expanduser()
    if name and os.path.lexists(path):
        return _path(path)
    wanted = parse(name)
    if wanted is not None and hub_cache.repo_dir(wanted.repo).is_dir():
        return _hub(wanted)
    for folder in written.remembered():
        if folder.name == name:
            raise FewbitError(
                f"{name!r} lies outside fewbit's cache.",
                f"It is {folder.path}, {folder.detail or 'written by fewbit'}.",
                f"Give its path to remove it: fewbit rm {shlex.quote(str(folder.path))}",
            )
    raise _unknown(name)


def plan_prepared() -> Removal:
    """Packed weights and kernels compiled for cards: everything that the next load makes again."""
    folders = (places.prepared_dir(), places.compiled_dir())

    def remove() -> None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    return Removal("prepared layouts and compiled kernels", tuple(f for d in folders for f in _below(d)), remove)


def sweep() -> None:
    """What a killed removal left."""
    with suppress(OSError):
        for left in places.quantized_dir().glob(f"{_ASIDE}*"):
            shutil.rmtree(left, ignore_errors=True)


def _alias(alias: aliases.Alias) -> Removal:
    place = aliases.place(alias)
    if not place.exists():
        raise FewbitError(
            f"{alias.name} is not here.", f"It would lie at {place}.", "Nothing needs to be removed; see fewbit ls."
        )
    return Removal(alias.name, (place,), place.unlink)


def _ours(name: str, folder: Path) -> Removal:
    """A folder of fewbit's own cache."""
    _check_idle(folder)

    def remove() -> None:
        _remove_folder(folder, folder.parent)

    return Removal(name, tuple(_below(folder)), remove)


def _check_idle(folder: Path) -> None:
    """FewbitError where a process is writing it."""
    try:
        import fcntl

        with (folder / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return
    except FileNotFoundError:
        return
    except BlockingIOError as error:
        raise FewbitError(
            f"{folder.name} is being written.", f"Another process holds {folder}.", "End that process first."
        ) from error


def _remove_folder(folder: Path, beside: Path) -> None:
    """It loses its name first: a removal that is killed leaves nothing that looks like a model."""
    aside = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=beside))
    folder.rename(aside / "folder")
    shutil.rmtree(aside)


def _path(path: Path) -> Removal:
    """A folder that fewbit wrote where the user wanted it."""
    quoted = shlex.quote(str(path))
    if (title := hub_cache.title(path)) is not None:
        raise FewbitError(
            f"{str(path)!r} belongs to the hub's cache.", f"It is {title}.", f"Name it so: fewbit rm {title}"
        )
    full = path.absolute()
    known = any(w.path == full for w in written.remembered())
    if path.is_symlink() or not path.is_dir() or not (known or written.notes(path)):
        raise FewbitError(
            f"{str(path)!r} was not written by fewbit.",
            "It is a link." if path.is_symlink() else "fewbit ls does not list it, and no note of fewbit's is in it.",
            f"Remove it yourself if you mean it: rm -r {quoted}",
        )
    foreign = sorted(f.name for f in path.iterdir() if f.name not in _OURS and not _is_weights(f))
    if foreign:
        raise FewbitError(
            f"{str(path)!r} holds more than the model.",
            f"Not written by fewbit: {', '.join(foreign[:5])}{' and others' if len(foreign) > 5 else ''}.",
            "Move that away first, or remove the folder yourself.",
        )
    _check_idle(path)
    files = _below(path)
    size = size_text(sum(f.lstat().st_size for f in files))

    def remove() -> None:
        _remove_folder(full, full.parent)
        written.forget(full)

    return Removal(str(path), tuple(files), remove, f"Remove {full}, {size}")


def _is_weights(file: Path) -> bool:
    return file.suffix == ".safetensors" and file.is_file()


def _hub(wanted: HubName) -> Removal:
    """A repository, one revision of it, or one GGUF model of it."""
    folder = hub_cache.repo_dir(wanted.repo)
    found = hub_cache.snapshots(wanted.repo, folder)
    revision = None if str(wanted).partition(":")[0] == wanted.repo else hub_cache.snapshot(wanted)
    if revision is None and str(wanted).partition(":")[0] != wanted.repo:
        raise _not_here(wanted, [s.name for s in found])
    files = _with_shared(folder)
    if wanted.part is not None:
        return _hub_part(wanted, [revision] if revision else found, files)
    if revision is not None and len(found) > 1:
        asks = f"Remove {wanted} from the hub's cache, {folder}; other revisions keep what they share with it"
        return Removal(str(wanted), files, lambda: _delete_revisions([revision.commit]), asks)
    size = size_text(sum({(s := f.lstat()).st_ino: s.st_size for f in _below(folder)}.values()))
    count = f"{len(found)} revisions, " if len(found) > 1 else ""
    asks = f"Remove {wanted.repo} from the hub's cache, {count}{size} in {folder}; other programs may use it"

    def remove() -> None:
        _delete_revisions([s.commit for s in found])
        # what was begun and never had a revision, and the locks
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(folder.parent / ".locks" / folder.name, ignore_errors=True)

    return Removal(wanted.repo, files, remove, asks, _kept_of(wanted.repo))


def _hub_part(wanted: HubName, found: Sequence[hub_cache.Snapshot], files: tuple[Path, ...]) -> Removal:
    """A GGUF file, with all parts, by its name."""
    places_of_it: list[Path] = []
    for snapshot in found:
        names = snapshot.files()
        for first in gguf_names(names):
            if wanted.part == first:
                places_of_it += [snapshot.path / part for part in gguf_parts(first, names)]
    if not places_of_it:
        raise _not_here(wanted, [f"{s.name}:{n}" for s in found for n in gguf_names(s.files())])

    def remove() -> None:
        from huggingface_hub import scan_cache_dir

        info = scan_cache_dir(hub_cache.hub_dir())
        chosen = [
            f for repo in info.repos for r in repo.revisions for f in r.files if Path(f.file_path) in set(places_of_it)
        ]
        info.delete_files(*chosen).execute()

    size = size_text(sum(f.stat().st_size for f in {p.resolve() for p in places_of_it}))
    return Removal(str(wanted), files, remove, f"Remove {wanted} from the hub's cache, {size}")


def _delete_revisions(commits: Sequence[str]) -> None:
    from huggingface_hub import scan_cache_dir

    known = scan_cache_dir(hub_cache.hub_dir())
    there = {r.commit_hash for repo in known.repos for r in repo.revisions}
    known.delete_revisions(*(c for c in commits if c in there)).execute()


def _with_shared(folder: Path) -> tuple[Path, ...]:
    """Files of a repository, and those of the cache that several repositories share."""
    inside = _below(folder)
    return (*inside, *(f.resolve() for f in inside if f.parent.name == "blobs" and f.is_symlink()))


def _below(folder: Path) -> list[Path]:
    """Files and links at any depth."""
    return [Path(inside) / name for inside, _, names in os.walk(folder) for name in names]


def _kept_of(repo: str) -> str | None:
    kept = [w.name for w in written.kept() if str(w.facts.get("source", "")).startswith(f"{repo}@")]
    return f"Quantized from it and still here: {', '.join(kept)}." if kept else None


def _not_here(wanted: HubName, known: list[str]) -> FewbitError:
    there = ", ".join(known) or "nothing whole"
    return FewbitError(
        f"{wanted} is not in the hub's cache.", f"Of {wanted.repo} there is {there}.", advice(str(wanted), known)
    )


def _unknown(name: str) -> FewbitError:
    known = [e.name for e in listing() if e.kind != "prepared"]
    return FewbitError(
        f"There is nothing called {name[:200]!r} to remove.",
        f"fewbit ls shows {len(known)} models.",
        advice(name, known),
    )
