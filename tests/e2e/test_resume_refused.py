"""Unfinished outputs that a run must not go on with: another recipe's, another process's, damaged, somebody else's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit.checkpoint._journal import LOCK, NAME, Journal
from fewbit.errors import FewbitError
from tests.e2e.test_resume import ROUNDED, SMALL, digest, units


class StoppedError(Exception):
    """Ends a run from its progress."""


def stopped_after(count: int, model: Path, out: Path, **options: Any) -> Path:
    """The unfinished folder of a run that ended with `count` units committed."""
    unfinished = out.parent / f".{out.name}.partial"

    def progress(done: int, total: int, doing: str) -> None:
        if units(unfinished / NAME) >= count:
            raise StoppedError

    with pytest.raises(StoppedError) as caught:
        fewbit.quantize(model, out, progress=progress, **SMALL | options)
    assert caught.value.__notes__ == [f"{count} of 4 units are kept"]
    assert units(unfinished / NAME) == count
    return unfinished


def test_a_changed_recipe_is_refused_with_what_changed(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    unfinished = stopped_after(2, tiny_folder, out, method="gptq")
    before = digest(unfinished)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"format": "int3g32"}, "format: int4g32 before, int3g32 now"),
        ({"method": "awq"}, "method: gptq before, awq now"),
        ({"head": "16bit"}, "head: int8 before, 16bit now"),
        ({"scales": "minmax"}, "scales: search before, minmax now"),
        ({"effort": 2}, "effort: 1 before, 2 now"),
        ({"windows": 9}, "calibration windows: 8 before, 9 now"),
        ({"length": 33}, "calibration length: 32 before, 33 now"),
        ({"drift": 0.25}, "drift: 0.0 before, 0.25 now"),
        ({"prefix": "original"}, "prefix: quantized before, original now"),
    ]
    for change, said in changes:
        with pytest.raises(FewbitError, match="unfinished output of another run") as caught:
            fewbit.quantize(tiny_folder, out, **SMALL | {"method": "gptq"} | change)
        assert said in caught.value.facts, change
        assert "--restart" in caught.value.next_step
        assert digest(unfinished) == before
    # what does not change a byte may change
    fewbit.quantize(tiny_folder, out, **SMALL | {"method": "gptq", "offload": True})


def test_a_changed_source_is_another_source(tiny_folder: Path, tmp_path: Path) -> None:
    unfinished = stopped_after(2, tiny_folder, tmp_path / "q", method="gptq")
    file = tiny_folder / "model.safetensors"
    os.utime(file, ns=(1, 1))
    with pytest.raises(FewbitError, match="another run") as caught:
        fewbit.quantize(tiny_folder, tmp_path / "q", **SMALL | {"method": "gptq"})
    assert "source_files model.safetensors: " in caught.value.facts
    assert unfinished.exists()


def test_another_number_of_threads_is_another_run(tiny_folder: Path, tmp_path: Path) -> None:
    stopped_after(2, tiny_folder, tmp_path / "q", method="gptq")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(FewbitError, match="another run") as caught:
            fewbit.quantize(tiny_folder, tmp_path / "q", **SMALL | {"method": "gptq"})
    finally:
        torch.set_num_threads(threads)
    assert f"threads: {threads} before, {threads + 1} now" in caught.value.facts


def test_restart_begins_anew(tiny_folder: Path, tmp_path: Path) -> None:
    stopped_after(2, tiny_folder, tmp_path / "q", method="gptq")
    said: list[str] = []
    options = ROUNDED
    with pytest.raises(FewbitError, match="another run"):
        fewbit.quantize(tiny_folder, tmp_path / "q", **options)
    fewbit.quantize(tiny_folder, tmp_path / "q", restart=True, progress=lambda *p: said.append(p[2]), **options)
    assert not any(text.startswith("going on") for text in said)
    fewbit.quantize(tiny_folder, tmp_path / "whole", **options)
    assert digest(tmp_path / "q") == digest(tmp_path / "whole")
    assert not (tmp_path / ".q.partial").exists()


def test_finished_units_are_not_quantized_again(tiny_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from fewbit.methods import gptq

    stopped_after(2, tiny_folder, tmp_path / "q", method="gptq")
    calls: list[tuple[int, ...]] = []
    quantize = gptq.quantize
    monkeypatch.setattr(gptq, "quantize", lambda w, *rest: calls.append(tuple(w.shape)) or quantize(w, *rest))
    said: list[str] = []
    options = SMALL | {"method": "gptq"}
    fewbit.quantize(tiny_folder, tmp_path / "q", progress=lambda *p: said.append(p[2]), **options)
    assert "going on after block 0 (2 of 4 units kept)" in said
    # the second block's four stacks, and the preflight's trial of the costliest
    assert len(calls) == 5


def test_a_second_process_is_refused_while_the_first_runs(tiny_folder: Path, tmp_path: Path) -> None:
    unfinished = stopped_after(2, tiny_folder, tmp_path / "q", method="gptq")
    before = digest(unfinished)
    hold = f"""
import sys
from pathlib import Path
from fewbit.checkpoint._journal import Journal
held = Journal.reopen(Path({str(unfinished)!r}))
print("held", flush=True)
sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    for restart in (False, True):
        with pytest.raises(FewbitError, match="Another process is writing"):
            fewbit.quantize(tiny_folder, tmp_path / "q", restart=restart, **SMALL | {"method": "gptq"})
        assert digest(unfinished) == before
    other.kill()
    other.communicate()
    # the lock dies with its holder
    fewbit.quantize(tiny_folder, tmp_path / "q", **SMALL | {"method": "gptq"})


def test_a_folder_of_others_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    unfinished = stopped_after(2, tiny_folder, tmp_path / "mine", method="gptq")
    place = tmp_path / ".q.partial"
    options = SMALL | {"method": "gptq"}

    def refused() -> None:
        for restart in (False, True):
            with pytest.raises(FewbitError, match="is in the way") as caught:
                fewbit.quantize(tiny_folder, tmp_path / "q", restart=restart, **options)
            assert "Remove it" in caught.value.next_step
        assert not (tmp_path / "q").exists()

    place.symlink_to(unfinished)
    refused()
    assert units(unfinished / NAME) == 2
    place.unlink()
    place.write_text("somebody's")
    refused()
    assert place.read_text() == "somebody's"
    place.unlink()
    place.mkdir()
    (place / "precious").write_text("somebody's")
    refused()
    assert [p.name for p in place.iterdir()] == ["precious"]
    place.rename(tmp_path / "away")
    shutil.copytree(unfinished, place)
    if os.getuid() == 0:
        # another user's, though it looks like ours
        os.chown(place, 12345, -1)
        refused()
        os.chown(place, 0, -1)
    fewbit.quantize(tiny_folder, tmp_path / "q", **options)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"fingerprint": {}}', '{"fingerprint": [], "done": []}', "\xff"])
def test_a_damaged_journal_is_refused(tiny_folder: Path, tmp_path: Path, damage: str) -> None:
    unfinished = stopped_after(2, tiny_folder, tmp_path / "q", method="gptq")
    (unfinished / NAME).write_bytes(damage.encode("latin-1"))
    with pytest.raises(FewbitError, match=r"is in the way|another run") as caught:
        fewbit.quantize(tiny_folder, tmp_path / "q", **SMALL | {"method": "gptq"})
    assert "Remove it" in caught.value.next_step
    # the step that it names works
    shutil.rmtree(unfinished)
    fewbit.quantize(tiny_folder, tmp_path / "q", **SMALL | {"method": "gptq"})


@pytest.mark.parametrize("damage", ["shorter", "longer", "header", "gone"])
def test_a_damaged_file_is_refused(tiny_folder: Path, tmp_path: Path, damage: str) -> None:
    unfinished = stopped_after(2, tiny_folder, tmp_path / "q", method="gptq")
    file = unfinished / "model.safetensors"
    if damage == "shorter":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "longer":
        file.write_bytes(file.read_bytes() + b"\0")
    elif damage == "header":
        data = bytearray(file.read_bytes())
        data[20] ^= 1
        file.write_bytes(data)
    else:
        file.unlink()
    options = SMALL | {"method": "gptq"}
    with pytest.raises(FewbitError, match="unfinished output is damaged") as caught:
        fewbit.quantize(tiny_folder, tmp_path / "q", **options)
    assert "--restart" in caught.value.next_step
    fewbit.quantize(tiny_folder, tmp_path / "q", restart=True, **options)
    fewbit.quantize(tiny_folder, tmp_path / "whole", **options)
    assert digest(tmp_path / "q") == digest(tmp_path / "whole")


def test_what_stands_beside_the_weights_is_written_again(tiny_folder: Path, tmp_path: Path) -> None:
    unfinished = stopped_after(2, tiny_folder, tmp_path / "q", method="gptq")
    (unfinished / "config.json").unlink()
    (unfinished / "tokenizer.json").write_text("{")
    fewbit.quantize(tiny_folder, tmp_path / "q", **SMALL | {"method": "gptq"})
    fewbit.quantize(tiny_folder, tmp_path / "whole", **SMALL | {"method": "gptq"})
    assert digest(tmp_path / "q") == digest(tmp_path / "whole")


def test_an_output_that_appears_meanwhile_is_kept(tiny_folder: Path, tmp_path: Path) -> None:
    stopped_after(2, tiny_folder, tmp_path / "q", method="gptq")
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "precious").write_text("somebody's")
    with pytest.raises(FewbitError, match="exists already"):
        fewbit.quantize(tiny_folder, tmp_path / "q", **SMALL | {"method": "gptq"})
    assert (tmp_path / "q" / "precious").read_text() == "somebody's"
    assert units(tmp_path / ".q.partial" / NAME) == 2


def test_a_journal_that_is_held_can_not_be_held_again(tmp_path: Path) -> None:
    first = Journal.begin(tmp_path, {"format": "int4"})
    first.commit("embedding")
    with pytest.raises(FewbitError, match="Another process"):
        Journal.reopen(tmp_path)
    first.close()
    second = Journal.reopen(tmp_path)
    assert second is not None
    assert (second.fingerprint, second.done) == ({"format": "int4"}, ["embedding"])
    second.close()
    assert (tmp_path / LOCK).exists()
