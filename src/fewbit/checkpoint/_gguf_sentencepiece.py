"""SentencePiece vocabularies in GGUF files: `llama` (pieces merged by score) and `t5` (unigram).

Both write a space as U+2581 and put one before the text, or not (`add_space_prefix`), and both spell what is in no
piece with tokens for bytes, <0x00> to <0xFF>, where the vocabulary has them.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Any

from fewbit.checkpoint._gguf_vocabulary import ADDED, BYTE, LONGEST_TOKEN, Vocabulary, contradiction

SPACE = "\u2581"
Document = dict[str, Any]
# a unigram's charsmap is 250 KB at most
MOST_CHARSMAP = 1 << 24


def by_score(vocabulary: Vocabulary) -> Document:
    """`llama`: of all neighbours whose union is a token, the one of the highest score is merged first.

    As merges of a BPE: every way to cut a token in two tokens, in falling order of the token's score.
    """
    prefix = vocabulary.flag("add_space_prefix", True)
    scores, ids = vocabulary.scores(), vocabulary.ids
    unknown = vocabulary.id("unknown_token_id")
    # control tokens are found before, and are no result of merging
    order = sorted((i for i, kind in enumerate(vocabulary.types) if kind not in ADDED), key=lambda i: -scores[i])
    merges = []
    for i in order:
        token = vocabulary.tokens[i]
        if len(token) > LONGEST_TOKEN:
            contradiction(vocabulary.name, f"the token {i} has {len(token)} characters")
        cuts = [(token[:at], token[at:]) for at in range(1, len(token)) if token[:at] in ids and token[at:] in ids]
        merges += sorted(cuts, key=lambda cut: (ids[cut[0]], ids[cut[1]]))
    model = bpe(vocabulary, merges, byte_fallback=BYTE in vocabulary.types)
    model["unk_token"], model["fuse_unk"] = vocabulary.tokens[0 if unknown is None else unknown], True
    return {"normalizer": _spaces(prefix), "pre_tokenizer": None, "decoder": decoder(prefix), "model": model}


def unigram(vocabulary: Vocabulary) -> Document:
    """`t5`: the most likely way to cut the text, by the logarithms of the pieces' probabilities."""
    prefix = vocabulary.flag("add_space_prefix", True)
    unknown = vocabulary.id("unknown_token_id")
    steps: list[Document] = []
    if charsmap := _charsmap(vocabulary):
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if vocabulary.flag("remove_extra_whitespaces", False):
        # the library's own Strip takes tabs and line breaks as well
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    scheme = "always" if prefix else "never"
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": True}
    pieces = [list(pair) for pair in zip(vocabulary.tokens, vocabulary.scores(), strict=True)]
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": metaspace,
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": 2 if unknown is None else unknown,
            "vocab": pieces,
            "byte_fallback": BYTE in vocabulary.types,
        },
    }


def bpe(
    vocabulary: Vocabulary, merges: Sequence[tuple[str, str]], whole_words: bool = False, byte_fallback: bool = False
) -> Document:
    """A BPE model of the tokenizers library."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": byte_fallback,
        "ignore_merges": whole_words,
        "vocab": vocabulary.ids,
        "merges": merges,
    }


def decoder(prefix: bool) -> Document:
    """Pieces to text; the space that was put before the text goes again."""
    steps = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _spaces(prefix: bool) -> Document:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if not prefix:
        return replace
    return {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}


def _charsmap(vocabulary: Vocabulary) -> str | None:
    """SentencePiece's table of characters' normal forms in base64; the library reads it, but does not check it.

    Length of a trie u32, the trie in u32, then the normal forms, each with a zero behind it. A node of the trie
    (a double array) has its offset in bits 10 to 31, shifted by 8 with bit 9, whether it ends a key in bit 8, and a
    label in bits 0 to 7; the value of a key is where its normal form begins.
    """
    found = vocabulary.metadata.get("tokenizer.ggml.precompiled_charsmap")
    if found is None or (isinstance(found, Sequence) and not found):
        return None
    wrong = isinstance(found, str) or not isinstance(found, Sequence) or len(found) > MOST_CHARSMAP
    if wrong or not all(isinstance(byte, int) and -128 <= byte < 256 for byte in found):
        contradiction(vocabulary.name, "tokenizer.ggml.precompiled_charsmap is not an array of bytes")
    data = bytes(byte & 255 for byte in found)
    size = int.from_bytes(data[:4], "little")
    if len(data) < 4 or size % 4 or not 4 <= size <= len(data) - 4:
        contradiction(vocabulary.name, f"tokenizer.ggml.precompiled_charsmap has a trie of {size} in {len(data)} bytes")
    _check_trie(vocabulary, struct.unpack_from(f"<{size // 4}I", data, 4), data[4 + size :])
    return base64.b64encode(data).decode()


def _check_trie(vocabulary: Vocabulary, trie: Sequence[int], forms: bytes) -> None:
    """No step from a node leads out of the trie, and no value out of the forms or into a character's middle."""
    for at, node in enumerate(trie):
        # besides the root, only nodes with a label are ever stood on, and those of values have none that matches
        if at and (node >> 31 or not node & 255):
            continue
        base = at ^ node >> 10 << (8 if node & 512 else 0)
        good = base | 255 < len(trie)
        if good and node & 256:
            value = trie[base] & 0x7FFFFFFF
            good = value < len(forms) and forms[value] & 0xC0 != 0x80
        if not good:
            contradiction(vocabulary.name, f"tokenizer.ggml.precompiled_charsmap leads out of itself at node {at}")
    try:
        forms.decode()
    except UnicodeDecodeError:
        contradiction(vocabulary.name, "tokenizer.ggml.precompiled_charsmap has normal forms that are not UTF-8")
