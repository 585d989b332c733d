"""Gemma 3 with images: fewbit reads its language model, which is gemma3_text."""

from __future__ import annotations

from typing import Any

from fewbit.config_values import shown
from fewbit.errors import FewbitError

# before and after transformers 4.52
PREFIXES = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "model.language_model.": "model."}
NOTE = "The language model alone is read: fewbit does not look at images."


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the language model; FewbitError where there is none."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise FewbitError(
            "The model's config has no usable 'text_config'.",
            f"Found {shown(text)} where a JSON object belongs.",
            "Check config.json against the original model's.",
        )
    outside = {key: config[key] for key in ("bos_token_id", "eos_token_id", "dtype", "torch_dtype") if key in config}
    named = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    return outside | text | named


def text_name(stored: str) -> str | None:
    """The name a tensor has in the language model; None for one that belongs to the images."""
    for prefix, ours in PREFIXES.items():
        if stored.startswith(prefix):
            return ours + stored.removeprefix(prefix)
    return stored if stored.startswith("lm_head.") else None
