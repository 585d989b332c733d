"""GPTQ and AWQ folders that are broken or hostile: each is a three-part error, never a crash or a wrong weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewbit
from fewbit.errors import FewbitError
from fewbit.formats import parse
from fewbit.source import open_source
from tests.conftest import CONFIG, random_weights, write_folder
from tests.pure.test_foreign_folders import (
    LINEAR,
    Made,
    awq_parts,
    awq_said,
    ct_ordered,
    ct_parts,
    ct_said,
    foreign_folder,
    gptq_parts,
    gptq_said,
    same_weights,
)


def change(part: str, to: Callable[[Tensor], Tensor] | None) -> Callable[[Path], None]:
    """A part of one matrix replaced, or left out."""

    def apply(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        t = tensors.pop(f"{LINEAR}.{part}")
        if to is not None:
            tensors[f"{LINEAR}.{part}"] = to(t).contiguous()
        save_file(tensors, path / "model.safetensors")

    return apply


def add(name: str, t: Tensor) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        save_file(load_file(path / "model.safetensors") | {name: t}, path / "model.safetensors")

    return apply


def say(**changes: Any) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"] |= changes
        (path / "config.json").write_text(json.dumps(config))

    return apply


BROKEN: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a row too few": ("gptq", change("qweight", lambda t: t[:-1]), "does not fit together"),
    "a column too few": ("gptq", change("qweight", lambda t: t[:, :-1]), "does not fit together"),
    "scales of another width": ("gptq", change("scales", lambda t: t[:, :-1]), "does not fit together"),
    "a group too few": ("gptq", change("scales", lambda t: t[:-1]), "does not fit together"),
    "zeros of another width": ("gptq", change("qzeros", lambda t: t[:, :-1]), "does not fit together"),
    "no zeros": ("gptq", change("qzeros", None), "qweight, qzeros and scales are needed"),
    "no scales": ("gptq", change("scales", None), "qweight, qzeros and scales are needed"),
    "no codes": ("gptq", change("qweight", None), r"down_proj\.weight' is missing"),
    "codes of 16 bits": ("gptq", change("qweight", lambda t: t.short()), "stored as torch.int16"),
    "zeros of 64 bits": ("gptq", change("qzeros", lambda t: t.long()), "stored as torch.int64"),
    "scales are numbers": ("gptq", change("scales", lambda t: t.int()), "stored as torch.int32"),
    "a flat part": ("gptq", change("qweight", lambda t: t.flatten()), "does not fit together"),
    "an empty part": ("gptq", change("scales", lambda t: t[:0]), "does not fit together"),
    "order too short": ("gptq", change("g_idx", lambda t: t[:-1]), "does not fit together|wrong shape"),
    "order of two axes": ("gptq", change("g_idx", lambda t: t[None]), "does not fit together"),
    "order leads out": ("gptq", change("g_idx", lambda t: t + 1), "g_idx runs from 1 to 5, there are 5"),
    "order below nothing": ("gptq", change("g_idx", lambda t: t - 1), "g_idx runs from -1"),
    "order of floats": ("gptq", change("g_idx", lambda t: t.float()), "stored as torch.float32"),
    "stored twice": ("gptq", add(f"{LINEAR}.weight", torch.zeros(64, 160)), "stored twice"),
    "other shape than the config": ("gptq", change("g_idx", None), ""),
    "marlin": ("gptq", say(checkpoint_format="marlin"), "'marlin'"),
    "marlin, old": ("gptq", say(is_marlin_format=True), "can't read"),
    "planes": ("gptq", say(checkpoint_format="gptq_p"), "'gptq_p'"),
    "a version of AWQ": ("awq", say(version="gemv"), "'gemv'"),
    "awq: a row too few": ("awq", change("qweight", lambda t: t[:-1]), "does not fit together|wrong shape"),
    "awq: a column too few": ("awq", change("qweight", lambda t: t[:, :-1]), "does not fit together"),
    "awq: with an order": ("awq", add(f"{LINEAR}.g_idx", torch.zeros(160).int()), "does not fit together"),
    "floating codes": ("gptq", say(quant_method="auto-round", data_type="mx_fp"), "'mx_fp'"),
    "activations too": ("gptq", say(quant_method="auto-round", act_bits=8), "act_bits 8"),
    "unknown packing": ("gptq", say(quant_method="auto-round", packing_format="auto_round:mlx"), "auto_round:mlx"),
    "rotated": ("gptq", say(quant_method="auto-round", rotation_config={"a": 1}), "rotation_config"),
    "groups are odd": ("gptq", say(group_size="many"), ""),
    "bits are odd": ("gptq", say(bits=[4] * 10_000), ""),
}


@pytest.mark.parametrize(("kind", "damage", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_and_hostile_folders(tmp_path: Path, kind: str, damage: Callable[[Path], None], words: str) -> None:
    said, parts = (awq_said(), awq_parts) if kind == "awq" else (gptq_said(), gptq_parts)
    folder = foreign_folder(tmp_path / "m", said, parts, symmetric=kind == "gptq")
    damage(folder.path)
    if not words:
        # the shapes alone say enough
        assert torch.equal(folder.read(f"{LINEAR}.weight"), folder.weights[f"{LINEAR}.weight"])
        return
    with pytest.raises(FewbitError, match=words) as caught:
        fewbit.load(folder.path)
    assert all(caught.value.to_dict().values())
    assert len(str(caught.value)) < 2000


def test_a_broken_order_of_compressed_tensors(tmp_path: Path) -> None:
    folder = foreign_folder(tmp_path / "m", ct_said(4, True, 32, "group"), ct_ordered)
    change("weight_g_idx", lambda t: t + 1)(folder.path)
    with pytest.raises(FewbitError, match="g_idx runs from 1"):
        fewbit.load(folder.path)
    change("weight_g_idx", lambda t: t[:-1])(folder.path)
    with pytest.raises(FewbitError, match="does not fit together"):
        fewbit.load(folder.path)


def test_an_order_that_is_partly_unset(tmp_path: Path) -> None:
    folder = foreign_folder(tmp_path / "m", ct_said(4, True, 32, "group"), ct_ordered, shuffled=True)
    change("weight_g_idx", lambda t: torch.cat([t[:1] * 0 - 1, t[1:]]))(folder.path)
    with pytest.raises(FewbitError, match="g_idx runs from -1"):
        fewbit.load(folder.path)


def scheme(**changes: Any) -> Callable[[Path], None]:
    said = ct_said(4, True, 32, None)["config_groups"]["group_0"]
    return say(config_groups={"group_0": said | {"weights": said["weights"] | changes}})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (say(kv_cache_scheme={"num_bits": 8, "type": "float"}), "kv_cache_scheme is set"),
        (say(transform_config={"config_groups": {"u": {}}}), "transform_config is set"),
        (say(config_groups={"g": {"targets": ["Linear"], "input_activations": {"num_bits": 8}}}), "input_activations"),
        (scheme(type="float"), "group_0 says type 'float', num_bits 4"),
        (scheme(strategy="tensor_group"), "strategy 'tensor_group'"),
        (say(config_groups={}), "Nothing says in which format"),
        (scheme(num_bits=6), "does not fit together"),
        (say(config_groups={"g": {"targets": [f"re:{'(?:' * 5}ab?{'){99}' * 5}"]}}), "repeats too often"),
    ],
)
def test_what_is_not_read_of_compressed_tensors_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    folder = foreign_folder(tmp_path / "m", ct_said(4, True, 32, None), ct_parts)
    damage(folder.path)
    with pytest.raises(FewbitError, match=words) as caught:
        fewbit.load(folder.path)
    assert all(caught.value.to_dict().values())
    assert len(str(caught.value)) < 2000


def test_six_bits_five_to_a_word_are_not_taken_for_dense_ones(tmp_path: Path) -> None:
    """The padded packing that compressed-tensors wrote before its version 0.20."""

    def padded(m: Made, bits: int) -> dict[str, Tensor]:
        fives = torch.nn.functional.pad(m.codes.t(), (0, -len(m.codes) % 5)).unflatten(1, (-1, 5))
        words = (fives.long() << (6 * torch.arange(5))).sum(-1)
        return ct_parts(m, bits) | {"weight_packed": words.int()}

    folder = foreign_folder(tmp_path / "m", ct_said(6, True, 32, None), padded, bits=6)
    with pytest.raises(FewbitError, match="does not fit together"):
        fewbit.load(folder.path)


def test_a_tensor_without_a_name_before_its_part_is_ignored(tmp_path: Path) -> None:
    folder = foreign_folder(tmp_path / "m", gptq_said(), gptq_parts)
    add(".qweight", torch.zeros(4, 4).int())(folder.path)
    same_weights(folder, "int4g32")


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_random_damage_is_an_error_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "m"
    write_folder(path, fuzzed(), num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_attention_heads=2)
    say_all = json.loads((path / "config.json").read_text()) | {"quantization_config": gptq_said(desc_act=True)}
    (path / "config.json").write_text(json.dumps(say_all))
    file = path / "model.safetensors"
    raw = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    with suppress(FewbitError):
        source = open_source(path)
        for w in source.weights:
            q = source.read(w.name)
            assert parse(q.spec).dequantize(q).shape == w.shape


def fuzzed() -> dict[str, Tensor]:
    config = CONFIG | {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    found: dict[str, Tensor] = {}
    for name, w in random_weights(config, torch.float16).items():
        if "_proj" not in name:
            found[name] = w
            continue
        n, k = w.shape
        order = (torch.arange(k) % max(1, k // 32)).int()
        codes, zeros = torch.zeros(k // 8, n).int(), torch.zeros(-(-k // 32), n // 8).int()
        parts = {"qweight": codes, "qzeros": zeros, "scales": torch.ones(-(-k // 32), n).half(), "g_idx": order}
        found |= {f"{name.removesuffix('.weight')}.{part}": t for part, t in parts.items()}
    return found
