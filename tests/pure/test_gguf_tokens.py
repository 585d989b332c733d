"""A tokenizer.json as GGUF's metadata: read back, and under the names llama.cpp knows, it gives the same ids."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from fewbit.checkpoint import TokenizerData
from fewbit.checkpoint._gguf_tokenizer import convert
from fewbit.errors import FewbitError
from fewbit.exports import _gguf_tokens
from tests.pure.test_gguf_tokenizer import HOSTILE, KINDS, ORIGINALS, TRAINED, WRITTEN, ids


def data(tokenizer: Library, **more: Any) -> TokenizerData:
    return TokenizerData(tokenizer.to_str(), bos_token_id=1, eos_token_ids=(2, 0), chat_template="{{ x }}", **more)


def written(source: TokenizerData, more_rows: int = 3) -> dict[str, Any]:
    size = Library.from_str(source.json).get_vocab_size()
    return dict(_gguf_tokens.metadata(source, size + more_rows, {"pad_token_id": 2}))


@pytest.mark.parametrize("pre", ORIGINALS)
def test_bytes_in_pieces(pre: str) -> None:
    found, expected = written(data(TRAINED[pre])), WRITTEN[pre]
    size = len(expected["tokenizer.ggml.tokens"])
    assert found["tokenizer.ggml.pre"] == pre
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.merges"] == expected["tokenizer.ggml.merges"]
    assert found["tokenizer.ggml.tokens"][:size] == expected["tokenizer.ggml.tokens"]
    assert found["tokenizer.ggml.token_type"] == [*expected["tokenizer.ggml.token_type"], 5, 5, 5]
    assert found["tokenizer.ggml.tokens"][size:] == [f"[PAD{i}]" for i in range(size, size + 3)]
    names = {"bos": 1, "eos": 2, "eot": 0, "padding": 2}
    assert {k: found[f"tokenizer.ggml.{k}_token_id"] for k in names} == names
    assert found["tokenizer.chat_template"] == "{{ x }}"
    again = Library.from_str(convert(found, "t.gguf").json)
    assert ids(again, HOSTILE) == ids(TRAINED[pre], HOSTILE)


def test_a_bos_that_is_added_is_told() -> None:
    for adds in (True, False):
        assert written(data(TRAINED["gpt-2"], add_bos=adds))["tokenizer.ggml.add_bos_token"] is adds


SENTENCES = [kind for kind, made in KINDS.items() if made["tokenizer.ggml.model"] == "llama"]


@pytest.mark.parametrize("kind", SENTENCES)
def test_pieces_by_score(kind: str) -> None:
    """Vocabularies with scores, through a tokenizer.json, to vocabularies with scores."""
    source = convert(dict(KINDS[kind]), "t.gguf")
    found = written(source, 0)
    assert found["tokenizer.ggml.model"] == "llama"
    for key in ("tokens", "token_type"):
        assert found[f"tokenizer.ggml.{key}"] == KINDS[kind][f"tokenizer.ggml.{key}"], key
    prefix = KINDS[kind].get("tokenizer.ggml.add_space_prefix", True)
    assert found["tokenizer.ggml.add_space_prefix"] is prefix
    again = convert(dict(found), "t.gguf")
    for text in (HOSTILE, "a b  c", " x", "the tokenizer takes the text"):
        assert ids(Library.from_str(again.json), text) == ids(Library.from_str(source.json), text)


def unknown_words() -> Library:
    made = Library.from_str(TRAINED["gpt-2"].to_str())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("e", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return made


def without(tokenizer: Library, **changes: Any) -> TokenizerData:
    document = json.loads(tokenizer.to_str())
    document["model"] |= changes
    return TokenizerData(json.dumps(document))


REFUSED = {
    "a splitting nobody named": (lambda: data(unknown_words()), 0, "none of the pre-tokenizers"),
    "words": (lambda: data(Library(models.WordLevel({"a": 0}, "a"))), 0, "WordLevel, not a BPE"),
    "no merges": (lambda: without(TRAINED["gpt-2"], merges=[]), 0, "no merges"),
    "too many tokens": (lambda: data(TRAINED["gpt-2"]), -1, "a token .* the embedding has"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_gguf_cannot_say(case: str) -> None:
    make, rows, words = REFUSED[case]
    with pytest.raises(FewbitError, match=f"(?i){words}"):
        written(make(), rows)
