"""Qwen 2 and 2.5: Llama with biases at queries, keys and values, and windows in upper layers where asked for."""

from __future__ import annotations

from typing import Any

from fewbit.models._decoder import SHARED, Args, Names, common, upper_windows
from fewbit.models._gguf import Read, as_they_are, config_of, head_width, metadata_of, rope_of, said, table

BLOCK, Block, Model, feeds, producers, rope, weights = SHARED


def args(config: dict[str, Any]) -> Args:
    """Checked facts of a config.json; FewbitError names the key that is off."""
    return common(config, qkv_bias=True, windows=upper_windows(config))


GGUF = table(Names())
gguf_rows = as_they_are


def gguf_config(metadata: dict[str, Any], names: set[str], read: Read) -> dict[str, Any]:
    """config.json of a GGUF file: its metadata, the tensor names it has, and a reader for small tensors."""
    theirs = metadata_of(metadata, "qwen2")
    config = config_of(theirs, names, "qwen2", "Qwen2ForCausalLM")
    config["rope_parameters"] = rope_of(theirs, names, read, head_width(config))
    return said(config)
