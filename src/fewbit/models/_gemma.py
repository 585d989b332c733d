"""What Gemma 2 and 3 have in common."""

from __future__ import annotations

from typing import Any

from fewbit.config_values import number, real
from fewbit.models._decoder import MOST_HEADS, MOST_WIDTH, Names

# configs leave out what equals these
DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
# a norm before each branch, and one of what it gives
SANDWICH = Names(
    attention_after="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_after="post_feedforward_layernorm",
)


def soft_cap(config: dict[str, Any], key: str) -> float:
    """What scores or logits are held by; 0 where they are not."""
    return 0.0 if config.get(key) is None else real(config, key, None, 1e-3, 1e9)


def gguf_gemma(theirs: dict[str, Any], largest: int) -> dict[str, Any]:
    """What a GGUF file says, and what llama.cpp knows of the model with `largest` layers."""
    head = number(theirs, "attention.key_length", 256, MOST_WIDTH)
    width = number(theirs, "embedding_length", most=MOST_WIDTH)
    heads = number(theirs, "attention.head_count", most=MOST_HEADS)
    return {
        "hidden_act": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": head,
        "query_pre_attn_scalar": width // heads if theirs.get("block_count") == largest else head,
        "sliding_window": theirs.get("attention.sliding_window"),
    }
