"""Tiny configs of every architecture: the plain one comes with the file in fewbit/models, more where options matter."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from fewbit.lookup import names
from tests.conftest import CONFIG, random_weights, write_folder

# models that wrap one of the others
WRAPPERS = {"gemma3"}
MODELS = [name for name in names("fewbit.models") if name not in WRAPPERS]
TINY = {key: value for key, value in CONFIG.items() if key not in ("architectures", "attention_bias", "mlp_bias")} | {
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "dtype": "float32",
}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4} | more}


UNTIED = {"tie_word_embeddings": False}
SHORT = {"max_position_embeddings": 64}
FACTORS = {"short_factor": [1 + i / 8 for i in range(8)], "long_factor": [2 + i / 2 for i in range(8)]}
# what a model can't do without, whatever the case
NEEDED: dict[str, dict[str, Any]] = {
    # from their files alone, configs would describe models of the published sizes
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 24},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 24, "rope_parameters": None},
    "phi3": {"pad_token_id": 0},
    "smollm3": {"pad_token_id": 0},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "linear": rope("linear", factor=4.0),
        "dynamic": {"max_position_embeddings": 16} | rope("dynamic", factor=3.0),
        "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=16),
        "yarn, its own temperature": rope(
            "yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=0.9, truncate=False
        ),
        "longrope, long": SHORT | rope("longrope", original_max_position_embeddings=16, **FACTORS),
        "longrope, short": SHORT | rope("longrope", original_max_position_embeddings=48, **FACTORS),
        "biases": {"attention_bias": True, "mlp_bias": True},
    },
    "mistral": {"window": {"sliding_window": 8} | UNTIED, "no window": {"sliding_window": None, "head_dim": 32}},
    "mixtral": {"window": {"sliding_window": 8, "num_experts_per_tok": 3} | UNTIED},
    "qwen2": {
        "windows above": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2} | UNTIED,
        "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=32),
    },
    "qwen3": {
        "biases": {"attention_bias": True, "head_dim": 32},
        "windows": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    },
    "qwen3_moe": {
        "some layers plain": {"mlp_only_layers": [1], "decoder_sparse_step": 1, "norm_topk_prob": False} | UNTIED,
        "every second layer": {"decoder_sparse_step": 2, "attention_bias": True},
    },
    "gemma2": {
        "no caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        "low caps": {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.0, "attention_bias": True},
    },
    "gemma3_text": {
        "pattern": {
            "layer_types": ["full_attention", *["sliding_attention"] * 3],
            "final_logit_softcapping": 2.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        "as written before": {
            "sliding_window_pattern": 2,
            "rope_parameters": None,
            "rope_theta": 1e5,
            "rope_local_base_freq": 5e3,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
    },
    "phi3": {
        "window": {"sliding_window": 8} | UNTIED,
        "longrope, long": {
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 16,
            **rope("longrope", **FACTORS),
        },
        "part of a head": {"head_dim": 16, **rope("default", partial_rotary_factor=0.5)},
        "longrope of a part": {
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 128,
            **rope("longrope", partial_rotary_factor=0.75, short_factor=[1.0] * 6, long_factor=[2.0] * 6),
        },
    },
    "smollm3": {
        "no positions in two": {"no_rope_layers": [1, 0, 0, 1], "attention_bias": True, "mlp_bias": True},
        "windows": {"use_sliding_window": True, "sliding_window": 6, "no_rope_layer_interval": 2} | UNTIED,
    },
    "olmo2": {"biases, all heads": {"attention_bias": True, "num_key_value_heads": 4} | UNTIED},
}
CASES = [(model, {}) for model in MODELS] + [(model, case) for model in OPTIONS for case in OPTIONS[model].values()]
CASE_NAMES = [*MODELS, *(f"{model}: {case}" for model in OPTIONS for case in OPTIONS[model])]


def config_of(model: str, changes: dict[str, Any]) -> dict[str, Any]:
    """A whole config.json; None in `changes` takes a key of the tiny config away, or stands in the file as null."""
    config = TINY | NEEDED.get(model, {}) | {"model_type": model} | changes
    return {key: value for key, value in config.items() if value is not None or key not in TINY}


def written(path: Path, model: str, changes: dict[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    """A folder of the tiny model with random weights."""
    config = config_of(model, changes)
    folder = write_folder(path, random_weights(config, dtype), **config)
    for key in set(CONFIG) - set(config):
        _drop(folder, key)
    return folder


def _drop(folder: Path, key: str) -> None:
    import json

    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.pop(key, None)
    file.write_text(json.dumps(config))


def transformers_model(folder: Path) -> Any:
    """The same model in transformers, which found every tensor it wanted and no other."""
    auto = importlib.import_module("transformers").AutoModelForCausalLM
    model, info = auto.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    return model.eval()
