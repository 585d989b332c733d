"""Folders that are broken, hostile or foreign: each is a three-part error, never a crash."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import fewbit
from fewbit.checkpoint._safetensors import CODES, Shards, ShardWriter
from fewbit.errors import FewbitError
from fewbit.source import open_source
from tests.conftest import write_folder


def break_config(**changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return apply


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return apply


def claim_more(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes((1 << 40).to_bytes(8, "little") + data[8:])


def reshape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(64, 160)
    save_file(weights, folder / "model.safetensors")


def drop(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")


def integers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.zeros(64, dtype=torch.int32)
    save_file(weights, folder / "model.safetensors")


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_text(text)

    return apply


def index(table: object) -> Callable[[Path], None]:
    return write("model.safetensors.index.json", json.dumps(table))


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated data": (cut("model.safetensors", 0.5), "not a whole safetensors"),
    "truncated header": (cut("model.safetensors", 0.001), "not a whole safetensors"),
    "empty file": (cut("model.safetensors", 0), "not a whole safetensors"),
    "header claims a terabyte": (claim_more, "not a whole safetensors"),
    "wrong shape": (reshape, r"'model\.layers\.1\.mlp\.up_proj\.weight' has the wrong shape"),
    "missing tensor": (drop, r"'model\.norm\.weight' is missing"),
    "integers for floats": (integers, r"'model\.norm\.weight' is stored as"),
    "no weights": (remove("model.safetensors"), "no weights"),
    "no config": (remove("config.json"), "not a model"),
    "no tokenizer": (remove("tokenizer.json"), "no tokenizer"),
    "config cut short": (cut("config.json", 0.5), "not valid JSON"),
    "config is a list": (write("config.json", "[]"), "JSON object"),
    "config nested too deep": (write("config.json", '{"a":' * 100_000), "not valid JSON"),
    "tokenizer is junk": (write("tokenizer.json", "{}"), "tokenizer"),
    "unknown architecture": (break_config(model_type="gpt2"), r"'gpt2' is not supported"),
    "no architecture": (break_config(model_type=None), "not supported"),
    "negative size": (break_config(hidden_size=-4), "hidden_size"),
    "size is a word": (break_config(num_hidden_layers="two"), "num_hidden_layers"),
    "size is huge": (break_config(vocab_size=10**15), "vocab_size"),
    "heads do not divide": (break_config(num_key_value_heads=3), "heads"),
    "strange activation": (break_config(hidden_act="swoosh"), "swoosh"),
    "foreign quantization": (break_config(quantization_config={"quant_method": "aqlm"}), "aqlm"),
    "index leads out": (index({"weight_map": {"a": "../../etc/passwd"}}), "missing"),
    "index names nothing": (index({"weight_map": {"a": "other.safetensors"}}), "missing"),
    "index is odd": (index({"weight_map": [1]}), "weight_map"),
}


@pytest.mark.parametrize(("damage", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_folder_is_an_error_in_three_parts(
    tiny_folder: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(tiny_folder)
    with pytest.raises(FewbitError, match=words) as caught:
        fewbit.load(tiny_folder)
    assert all(caught.value.to_dict().values())


def test_more_blocks_than_the_file_has_are_missing_tensors(tiny_folder: Path) -> None:
    break_config(num_hidden_layers=3)(tiny_folder)
    with pytest.raises(FewbitError, match=r"layers\.2\."):
        open_source(tiny_folder)


def test_missing_path_and_foreign_file(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"not a model")
    with pytest.raises(FewbitError, match="not a model"):
        open_source(tmp_path / "x.bin")
    with pytest.raises(FewbitError):
        open_source(tmp_path / "nowhere" / "model")


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_random_damage_to_a_quantized_folder_is_an_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("fuzz") / "m"
    write_folder(folder, num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    quantized = folder.parent / "q"
    fewbit.quantize(folder, quantized, format="int4g32a")
    file = quantized / "model.safetensors"
    raw = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    with suppress(FewbitError):
        fewbit.load(quantized)


@pytest.mark.parametrize("part", ["_packed", "_scale", "_zero_point", "_shape"])
@pytest.mark.parametrize("how", ["short", "gone", "dtype"])
def test_parts_that_do_not_fit_together(tiny_folder: Path, tmp_path: Path, part: str, how: str) -> None:
    fewbit.quantize(tiny_folder, tmp_path / "q", format="int4g32a")
    file = tmp_path / "q" / "model.safetensors"
    shards = Shards([file])
    weights, metadata = load_file(file), shards.metadata[file.name]
    name = f"model.layers.0.mlp.up_proj.weight{part}"
    if how == "short":
        weights[name] = weights[name][:-1].clone()
    elif how == "gone":
        del weights[name]
    else:
        weights[name] = weights[name].to(torch.float64)
    save_file(weights, file, metadata=metadata)
    with pytest.raises(FewbitError):
        open_source(tmp_path / "q").read("model.layers.0.mlp.up_proj.weight")


def test_writer_and_library_agree_on_every_dtype(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.arange(3 * (i + 1)).reshape(3, i + 1).to(dtype) for i, dtype in enumerate(CODES)}
    planned = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with ShardWriter(tmp_path / "x.safetensors", planned, {"note": "ü"}) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name][:1])
            writer.write(name, tensors[name][1:])
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in tensors.items())
    shards = Shards([tmp_path / "x.safetensors"])
    assert shards.metadata["x.safetensors"]["note"] == "ü"
    assert torch.equal(shards.read("t1", (1, 3)), tensors["t1"][1:3])


def test_writer_notices_missing_and_surplus_bytes(tmp_path: Path) -> None:
    planned = {"a": (torch.float32, (2, 2))}
    with pytest.raises(ValueError, match="without all"), ShardWriter(tmp_path / "x", planned, {}) as writer:
        writer.write("a", torch.zeros(1, 2))
    with pytest.raises(ValueError, match="more bytes"), ShardWriter(tmp_path / "y", planned, {}) as writer:
        writer.write("a", torch.zeros(3, 2))
