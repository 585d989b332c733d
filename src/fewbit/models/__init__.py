"""One module per `model_type` of config.json; the file name is the registry.

A module offers `args(config)` (the checked facts of a config), `weights(args)` (every tensor with its shape and role)
and `Model(args, weights)`; for calibration `Block(args, weights, block)`, `BLOCK` (a block's prefix),
`rope(args, context)`, `feeds(args, block)` and `producers(args, linear)`; where GGUF files of it exist, `GGUF`,
`gguf_config(metadata, names, read)` and `gguf_rows(name, args)`. A module of a model that holds a language model among
other things has `text_part(config)`, `text_name(stored)` and `NOTE` instead.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from fewbit.config_values import shown
from fewbit.errors import FewbitError
from fewbit.lookup import find, names

Role = Literal["embedding", "head", "linear", "router", "norm", "bias"]
# `general.architecture` of a GGUF file -> model_type, where they differ
GGUF_ARCHITECTURES = {"qwen3moe": "qwen3_moe", "gemma3": "gemma3_text"}


@dataclass(frozen=True)
class WeightInfo:
    """One tensor a model needs: canonical name, logical shape, what it does, and its block (None outside blocks)."""

    name: str
    shape: tuple[int, ...]
    role: Role
    block: int | None = None


def find_model(model_type: str) -> ModuleType:
    """The module of an architecture; FewbitError with the list where fewbit does not know it."""
    known = names(__name__)
    if model_type not in known:
        other = "Choose a model of one of these architectures."
        if _transformers_runs(model_type):
            other = (
                f"transformers, which is installed here, knows {shown(model_type)} and can run it in full precision."
            )
        raise FewbitError(
            f"The architecture {shown(model_type)} is not supported.", f"fewbit runs: {', '.join(known)}.", other
        )
    return find(__name__, model_type)


def find_gguf_model(metadata: dict[str, Any]) -> ModuleType:
    """The module for a GGUF file by its metadata; FewbitError where fewbit does not know its architecture."""
    found = str(metadata.get("general.architecture"))
    if found == "llama" and metadata.get("llama.expert_count"):
        # ggml's word for Mixtral
        return find_model("mixtral")
    module = find_model(GGUF_ARCHITECTURES.get(found, found))
    if not hasattr(module, "GGUF"):
        raise FewbitError(
            f"fewbit does not read GGUF files of the architecture {shown(found)}.",
            "llama.cpp writes none of that name.",
            "Use the model's safetensors folder.",
        )
    return module


def _transformers_runs(model_type: str) -> bool:
    """Whether transformers is installed and lists the architecture; no model of it is imported."""
    if importlib.util.find_spec("transformers") is None:
        return False
    try:
        listed = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING_NAMES
    except (ImportError, AttributeError):
        return False
    return model_type in listed
