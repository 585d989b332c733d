"""One module per `model_type` of config.json; the file name is the registry.

A module offers `Args.from_config(config)`, `Model(args, weights)`, `weights(args)` (every tensor with its shape and
role) and, where GGUF files of it exist, `GGUF`, `gguf_config(metadata, read)` and `gguf_rows(name, args)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from fewbit.config_values import shown
from fewbit.errors import FewbitError
from fewbit.lookup import find, names

Role = Literal["embedding", "head", "linear", "norm", "bias"]


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
        raise FewbitError(
            f"The architecture {shown(model_type)} is not supported.",
            f"fewbit runs: {', '.join(known)}.",
            "Choose a model of one of these architectures.",
        )
    return find(__name__, model_type)
