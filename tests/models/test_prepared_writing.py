"""Writing prepared layouts: what is refused, fails, is killed or shares the folder leaves nothing and harms nobody."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fewbit
from fewbit import prepared
from fewbit.kernels import cpu
from fewbit.store import prepared_dir
from tests.models.conftest import files, logits, the_file, without_cache

pytestmark = pytest.mark.skipif(cpu.backend() is None, reason="fewbit._cpu is not built")


def test_a_folder_that_can_not_be_made_is_told(model: Path) -> None:
    right = without_cache(model)
    prepared_dir().parent.mkdir(parents=True, exist_ok=True)
    prepared_dir().write_text("a file")
    found, note = logits(model)
    assert torch.equal(found, right)
    assert note
    assert str(prepared_dir()) in note


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_can_not_be_written_is_told(model: Path) -> None:
    prepared_dir().mkdir(parents=True)
    prepared_dir().chmod(0o500)
    note = logits(model)[1]
    assert note
    assert "Permission denied" in note


@pytest.mark.parametrize("granted", [0, 1, 3])
def test_a_full_disk_is_told_and_nothing_is_left(model: Path, monkeypatch: pytest.MonkeyPatch, granted: int) -> None:
    right = without_cache(model)
    left, held, used = granted, -1, 0
    monkeypatch.setattr(prepared, "STEP", 1 << 16)

    def allocate(file: int, offset: int, count: int) -> None:
        nonlocal left, held, used
        left -= 1
        if left < 0:
            # as file systems do: what there was is taken
            real(file, offset, count // 2)
            held, used = os.dup(file), offset
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, offset, count)

    real = os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", allocate)
    found, note = logits(model)
    assert torch.equal(found, right)
    assert note
    assert "No space left" in note
    assert not files()
    with os.fdopen(held) as unnamed:
        assert os.fstat(unnamed.fileno()).st_size <= used


def test_weights_that_outgrow_the_mapping_are_not_kept(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = without_cache(model)
    monkeypatch.setattr(prepared, "MOST_PADDING", 1 << 18)
    found, note = logits(model)
    assert torch.equal(found, right)
    assert note
    assert "take more than" in note
    assert not files()


def test_a_disk_that_is_nearly_full_is_left_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = (model / "model.safetensors").stat().st_size
    full = shutil.disk_usage(model)._replace(free=3 * weights)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    note = logits(model)[1]
    assert note
    assert "is not kept" in note
    assert not files()
    full = full._replace(free=5 * weights)
    assert logits(model)[1] is None
    the_file()


def test_a_failed_load_leaves_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        # something was packed by then
        assert files()
        raise KeyboardInterrupt

    monkeypatch.setattr("fewbit.models._decoder.rope", broken)
    with pytest.raises(KeyboardInterrupt):
        fewbit.load(model)
    assert not files()


def test_a_model_that_changes_under_its_load_is_not_kept(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = prepared.PreparedLayouts.keep

    def late(self: prepared.PreparedLayouts) -> None:
        os.utime(model / "config.json")
        keep(self)

    monkeypatch.setattr(prepared.PreparedLayouts, "keep", late)
    fewbit.load(model)
    assert not files()


def test_old_files_make_room(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [Path(shutil.copytree(model, tmp_path / name)) for name in "abc"]
    for other in others:
        fewbit.load(other)
    size = max(f.stat().st_size for f in files())
    assert len(files()) == 3
    a, b, c = (prepared_dir() / prepared._file_name(other) for other in others)
    # what was used last stays
    for file, when in ((a, 30), (b, 10), (c, 20)):
        os.utime(file, (when, when))
    monkeypatch.setattr(prepared, "MAX_BYTES", int(2.5 * size))
    fewbit.load(model)
    mine = prepared_dir() / prepared._file_name(model)
    assert set(files()) == {a, mine}
    # what no model belongs to goes whatever room there is
    monkeypatch.setattr(prepared, "MAX_BYTES", 1 << 40)
    shutil.rmtree(others[0])
    (prepared_dir() / f"0{prepared.SUFFIX}").write_text("no layout")
    fewbit.load(others[2])
    assert set(files()) == {c, mine}


PROCESS = """
import os, signal, sys, torch, fewbit
from fewbit import prepared
from fewbit.runtime.cache import Sequence
prepared.SMALL_BYTES = 0
if sys.argv[2] == "killed":
    prepared._tidy = prepared.PreparedLayouts._header = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
model = fewbit.load(sys.argv[1], threads=1)
print(model.prefill(Sequence(), [1, 5, 257, 30, 2]).tolist(), model.prepared_note)
"""


def test_processes_at_once_and_one_that_is_killed(model: Path) -> None:
    right = without_cache(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")

        def start(how: str) -> subprocess.Popen[str]:
            return subprocess.Popen([sys.executable, "-c", PROCESS, str(model), how], stdout=subprocess.PIPE, text=True)

        # to its end before the others begin: it is killed while it writes, and would find nothing to write after them
        killed = start("killed")
        assert not killed.communicate(timeout=120)[0]
        assert killed.returncode == -signal.SIGKILL
        started = [start("whole"), start("whole")]
        said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert said[0] == said[1] == f"{right.tolist()} None\n"
    # what the killed one left goes when the next file is written, unless one of the others saw it first
    file = prepared_dir() / prepared._file_name(model)
    held = prepared._Draft(prepared_dir(), 1 << 20)
    assert torch.equal(logits(model)[0], right)
    file.unlink()
    assert torch.equal(logits(model)[0], right)
    # what is being written by another stays
    assert files() == sorted([file, held.path])
    held.close()
    the_file()
