"""A full-precision model asked for in few bits: rounded once, kept, gone on with, found without its source."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file

import fewbit
from fewbit import on_demand, store
from fewbit.checkpoint._journal import NAME as JOURNAL
from fewbit.cli import main
from fewbit.errors import FewbitError
from fewbit.methods import rtn
from fewbit.on_demand import in_few_bits
from tests._hub import Hub
from tests.conftest import CONFIG, random_weights, write_folder
from tests.models.test_gguf_models import write_gguf


def kept() -> list[str]:
    """Everything in the folder, the unfinished too."""
    return sorted(f.name for f in store.quantized_dir().iterdir()) if store.quantized_dir().exists() else []


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    mine, theirs = tensors(a), tensors(b)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


def never(*_: object, **__: object) -> Any:
    raise AssertionError("nothing is to be quantized")


def test_it_is_what_quantize_writes_and_is_made_once(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    path = in_few_bits(tiny_folder, "int4g64", note=said.append)
    fewbit.quantize(tiny_folder, tmp_path / "out", format="int4g64", method="rtn")
    assert same(path, tmp_path / "out")
    assert kept() == [path.name]
    assert path.name.startswith("tiny-int4g64-")
    assert path.name in said[0]
    monkeypatch.setattr(on_demand, "quantize", never)
    assert in_few_bits(tiny_folder, "int4g64") == path
    # by its name, too; the list of folders the user asked for stays the user's
    assert store.locate(path.name) == path
    assert [w.path for w in store.remembered()] == [tmp_path / "out"]


def test_another_format_or_another_state_of_the_model_is_another_one(tiny_folder: Path) -> None:
    four, eight = in_few_bits(tiny_folder, "int4g64"), in_few_bits(tiny_folder, "int8")
    assert four != eight
    shutil.rmtree(tiny_folder)
    write_folder(tiny_folder, random_weights(CONFIG, seed=1))
    changed = in_few_bits(tiny_folder, "int4g64")
    assert changed not in (four, eight)
    assert not same(changed, four)
    assert len(kept()) == 3


def test_a_gguf_file_in_full_precision(tmp_path: Path) -> None:
    file = tmp_path / "m-F16.gguf"
    write_gguf(file, GGMLQuantizationType.F16, CONFIG, random_weights(CONFIG))
    path = in_few_bits(file, "int8")
    assert path.name.startswith("m-F16-int8-")
    assert "".join(fewbit.load(path).generate("hello", max_tokens=3)) is not None


@pytest.mark.parametrize("bits", [{"format": "int4g32"}, {"format": "int8", "head": "16bit"}])
def test_what_is_quantized_is_not_rounded_again(tiny_folder: Path, tmp_path: Path, bits: dict[str, str]) -> None:
    fewbit.quantize(tiny_folder, tmp_path / "q", method="rtn", **bits)
    with pytest.raises(FewbitError, match="quantized already") as caught:
        in_few_bits(tmp_path / "q", "int4g64")
    assert bits["format"] in caught.value.facts
    assert kept() == []


def stopped(monkeypatch: pytest.MonkeyPatch, model: Path, calls: int) -> None:
    """A start that ends after some matrices."""
    inner, count = rtn.quantize, 0

    def quantize(*given: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt
        return inner(*given)

    with monkeypatch.context() as patch:
        patch.setattr(rtn, "quantize", quantize)
        with pytest.raises(KeyboardInterrupt) as caught:
            in_few_bits(model, "int4g64")
    assert "units are kept" in "; ".join(caught.value.__notes__)


def test_a_start_that_was_stopped_is_gone_on_with(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(monkeypatch, tiny_folder, 9)
    (left,) = kept()
    assert left.startswith(".tiny-int4g64-")
    rounded: list[tuple[int, ...]] = []
    inner = rtn.quantize

    def counted(w: torch.Tensor, *rest: Any) -> Any:
        rounded.append(tuple(w.shape))
        return inner(w, *rest)

    monkeypatch.setattr(rtn, "quantize", counted)
    path = in_few_bits(tiny_folder, "int4g64")
    # an embedding and two blocks of seven; the embedding and the first block are there
    assert len(rounded) == 7
    fewbit.quantize(tiny_folder, tmp_path / "out", format="int4g64", method="rtn")
    assert same(path, tmp_path / "out")
    assert kept() == [path.name]


def test_what_another_version_left_unfinished_is_begun_anew(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(monkeypatch, tiny_folder, 9)
    journal = store.quantized_dir() / kept()[0] / JOURNAL
    found = json.loads(journal.read_text())
    found["fingerprint"]["version"] = "0.0.1"
    journal.write_text(json.dumps(found))
    path = in_few_bits(tiny_folder, "int4g64")
    fewbit.quantize(tiny_folder, tmp_path / "out", format="int4g64", method="rtn")
    assert same(path, tmp_path / "out")
    assert kept() == [path.name]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    with made.running():
        made.point(monkeypatch, tmp_path / "hub")
        yield made


def test_a_model_of_the_hub_need_not_stay(
    hub: Hub, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("owner/name", {f.name: f.read_bytes() for f in tiny_folder.iterdir()})
    assert main(["run", "owner/name", "hello", "--bits", "4", "--max-tokens", "4"]) == 0
    first, said = capsys.readouterr()
    assert "kept as name-int4g64-" in said
    assert main(["rm", "owner/name", "--yes"]) == 0
    hub.asked.clear()
    monkeypatch.setattr(on_demand, "quantize", never)
    capsys.readouterr()
    assert main(["run", "owner/name", "hello", "--format", "int4g64", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out == first
    assert hub.asked == []
    # other bits, and another revision, are another model
    for text, spec in (("owner/name", "int8"), ("owner/name@v2", "int4g64")):
        with pytest.raises((AssertionError, FewbitError), match=r"quantized|revision"):
            in_few_bits(text, spec, progress=lambda *_: None)


def test_bits_and_format_exclude_each_other(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tiny_folder), "x", "--bits", "4", "--format", "int8"]) == 2
    assert "not allowed with" in capsys.readouterr().err
    assert main(["run", str(tiny_folder), "x", "--format", "int9"]) == 1
    assert kept() == []
