"""Tables of formats by tensor, and the textbook's mixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fewbit.errors import FewbitError
from fewbit.models import WeightInfo
from fewbit.recipes import mixed, read, resolved

LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
WEIGHTS = [
    WeightInfo("model.embed_tokens.weight", (64, 32), "embedding"),
    *(WeightInfo(f"model.layers.{i}.{n}.weight", (32, 32), "linear", i) for i in range(3) for n in LINEARS),
    *(WeightInfo(f"model.layers.{i}.input_layernorm.weight", (32,), "norm", i) for i in range(3)),
    WeightInfo("lm_head.weight", (64, 32), "head"),
]


def test_the_textbook_mixture() -> None:
    found = mixed(WEIGHTS)
    assert found.pop("model.embed_tokens.weight") == found.pop("lm_head.weight") == "int6g64"
    assert {n for n, spec in found.items() if spec == "int4g64"} == {
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    }
    assert {spec for n, spec in found.items() if ".0." in n or ".2." in n or "o_proj" in n} == {"int8"}
    assert len(found) == 9


def test_the_first_pattern_that_fits_counts() -> None:
    table = {"*.1.mlp.down_proj.weight": "int2g64", "*down_proj*": "int8", "model.embed_tokens.weight": "int6g64"}
    assert resolved(table, WEIGHTS) == {
        "model.layers.1.mlp.down_proj.weight": "int2g64",
        "model.layers.0.mlp.down_proj.weight": "int8",
        "model.layers.2.mlp.down_proj.weight": "int8",
        "model.embed_tokens.weight": "int6g64",
    }


def test_a_function_is_a_recipe() -> None:
    found = resolved(lambda name: "int8" if "q_proj" in name else None, WEIGHTS)
    assert found == {f"model.layers.{i}.self_attn.q_proj.weight": "int8" for i in range(3)}


def test_a_pattern_for_nothing_is_named() -> None:
    with pytest.raises(FewbitError, match="for no matrix") as raised:
        resolved({"model.layers.0.mlp.down_prj.weight": "int8"}, WEIGHTS)
    assert "model.layers.0.mlp.down_proj.weight" in raised.value.next_step


@pytest.mark.parametrize("content", ["[1]", "{", '{"a": 1}', "[" * 100_000])
def test_what_is_no_table(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "r.json"
    file.write_text(content)
    with pytest.raises(FewbitError, match="The recipe"):
        read(file)
    file.write_text(json.dumps({"*": "int8"}))
    assert read(file) == {"*": "int8"}
