"""Kill -9 at any moment: the same command goes on, and the finished files are those of a run that nobody stopped."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit.checkpoint._journal import LOCK, NAME, Journal
from fewbit.errors import FewbitError
from tests.conftest import write_folder

# Forks a process for each run it is asked for, so that a run costs no imports. A run says how often it came to a step
# of the bookkeeping, and is killed by itself at the step or by its parent at the moment it was told.
DRIVER = """
import contextlib, json, os, pathlib, signal, sys, tempfile, time, torch
torch.set_num_threads(1)
import fewbit, fewbit.preflight, fewbit.quantizer, fewbit.tokenizer
from fewbit.checkpoint._journal import Journal
from fewbit.checkpoint._safetensors import ShardWriter
from fewbit.methods import auto, awq, gptq, rtn, tuned
tuned.STEPS = (3, 3, 3, 3)

count, limit = 0, None
def counted(owner, name):
    inner = getattr(owner, name)
    def call(*args, **options):
        global count
        if count == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return inner(*args, **options)
    setattr(owner, name, call)

def run(job):
    global limit
    limit = job.get("step")
    for owner, name in {
        "files": [(os, "fsync"), (tempfile, "mkdtemp"), (pathlib.Path, "rename"), (pathlib.Path, "unlink"),
                  (pathlib.Path, "chmod"), (ShardWriter, "__init__"), (Journal, "close")],
        "commits": [(Journal, "commit")],
    }[job.get("steps", "files")]:
        counted(owner, name)
    fewbit.quantize(job["model"], job["out"], **job["options"])
    print(json.dumps(count), flush=True)

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        try:
            run(job)
        except BaseException as e:
            print(json.dumps(f"{type(e).__name__}: {e}"), flush=True)
        os._exit(0)
    start = time.monotonic()
    if "seconds" in job:
        while time.monotonic() < start + job["seconds"] and os.waitid(
            os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
        ) is None:
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status)
    print(json.dumps({"killed": killed, "seconds": time.monotonic() - start}), flush=True)
"""

START = "import sys; from fewbit.cli import main; sys.exit(main(sys.argv[1:]))"


class Runner:
    """Runs of `quantize` in processes of their own, killed or not."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, model: Path, out: Path, options: dict[str, Any], **job: Any) -> tuple[Any, dict[str, Any]]:
        """What the run said (its steps, or an error; None where it was killed), and how it ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        text = json.dumps({"model": str(model), "out": str(out), "options": options} | job)
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        found = json.loads(self.process.stdout.readline())
        if isinstance(found, dict):
            return None, found
        return found, json.loads(self.process.stdout.readline())


@pytest.fixture
def run() -> Any:
    runner = Runner()
    yield runner
    assert runner.process.stdin is not None
    assert runner.process.stdout is not None
    runner.process.stdin.close()
    runner.process.wait(timeout=30)
    runner.process.stdout.close()


def digest(folder: Path) -> dict[str, str]:
    """Every file's hash."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


SMALL: dict[str, Any] = {"format": "int4g32", "windows": 8, "length": 32, "device": "cpu"}
RECIPES: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq"},
    "awq+gptq": {"method": "awq+gptq", "format": "int3g32a"},
    "tuned": {"method": "tuned"},
    "drift": {"method": "gptq", "drift": True, "offload": True},
}


def test_a_kill_at_every_step_of_the_bookkeeping(run: Runner, tiny_folder: Path, tmp_path: Path) -> None:
    options = SMALL | {"method": "rtn"}
    steps, _ = run(tiny_folder, tmp_path / "whole", options)
    assert isinstance(steps, int), steps
    assert steps > 15
    expected = digest(tmp_path / "whole")
    for step in range(steps):
        place = tmp_path / f"at {step}"
        place.mkdir()
        said, end = run(tiny_folder, place / "q", options, step=step)
        assert (said, end["killed"]) == (None, True), step
        if not (place / "q").exists() or (place / "q" / NAME).exists():
            said, end = run(tiny_folder, place / "q", options)
            assert isinstance(said, int), (step, said)
        assert digest(place / "q") == expected, step
        assert [p.name for p in place.iterdir()] == ["q"], step


@pytest.mark.parametrize("recipe", RECIPES)
def test_kills_while_it_calibrates(run: Runner, tmp_path: Path, recipe: str) -> None:
    model = write_folder(tmp_path / "m", num_hidden_layers=3, tie_word_embeddings=False)
    options = SMALL | RECIPES[recipe]
    commits, took = run(model, tmp_path / "whole", options, steps="commits")
    # embedding, three blocks, norm, head
    assert commits == 6, commits
    place = tmp_path / "killed"
    place.mkdir()
    # before each commit: the unit's bytes lie there, and nobody knows of them
    for step in (0, 0, 1, 2):
        _, end = run(model, place / "q", options, steps="commits", step=step)
        assert end["killed"]
    moments = random.Random(recipe)
    for _ in range(3):
        run(model, place / "q", options, seconds=moments.uniform(0.1, 0.9) * took["seconds"])
        if (place / "q").exists():
            break
    else:
        said, _ = run(model, place / "q", options)
        assert isinstance(said, int), said
    assert digest(place / "q") == digest(tmp_path / "whole")
    assert [p.name for p in place.iterdir()] == ["q"]


def test_a_real_process_killed_right_after_commits(tiny_folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "killed"
    place.mkdir()
    options = ["--method", "gptq", "--format", "int4g32", "--windows", "8", "--length", "32", "--device", "cpu"]
    command = [sys.executable, "-c", START, "quantize", str(tiny_folder), "-o"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    subprocess.run([*command, str(tmp_path / "whole"), *options], check=True, **quiet)
    journal = place / ".q.partial" / NAME
    for kept in (1, 2):
        process = subprocess.Popen([*command, str(place / "q"), *options], **quiet)
        until = time.monotonic() + 60
        while units(journal) < kept:
            assert time.monotonic() < until
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    done = subprocess.run([*command, str(place / "q"), *options], check=True, **quiet)
    assert "going on after " in done.stderr
    assert digest(place / "q") == digest(tmp_path / "whole")
    assert [p.name for p in place.iterdir()] == ["q"]


def units(journal: Path) -> int:
    """How many are committed; a journal is replaced in one step, so that it is whole at any moment."""
    return len(json.loads(journal.read_text())["done"]) if journal.exists() else 0


class Stop(Exception):
    """Ends a run from its progress."""


def stopped_after(count: int, model: Path, out: Path, **options: Any) -> Path:
    """The unfinished folder of a run that ended with `count` units committed."""
    unfinished = out.parent / f".{out.name}.partial"

    def progress(done: int, total: int, doing: str) -> None:
        if units(unfinished / NAME) >= count:
            raise Stop

    with pytest.raises(Stop) as caught:
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
        ({"method": "rtn"}, "method: gptq before, rtn now"),
        ({"head": "16bit"}, "head: int8 before, 16bit now"),
        ({"scales": "minmax"}, "scales: search before, minmax now"),
        ({"effort": 2}, "effort: 1 before, 2 now"),
        ({"windows": 9}, "calibration: "),
        ({"length": 33}, "calibration: "),
        ({"drift": True}, "drift: false before, true now"),
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
    assert "source_files: " in caught.value.facts
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
    options = SMALL | {"method": "rtn"}
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
held = Journal(Path({str(unfinished)!r}), {{}}, [])
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
    first = Journal(tmp_path, {}, [])
    with pytest.raises(FewbitError, match="Another process"):
        Journal(tmp_path, {}, [])
    first.close()
    Journal(tmp_path, {}, []).close()
    assert (tmp_path / LOCK).exists()


# Ctrl-C

INTERRUPTIBLE = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from fewbit.methods import gptq
gptq.quantize = lambda *_: time.sleep(60)
from fewbit.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_prints_the_line_that_goes_on(tiny_folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "my results"
    place.mkdir()
    argv = ["quantize", str(tiny_folder), "-o", str(place / "it's"), "--method", "gptq", "--format", "int4g32"]
    argv += ["--windows", "8", "--length", "32", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 60
    while units(place / ".it's.partial" / NAME) < 1:
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    what, facts, again = err.splitlines()[-3:]
    assert what == "error: Interrupted."
    assert facts.endswith("; 1 of 4 units are kept.")
    sign = "  To go on: "
    assert again.startswith(sign)
    # the very line, as a shell takes it apart
    assert shlex.split(again.removeprefix(sign)) == ["fewbit", *argv]
    line = again.removeprefix(sign).replace("fewbit ", f"{shlex.quote(sys.executable)} -c {shlex.quote(START)} ", 1)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert "going on after embedding (1 of 4 units kept)" in done.stderr
    assert [p.name for p in place.iterdir()] == ["it's"]
