"""What can go wrong in a calibrated walk: three parts, finished units kept, the source untouched, and a way on."""

from __future__ import annotations

import errno
import hashlib
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

import fewbit
from fewbit import preflight
from fewbit.checkpoint._journal import NAME
from fewbit.checkpoint._safetensors import ShardWriter
from fewbit.cli import main
from fewbit.errors import FewbitError
from fewbit.methods import gptq, tuned
from fewbit.random_models import random_model
from tests.conftest import CONFIG, random_weights, write_folder

SMALL: dict[str, Any] = {"method": "gptq", "format": "int4g32", "windows": 8, "length": 32, "device": "cpu"}


def digest(folder: Path) -> dict[str, str]:
    """Every file's hash."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def kept(out: Path) -> list[str]:
    """Units of the unfinished output."""
    journal = out.parent / f".{out.name}.partial" / NAME
    found: list[str] = json.loads(journal.read_text())["done"] if journal.exists() else []
    return found


def fails(model: Path, out: Path, units: list[str], **options: Any) -> FewbitError:
    """The run must fail with an error of three parts, keep just `units`, and leave the source and the rest alone."""
    before = digest(model) if model.is_dir() else {}
    with pytest.raises(FewbitError) as caught:
        fewbit.quantize(model, out, **SMALL | options)
    error = caught.value
    assert all((error.what, error.facts, error.next_step))
    assert kept(out) == units
    assert not out.exists()
    assert digest(model) == before
    beside = [p.name for p in out.parent.iterdir() if p.name.startswith((f".{out.name}", out.name))]
    assert beside == ([f".{out.name}.partial"] if units else [])
    notes = [f"{len(units)} of 4 units are kept"] if units else []
    assert getattr(error, "__notes__", []) == notes
    return error


# Weights and activations


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["gptq", "awq+gptq", "tuned"])
def test_broken_weights_are_named_before_the_first_block(tmp_path: Path, value: float, method: str) -> None:
    weights = random_weights(CONFIG)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    folder = write_folder(tmp_path / "m", weights)
    # all that is left is looked at before the first block: the error comes now, not after an hour
    error = fails(folder, tmp_path / "q", ["embedding"], method=method)
    assert "model.layers.1.mlp.up_proj.weight" in error.what
    assert "[3, 5]" in error.facts
    # what failed fails again in the same words, and goes on from there
    assert str(fails(folder, tmp_path / "q", ["embedding"], method=method)) == str(error)


def test_a_broken_embedding_is_named(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights["model.embed_tokens.weight"][7, 1] = float("nan")
    folder = write_folder(tmp_path / "m", weights)
    error = fails(folder, tmp_path / "q", [])
    assert "model.embed_tokens.weight" in error.what
    assert "[7, 1]" in error.facts


def test_a_broken_norm_is_named(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights["model.layers.0.input_layernorm.weight"][2] = float("inf")
    error = fails(write_folder(tmp_path / "m", weights), tmp_path / "q", ["embedding"])
    assert "model.layers.0.input_layernorm.weight" in error.what


@pytest.mark.parametrize("options", [{}, {"drift": 0.25}, {"prefix": "original"}, {"method": "tuned"}], ids=str)
def test_activations_that_overflow_are_said(tmp_path: Path, options: dict[str, Any]) -> None:
    config = CONFIG | {"dtype": "float32"}
    weights = random_weights(config, torch.float32)
    # finite weights whose products are not: float32 ends at 3e38
    weights["model.layers.1.post_attention_layernorm.weight"] *= 1e20
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e20
    folder = write_folder(tmp_path / "m", weights, **config)
    # said before the first block is quantized where the whole model runs first
    error = fails(folder, tmp_path / "q", ["embedding"], **options)
    assert "NaN or infinity in block 1" in error.what
    error = fails(folder, tmp_path / "even", ["embedding", "block 0"], weighting="even", **options)
    assert "NaN or infinity in block 1" in error.what


# Text and tokenizer


def test_a_text_that_is_too_short(tiny_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("one two three four five six seven eight nine ten " * 3)
    error = fails(tiny_folder, tmp_path / "q", [], calibration=str(text))
    assert "too short" in error.what
    assert "147 tokens" in error.facts
    assert "256" in error.facts
    text.write_text("")
    assert "empty" in fails(tiny_folder, tmp_path / "q", [], calibration=str(text)).what


def test_a_tokenizer_that_knows_nothing(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    words = {"<unk>": 0, "unheard": 1, "of": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").unlink()
    error = fails(folder, tmp_path / "q", [])
    assert "tokenizer knows too little" in error.what
    assert "unknown text" in error.facts
    # a method without data has no use for text
    fewbit.quantize(folder, tmp_path / "q", method="rtn")


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    config = CONFIG | {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
    folder = write_folder(tmp_path / "m", random_weights(config), **config)
    (folder / "chat_template.jinja").unlink()
    error = fails(folder, tmp_path / "q", [])
    assert "tokenizer does not belong" in error.what
    assert "the model has 100" in error.facts


def test_windows_longer_than_the_context(tiny_folder: Path, tmp_path: Path) -> None:
    error = fails(tiny_folder, tmp_path / "q", [], length=1025)
    assert "1,025" in error.what
    assert "1,024" in error.facts
    assert "--length 512" in error.next_step


# Options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "gtpq"}, "gtpq"),
        ({"method": "rtn+gptq"}, "rtn+gptq"),
        ({"method": "gptq+awq"}, "gptq+awq"),
        ({"method": "awq+"}, "methods"),
        ({"method": ""}, "methods"),
        ({"method": "_columns"}, "methods"),
        ({"effort": 7}, "effort 7"),
        ({"effort": -1}, "effort -1"),
        ({"prefix": "both"}, "prefix"),
        ({"prefix": "original", "drift": True}, "--drift"),
        ({"method": "rtn"}, "rtn has no use for windows"),
        ({"scales": "best"}, "scales"),
        ({"windows": 0}, "windows"),
        ({"length": 0}, "length"),
        ({"device": "tpu"}, "tpu"),
        ({"device": "meta"}, "meta"),
        ({"calibration": "no such text"}, "no such text"),
    ],
    ids=str,
)
def test_options_that_are_not(tiny_folder: Path, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    assert said in fails(tiny_folder, tmp_path / "q", [], **options).what


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:1"])
def test_a_gpu_that_is_not_there(tiny_folder: Path, tmp_path: Path, device: str) -> None:
    error = fails(tiny_folder, tmp_path / "q", [], device=device)
    assert device in error.what
    assert "--device cpu" in error.next_step


def test_a_gpu_beyond_the_last(tiny_folder: Path, tmp_path: Path) -> None:
    assert "'cuda:99'" in fails(tiny_folder, tmp_path / "q", [], device="cuda:99").what


# Memory and disk


def test_a_block_that_does_not_fit_is_said_before_the_first(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def available(free: int) -> Callable[[], int | None]:
        def tell() -> int | None:
            asked.append(free)
            return free

        return tell

    monkeypatch.setattr(preflight, "_available_memory", available(100_000))
    monkeypatch.setattr(gptq, "quantize", lambda *_: pytest.fail("nothing is to be tried without the memory for it"))
    error = fails(tiny_folder, tmp_path / "q", ["embedding"])
    assert "not enough memory" in error.what
    assert "0.00 GiB are free" in error.facts
    assert "--method rtn" in error.next_step
    assert asked == [100_000]
    # with the memory there, the same command goes on
    monkeypatch.undo()
    fewbit.quantize(tiny_folder, tmp_path / "q", **SMALL)
    assert kept(tmp_path / "q") == []


def test_a_larger_block_needs_more(tmp_path: Path) -> None:
    from fewbit.source import open_source

    sizes = []
    for i, width in enumerate((64, 128)):
        folder = write_folder(tmp_path / str(i), hidden_size=width, intermediate_size=2 * width)
        source = open_source(folder)
        work, state = preflight.needed(source, (8, 32, width), with_goals=False)
        assert state == 8 * 32 * width * 4
        assert preflight.needed(source, (8, 32, width), with_goals=True) == (work, 2 * state)
        assert preflight.needed(source, (8, 32, width), with_goals=False, with_drift=True)[0] > work
        weights = sum(torch.Size(w.shape).numel() for w in source.weights if w.role == "linear" and w.block == 0)
        assert work > 4 * weights
        sizes.append(work)
    assert sizes[1] > 1.5 * sizes[0]


@pytest.mark.parametrize("options", [{}, {"with_drift": True, "weighted": True}])
def test_a_block_of_70_billion_weights_fits_a_card_of_24_gb(options: dict[str, bool]) -> None:
    """What is counted on was measured as more than is used, by benchmarks/gpu_quantize.py --cap 22."""
    source = random_model("llama-2-70b", "bf16")
    work, state = preflight.needed(source, (128, 2048, 8192), with_goals=False, **options)
    assert work + preflight.CARD_BYTES < 22 * 2**30
    assert state == 4 * 128 * 2048 * 8192


def full_after(writes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full from the given write on."""
    original, count = ShardWriter.write, 0

    def write(self: ShardWriter, name: str, piece: torch.Tensor) -> None:
        nonlocal count
        count += 1
        if count > writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, name, piece)

    monkeypatch.setattr(ShardWriter, "write", write)


@pytest.mark.parametrize(("writes", "units"), [(0, []), (3, ["embedding"]), (26, ["embedding", "block 0"])])
def test_a_disk_that_fills_up(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int, units: list[str]
) -> None:
    fewbit.quantize(tiny_folder, tmp_path / "whole", **SMALL)
    with monkeypatch.context() as m:
        full_after(writes, m)
        error = fails(tiny_folder, tmp_path / "q", units)
        assert "disk is full" in error.what
        assert "same command again" in error.next_step
    fewbit.quantize(tiny_folder, tmp_path / "q", **SMALL)
    assert digest(tmp_path / "q") == digest(tmp_path / "whole")


def test_a_limit_of_the_system_on_files(tiny_folder: Path, tmp_path: Path) -> None:
    # a real refusal by the kernel, in a process that is held to files of 40,000 bytes
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    start = "import sys; from fewbit.cli import main; sys.exit(main(sys.argv[1:]))"
    argv = ["quantize", str(tiny_folder), "-o", str(tmp_path / "q"), "--method", "gptq", "--format", "int4g32"]
    argv += ["--windows", "8", "--length", "32", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", start, *argv],
        preexec_fn=limited,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    what, facts, step = done.stderr.splitlines()[-3:]
    assert "Traceback" not in done.stderr
    assert what == "error: A file can't be read or written."
    assert "File too large" in facts
    assert "ulimit" in step
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny"]


# On the command line


def test_the_command_line_says_what_is_kept_and_how_to_go_on(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["quantize", str(tiny_folder), "-o", str(tmp_path / "q"), "--method", "gptq", "--format", "int4g32"]
    argv += ["--windows", "8", "--length", "32", "--device", "cpu"]
    with monkeypatch.context() as m:
        full_after(26, m)
        assert main([*argv, "--json"]) == 1
    out, err = capsys.readouterr()
    what, facts, step = err.splitlines()[-3:]
    assert what == "error: The disk is full."
    assert facts.endswith(" 2 of 4 units are kept.")
    assert step.endswith(f" To go on then: fewbit {' '.join(argv)} --json")
    assert json.loads(out) == {"error": {"what": what[7:], "facts": facts.strip(), "next_step": step.strip()}}
    assert main(argv) == 0
    assert "going on after block 0 (2 of 4 units kept)" in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EIO, "Input/output error")])
def test_other_failures_say_what_is_kept_too(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(tuned, "tune", failing)
    argv = ["quantize", str(tiny_folder), "-o", str(tmp_path / "q"), "--method", "tuned", "--windows", "8"]
    assert main([*argv, "--length", "32", "--device", "cpu"]) == 1
    assert capsys.readouterr().err.splitlines()[-2].endswith(" 1 of 4 units are kept.")
    assert kept(tmp_path / "q") == ["embedding"]


def test_a_source_that_can_not_be_written_is_enough(tiny_folder: Path, tmp_path: Path) -> None:
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in tiny_folder.iterdir()}
    tiny_folder.chmod(0o555)
    try:
        fewbit.quantize(tiny_folder, tmp_path / "q", **SMALL | {"offload": True})
    finally:
        tiny_folder.chmod(0o755)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in tiny_folder.iterdir()} == before
    assert load_file(tmp_path / "q" / "model.safetensors")
