"""Mixtral (Jiang et al. 2024): Mistral with experts in every layer."""

from __future__ import annotations

from typing import Any

from fewbit.config_values import number
from fewbit.models._decoder import MOST_WIDTH, SHARED, Args, Names, common, experts, layer_count, windows
from fewbit.models._gguf import Read, config_of, head_width, interleaved, metadata_of, rope_of, said, table
from fewbit.rotary import RopeArgs

BLOCK, Block, Model, feeds, producers, rope, weights = SHARED


NAMES = Names(
    router="block_sparse_moe.gate",
    expert_gate="block_sparse_moe.experts.{}.w1",
    expert_up="block_sparse_moe.experts.{}.w3",
    expert_down="block_sparse_moe.experts.{}.w2",
)


def args(config: dict[str, Any]) -> Args:
    """Checked facts of a config.json; FewbitError names the key that is off."""
    config = {"rms_norm_eps": 1e-5} | config
    layers = layer_count(config)
    return common(
        config,
        ropes=(RopeArgs.from_config(config, 1e6),),
        names=NAMES,
        windows=windows(config, [True] * layers),
        sparse=(True,) * layers,
        expert_size=number(config, "intermediate_size", most=MOST_WIDTH),
        **experts(config, "num_local_experts", 8, 2),
    )


GGUF = table(NAMES, sparse=True)
gguf_rows = interleaved


def gguf_config(metadata: dict[str, Any], names: set[str], read: Read) -> dict[str, Any]:
    """config.json of a GGUF file: its metadata, the tensor names it has, and a reader for small tensors."""
    theirs = metadata_of(metadata, "llama")
    config = config_of(theirs, names, "mixtral", "MixtralForCausalLM")
    config["num_local_experts"], config["num_experts_per_tok"] = theirs["expert_count"], theirs.get("expert_used_count")
    config["rope_parameters"] = rope_of(theirs, names, read, head_width(config))
    return said(config)
