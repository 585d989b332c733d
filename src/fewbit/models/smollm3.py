"""SmolLM 3: Llama in which every fourth layer knows no positions (NoPE, Kazemnejad et al. 2023)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewbit.config_values import flag, number, shown
from fewbit.errors import FewbitError
from fewbit.models._decoder import MOST_LAYERS, SHARED, Args, Names, common, layer_count, sliding, windows
from fewbit.models._gguf import Read, config_of, head_width, interleaved, metadata_of, rope_of, said, table
from fewbit.rotary import RopeArgs

BLOCK, Block, Model, feeds, producers, rope, weights = SHARED


def args(config: dict[str, Any]) -> Args:
    """Checked facts of a config.json; FewbitError names the key that is off."""
    config = {"tie_word_embeddings": True, "num_key_value_heads": 4} | config
    layers, biased = layer_count(config), flag(config, "attention_bias")
    turns = config.get("no_rope_layers")
    if turns is None:
        step = number(config, "no_rope_layer_interval", 4, MOST_LAYERS)
        turns = [int((i + 1) % step != 0) for i in range(layers)]
    if not isinstance(turns, list) or len(turns) < layers or any(t not in (0, 1) for t in turns):
        raise FewbitError(
            "The model's config has no usable 'no_rope_layers'.",
            f"Found {shown(turns)} where a 1 or 0 for each of {layers} layers belongs.",
            "Check config.json against the original model's.",
        )
    slides = flag(config, "use_sliding_window")
    turning = RopeArgs.from_config(config, 2e6)
    return common(
        config,
        ropes=(turning, replace(turning, kind="none", strength=1.0)),
        rotations=tuple(0 if t else 1 for t in turns[:layers]),
        windows=windows(config, sliding(config, [slides and not t for t in turns[:layers]])),
        qkv_bias=biased,
        o_bias=biased,
        mlp_bias=flag(config, "mlp_bias"),
    )


GGUF = table(Names())
gguf_rows = interleaved


def gguf_config(metadata: dict[str, Any], names: set[str], read: Read) -> dict[str, Any]:
    """config.json of a GGUF file: its metadata, the tensor names it has, and a reader for small tensors."""
    theirs = metadata_of(metadata, "smollm3")
    config = config_of(theirs, names, "smollm3", "SmolLM3ForCausalLM")
    config["no_rope_layer_interval"] = 4
    config["attention_bias"] = "blk.0.attn_q.bias" in names
    config["mlp_bias"] = "blk.0.ffn_up.bias" in names
    config["rope_parameters"] = rope_of(theirs, names, read, head_width(config), 2e6)
    return said(config)
