"""Gemma 3's language model: Gemma 2 with norms of q and k instead of a cap, and two rotations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewbit.config_values import flag, number, real, shown
from fewbit.errors import FewbitError
from fewbit.models._decoder import (
    MOST_LAYERS,
    MOST_WIDTH,
    SHARED,
    Args,
    causal_only,
    common,
    layer_count,
    sliding,
    windows,
)
from fewbit.models._gemma import DEFAULTS, SANDWICH, gguf_gemma, soft_cap
from fewbit.models._gguf import Read, as_they_are, config_of, head_width, metadata_of, rope_of, said, table
from fewbit.rotary import RopeArgs

BLOCK, Block, Model, feeds, producers, rope, weights = SHARED


NAMES = replace(SANDWICH, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
# of the 27B model, whose scores are scaled by the width of the hidden state over its heads
LARGEST_LAYERS = 62


def args(config: dict[str, Any]) -> Args:
    """Checked facts of a config.json; FewbitError names the key that is off."""
    config = DEFAULTS | {"max_position_embeddings": 131072, "vocab_size": 262208} | config
    causal_only(config)
    pattern = number(config, "sliding_window_pattern", 6, MOST_LAYERS)
    slides = sliding(config, [(i + 1) % pattern != 0 for i in range(layer_count(config))])
    biased = flag(config, "attention_bias")
    return common(
        config,
        names=NAMES,
        qkv_bias=biased,
        o_bias=biased,
        ropes=_ropes(config),
        rotations=tuple(int(s) for s in slides),
        windows=windows(config, slides),
        scale=real(config, "query_pre_attn_scalar", 256.0, 1e-6, 1e6) ** -0.5,
        final_soft_cap=soft_cap(config, "final_logit_softcapping"),
        embedding_scale=number(config, "hidden_size", most=MOST_WIDTH) ** 0.5,
        norm_offset=1.0,
    )


def _ropes(config: dict[str, Any]) -> tuple[RopeArgs, RopeArgs]:
    """Of layers that see everything, which may be stretched, and of those with a window, which never is."""
    found = config.get("rope_parameters")
    if isinstance(found, dict) and ("full_attention" in found or "sliding_attention" in found):
        every = [found.get(kind) or {} for kind in ("full_attention", "sliding_attention")]
        if not all(isinstance(one, dict) for one in every):
            raise FewbitError(
                "The model's config has no usable rotary parameters.",
                f"rope_parameters is {shown(found)} where a JSON object for each kind of layer belongs.",
                "Check config.json against the original model's.",
            )
        whole, near = every
        return RopeArgs.from_parameters(whole, config, 1e6), RopeArgs.from_parameters(near, {}, 1e4)
    near_theta = real(config, "rope_local_base_freq", 1e4, 1.0, 1e15)
    return RopeArgs.from_config(config, 1e6), RopeArgs(near_theta)


GGUF = table(NAMES)
gguf_rows = as_they_are


def gguf_config(metadata: dict[str, Any], names: set[str], read: Read) -> dict[str, Any]:
    """config.json of a GGUF file: its metadata, the tensor names it has, and a reader for small tensors."""
    theirs = metadata_of(metadata, "gemma3")
    config = config_of(theirs, names, "gemma3_text", "Gemma3ForCausalLM") | gguf_gemma(theirs, LARGEST_LAYERS)
    config["final_logit_softcapping"] = theirs.get("final_logit_softcapping")
    near = {"rope_type": "default", "rope_theta": real(theirs, "rope.freq_base_swa", 1e4, 1.0, 1e15)}
    whole = rope_of(theirs, names, read, head_width(config), 1e6)
    config["rope_parameters"] = {"full_attention": whole, "sliding_attention": near}
    if config["sliding_window"] is None:
        # what a converter leaves out where no layer has one
        config["layer_types"] = ["full_attention"] * layer_count(config)
    return said(config)
