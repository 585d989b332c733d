"""Qwen 3 with experts: a layer is Qwen 3's, but for the mixture in most of them."""

from __future__ import annotations

from typing import Any

from fewbit.config_values import flag, number, shown
from fewbit.errors import FewbitError
from fewbit.models._decoder import MOST_LAYERS, MOST_WIDTH, SHARED, Args, Names, common, experts, layer_count, windows
from fewbit.models._gguf import Read, as_they_are, config_of, head_width, metadata_of, rope_of, said, table

BLOCK, Block, Model, feeds, producers, rope, weights = SHARED


NAMES = Names(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")


def args(config: dict[str, Any]) -> Args:
    """Checked facts of a config.json; FewbitError names the key that is off."""
    layers, biased = layer_count(config), flag(config, "attention_bias")
    step, plain = number(config, "decoder_sparse_step", 1, MOST_LAYERS), config.get("mlp_only_layers") or []
    if not isinstance(plain, list):
        raise FewbitError(
            "The model's config has no usable 'mlp_only_layers'.",
            f"Found {shown(plain)} where a list of layers belongs.",
            "Check config.json against the original model's.",
        )
    slides = flag(config, "use_sliding_window")
    return common(
        config,
        names=NAMES,
        qkv_bias=biased,
        o_bias=biased,
        windows=windows(config, [slides] * layers),
        sparse=tuple(i not in plain and (i + 1) % step == 0 for i in range(layers)),
        expert_size=number(config, "moe_intermediate_size", 768, MOST_WIDTH),
        **experts(config, "num_experts", 128, 8, flag(config, "norm_topk_prob")),
    )


GGUF = table(NAMES, sparse=True)
gguf_rows = as_they_are


def gguf_config(metadata: dict[str, Any], names: set[str], read: Read) -> dict[str, Any]:
    """config.json of a GGUF file: its metadata, the tensor names it has, and a reader for small tensors."""
    theirs = metadata_of(metadata, "qwen3moe")
    config = config_of(theirs, names, "qwen3_moe", "Qwen3MoeForCausalLM")
    # llama.cpp knows files whose layers all have experts, of weights that sum to one
    config |= {"decoder_sparse_step": 1, "norm_topk_prob": True, "mlp_only_layers": []}
    config["num_experts"], config["num_experts_per_tok"] = theirs.get("expert_count"), theirs.get("expert_used_count")
    config["moe_intermediate_size"] = theirs.get("expert_feed_forward_length")
    config["rope_parameters"] = rope_of(theirs, names, read, head_width(config))
    return said(config)
