"""The tokenizer in a GGUF file against the tokenizer.json it was made from: the same ids on a text made to be nasty."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from fewbit.checkpoint import gguf
from fewbit.checkpoint._gguf_tokenizer import PRE_TOKENIZERS, convert
from fewbit.errors import FewbitError

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER = ["<tool>", "    "]
LLAMA3_WORDS = PRETOKENIZE_REGEX.replace(r"\p{N}", r"\p{N}{1,3}", 1)

HOSTILE = """\
\tTabs\t\t and  double spaces   and trailing ones   \r\n\r\n \n\n\n   \n
0 12 345 6789 1234567 3.14159 1,000,000 0x1F ٣٤٥ १२३ ½ Ⅷ ² ①② year2024ok
don't DON'T I'll we'Ve they'RE 'tis o'clock 'S ''' rock'n'roll
漢字かなカナ한국어 中文\uff0c标点。「引用」 ไทย العربية עברית हिन्दी
😀👩‍👩‍👧‍👦🏳️‍🌈🇺🇳 zero\u200bwidth\u200djoin\ufeff nb\u00a0sp \u3000wide e\u0301 é ﬁ Å Å \u017f ǆ
<|im_start|>user\nhi<|im_end|> <|im_start| <|im_end|><|im_end|>x<|endoftext|> <tool>a</tool> <TOOL>
def f(x): return {"a": [x**2, ~x, x^1, $y, `z`]}  # <=>|+|=== ... --- ___ \\n
\x00\x01\x7f\u0080\u2028\u2029 \U0010ffff end"""

# words often enough to be merged over several steps
TEACHING = [
    "the tokenizer takes the text that it was trained on and returns the same text in tokens, then rejoins it"
] * 3


def byte_level(regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


# the pre-tokenizers and normalizers of the original tokenizer.json files
ORIGINALS: dict[str, tuple[list[Any], bool]] = {
    "smollm": ([pre_tokenizers.Digits(individual_digits=True), byte_level(True)], False),
    "command-r": ([pre_tokenizers.Digits(individual_digits=True), byte_level(True)], True),
    "gpt-2": ([byte_level(True)], False),
    "qwen2": ([split(PRETOKENIZE_REGEX), byte_level(False)], True),
    "llama-bpe": ([split(LLAMA3_WORDS), byte_level(False)], False),
}


def original(pre: str) -> Tokenizer:
    """A small tokenizer trained on this file's text, set up like the models behind `pre`."""
    steps, nfc = ORIGINALS[pre]
    made = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if nfc:
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=CONTROL, initial_alphabet=byte_level(False).alphabet(), show_progress=False
    )
    made.train_from_iterator([HOSTILE, __doc__ or "", *TEACHING], trainer)
    made.add_tokens([AddedToken(text, normalized=False) for text in USER])
    return made


def metadata(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """What a converter writes of it."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    assert [i for _, i in vocabulary] == list(range(len(vocabulary)))
    kinds = {**dict.fromkeys(CONTROL, 3), **dict.fromkeys(USER, 4)}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [token for token, _ in vocabulary],
        "tokenizer.ggml.token_type": [kinds.get(token, 1) for token, _ in vocabulary],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
    }


TRAINED = {pre: original(pre) for pre in ORIGINALS}
WRITTEN = {pre: metadata(made, pre) for pre, made in TRAINED.items()}
CONVERTED = {pre: Tokenizer.from_str(convert(data, "t.gguf").json) for pre, data in WRITTEN.items()}


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found


@pytest.mark.parametrize("pre", ORIGINALS)
def test_a_hostile_text_gets_the_ids_of_the_original(pre: str) -> None:
    got = ids(CONVERTED[pre], HOSTILE)
    assert got == ids(TRAINED[pre], HOSTILE)
    for skip in (True, False):
        decoded = CONVERTED[pre].decode(got, skip_special_tokens=skip)
        assert decoded == TRAINED[pre].decode(got, skip_special_tokens=skip)
        assert ("<|im_start|>" in decoded) is not skip
        assert "<tool>" in decoded
    if not ORIGINALS[pre][1]:
        assert CONVERTED[pre].decode(got, skip_special_tokens=False) == HOSTILE


@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=60), pre=st.sampled_from(sorted(ORIGINALS)))
def test_any_text_gets_the_ids_of_the_original(text: str, pre: str) -> None:
    assert ids(CONVERTED[pre], text) == ids(TRAINED[pre], text)


def test_the_names_differ_where_the_models_do() -> None:
    """Each pre-tokenizer has a text that only it splits so: a swapped table row can't pass."""
    words = {
        pre: [word for word, _ in CONVERTED[pre].pre_tokenizer.pre_tokenize_str("in 1234 I'LL 12\n\n")]
        for pre in ("smollm", "gpt-2", "qwen2", "llama-bpe")
    }
    assert words == {
        "smollm": ["in", "Ġ", "1", "2", "3", "4", "ĠI", "'", "LL", "Ġ", "1", "2", "ĊĊ"],
        "gpt-2": ["in", "Ġ1234", "ĠI", "'", "LL", "Ġ12", "ĊĊ"],
        "qwen2": ["in", "Ġ", "1", "2", "3", "4", "ĠI", "'LL", "Ġ", "1", "2", "ĊĊ"],
        "llama-bpe": ["in", "Ġ", "123", "4", "ĠI", "'LL", "Ġ", "12", "ĊĊ"],
    }


def test_the_default_splits_as_llama_cpp_does() -> None:
    made = Tokenizer.from_str(convert({**WRITTEN["gpt-2"], "tokenizer.ggml.pre": "default"}, "t.gguf").json)
    words = [word for word, _ in made.pre_tokenizer.pre_tokenize_str("in 12345, don't ½")]
    assert words == ["in", "Ġ", "123", "45", ",", "Ġdon", "'", "t", "Ġ", "Â½"]


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_name_in_the_table_gives_a_tokenizer_that_loads(pre: str) -> None:
    data = convert({**WRITTEN["gpt-2"], "tokenizer.ggml.pre": pre}, "t.gguf")
    made = Tokenizer.from_str(data.json)
    assert made.decode(ids(made, "a b 1é\n")) == "a b 1é\n"
    assert data.add_bos is (pre in ("llama-bpe", "llama3", "llama-v3"))


def test_a_file_gives_the_same_as_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "t.gguf"
    writer = GGUFWriter(path, "llama")
    data = WRITTEN["smollm"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(data["tokenizer.ggml.tokens"])
    writer.add_token_types(data["tokenizer.ggml.token_type"])
    writer.add_token_merges(data["tokenizer.ggml.merges"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    got = gguf.open(path).tokenizer()
    assert got.json == convert(data, "t.gguf").json
    assert (got.chat_template, got.bos_token_id, got.eos_token_ids) == ("{{ messages }}", 1, (2, 0))
    assert got.add_bos is True


def test_ends_are_given_once_and_missing_ids_are_none() -> None:
    data = convert({**WRITTEN["gpt-2"], "tokenizer.ggml.eot_token_id": 2}, "t.gguf")
    assert data.eos_token_ids == (2,)
    bare = {k: v for k, v in WRITTEN["gpt-2"].items() if not k.endswith(("_id", "chat_template"))}
    got = convert(bare, "t.gguf")
    assert (got.bos_token_id, got.eos_token_ids, got.chat_template, got.add_bos) == (None, (), None, False)


def test_a_word_that_is_a_token_skips_the_merges_where_the_model_does_so() -> None:
    tokens = [*WRITTEN["gpt-2"]["tokenizer.ggml.tokens"], "qzqz"]
    kinds = [*WRITTEN["gpt-2"]["tokenizer.ggml.token_type"], 1]
    data = {**WRITTEN["gpt-2"], "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    whole = Tokenizer.from_str(convert({**data, "tokenizer.ggml.pre": "llama-bpe"}, "t.gguf").json)
    merged = Tokenizer.from_str(convert(data, "t.gguf").json)
    assert ids(whole, "qzqz") == [len(tokens) - 1]
    assert len(ids(merged, "qzqz")) == 4


def test_empty_tokens_keep_their_places() -> None:
    tokens = [*WRITTEN["gpt-2"]["tokenizer.ggml.tokens"], "", ""]
    kinds = [*WRITTEN["gpt-2"]["tokenizer.ggml.token_type"], 4, 1]
    data = {**WRITTEN["gpt-2"], "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    document = convert(data, "t.gguf").json
    made = Tokenizer.from_str(document)
    assert made.get_vocab_size() == len(tokens)
    assert ids(made, HOSTILE) == ids(TRAINED["gpt-2"], HOSTILE)
    assert all(added["content"] for added in json.loads(document)["added_tokens"])


TOKENS = ["a", "b", "ab"]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no tokenizer": ({"model": None}, "no tokenizer.ggml.model"),
    "sentencepiece": ({"model": "llama"}, "SentencePiece"),
    "other kind": ({"model": "rwkv"}, "'rwkv'"),
    "no pre": ({"pre": None}, "names no pre-tokenizer"),
    "unknown pre": ({"pre": "qwen3"}, "smollm, starcoder"),
    "pre of another type": ({"pre": ["gpt-2"]}, "smollm, starcoder"),
    "no tokens": ({"tokens": None}, "tokens is not an array of strings"),
    "empty tokens": ({"tokens": []}, "tokens is not an array of strings"),
    "numbers for tokens": ({"tokens": [1, 2, 3]}, "tokens is not an array of strings"),
    "text for tokens": ({"tokens": "abc"}, "tokens is not an array of strings"),
    "no merges": ({"merges": None}, "merges is not an array of strings"),
    "token twice": ({"tokens": ["a", "b", "ab", "b"]}, "'b' has the ids 1 and 3"),
    "merge of no token": ({"merges": ["a b", "b c"]}, "merge 1 ('b c')"),
    "merge of no left token": ({"tokens": ["a", "b", "ab", "cb"], "merges": ["c b"], "token_type": None}, "merge 0"),
    "merge to no token": ({"merges": ["b a"]}, "merge 0 ('b a')"),
    "merge of one": ({"merges": ["ab"]}, "merge 0 ('ab')"),
    "few types": ({"token_type": [1]}, "one type for each of 3 tokens"),
    "types of another type": ({"token_type": 3}, "one type for each of 3 tokens"),
    "eos beyond": ({"eos_token_id": 3}, "eos_token_id is 3 in a vocabulary of 3"),
    "bos negative": ({"bos_token_id": -1}, "bos_token_id is -1"),
    "eot text": ({"eot_token_id": "<|eot|>"}, "eot_token_id is <|eot|>"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_with_a_tokenizer_is_said(case: str) -> None:
    change, words = REFUSED[case]
    good = {"model": "gpt2", "pre": "gpt-2", "tokens": TOKENS, "merges": ["a b"], "token_type": [1, 1, 1]}
    data = {f"tokenizer.ggml.{k}": v for k, v in {**good, **change}.items() if v is not None}
    with pytest.raises(FewbitError) as caught:
        convert(data, "some.gguf")
    assert words in caught.value.facts
    assert "some.gguf" in caught.value.what
