"""Llama 1 to 3.x and its kin (SmolLM2): grouped-query attention, rotary positions, RMSNorm, SwiGLU."""

from __future__ import annotations

from typing import Any

from fewbit.config_values import flag
from fewbit.models._decoder import SHARED, Args, Names, common
from fewbit.models._gguf import Read, config_of, head_width, interleaved, metadata_of, rope_of, said, table

BLOCK, Block, Model, feeds, producers, rope, weights = SHARED


def args(config: dict[str, Any]) -> Args:
    """Checked facts of a config.json; FewbitError names the key that is off."""
    biased = flag(config, "attention_bias")
    return common(config, qkv_bias=biased, o_bias=biased, mlp_bias=flag(config, "mlp_bias"))


GGUF = table(Names())
gguf_rows = interleaved


def gguf_config(metadata: dict[str, Any], names: set[str], read: Read) -> dict[str, Any]:
    """config.json of a GGUF file: its metadata, the tensor names it has, and a reader for small tensors."""
    theirs = metadata_of(metadata, "llama")
    config = config_of(theirs, names, "llama", "LlamaForCausalLM")
    config["attention_bias"] = "blk.0.attn_q.bias" in names
    config["mlp_bias"] = "blk.0.ffn_up.bias" in names
    config["rope_parameters"] = rope_of(theirs, names, read, head_width(config))
    return said(config)
