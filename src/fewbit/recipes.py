"""Which tensor gets which format where one format for all is not the best: tables, and the textbook's rule."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from fewbit.errors import FewbitError
from fewbit.lookup import nearest
from fewbit.models import WeightInfo

# the name of a matrix (`model.layers.0.mlp.down_proj.weight`), or a pattern with *, -> its spec; the first that fits
Table = Mapping[str, str]
# a function does as well: the name -> a spec, or None for the model's one format
Recipe = Table | Callable[[str], str | None]

# the textbook's mixture: attention's outputs and both ends of the model are the most sensitive
BASE, CAREFUL, ENDS = "int4g64", "int8", "int6g64"
MIXED = "mixed"


def mixed(weights: Sequence[WeightInfo]) -> dict[str, str]:
    """4 bits, but 8 for attention's output and the first and last blocks, 6 for embedding and head."""
    last = max((w.block for w in weights if w.block is not None), default=0)
    found = {}
    for w in weights:
        if w.role in ("embedding", "head"):
            found[w.name] = ENDS
        elif w.role == "linear":
            careful = w.block in (0, last) or w.name.endswith("self_attn.o_proj.weight")
            found[w.name] = CAREFUL if careful else BASE
    return found


def read(file: Path) -> dict[str, str]:
    """A JSON object of names or patterns and specs; FewbitError where it is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FewbitError(
            f"The recipe {file.name!r} can't be read.", f"{error}.", 'Give a JSON file: {"*.down_proj.weight": "int8"}.'
        ) from error
    if not isinstance(found, dict) or not all(isinstance(spec, str) for spec in found.values()):
        raise FewbitError(
            f"The recipe {file.name!r} is not a table of formats.",
            "It must be one JSON object: names of tensors, or patterns with *, each with a format.",
            'Write it like {"*.down_proj.weight": "int8"}.',
        )
    return found


def resolved(recipe: Recipe, weights: Sequence[WeightInfo]) -> dict[str, str]:
    """The spec of each matrix the recipe speaks of; FewbitError where a part of a table is for no matrix."""
    names = [w.name for w in weights if w.role in ("linear", "embedding", "head")]
    if callable(recipe):
        specs = {name: recipe(name) for name in names}
        return {name: spec for name, spec in specs.items() if spec is not None}
    found: dict[str, str] = {}
    for pattern, spec in recipe.items():
        fitting = [name for name in names if fnmatchcase(name, pattern)]
        if not fitting:
            raise FewbitError(
                f"The recipe's {pattern[:200]!r} is for no matrix of the model.",
                f"The model has {len(names)} matrices, such as {names[0]!r}.",
                nearest(pattern, names[:1000]),
            )
        for name in fitting:
            found.setdefault(name, spec)
    return found
