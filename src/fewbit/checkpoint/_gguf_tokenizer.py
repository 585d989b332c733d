"""The tokenizer inside a GGUF file, rewritten as the tokenizer.json it came from.

GGUF keeps the vocabulary, the merges and the type of each token, and only names the pre-tokenizer. The table below
says what each name stands for: the expressions llama.cpp uses for it (`src/llama-vocab.cpp`), in the form the
original tokenizer.json has where that is known (Digits, ByteLevel, NFC), so both give the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from fewbit.checkpoint import TokenizerData
from fewbit.errors import FewbitError
from fewbit.lookup import nearest

# tokenizer.ggml.token_type
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_Step = dict[str, Any]


def _split(pattern: str) -> _Step:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level(regex: bool) -> _Step:
    """Bytes as printable characters; with `regex`, after a split by GPT-2's expression."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}


_DIGITS: Final[_Step] = {"type": "Digits", "individual_digits": True}


@dataclass(frozen=True)
class _Pre:
    """What one name of `tokenizer.ggml.pre` stands for.

    whole_words  a word that is a token as a whole skips the merges (`ignore_merges`)
    add_bos      the default where the metadata has no `add_bos_token`
    """

    steps: tuple[_Step, ...]
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False


_GPT2 = _Pre((_byte_level(True),))
_DIGITS_GPT2 = _Pre((_DIGITS, _byte_level(True)))
_LLAMA3_PRE = _Pre((_split(_LLAMA3), _byte_level(False)), whole_words=True, add_bos=True)
_QWEN2_STEPS = (_split(_QWEN2), _byte_level(False))
# ByteLevel comes last: some of its characters for bytes are numerals (¼ ½ ¾ ¹ ² ³) to the expressions before it
_DEFAULT = _Pre(
    (
        _split(r"[\p{P}\$\+<=>\^~\|]+"),
        _split(_GPT2_WORDS),
        _split(r"\p{N}+"),
        _split("[0-9][0-9][0-9]"),
        _byte_level(False),
    )
)

PRE_TOKENIZERS: Final[dict[str, _Pre]] = {
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _DIGITS_GPT2),
    "command-r": _Pre(_DIGITS_GPT2.steps, nfc=True),
    **dict.fromkeys(("gpt-2", "phi-2"), _GPT2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3_PRE),
    "qwen2": _Pre(_QWEN2_STEPS, nfc=True),
    "deepseek-r1-qwen": _Pre(_QWEN2_STEPS),
    "default": _DEFAULT,
}


def convert(metadata: dict[str, Any], name: str) -> TokenizerData:
    """The tokenizer of the GGUF file called `name` from its metadata.

    Raises FewbitError where there is none, it is of a kind fewbit does not read, or it contradicts itself.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        raise FewbitError(
            f"{name} holds no tokenizer.",
            "Its metadata has no tokenizer.ggml.model.",
            "Use a file that was converted with its vocabulary.",
        )
    if model != "gpt2":
        raise FewbitError(
            f"fewbit does not read the tokenizer of {name}.",
            f"It is of the kind {str(model)[:40]!r} (SentencePiece is 'llama'); readable: 'gpt2', byte-level BPE.",
            "Use the model's folder with its tokenizer.json instead.",
        )
    pre = _pre_tokenizer(metadata.get("tokenizer.ggml.pre"), name)
    tokens = _strings(metadata, "tokens", name)
    vocabulary = _vocabulary(tokens, name)
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(metadata, tokens, name),
        "normalizer": {"type": "NFC"} if pre.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(pre.steps)},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(vocabulary, _merges(metadata, vocabulary, name), pre.whole_words),
    }
    size = len(tokens)
    ends = [_token_id(metadata, key, size, name) for key in ("eos_token_id", "eot_token_id")]
    template = metadata.get("tokenizer.chat_template")
    return TokenizerData(
        json=json.dumps(document, ensure_ascii=False, separators=(",", ":")),
        chat_template=template if isinstance(template, str) else None,
        bos_token_id=_token_id(metadata, "bos_token_id", size, name),
        eos_token_ids=tuple(dict.fromkeys(e for e in ends if e is not None)),
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", pre.add_bos)),
    )


def _pre_tokenizer(pre: Any, name: str) -> _Pre:
    known = sorted(PRE_TOKENIZERS)
    found = PRE_TOKENIZERS.get(pre) if isinstance(pre, str) else None
    if found is None:
        said = "names no pre-tokenizer" if pre is None else f"says tokenizer.ggml.pre = {str(pre)[:40]!r}"
        raise FewbitError(
            f"fewbit does not know how {name} splits text into words.",
            f"It {said}; a guess would give wrong tokens. Known: {', '.join(known)}.",
            f"Use the model's folder with its tokenizer.json instead ({nearest(str(pre)[:40], known)[:80]}).",
        )
    return found


def _strings(metadata: dict[str, Any], key: str, name: str) -> Sequence[str]:
    items = metadata.get(f"tokenizer.ggml.{key}")
    if isinstance(items, str) or not isinstance(items, Sequence) or not items or not isinstance(items[0], str):
        _contradiction(name, f"tokenizer.ggml.{key} is not an array of strings")
    return items


def _vocabulary(tokens: Sequence[str], name: str) -> dict[str, int]:
    """Token -> id. Empty tokens get a name of their own, as in llama.cpp: they only keep their place."""
    vocabulary = {token or f"[EMPTY_{i}]": i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        first = next(i for i, token in enumerate(tokens) if vocabulary.get(token, i) != i)
        _contradiction(name, f"the token {tokens[first][:40]!r} has the ids {first} and {vocabulary[tokens[first]]}")
    return vocabulary


def _merges(metadata: dict[str, Any], vocabulary: dict[str, int], name: str) -> list[tuple[str, str]]:
    merges = []
    for rank, text in enumerate(_strings(metadata, "merges", name)):
        # no token of byte-level BPE holds a space
        left, _, right = text.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            _contradiction(name, f"merge {rank} ({text[:40]!r}) is not of two tokens that make a token")
        merges.append((left, right))
    return merges


def _added_tokens(metadata: dict[str, Any], tokens: Sequence[str], name: str) -> list[dict[str, Any]]:
    """Tokens found in the text before it is split: control tokens are special, user-defined ones are not."""
    types = metadata.get("tokenizer.ggml.token_type", [])
    if isinstance(types, str) or not isinstance(types, Sequence) or len(types) not in (0, len(tokens)):
        _contradiction(name, f"tokenizer.ggml.token_type does not give one type for each of {len(tokens)} tokens")
    return [
        {
            "id": i,
            "content": tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for i, kind in enumerate(types)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and tokens[i]
    ]


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], whole_words: bool) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": whole_words,
        "vocab": vocabulary,
        "merges": merges,
    }


def _token_id(metadata: dict[str, Any], key: str, size: int, name: str) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < size:
        _contradiction(name, f"tokenizer.ggml.{key} is {str(value)[:40]} in a vocabulary of {size}")
    return value


def _contradiction(name: str, facts: str) -> NoReturn:
    raise FewbitError(
        f"The tokenizer in {name} contradicts itself.", f"In its metadata, {facts}.", "Convert the model again."
    )
