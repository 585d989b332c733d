"""Bad input through the command line: three parts, the right exit code, and no output left behind."""

from __future__ import annotations

import errno
import io
import json
import shlex
import shutil
import struct
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbit.checkpoint._safetensors import ShardWriter
from fewbit.cli import main


class Failed:
    """What a failing command said."""

    def __init__(self, code: int, out: str, err: str) -> None:
        lines = err.splitlines()
        assert "Traceback" not in err
        # progress may stand before the three lines
        assert lines[-3].startswith("error: ")
        assert lines[-2].startswith("  ")
        assert lines[-1].startswith("  ")
        self.code, self.out = code, out
        self.what, self.facts, self.next = lines[-3][7:], lines[-2].strip(), lines[-1].strip()
        assert self.what
        assert self.facts
        assert self.next


def fails(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> Failed:
    capsys.readouterr()
    code = main([str(a) for a in argv])
    assert code != 0
    return Failed(code, *capsys.readouterr())


def quantize_fails(capsys: pytest.CaptureFixture[str], model: str | Path, out: Path, *options: str) -> Failed:
    """`fewbit quantize` must fail and leave the output's folder as it was."""
    before = sorted(out.parent.rglob("*"))
    failed = fails(capsys, "quantize", model, "-o", out, *options)
    assert failed.code == 1
    assert sorted(out.parent.rglob("*")) == before
    return failed


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    return folder / "out"


# Usage


@pytest.mark.parametrize(
    ("argv", "what", "hint"),
    [
        (["quantise", "x"], "no command 'quantise'", "quantize"),
        (["zzz", "x"], "no command 'zzz'", "bench, compare, eval, "),
        (["serve"], "no command 'serve'", "Known"),
        (["_terminal"], "no command '_terminal'", "Known"),
        (["--verison"], "no option '--verison'", "Known"),
        (["run", "m", "p", "--temprature", "1"], "no option '--temprature'", "--temperature"),
        (["run", "m", "hello", "world"], "another argument: 'world'", "Quote"),
        (["run", "m", "p", "--max-tokens", "0"], "'0' is not a whole number from 1 up", "--help"),
        (["run"], "required: MODEL", "--help"),
        (["run", "m", "p", "--raw", "--system", "s"], "exclude each other", "Drop one"),
        (["quantize", "m"], "required: -o/--output", "--help"),
        (["quantize", "m", "-o", "x", "--bits", "9"], "invalid choice", "--help"),
        (["quantize", "m", "-o", "x", "--bits", "4", "--format", "int8"], "not allowed with", "--help"),
        (["eval", "m", "--text", "t"], "required: --against", "--help"),
    ],
)
def test_usage(capsys: pytest.CaptureFixture[str], argv: list[str], what: str, hint: str) -> None:
    failed = fails(capsys, *argv)
    assert failed.code == 2
    assert what in failed.what
    assert hint in failed.next


def test_json_and_raw_need_a_prompt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for option in ("--json", "--raw"):
        failed = fails(capsys, "run", "m", option)
        assert failed.code == 2
        assert option in failed.what


def test_errors_are_json_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    failed = fails(capsys, "show", tmp_path / "nothing", "--json")
    assert json.loads(failed.out) == {
        "error": {"what": failed.what, "facts": failed.facts, "next_step": failed.next},
    }


# Models that are not there, or broken


def test_missing_path(capsys: pytest.CaptureFixture[str], tmp_path: Path, out: Path) -> None:
    failed = quantize_fails(capsys, tmp_path / "nothing", out)
    assert "nothing" in failed.what
    for argv in (["show"], ["bench"], ["run", "hello"]):
        assert fails(capsys, argv[0], tmp_path / "nothing", *argv[1:]).code == 1


def test_unknown_alias_names_the_nearest(capsys: pytest.CaptureFixture[str], out: Path) -> None:
    failed = quantize_fails(capsys, "smolm2", out)
    assert "smolm2" in failed.what
    assert "smollm2" in failed.next


def test_truncated_safetensors(capsys: pytest.CaptureFixture[str], tiny_folder: Path, out: Path) -> None:
    file = tiny_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "model.safetensors" in str(vars(quantize_fails(capsys, tiny_folder, out)))


def test_safetensors_header_beyond_the_file(capsys: pytest.CaptureFixture[str], tiny_folder: Path, out: Path) -> None:
    file = tiny_folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 40) + file.read_bytes()[8:])
    assert "model.safetensors" in str(vars(quantize_fails(capsys, tiny_folder, out)))


@pytest.mark.parametrize(
    "data",
    [
        b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 1 << 40),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60) + b"general",
        b"GGUF" + struct.pack("<I", 3),
    ],
    ids=["counts", "string length", "cut off"],
)
def test_gguf_that_ends_early(capsys: pytest.CaptureFixture[str], tmp_path: Path, out: Path, data: bytes) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(data)
    assert "broken.gguf" in str(vars(quantize_fails(capsys, file, out)))


def test_wrong_shape_names_the_tensor(capsys: pytest.CaptureFixture[str], tiny_folder: Path, out: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change(tiny_folder, name, torch.zeros(7, 64, dtype=torch.bfloat16))
    failed = quantize_fails(capsys, tiny_folder, out)
    assert name in failed.what
    assert "(7, 64)" in failed.facts


def test_nan_names_the_tensor(capsys: pytest.CaptureFixture[str], tiny_folder: Path, out: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    weight = load_file(tiny_folder / "model.safetensors")[name]
    weight[3, 5] = float("nan")
    change(tiny_folder, name, weight)
    argv = ["quantize", str(tiny_folder), "-o", str(out), "--method", "rtn"]
    failed = fails(capsys, *argv)
    assert name in failed.what
    assert "[3, 5]" in failed.facts
    assert failed.facts.endswith("2 of 4 units are kept.")
    assert failed.next.endswith(f"To go on then: {shlex.join(['fewbit', *argv])}")
    assert [p.name for p in out.parent.iterdir()] == [".out.partial"]


def test_unsupported_architecture_lists_the_known(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, out: Path
) -> None:
    config = json.loads((tiny_folder / "config.json").read_text()) | {"model_type": "mamba3"}
    (tiny_folder / "config.json").write_text(json.dumps(config))
    failed = quantize_fails(capsys, tiny_folder, out)
    assert "mamba3" in failed.what
    assert "llama" in failed.facts


def change(folder: Path, name: str, weight: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = weight
    save_file(tensors, folder / "model.safetensors")


# Outputs


def test_existing_output_is_left_alone(capsys: pytest.CaptureFixture[str], tiny_folder: Path, out: Path) -> None:
    out.mkdir()
    (out / "precious").write_text("do not touch")
    failed = quantize_fails(capsys, tiny_folder, out)
    assert "exists" in failed.what
    assert (out / "precious").read_text() == "do not touch"


def test_full_disk_seen_beforehand(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 900, 100))
    failed = quantize_fails(capsys, tiny_folder, out)
    assert "full" in failed.what
    assert "100 are free" in failed.facts


def test_full_disk_met_while_writing(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self: ShardWriter, name: str, piece: torch.Tensor) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "write", write)
    assert "full" in quantize_fails(capsys, tiny_folder, out).what


def test_out_of_memory(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_says = RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
    )
    for error in (MemoryError(), torch_says):

        def write(self: ShardWriter, name: str, piece: torch.Tensor, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(ShardWriter, "write", write)
        assert "memory" in quantize_fails(capsys, tiny_folder, out).what


def test_a_bug_keeps_its_traceback(tiny_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: ShardWriter, name: str, piece: torch.Tensor) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(ShardWriter, "write", write)
    with pytest.raises(ZeroDivisionError):
        main(["quantize", str(tiny_folder), "-o", str(out)])
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--format", "int9"], "int9"),
        (["--format", "gguf:q4_1"], "gguf:q4_1"),
        (["--method", "rtm"], "rtm"),
        (["--head", "none"], "none"),
    ],
)
def test_unknown_settings(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, out: Path, options: list[str], part: str
) -> None:
    assert part in quantize_fails(capsys, tiny_folder, out, *options).what


# Prompts and texts


def test_bad_prompts(capsys: pytest.CaptureFixture[str], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "empty" in fails(capsys, "run", tiny_folder, " ").what
    assert "UTF-8" in fails(capsys, "run", tiny_folder, "caf\udce9").what
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    failed = fails(capsys, "run", tiny_folder)
    assert "UTF-8" in failed.what
    assert "Byte 3 of 4 is 0xe9" in failed.facts


def test_context_overflow_says_the_numbers(capsys: pytest.CaptureFixture[str], tiny_folder: Path) -> None:
    failed = fails(capsys, "run", tiny_folder, "x" * 100, "--raw", "--context", "64")
    assert "100 tokens" in failed.facts
    assert "64" in failed.facts
    assert "1,024" in fails(capsys, "run", tiny_folder, "x", "--context", "4096").facts


def test_sampling_out_of_range(capsys: pytest.CaptureFixture[str], tiny_folder: Path) -> None:
    assert "top_p" in fails(capsys, "run", tiny_folder, "x", "--top-p", "1.5").what


def test_texts_that_can_not_be_measured(capsys: pytest.CaptureFixture[str], tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    argv = ("eval", tiny_folder, "--against", tiny_folder, "--text", file)
    assert "short.txt" in fails(capsys, *argv).what
    file.write_text("too short")
    assert "9 tokens" in fails(capsys, *argv).facts
    file.write_bytes(b"\xff" * 2000)
    assert "UTF-8" in fails(capsys, *argv).what
