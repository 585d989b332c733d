r"""How the names in `tokenizer.ggml.pre` split a text into words, as steps of a tokenizer.json.

A name stands for a list of expressions: each splits what the ones before left, a match is a word and so is what lies
between matches. They are the expressions of the models' own tokenizer.json files, which llama.cpp's
(`src/llama-vocab.cpp`) follow as far as its regex engine lets them; where the two differ, the model was trained with
its own. Expressions are for Oniguruma, which the tokenizers library uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

Step = dict[str, Any]

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _LINES
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# combining marks stay with their letters
_QWEN35 = _QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# capitals, then small letters: a word in camel case is several
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"


def _cased(upper: str, lower: str, after: str, rest: str) -> str:
    return rf"{_BEFORE}{upper}*{lower}+{after}|{_BEFORE}{upper}+{lower}*{after}|{rest}"


_TEKKEN = _cased(_UPPER, _LOWER, "", r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _LINES)
_GPT4O = _cased(_UPPER, _LOWER, _CONTRACTION + "?", r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _LINES)
_KIMI = r"\p{Han}+|" + _cased(
    _UPPER[:-1] + r"&&[^\p{Han}]]",
    _LOWER[:-1] + r"&&[^\p{Han}]]",
    _CONTRACTION + "?",
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _LINES,
)
_CHINESE_JAPANESE = r"[\u4E00-\u9FA5\u3040-\u309F\u30A0-\u30FF]+"
_DEEPSEEK3_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _LINES
)
# letters with a case, as the model's tokenizer.json lists them: this is what the list comes to
_DEEPSEEK_LETTERS = r"\s?[\p{Lu}\p{Ll}\p{Lt}]+"
_DEEPSEEK_MARKS = r"\s?[!-/:-~\uFF01-\uFF0F\uFF1A-\uFF5E\u2018-\u201F\u3000-\u3002]+"
_DEEPSEEK_CJK = r"[\u4E00-\u9FA5\u0800-\u4E00\uAC00-\uD7FF]+"
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"


def _split(pattern: str) -> Step:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level(regex: bool = False) -> Step:
    """Bytes as printable characters; with `regex`, after a split by GPT-2's expression."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}


def _words(*patterns: str) -> tuple[Step, ...]:
    """ByteLevel comes last: some of its characters for bytes are numerals (¼ ½ ¾ ¹ ² ³) to expressions behind it."""
    return (*map(_split, patterns), _byte_level())


@dataclass(frozen=True)
class Pre:
    """What one name of `tokenizer.ggml.pre` stands for.

    whole_words  a word that is a token as a whole skips the merges (`ignore_merges`)
    add_bos      the default where the metadata has no `add_bos_token`
    """

    steps: tuple[Step, ...]
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False


def _named(pre: Pre, names: str) -> dict[str, Pre]:
    return dict.fromkeys(names.split(), pre)


_DIGIT_BY_DIGIT = ({"type": "Digits", "individual_digits": True}, _byte_level(regex=True))
_GPT2 = (_byte_level(regex=True),)
_DEEPSEEK3 = _words(r"\p{N}{1,3}", _CHINESE_JAPANESE, _DEEPSEEK3_WORDS)

PRE_TOKENIZERS: Final[dict[str, Pre]] = {
    **_named(Pre(_GPT2), "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum"),
    **_named(Pre(_DIGIT_BY_DIGIT), "smollm starcoder refact codeshell exaone minerva-7b mellum2"),
    "command-r": Pre(_DIGIT_BY_DIGIT, nfc=True),
    **_named(
        Pre(_words(_LLAMA3), whole_words=True, add_bos=True),
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    ),
    **_named(Pre(_words(_LLAMA3)), "dbrx smaug-bpe chatglm-bpe"),
    **_named(Pre(_words(_LLAMA3), whole_words=True), "glm4 glm5"),
    "minicpm5": Pre(_words(r"\p{N}{1,3}", _LLAMA3.replace("{1,3}", "+")), whole_words=True),
    "jais-2": Pre(
        _words(
            _LLAMA3.removesuffix(r"|\s+(?!\S)|\s+")
            + "".join(rf"|\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))
            + r"|\s{1}"
        )
    ),
    "qwen2": Pre(_words(_QWEN2), nfc=True),
    **_named(Pre(_words(_QWEN2)), "deepseek-r1-qwen stablelm2 hunyuan solar-open megrez grok-2 kormo"),
    "qwen35": Pre(_words(_QWEN35), nfc=True),
    "laguna": Pre(_words(r"[^\n]+|[\n]+", _QWEN2)),
    "ufakzeka": Pre(_words(_QWEN2.removeprefix(_CONTRACTION + "|"))),
    "seed-coder": Pre(_words(_QWEN2.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+"))),
    **_named(
        Pre(_words(_QWEN2.replace(_CONTRACTION, "'(?i:[sdmt]|ll|ve|re)").replace(r"\s*[\r\n]+", r"\s*[\r\n]"))),
        "bailingmoe bailingmoe2 llada-moe",
    ),
    "exaone-moe": Pre(
        _words(
            _QWEN2.replace(r"\p{L}+", r"(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+")
            .replace(r"]+[\r\n]*", r"]+[\r\n/]?")
            .replace(r"\s*[\r\n]+", r"\s*[\r\n]")
        )
    ),
    **_named(Pre(_DEEPSEEK3), "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    "deepseek-llm": Pre(
        _words(r"[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_MARKS, r"\s+$", _DEEPSEEK_CJK, r"\p{N}+"),
    ),
    "deepseek-coder": Pre(_words(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")),
    "tekken": Pre(_words(_TEKKEN), whole_words=True, add_bos=True),
    **_named(Pre(_words(_GPT4O)), "gpt-4o llama4 kanana2 talkie minimax-m2"),
    **_named(Pre(_words(r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)), "tiny_aya cohere2moe"),
    "kimi-k2": Pre(_words(_KIMI)),
    "superbpe": Pre(_words(r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    **_named(Pre(_words(_BLOOM)), "bloom poro-chat gpt3-finnish"),
    "viking": Pre(_words(_BLOOM, r"\p{N}")),
    "falcon": Pre(_words(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2_WORDS, "[0-9][0-9][0-9]")),
    "chameleon": Pre(
        _words(
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2_WORDS,
        ),
        add_bos=True,
    ),
    "default": Pre(_words(r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
}
