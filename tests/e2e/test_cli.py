"""The commands in one process: what they print, as text and as JSON, from a model to its answers and figures."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fewbit
from fewbit.cli import main
from fewbit.cli.quantize import format_of_bits

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs one command line: exit code, standard output, standard error."""

    def run(*argv: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(a) for a in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """1,300 bytes, which is two windows for a tokenizer of bytes."""
    file = tmp_path / "text.txt"
    file.write_text("The tide clock by the door is always wrong, and nobody minds. " * 21)
    return file


def pipe_in(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(cli: Cli, argv: list[str]) -> None:
    code, out, err = cli(*argv)
    assert (code, err) == (0, "")
    for verb in ("run", "quantize", "eval", "compare", "show", "bench", "ls", "pull", "rm"):
        assert f"\n  {verb} " in out


@pytest.mark.parametrize("verb", ["run", "quantize", "eval", "compare", "show", "bench", "ls", "pull", "rm"])
def test_every_command_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([verb, "--help"])
    assert left.value.code == 0
    assert f"usage: fewbit {verb}" in capsys.readouterr().out


def test_version(cli: Cli) -> None:
    assert cli("--version") == (0, f"fewbit {fewbit.__version__}\n", "")


def test_quantize_then_use_the_result(cli: Cli, tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, progress = cli("quantize", tiny_folder, "-o", out, "--bits", "4", "--head", "int8", "--method", "rtn")
    assert code == 0
    assert said.startswith(f"{out}: int4g64 by rtn, head int8, in ")
    assert "smaller than 16 bits" in said
    assert "smaller than the source" in said
    assert "\x1b" not in progress

    code, said, _ = cli("show", out, "--tensors")
    assert code == 0
    assert "llama" in said
    assert "int4g64" in said
    assert "model.layers.1.mlp.down_proj.weight" in said

    code, said, _ = cli("eval", tiny_folder, out, "--against", tiny_folder, "--text", text, "--windows", "1")
    assert code == 0
    header, first, second, last = said.splitlines()
    assert header.split()[:2] == ["model", "MB"]
    assert str(tiny_folder) in first
    assert str(out) in second
    assert last.startswith(f"against {tiny_folder}: PPL ")
    assert "255 predictions" in last

    code, said, _ = cli("bench", out, "--prompt", "16", "--tokens", "4")
    assert code == 0
    assert " 16 tokens\n" in said
    assert " 4 tokens, " in said

    code, said, _ = cli("ls")
    assert code == 0
    assert "smollm2" in said
    assert str(out) in said


def test_json_has_the_figures_and_nothing_else(cli: Cli, tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    def figures(*argv: str | Path) -> Any:
        code, said, _ = cli(*argv, "--json")
        assert code == 0
        return json.loads(said)

    out = tmp_path / "out"
    options = ("--format", "int8", "--head", "16bit", "--scales", "minmax", "--method", "rtn")
    summary = figures("quantize", tiny_folder, "-o", out, *options)
    assert summary["path"] == str(out)
    assert (summary["format"], summary["method"], summary["head"]) == ("int8", "rtn", "16bit")
    assert {"weight_bytes", "source_bytes", "float16_bytes", "bits_per_weight", "seconds"} <= set(summary)

    shown = figures("show", out)
    assert shown["weight_bytes"] == summary["weight_bytes"]
    assert shown["quantized"] is True
    assert sum(count for count, _, _ in shown["specs"].values()) == len(shown["tensors"])

    quality = figures("eval", out, "--against", tiny_folder, "--text", text, "--exact")
    assert quality["against"] == str(tiny_folder)
    (only,) = quality["models"]
    assert only["tokens"] == 2 * 255
    assert only["exact"] is True
    assert 0 <= only["mean_kl"] < 0.1
    assert 0.8 < only["top1"] <= 1

    speed = figures("bench", out, "--prompt", "8", "--new", "2")
    assert speed["prompt_tokens"] == 8
    assert sum(speed["backends"].values()) > 0

    listed = figures("ls")
    assert {"smollm2", "out"} <= {m["name"] for m in listed["models"]}


@pytest.mark.parametrize(("bits", "spec"), [(2, "int2g64"), (4, "int4g64"), (7, "int7g64"), (8, "int8")])
def test_bits_stand_for_a_format(bits: int, spec: str) -> None:
    assert format_of_bits(bits) == spec


def test_run_answers_once(cli: Cli, tiny_folder: Path) -> None:
    code, said, err = cli("run", tiny_folder, "hello", "--max-tokens", "5", "--stats")
    assert code == 0
    assert said.endswith("\n")
    assert "tokens/s" in err

    code, again, _ = cli("run", tiny_folder, "hello", "--max-tokens", "5", "--json")
    found = json.loads(again)
    assert found["text"].rstrip("\n") == said.rstrip("\n")
    assert found["stats"]["new_tokens"] <= 5
    assert found["stats"]["finish_reason"] in ("length", "stop")


def test_run_puts_the_prompt_through_the_template(cli: Cli, tiny_folder: Path) -> None:
    def prompt_tokens(*options: str) -> int:
        _, said, _ = cli("run", tiny_folder, "--max-tokens", "1", "--json", *options)
        found: int = json.loads(said)["stats"]["prompt_tokens"]
        return found

    # byte tokens; the template adds "<|im_start|>user\n", "<|im_end|>\n" and "<|im_start|>assistant\n"
    assert prompt_tokens("hello", "--raw") == 5
    assert prompt_tokens("hello") == 5 + 6 + 2 + 11
    assert prompt_tokens("hello", "--system", "be brief") == 5 + 6 + 2 + 11 + 8 + 8 + 2


def test_run_reads_standard_input(cli: Cli, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--max-tokens", "4", "--json")
    _, typed, _ = cli("run", tiny_folder, "grüße", *options)
    pipe_in(monkeypatch, "grüße".encode())
    code, piped, _ = cli("run", tiny_folder, *options)
    assert code == 0
    assert json.loads(piped)["text"] == json.loads(typed)["text"]


def test_options_may_stand_between_model_and_prompt(cli: Cli, tiny_folder: Path) -> None:
    code, said, _ = cli("run", tiny_folder, "--max-tokens", "1", "--json", "hello")
    assert code == 0
    assert json.loads(said)["stats"]["new_tokens"] == 1


def test_seed_repeats_a_sampled_answer(cli: Cli, tiny_folder: Path) -> None:
    def answer(seed: str) -> str:
        code, said, _ = cli("run", tiny_folder, "a", "--temperature", "50", "--seed", seed, "--max-tokens", "12")
        assert code == 0
        return said

    assert answer("1") == answer("1")
    assert answer("1") != answer("2")


def test_a_model_without_a_template_continues_the_prompt(cli: Cli, tiny_folder: Path) -> None:
    (tiny_folder / "chat_template.jinja").unlink()
    code, said, _ = cli("run", tiny_folder, "hello", "--max-tokens", "1", "--json")
    assert code == 0
    assert json.loads(said)["stats"]["prompt_tokens"] == 5
    code, _, err = cli("run", tiny_folder, "hello", "--system", "be brief")
    assert code == 1
    assert "no chat template" in err
