"""Quantize to a size: within it to the byte, never worse than one format for all, measured once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit import fitting
from fewbit.cli import main
from fewbit.config_values import parse_bytes
from fewbit.errors import FewbitError
from fewbit.fitting import choose, fit, measure
from fewbit.judge import Verdict
from fewbit.rates import Meter
from fewbit.source import describe, open_source
from tests.conftest import CONFIG, random_weights, write_folder

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {"method": "rtn", "device": "cpu"}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model, short windows, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(fitting, "LENGTH", 32)
    monkeypatch.setattr(fitting, "MEASURED", 6)
    monkeypatch.setattr(fitting, "HELD_OUT", 6)
    config = CONFIG | {"num_hidden_layers": 2}
    return write_folder(tmp_path / "m", random_weights(config, torch.bfloat16), **config)


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def smallest(model: Path, tmp_path: Path) -> int:
    """Bytes of the smallest files, by the error of a size that can't be."""
    with pytest.raises(FewbitError, match="Nothing fits") as raised:
        fit(model, tmp_path / "none", size=1000, **OPTIONS)
    assert not (tmp_path / "none").exists()
    assert "Allow at least" in raised.value.next_step
    source = open_source(model)
    parts, _ = measure(source, CPU, fitting._windows(source), lambda *_: None)
    return fitting._file_bytes(source, parts, None)


def test_a_size_is_kept_and_what_it_bought_is_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = smallest(model, tmp_path)
    measured = []
    monkeypatch.setattr(Meter, "measure", lambda *args: measured.append(args))
    told: list[str] = []
    kl = []
    for i, size in enumerate((least, least + 3000, 2 * least)):
        out = tmp_path / f"q{i}"
        found = fit(model, out, size=size, note=told.append, **OPTIONS)
        assert weight_bytes(out) <= size
        assert found.summary.path == str(out)
        assert found.budget == size
        assert describe(out).weight_bytes == weight_bytes(out)
        if found.mixed and found.uniform:
            kl.append(min(found.mixed.kl, found.uniform.kl))
            assert found.kept == ("mixed" if found.mixed.kl <= found.uniform.kl else "uniform")
    assert kl == sorted(kl, reverse=True)
    # the first size measured the parts for all
    assert not measured
    assert any("measured on text held out" in line for line in told)
    # nothing is left beside
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "data", "m", "q0", "q1", "q2"]
    fewbit.load(tmp_path / "q2", exact=True)


@pytest.mark.parametrize("better", ["mixed", "uniform"])
def test_what_is_measured_better_is_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, better: str
) -> None:
    verdicts = [Verdict(0.1, 0.01), Verdict(0.2, 0.01)]
    seen: list[list[Path]] = []

    def judged(source: Any, outs: list[Path], *_: Any) -> list[Verdict]:
        seen.append(outs)
        return verdicts if better == "mixed" else verdicts[::-1]

    monkeypatch.setattr(fitting, "_judged", judged)
    found = fit(model, tmp_path / "q", bits_per_weight=5.2, **OPTIONS)
    assert found.kept == better
    specs = {open_source(tmp_path / "q").spec(w.name) for w in open_source(model).weights if len(w.shape) == 2}
    assert (specs == {found.uniform_spec}) == (better == "uniform")
    assert found.summary.path == str(tmp_path / "q")
    assert [p.name for p in seen[0]] == ["q", ".q.uniform"]
    assert not seen[0][1].exists()


def test_more_room_is_never_predicted_worse(model: Path, tmp_path: Path) -> None:
    source = open_source(model)
    parts, joints = measure(source, CPU, fitting._windows(source), lambda *_: None)
    curve = fitting.fitted(parts, joints)
    least = fitting._file_bytes(source, parts, None)
    losses = [choose(source, parts, curve, least + extra).mixed.loss for extra in range(0, 40_000, 2_000)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_damaged_measurements_are_made_anew(model: Path, tmp_path: Path) -> None:
    source = open_source(model)
    windows = fitting._windows(source)
    parts, joints = measure(source, CPU, windows, lambda *_: None)
    (kept,) = (tmp_path / "cache" / "fewbit" / "rates").iterdir()
    assert measure(source, CPU, windows, lambda *_: None) == (parts, joints)
    kept.write_text(kept.read_text()[:-20])
    assert measure(source, CPU, windows, lambda *_: None) == (parts, joints)


def test_a_text_too_short_is_refused(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("a few words " * 30)
    with pytest.raises(FewbitError, match="too short to choose bits by"):
        fit(model, tmp_path / "q", size=10**6, calibration=str(text), **OPTIONS)


def test_the_command_line_takes_a_size(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "q"
    assert main(["quantize", str(model), "-o", str(out), "--bpw", "6", "--method", "rtn", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["summary"]["weight_bytes"] == weight_bytes(out) <= found["budget"]
    assert main(["quantize", str(model), "-o", str(out), "--size", "9MB", "--head", "int8"]) != 0
    assert "--head names one" in capsys.readouterr().err


def test_the_textbook_mixture(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    assert main(["quantize", str(model), "-o", str(out), "--bits", "mixed", "--method", "rtn"]) == 0
    specs = {w.name: open_source(out).spec(w.name) for w in open_source(model).weights if len(w.shape) == 2}
    assert specs["model.embed_tokens.weight"] == "int6g64"
    assert set(specs.values()) == {"int6g64", "int8"}


@pytest.mark.parametrize(
    ("text", "count"), [("40GB", 40 * 10**9), ("16GiB", 16 << 30), ("56 mb", 56 * 10**6), ("1.5k", 1500), ("7", 7)]
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "0", "1e9", "3XB", "1" * 40 + "GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)
