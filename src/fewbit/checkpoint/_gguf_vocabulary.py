"""The vocabulary in a GGUF file's metadata, checked: what every kind of tokenizer begins with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from fewbit.errors import FewbitError

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# found in the text before it is split
ADDED: Final = (UNKNOWN, CONTROL, USER_DEFINED)
# more than that no model has; a bound on what the merges are searched in
LONGEST_TOKEN = 1 << 10


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of the file called `name`, with the type of each, as numbers of `tokenizer.ggml.token_type`."""

    name: str
    metadata: dict[str, Any] = field(repr=False)
    tokens: list[str] = field(repr=False)
    types: list[int] = field(repr=False)
    ids: dict[str, int] = field(repr=False)

    @classmethod
    def read(cls, metadata: dict[str, Any], name: str) -> Vocabulary:
        """FewbitError where the metadata contradicts itself. Empty tokens get a name of their own, as in llama.cpp:
        they only keep their place.
        """
        stored = strings(metadata, "tokens", name)
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(stored)]
        ids = {token: i for i, token in enumerate(tokens)}
        if len(ids) != len(tokens):
            first = next(i for i, token in enumerate(tokens) if ids[token] != i)
            contradiction(name, f"the token {tokens[first][:40]!r} has the ids {first} and {ids[tokens[first]]}")
        types = metadata.get("tokenizer.ggml.token_type", [])
        wrong = isinstance(types, str) or not isinstance(types, Sequence) or len(types) not in (0, len(tokens))
        if wrong or not all(isinstance(kind, int) for kind in types):
            contradiction(name, f"tokenizer.ggml.token_type does not give one type for each of {len(tokens)} tokens")
        # a name that was made up is never looked for
        kinds = [kind if token else NORMAL for kind, token in zip(types, stored, strict=True)] if types else []
        return cls(name, metadata, tokens, kinds or [NORMAL] * len(tokens), ids)

    def id(self, key: str) -> int | None:
        """The token id under a key such as `bos_token_id`; None where the metadata has none."""
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(self.tokens):
            contradiction(self.name, f"tokenizer.ggml.{key} is {str(value)[:40]} in a vocabulary of {len(self.tokens)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A yes or no."""
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, bool):
            contradiction(self.name, f"tokenizer.ggml.{key} is {str(value)[:40]}, neither true nor false")
        return value

    def scores(self) -> list[float]:
        """A number for each token."""
        found = self.metadata.get("tokenizer.ggml.scores")
        wrong = isinstance(found, str) or not isinstance(found, Sequence) or len(found) != len(self.tokens)
        if found is None or wrong or not all(isinstance(score, int | float) for score in found):
            contradiction(
                self.name, f"tokenizer.ggml.scores does not give a number for each of {len(self.tokens)} tokens"
            )
        scores = [float(score) for score in found]
        if any(score != score for score in scores):
            contradiction(self.name, "tokenizer.ggml.scores holds NaN")
        return scores


def strings(metadata: dict[str, Any], key: str, name: str) -> Sequence[str]:
    """An array of strings that is not empty."""
    items: Sequence[Any] | None = metadata.get(f"tokenizer.ggml.{key}")
    wrong = isinstance(items, str) or not isinstance(items, Sequence) or not items
    if items is None or wrong or not all(isinstance(item, str) for item in items):
        contradiction(name, f"tokenizer.ggml.{key} is not an array of strings")
    return items


def contradiction(name: str, facts: str) -> NoReturn:
    """What is wrong with the tokenizer, in words."""
    raise FewbitError(
        f"The tokenizer in {name} contradicts itself.", f"In its metadata, {facts}.", "Convert the model again."
    )
