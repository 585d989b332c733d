"""Files kept in the cache directory: whole or not there, and no more than there is room for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fewbit import kept
from fewbit.kernels import _nvrtc


def fail_in_the_middle(file: Path, error: type[BaseException]) -> None:
    with kept.written(file) as draft:
        draft.write(b"new")
        raise error


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "a.kept"
    with kept.written(file) as draft:
        draft.write(b"half")
        assert not file.exists()
        draft.write(b" and half")
    assert file.read_bytes() == b"half and half"
    for error in (KeyboardInterrupt, OSError, ValueError):
        with pytest.raises(error):
            fail_in_the_middle(file, error)
        assert [p.name for p in file.parent.iterdir()] == ["a.kept"]
        assert file.read_bytes() == b"half and half"


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.kept").write_bytes(bytes(100))
        os.utime(tmp_path / f"{i}.kept", (1000 + i, 1000 + i))
    (tmp_path / "other.file").write_bytes(bytes(1000))
    kept.used(tmp_path / "0.kept")
    kept.tidy(tmp_path, ".kept", tmp_path / "1.kept", 350)
    # 1 is the newest one, 0 was used just now
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.kept", "1.kept", "5.kept", "other.file"]
    kept.tidy(tmp_path, ".kept", tmp_path / "1.kept", 1000, lambda file: file.name != "5.kept")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.kept", "1.kept", "other.file"]
    kept.tidy(tmp_path, ".kept", tmp_path / "1.kept", 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.kept", "other.file"]


def test_only_a_dead_writers_draft_goes(tmp_path: Path) -> None:
    killed = """
import os, pathlib, sys
from fewbit import kept
draft = kept.begin(pathlib.Path(sys.argv[1]))
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", killed, str(tmp_path)], check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    opened, draft = kept.begin(tmp_path)
    with opened:
        kept.tidy(tmp_path, ".kept", tmp_path / "a", 0)
        assert list(tmp_path.iterdir()) == [draft]
    kept.tidy(tmp_path, ".kept", tmp_path / "a", 0)
    assert not list(tmp_path.iterdir())


def test_compiled_kernels_are_capped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_nvrtc, "_key", lambda *asked: f"{asked[-1]}")
    monkeypatch.setattr(_nvrtc, "MAX_BYTES", 2500)
    made: list[int] = []

    def compiled(source: str, defines: dict[str, object], arch: int) -> bytes:
        made.append(arch)
        if arch == 0:
            raise KeyboardInterrupt
        return bytes(1000)

    monkeypatch.setattr(_nvrtc, "compiled", compiled)
    folder = tmp_path / "fewbit" / "cuda"
    for arch in (80, 86, 89, 90):
        assert _nvrtc._kept("read.cu", (), arch) == bytes(1000)
        for i, file in enumerate(sorted(folder.iterdir())):
            os.utime(file, (1000 + i, 1000 + i))
        _nvrtc._kept("read.cu", (), 80)
    assert sorted(p.name for p in folder.iterdir()) == ["read-80.cubin", "read-90.cubin"]
    assert made == [80, 86, 89, 90]
    with pytest.raises(KeyboardInterrupt):
        _nvrtc._kept("read.cu", (), 0)
    assert len(list(folder.iterdir())) == 2
