"""`fewbit bench`: figures that agree with each other and with the model's size, whatever the clock says."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

import fewbit
from fewbit import prepared
from fewbit.cli import main
from fewbit.kernels import _ceilings, cpu
from fewbit.runtime import speed as measuring
from fewbit.runtime.speed import measure_speed, multiply_adds, read_bytes
from fewbit.store import prepared_dir


@pytest.fixture(autouse=True)
def _small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ceilings, "LEAST_BYTES", 1 << 20)
    monkeypatch.setattr(_ceilings, "CACHES", 0)


@pytest.fixture
def packed(tiny_folder: Path, tmp_path: Path) -> Path:
    out = tmp_path / "int8"
    fewbit.quantize(tiny_folder, out, format="int8", head="int8", method="rtn", scales="minmax")
    return out


def figures(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main([str(a) for a in ("bench", *argv, "--json")]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_shares_follow_from_rates_and_ceilings(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, tiny_folder, "--prompt", "12", "--tokens", "3", "--rounds", "4", "--threads", "2")
    assert (found["prompt_tokens"], found["new_tokens"], found["threads"]) == (12, 3, 2)
    for kind in ("prompt", "decode"):
        assert len(found[f"{kind}_rates"]) == 4
        assert found[f"{kind}_rate"] == pytest.approx(statistics.median(found[f"{kind}_rates"]))
    if found["read_ceiling"] is None:
        pytest.skip("fewbit._cpu is not built")
    assert min(found["read_ceiling"], found["dot_ceiling"]) > 0
    assert found["decode_share"] == pytest.approx(found["decode_rate"] * found["read_bytes"] / found["read_ceiling"])
    done = found["prompt_rate"] * found["multiply_adds"] / found["prompt_tokens"]
    assert found["prompt_share"] == pytest.approx(done / found["dot_ceiling"])


def test_bytes_and_multiply_adds_are_the_linears(packed: Path) -> None:
    model = fewbit.load(packed)
    a = model.source.args
    heads = (2 * a.num_key_value_heads + 2 * a.num_attention_heads) * a.head_dim
    block = a.hidden_size * (heads + 3 * a.intermediate_size)
    head = a.vocab_size * a.hidden_size
    assert multiply_adds(model, 7) == 7 * a.num_hidden_layers * block + head
    # a prompt of three chunks runs the head three times
    longer = 2 * model.chunk + 1
    assert multiply_adds(model, longer) == longer * a.num_hidden_layers * block + 3 * head
    parts = [p for layer in model.model.stack.layers for p in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    assert read_bytes(model) == sum(p.packed.nbytes for p in parts) + model.model.head.packed.nbytes
    # one byte a code, a scale for each row; packing may pad
    assert read_bytes(model) >= a.num_hidden_layers * block + head


def test_an_embedding_counts_where_it_is_the_head(tmp_path: Path) -> None:
    from tests.conftest import write_folder

    tied = fewbit.load(write_folder(tmp_path / "tied", tie_word_embeddings=True))
    apart = fewbit.load(write_folder(tmp_path / "apart", tie_word_embeddings=False))
    expected = read_bytes(tied)
    assert read_bytes(apart) == expected
    for layer, more in ((apart.model.embedding, 0), (apart.model.head, 1000), (tied.model.embedding, 1000)):
        layer.packed = dataclasses.replace(layer.packed, nbytes=layer.packed.nbytes + 1000)
        assert read_bytes(tied if layer is tied.model.embedding else apart) == expected + more


def test_three_lines_for_people(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tiny_folder), "--prompt", "5", "--tokens", "2", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["prefill", "decode", "model"]
    assert all("tokens/s" in line and " % of " in line for line in lines[:2])
    assert "5 tokens" in lines[0]
    assert "2 tokens" in lines[1]


@pytest.mark.skipif(cpu.backend() is None, reason="fewbit._cpu is not built")
def test_a_prepared_layout_that_is_not_kept_is_told(
    packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "SMALL_BYTES", 0)
    arguments = [str(packed), "--prompt", "3", "--tokens", "1", "--rounds", "1"]
    prepared_dir().parent.mkdir(parents=True, exist_ok=True)
    prepared_dir().write_text("a file where the folder should be")
    for more in ([], ["--json"]):
        capsys.readouterr()
        assert main(["bench", *arguments, *more]) == 0
        said = capsys.readouterr()
        (line,) = [line for line in said.err.splitlines() if "note: " in line]
        assert "The prepared layout of this model is not kept" in line
        assert str(prepared_dir()) in line
        # as `fewbit run` says it
        if more:
            assert line.endswith(f"note: {json.loads(said.out)['prepared_note']}")
    prepared_dir().unlink()
    assert main(["bench", *arguments]) == 0
    assert "note:" not in capsys.readouterr().err


def test_help_says_what_a_share_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    said = capsys.readouterr().out
    assert "share of a ceiling" in said
    assert "  decode    bytes of packed weights" in said


def test_what_can_not_be_timed_is_told_in_three_parts(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tiny_folder), "--prompt", "999999"]) == 1
    lines = capsys.readouterr().err.splitlines()[-3:]
    assert lines[0] == "error: The run does not fit the context."
    assert "999999 + 64 tokens" in lines[1]
    with pytest.raises(fewbit.FewbitError, match="nothing to time"):
        measure_speed(tiny_folder, repeat=0)


def test_without_native_kernels_there_is_no_share(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "ceilings", lambda _: None)
    found = measure_speed(tiny_folder, prompt=3, new=1, repeat=1)
    assert (found.read_ceiling, found.dot_ceiling, found.prompt_share, found.decode_share) == (None,) * 4
    from fewbit.cli.bench import rows

    assert rows(found)[0][2] == "no ceiling known"
