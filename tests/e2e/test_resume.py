"""Kill -9 at any moment: the same command goes on, and the finished files are those of a run that nobody stopped."""

from __future__ import annotations

import hashlib
import json
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fewbit.checkpoint._journal import NAME
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
ROUNDED: dict[str, Any] = {"format": "int4g32", "method": "rtn"}
RECIPES: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq"},
    "awq+gptq": {"method": "awq+gptq", "format": "int3g32a"},
    "tuned": {"method": "tuned"},
    "drift": {"method": "gptq", "drift": 0.25, "offload": True},
}


def test_a_kill_at_every_step_of_the_bookkeeping(run: Runner, tiny_folder: Path, tmp_path: Path) -> None:
    options = ROUNDED
    steps, _ = run(tiny_folder, tmp_path / "whole", options)
    assert isinstance(steps, int), steps
    assert steps > 15
    expected = digest(tmp_path / "whole")
    for step in range(steps):
        place = tmp_path / f"at {step}"
        place.mkdir()
        said, end = run(tiny_folder, place / "q", options, step=step)
        assert (said, end["killed"]) == (None, True), step
        named = (place / "q").exists()
        said, end = run(tiny_folder, place / "q", options)
        # a folder that has its name is whole, and is no longer gone on with
        assert "exists already" in said if named else isinstance(said, int), (step, said)
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
    assert process.returncode == 130, err
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
