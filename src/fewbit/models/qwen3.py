"""Qwen 3: Llama with a norm of each head of queries and keys."""

from __future__ import annotations

from typing import Any

from fewbit.config_values import flag
from fewbit.models._decoder import SHARED, Args, Names, common, upper_windows
from fewbit.models._gguf import Read, as_they_are, config_of, head_width, metadata_of, rope_of, said, table

BLOCK, Block, Model, feeds, producers, rope, weights = SHARED


NAMES = Names(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")


def args(config: dict[str, Any]) -> Args:
    """Checked facts of a config.json; FewbitError names the key that is off."""
    config = {"head_dim": 128} | config
    biased = flag(config, "attention_bias")
    return common(config, names=NAMES, qkv_bias=biased, o_bias=biased, windows=upper_windows(config))


GGUF = table(NAMES)
gguf_rows = as_they_are


def gguf_config(metadata: dict[str, Any], names: set[str], read: Read) -> dict[str, Any]:
    """config.json of a GGUF file: its metadata, the tensor names it has, and a reader for small tensors."""
    theirs = metadata_of(metadata, "qwen3")
    config = config_of(theirs, names, "qwen3", "Qwen3ForCausalLM")
    config["rope_parameters"] = rope_of(theirs, names, read, head_width(config))
    return said(config)
