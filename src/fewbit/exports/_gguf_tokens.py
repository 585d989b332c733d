"""A tokenizer.json as GGUF's metadata: the inverse of `checkpoint._gguf_tokenizer`.

GGUF only names the pre-tokenizer. The name is found by trying: it is right where reading the metadata back cuts a text
made to be nasty into the same tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from fewbit.checkpoint import TokenizerData
from fewbit.checkpoint import _gguf_tokenizer as reading
from fewbit.checkpoint._gguf_vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from fewbit.checkpoint._gguf_words import PRE_TOKENIZERS
from fewbit.checkpoint._gguf_writer import Value
from fewbit.errors import FewbitError
from fewbit.tokenizer import Tokenizer

# where several names mean the same: those that most engines know
PREFERRED = ("llama-bpe", "qwen2", "gpt-2", "smollm", "command-r", "deepseek-r1-qwen", "default")
NASTY = """\
\tTabs\t\t and  double spaces   and trailing ones   \r\n\r\n \n\n\n   \n
0 12 345 6789 1234567 3.14159 1,000,000 0x1F ٣٤٥ १२३ ½ Ⅷ ² ①② year2024ok
don't DON'T I'll we'Ve they'RE 'tis o'clock 'S ''' rock'n'roll HTTPServer CamelCase ALLCAPS iPhone
漢字かなカナ한국어 中文。「引用」 ไทย العربية עברית हिन्दी Ελληνικά Русский
😀👩‍👩‍👧‍👦🏳️‍🌈🇺🇳 zero\u200bwidth\u200djoin\ufeff nb\u00a0sp \u3000wide e\u0301 é ﬁ Å Å \u017f ǆ
def f(x): return {"a": [x**2, ~x, x^1, $y, `z`]}  # <=>|+|=== ... --- ___ \\n // !! ?? @@ ##
x/*a*/+=b; a/b/c http://x.y/?q=1&r=2#s  _under_score__ (¹²³) ¿qué? “quotes” — dash…
\x00\x01\x7f\u0080\u2028\u2029 \U0010ffff end"""


def metadata(data: TokenizerData, rows: int, config: dict[str, Any]) -> dict[str, Value]:
    """`tokenizer.*` keys for a model whose embedding has `rows` rows.

    FewbitError where GGUF, or fewbit, has no way to say what the tokenizer does.
    """
    document = json.loads(data.json)
    model = document.get("model") or {}
    if model.get("type") != "BPE":
        raise _unsayable(f"it is a {model.get('type')}, not a BPE")
    if not model.get("merges"):
        raise _unsayable("it has no merges, which GGUF's readers want")
    tokens, kinds = _tokens(document, rows)
    common: dict[str, Value] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_bos_token": Tokenizer(data).add_bos,
    }
    common |= _special(data, model, tokens, config)
    if data.chat_template is not None:
        common["tokenizer.chat_template"] = data.chat_template
    if model.get("byte_fallback"):
        return _sentencepiece(data, model, common)
    if not _has_step(document, "ByteLevel"):
        raise _unsayable("it is a BPE neither of bytes nor of SentencePiece")
    common |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": [" ".join(m) for m in _merges(model)]}
    common["tokenizer.ggml.add_space_prefix"] = False
    return common | {"tokenizer.ggml.pre": _pre_tokenizer(data, common)}


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs in their order; older files have them as one text with a space between."""
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model.get("merges") or [])
    return [(str(left), str(right)) for left, right in pairs]


def _sentencepiece(data: TokenizerData, model: dict[str, Any], common: dict[str, Value]) -> dict[str, Value]:
    """`llama`: pieces merged by score. The merges' order says what the scores were, up to a scale."""
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(_merges(model)):
        rank.setdefault(left + right, i)
    tokens: Any = common["tokenizer.ggml.tokens"]
    kinds: Any = common["tokenizer.ggml.token_type"]
    byte = re.compile(r"<0x[0-9A-F]{2}>")
    kinds = [
        BYTE if kind == NORMAL and byte.fullmatch(text) else kind for text, kind in zip(tokens, kinds, strict=True)
    ]
    unknown = model.get("unk_token")
    kinds = [UNKNOWN if text == unknown else kind for text, kind in zip(tokens, kinds, strict=True)]
    # what no merge makes comes after all that merges make
    scores = [
        -float(rank.get(text, len(rank))) if kind == NORMAL else 0.0 for text, kind in zip(tokens, kinds, strict=True)
    ]
    found = common | {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
    found |= {"tokenizer.ggml.token_type": kinds, "tokenizer.ggml.scores": scores}
    expected = Tokenizer(data).encode(NASTY, bos=False)
    for prefix in (True, False):
        found["tokenizer.ggml.add_space_prefix"] = prefix
        if Tokenizer(reading.convert(dict(found), "the export")).encode(NASTY, bos=False) == expected:
            return found
    raise _unsayable("read back as a SentencePiece vocabulary it cuts text otherwise than its own merges do")


def _has_step(document: dict[str, Any], kind: str) -> bool:
    """Whether the pre-tokenizer or the decoder has a step of a kind."""
    return any(
        f'"type":"{kind}"' in json.dumps(document.get(p), separators=(",", ":")) for p in ("pre_tokenizer", "decoder")
    )


def _tokens(document: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Every row's token and what it is; rows without one are unused."""
    by_id: dict[int, tuple[str, int]] = {i: (text, NORMAL) for text, i in document["model"]["vocab"].items()}
    for added in document.get("added_tokens") or []:
        by_id[added["id"]] = (added["content"], CONTROL if added.get("special") else USER_DEFINED)
    most = max(by_id, default=-1)
    if most >= rows:
        raise FewbitError(
            "The tokenizer does not belong to the model.",
            f"It has a token {most:,}; the embedding has {rows:,} rows.",
            "Check tokenizer.json against the original model's.",
        )
    filled = [by_id.get(i, (f"[PAD{i}]", UNUSED)) for i in range(rows)]
    return [text for text, _ in filled], [kind for _, kind in filled]


def _special(data: TokenizerData, model: dict[str, Any], tokens: list[str], config: dict[str, Any]) -> dict[str, Value]:
    """Ids with a meaning."""
    ids: dict[str, Any] = {"padding": config.get("pad_token_id"), "bos": data.bos_token_id}
    ids |= dict(zip(("eos", "eot"), data.eos_token_ids, strict=False))
    if isinstance(model.get("unk_token"), str) and model["unk_token"] in tokens:
        ids["unknown"] = tokens.index(model["unk_token"])
    return {
        f"tokenizer.ggml.{name}_token_id": i
        for name, i in ids.items()
        if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < len(tokens)
    }


def _pre_tokenizer(data: TokenizerData, found: dict[str, Value]) -> str:
    """The name under which the tokens come out the same; FewbitError where there is none."""
    expected = Tokenizer(data).encode(NASTY, bos=False)
    document = json.loads(data.json)
    own = _steps((document.get("pre_tokenizer"),)), (document.get("normalizer") or {}).get("type") == "NFC"
    names = [name for name in PREFERRED if name in PRE_TOKENIZERS]
    names += sorted(set(PRE_TOKENIZERS) - set(names))

    def spelled_as_its_own(name: str) -> bool:
        return (_steps(PRE_TOKENIZERS[name].steps), PRE_TOKENIZERS[name].nfc) == own

    # one that is spelled as the tokenizer's own does the same on every text
    for name in sorted(names, key=lambda name: not spelled_as_its_own(name)):
        again = reading.convert(found | {"tokenizer.ggml.pre": name}, "the export")
        if Tokenizer(again).encode(NASTY, bos=False) == expected:
            return name
    raise _unsayable("none of the pre-tokenizers that fewbit knows by ggml's names cuts text as its own does")


def _steps(steps: Sequence[Any]) -> list[tuple[str, ...]]:
    """What pre-tokenizers do, however they are nested; what changes offsets alone is left out."""
    keys = ("type", "pattern", "behavior", "invert", "individual_digits", "use_regex", "add_prefix_space")
    found: list[tuple[str, ...]] = []
    for step in steps:
        if isinstance(step, dict):
            inner = step.get("pretokenizers")
            found += _steps(inner) if isinstance(inner, list) else [tuple(str(step.get(key)) for key in keys)]
    return found


def _unsayable(facts: str) -> FewbitError:
    return FewbitError(
        "fewbit can't write this tokenizer into a GGUF file.",
        f"{facts[0].upper()}{facts[1:]}.",
        "Export to compressed-tensors, gptq or awq, which keep tokenizer.json.",
    )
