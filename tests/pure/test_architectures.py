"""Configs of every architecture: public models have their public sizes, and hostile values are errors."""

from __future__ import annotations

import json
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fewbit
from fewbit.errors import FewbitError
from fewbit.models import find_model
from fewbit.rotary import RopeArgs
from fewbit.runtime.cache import Sequence
from fewbit.shapes import SHAPES
from fewbit.source import open_source
from tests.conftest import random_weights, write_folder
from tests.models.decoders import FACTORS, MODELS, config_of

# as the publishers round them, in billions
PARAMETERS = {
    "llama-3.1-8b": 8.03, "llama-3.2-1b": 1.24, "smollm2-135m": 0.135, "smollm3-3b": 3.08, "mistral-7b": 7.25,
    "mixtral-8x7b": 46.7, "qwen2.5-0.5b": 0.494, "qwen2.5-7b": 7.62, "qwen3-0.6b": 0.596, "qwen3-8b": 8.19,
    "qwen3-30b-a3b": 30.5, "gemma-2-2b": 2.61, "gemma-2-9b": 9.24, "gemma-2-27b": 27.2, "gemma-3-1b": 1.0,
    "gemma-3-4b": 3.88, "gemma-3-12b": 11.8, "phi-3-mini": 3.82, "phi-4": 14.7, "olmo-2-7b": 7.30,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shape_has_its_models_size(name: str) -> None:
    module = find_model(SHAPES[name]["model_type"])
    count = sum(prod(w.shape) for w in module.weights(module.args(SHAPES[name])))
    assert count / 1e9 == pytest.approx(PARAMETERS[name], rel=0.005)


def test_every_architecture_has_a_shape() -> None:
    assert {shape["model_type"] for shape in SHAPES.values()} == set(MODELS)


HOSTILE: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"sliding_window": -1}, "sliding_window"),
    ("mistral", {"sliding_window": "wide"}, "sliding_window"),
    ("qwen2", {"use_sliding_window": 1}, "use_sliding_window"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": "x"}, "max_window_layers"),
    ("qwen3", {"attention_bias": "yes"}, "attention_bias"),
    ("gemma2", {"layer_types": ["sliding_attention"]}, "layer_types"),
    ("gemma2", {"layer_types": ["linear_attention"] * 4}, "layer_types"),
    ("gemma2", {"layer_types": [[]] * 4}, "layer_types"),
    ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping"),
    ("gemma2", {"final_logit_softcapping": float("nan")}, "final_logit_softcapping"),
    ("gemma2", {"query_pre_attn_scalar": -4}, "query_pre_attn_scalar"),
    ("gemma2", {"use_bidirectional_attention": True}, "no language model"),
    ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
    ("gemma3_text", {"rope_parameters": {"full_attention": 3}}, "rotary parameters"),
    ("gemma3_text", {"rope_local_base_freq": "x", "rope_parameters": None}, "rope_local_base_freq"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    ("smollm3", {"no_rope_layers": [1, 0, 1, "0"]}, "no_rope_layers"),
    ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
    ("phi3", {"partial_rotary_factor": 2.0, "rope_parameters": None}, "partial_rotary_factor"),
    ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8}}, "long_factor"),
    ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": "x", "long_factor": "x"}}, "short_factor"),
    (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 5}},
        "rotary parameters",
    ),
    (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [0.0] * 8, "long_factor": [1.0] * 8}},
        "short_factor",
    ),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": "x"}}, "beta_fast"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_theta"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 1e9}}, "factor"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "attention_factor": float("inf")}}, "attention_factor"),
]


@pytest.mark.parametrize(("model", "changes", "key"), HOSTILE)
def test_hostile_values_are_errors(model: str, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(FewbitError, match=key) as caught:
        find_model(model).args(config_of(model, {"num_hidden_layers": 4} | changes))
    assert len(str(caught.value)) < 600


def test_a_stretched_context_is_as_long_as_it_was_stretched_to() -> None:
    config = {"max_position_embeddings": 2048}
    for kind, most in (("dynamic", 8192), ("yarn", 8192), ("linear", 2048)):
        rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
        args = find_model("llama").args(config_of("llama", config | {"rope_parameters": rope}))
        assert args.max_position_embeddings == most


def test_rotations_that_follow_the_context() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 100, **FACTORS}
    args = RopeArgs.from_config({"max_position_embeddings": 400, "rope_parameters": rope})
    plain = RopeArgs(1e4).frequencies(16)
    torch.testing.assert_close(plain / args.frequencies(16, 100), torch.tensor(FACTORS["short_factor"]))
    torch.testing.assert_close(plain / args.frequencies(16, 101), torch.tensor(FACTORS["long_factor"]))
    # Ding et al.: sqrt(1 + ln(4) / ln(100))
    assert args.strength == pytest.approx(1.140627, rel=1e-6)


def test_an_unknown_architecture_says_who_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FewbitError, match="'mamba2' is not supported") as caught:
        find_model("mamba2")
    assert all(model in caught.value.facts for model in MODELS)
    assert "transformers" in caught.value.next_step
    with pytest.raises(FewbitError, match="'qwen99'") as caught:
        find_model("qwen99")
    assert "transformers" not in caught.value.next_step
    # not installed
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(FewbitError, match="'mamba2'") as caught:
        find_model("mamba2")
    assert "transformers" not in caught.value.next_step


@pytest.mark.parametrize("prefixes", [("language_model.", "language_model."), ("", "model.language_model")])
def test_the_language_model_of_a_model_with_images(tmp_path: Path, prefixes: tuple[str, str]) -> None:
    config = config_of("gemma3_text", {"num_hidden_layers": 2})
    text = write_folder(tmp_path / "text", weights := random_weights(config), **config)
    head, inner = prefixes
    renamed = {name.replace("model.", inner + ("model." if head else "."), 1): w for name, w in weights.items()}
    renamed["vision_tower.patch.weight"] = torch.zeros(3, 3)
    whole = write_folder(tmp_path / "whole", weights)
    save_file(renamed, whole / "model.safetensors")
    config.pop("bos_token_id")
    outside = {"model_type": "gemma3", "bos_token_id": 256, "text_config": config, "vision_config": {}}
    (whole / "config.json").write_text(json.dumps(outside))
    source = open_source(whole)
    assert source.config["model_type"] == "gemma3_text"
    assert "images" in source.notes[0]
    assert not open_source(text).notes
    a, b = (fewbit.load(m, exact=True).forward([(Sequence(), [1, 2, 3])]) for m in (whole, text))
    assert torch.equal(a, b)
    # what is written is the language model
    fewbit.quantize(whole, tmp_path / "q", format="int8", head="16bit", method="rtn")
    assert json.loads((tmp_path / "q" / "config.json").read_text())["model_type"] == "gemma3_text"
    assert not open_source(tmp_path / "q").notes
    outside["text_config"] = "none"
    (whole / "config.json").write_text(json.dumps(outside))
    with pytest.raises(FewbitError, match="text_config"):
        open_source(whole)
