"""Gemma 2: norms before and behind each branch, windows in every second layer, scores and logits held by tanh."""

from __future__ import annotations

from typing import Any

from fewbit.config_values import flag, number, real
from fewbit.models._decoder import MOST_WIDTH, SHARED, Args, causal_only, common, layer_count, sliding, windows
from fewbit.models._gemma import DEFAULTS, SANDWICH, gguf_gemma, soft_cap
from fewbit.models._gguf import Read, as_they_are, config_of, head_width, metadata_of, rope_of, said, table

BLOCK, Block, Model, feeds, producers, rope, weights = SHARED


# what a config leaves out; null is none
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
# of the 27B model, whose scores are scaled by the width of the hidden state over its heads
LARGEST_LAYERS = 46


def args(config: dict[str, Any]) -> Args:
    """Checked facts of a config.json; FewbitError names the key that is off."""
    config = DEFAULTS | CAPS | {"max_position_embeddings": 8192, "vocab_size": 256000} | config
    causal_only(config)
    slides = sliding(config, [i % 2 == 0 for i in range(layer_count(config))])
    biased = flag(config, "attention_bias")
    return common(
        config,
        names=SANDWICH,
        qkv_bias=biased,
        o_bias=biased,
        windows=windows(config, slides),
        scale=real(config, "query_pre_attn_scalar", 256.0, 1e-6, 1e6) ** -0.5,
        soft_cap=soft_cap(config, "attn_logit_softcapping"),
        final_soft_cap=soft_cap(config, "final_logit_softcapping"),
        embedding_scale=number(config, "hidden_size", most=MOST_WIDTH) ** 0.5,
        norm_offset=1.0,
    )


GGUF = table(SANDWICH)
gguf_rows = as_they_are


def gguf_config(metadata: dict[str, Any], names: set[str], read: Read) -> dict[str, Any]:
    """config.json of a GGUF file: its metadata, the tensor names it has, and a reader for small tensors."""
    theirs = metadata_of(metadata, "gemma2")
    config = config_of(theirs, names, "gemma2", "Gemma2ForCausalLM") | gguf_gemma(theirs, LARGEST_LAYERS)
    config["attn_logit_softcapping"] = theirs.get("attn_logit_softcapping", 50.0)
    config["final_logit_softcapping"] = theirs.get("final_logit_softcapping", 30.0)
    config["rope_parameters"] = rope_of(theirs, names, read, head_width(config))
    return said(config)
