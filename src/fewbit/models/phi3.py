"""Phi 3, 3.5 and 4: Llama with q, k and v in one tensor, gate and up in another, and longrope for long contexts."""

from __future__ import annotations

from typing import Any

from fewbit.config_values import number
from fewbit.models._decoder import SHARED, Args, Names, common, layer_count, windows
from fewbit.models._gguf import Read, as_they_are, config_of, head_width, longrope_of, metadata_of, said, table

BLOCK, Block, Model, feeds, producers, rope, weights = SHARED


NAMES = Names(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))


def args(config: dict[str, Any]) -> Args:
    """Checked facts of a config.json; FewbitError names the key that is off."""
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if isinstance(rope, dict) and "yarn" in (rope.get("type"), rope.get("rope_type")):
        # an early name of what Phi has
        config = config | {"rope_parameters": rope | {"rope_type": "longrope"}}
    if config.get("original_max_position_embeddings") is None:
        config = config | {"original_max_position_embeddings": 4096}
    return common(config, names=NAMES, windows=windows(config, [True] * layer_count(config)))


GGUF = table(NAMES)
gguf_rows = as_they_are


def gguf_config(metadata: dict[str, Any], names: set[str], read: Read) -> dict[str, Any]:
    """config.json of a GGUF file: its metadata, the tensor names it has, and a reader for small tensors."""
    theirs = metadata_of(metadata, "phi3")
    config = config_of(theirs, names, "phi3", "Phi3ForCausalLM")
    # what the file calls a head's dimensions are those that are turned
    config.pop("head_dim", None)
    head = head_width(config)
    turned = number(theirs, "rope.dimension_count", head, head)
    config["rope_parameters"] = longrope_of(theirs, names, read, turned) | {"partial_rotary_factor": turned / head}
    config["original_max_position_embeddings"] = theirs.get("rope.scaling.original_context_length")
    # 0 stands for none
    config["sliding_window"] = theirs.get("attention.sliding_window") or None
    return said(config)
