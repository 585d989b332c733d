"""The tokenizer inside a GGUF file, rewritten as the tokenizer.json it came from.

GGUF keeps the vocabulary, the type of each token and, by the kind of tokenizer, merges or scores; of a byte-level BPE
it only names the pre-tokenizer (`_gguf_words` has what the names stand for). `_gguf_sentencepiece` has the other kinds.
"""

from __future__ import annotations

import json
from typing import Any, Final

from fewbit.checkpoint import TokenizerData
from fewbit.checkpoint._gguf_sentencepiece import SPACE, Document, bpe, by_score, decoder, unigram
from fewbit.checkpoint._gguf_vocabulary import ADDED, CONTROL, USER_DEFINED, Vocabulary, contradiction, strings
from fewbit.checkpoint._gguf_words import PRE_TOKENIZERS, Pre
from fewbit.errors import FewbitError
from fewbit.lookup import nearest

# control tokens that end an answer whatever the metadata says: files name one, and some name the end of a text where
# the chat template uses another (the names of llama.cpp, `src/llama-vocab.cpp`)
ENDS: Final = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>"),
    *("<|eom_id|>", "<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>"),
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
# tokens of Phi-3 that leave the spaces behind them, unlike its others
PHI3_KEEPING: Final = ("<unk>", "<s>", "<|endoftext|>")
KINDS: Final = "'gpt2' (byte-level BPE), 'gemma4', 'llama' (SentencePiece by score), 't5' (SentencePiece unigram)"


def convert(metadata: dict[str, Any], name: str) -> TokenizerData:
    """The tokenizer of the GGUF file called `name` from its metadata.

    Raises FewbitError where there is none, it is of a kind fewbit does not read, or it contradicts itself.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        raise FewbitError(
            f"{name} holds no tokenizer.",
            "Its metadata has no tokenizer.ggml.model.",
            "Use a file that was converted with its vocabulary.",
        )
    # where the metadata has no `add_bos_token`
    add_bos = kind in ("llama", "gemma4")
    if kind == "gpt2":
        pre = _pre_tokenizer(metadata.get("tokenizer.ggml.pre"), name)
        vocabulary = Vocabulary.read(metadata, name)
        document, add_bos = _byte_level(vocabulary, pre), pre.add_bos
    elif kind in ("llama", "t5", "gemma4"):
        vocabulary = Vocabulary.read(metadata, name)
        document = {"llama": by_score, "t5": unigram, "gemma4": _gemma4}[kind](vocabulary)
    else:
        raise FewbitError(
            f"fewbit does not read the tokenizer of {name}.",
            f"It is of the kind {str(kind)[:40]!r}; readable: {KINDS}.",
            "Use the model's folder with its tokenizer.json instead.",
        )
    frame = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None}
    document = {**frame, "added_tokens": _added_tokens(vocabulary), **document}
    template = metadata.get("tokenizer.chat_template")
    return TokenizerData(
        json=json.dumps(document, ensure_ascii=False, separators=(",", ":")),
        chat_template=template if isinstance(template, str) else None,
        bos_token_id=vocabulary.id("bos_token_id"),
        eos_token_ids=_ends(vocabulary),
        add_bos=vocabulary.flag("add_bos_token", add_bos),
    )


def _pre_tokenizer(pre: Any, name: str) -> Pre:
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


def _byte_level(vocabulary: Vocabulary, pre: Pre) -> Document:
    """`gpt2`: words of bytes, written as printable characters, in pieces that merge by rank."""
    return {
        "normalizer": {"type": "NFC"} if pre.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(pre.steps)},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": bpe(vocabulary, _merges(vocabulary), pre.whole_words),
    }


def _gemma4(vocabulary: Vocabulary) -> Document:
    """`gemma4`: ranked merges of characters as they are, spaces written as in SentencePiece; lines are words."""
    lines = {"type": "Split", "pattern": {"Regex": r"[^\n]+|\n+"}, "behavior": "Isolated", "invert": False}
    return {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": lines,
        "decoder": decoder(prefix=False),
        "model": bpe(vocabulary, _merges(vocabulary), byte_fallback=True),
    }


def _merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    merges, ids = [], vocabulary.ids
    for rank, text in enumerate(strings(vocabulary.metadata, "merges", vocabulary.name)):
        # the space between the two is behind the first character, as a token may begin with one
        cut = text.find(" ", 1)
        left, right = (text[:cut], text[cut + 1 :]) if cut > 0 else (text, "")
        if left not in ids or right not in ids or left + right not in ids:
            contradiction(vocabulary.name, f"merge {rank} ({text[:40]!r}) is not of two tokens that make a token")
        merges.append((left, right))
    return merges


def _added_tokens(vocabulary: Vocabulary) -> list[Document]:
    """Tokens found in the text before it is split: control tokens are special, user-defined ones are not."""
    title = vocabulary.metadata.get("general.name")
    phi3 = isinstance(title, str) and any(name in title.lower() for name in ("phi-3", "phi3"))
    return [
        {
            "id": i,
            "content": vocabulary.tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": phi3 and vocabulary.tokens[i] not in PHI3_KEEPING,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for i, kind in enumerate(vocabulary.types)
        if kind in ADDED
    ]


def _ends(vocabulary: Vocabulary) -> tuple[int, ...]:
    """Tokens that end an answer, those the metadata names first."""
    named = [vocabulary.id(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    known = [vocabulary.ids[token] for token in ENDS if token in vocabulary.ids]
    found = [i for i in named if i is not None] + [i for i in known if vocabulary.types[i] == CONTROL]
    return tuple(dict.fromkeys(found))
