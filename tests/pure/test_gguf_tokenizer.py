"""The tokenizer in a GGUF file against the tokenizer.json it was made from, and against llama.cpp, on a nasty text.

data/llama_cpp_ids.txt holds what llama.cpp (as in llama-cpp-python 0.3.36) made of data/hostile.txt with the
vocabularies of data/gguf_tokenizers.json: one whose merges cross every border between words, under each name of a
pre-tokenizer, and cut-down ones of the other kinds. Lines say which text: whole, in NFC where a model's tokenizer.json
asks for it and llama.cpp does not, or its ASCII alone where llama.cpp departs from the model's own expression beyond.
"""

from __future__ import annotations

import base64
import json
import struct
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from fewbit.checkpoint import gguf
from fewbit.checkpoint._gguf_tokenizer import convert
from fewbit.checkpoint._gguf_words import PRE_TOKENIZERS
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


DATA = Path(__file__).parent / "data"
KINDS: dict[str, dict[str, Any]] = json.loads((DATA / "gguf_tokenizers.json").read_text())
NASTY = (DATA / "hostile.txt").read_bytes().decode()
TEXTS = {"whole": NASTY, "NFC": unicodedata.normalize("NFC", NASTY), "ASCII": NASTY.encode("ascii", "ignore").decode()}
# (which text, the name of a pre-tokenizer or =kind, ids)
ENGINE = [
    (line[0], name, [int(i) for i in line[2].split()])
    for line in (row.split("\t") for row in (DATA / "llama_cpp_ids.txt").read_text().splitlines())
    for name in line[1].split()
]
# llama.cpp splits by a rule of its own here, on plain text as well
OWN_RULE = {"kimi-k2", "tiny_aya", "cohere2moe"}


@pytest.mark.parametrize(("which", "name", "expected"), ENGINE, ids=[name for _, name, _ in ENGINE])
def test_llama_cpp_gives_the_same_ids(which: str, name: str, expected: list[int]) -> None:
    kind = name.removeprefix("=")
    data = KINDS[kind] if name != kind else {**KINDS["gpt2"], "tokenizer.ggml.pre": name}
    made = Tokenizer.from_str(convert(data, "t.gguf").json)
    assert ids(made, TEXTS[which]) == expected
    # NFC is the tokenizer's own step
    assert ids(made, NASTY if which == "NFC" else TEXTS[which]) == expected


def test_every_name_was_compared_with_llama_cpp() -> None:
    assert {name for _, name, _ in ENGINE} | OWN_RULE == {*PRE_TOKENIZERS, "=llama", "=t5", "=gemma4"}


def test_pieces_come_back_as_text() -> None:
    for kind in ("llama", "t5", "gemma4"):
        made = Tokenizer.from_str(convert(KINDS[kind], "t.gguf").json)
        text = "Tabs and 345 words it"
        assert made.decode(ids(made, text)) == text
    llama, gemma = (Tokenizer.from_str(convert(KINDS[kind], "t.gguf").json) for kind in ("llama", "gemma4"))
    # only what was put there is taken away; bytes stand for what no piece has
    for made in (llama, gemma):
        for text in ("  two", "two  ", "a\tb\n\n\u0a15\U0001f600"):
            assert made.decode(ids(made, text)) == text
    assert llama.decode(ids(llama, "x"), skip_special_tokens=False) == "x"
    assert [llama.id_to_token(i) for i in ids(llama, "\U0001f984")] == [
        "\u2581",
        *("<0xF0>", "<0x9F>", "<0xA6>", "<0x84>"),
    ]


def test_a_file_without_the_space_before_the_text_says_so() -> None:
    data = {**KINDS["llama"], "tokenizer.ggml.add_space_prefix": False}
    made = Tokenizer.from_str(convert(data, "t.gguf").json)
    assert made.id_to_token(ids(made, "the")[0]) == "the"
    assert made.decode(ids(made, " the")) == " the"


def test_text_never_becomes_a_control_token_that_is_not_written_out() -> None:
    """A control token with the sign for a space is not in the text, but could be made of its pieces."""
    space = {"tokens": ["<unk>", "\u2581", "a", "\u2581a"], "scores": [0.0, -2.0, -2.0, -1.0]}
    for kind, expected in ((3, [1, 2]), (1, [3])):
        data = {"model": "llama", **space, "token_type": [2, 1, 1, kind]}
        made = Tokenizer.from_str(convert({f"tokenizer.ggml.{k}": v for k, v in data.items()}, "t.gguf").json)
        assert ids(made, "a") == expected


def test_bytes_are_spelled_only_where_there_are_tokens_for_them() -> None:
    data = {**KINDS["llama"], "tokenizer.ggml.token_type": [1 if t == 6 else t for t in _types("llama")]}
    made = Tokenizer.from_str(convert(data, "t.gguf").json)
    assert made.id_to_token(ids(made, "\U0001f984")[-1]) == "<unk>"


def _types(kind: str) -> list[int]:
    found: list[int] = KINDS[kind]["tokenizer.ggml.token_type"]
    return found


def test_special_tokens_of_phi_3_take_the_spaces_behind_them() -> None:
    for name, rest in (("Phi-3 mini", ["x"]), ("Other", ["\u2581", "\u2581", "\u2581", "x"])):
        tokens, types = [*KINDS["llama"]["tokenizer.ggml.tokens"], "<|user|>"], [*_types("llama"), 3]
        scores = [*KINDS["llama"]["tokenizer.ggml.scores"], 0.0]
        changed = {"tokens": tokens, "token_type": types, "scores": scores, "add_space_prefix": False}
        data = {**KINDS["llama"], **{f"tokenizer.ggml.{k}": v for k, v in changed.items()}, "general.name": name}
        made = Tokenizer.from_str(convert(data, "t.gguf").json)
        assert "".join(made.id_to_token(i) for i in ids(made, "<|user|>   x")) == "".join(["<|user|>", *rest])


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
    assert data.add_bos is PRE_TOKENIZERS[pre].add_bos


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
    assert data.eos_token_ids == (2, 0)
    bare = {k: v for k, v in WRITTEN["gpt-2"].items() if not k.endswith(("_id", "chat_template"))}
    got = convert(bare, "t.gguf")
    assert (got.bos_token_id, got.chat_template, got.add_bos) == (None, None, False)


def test_control_tokens_known_to_end_an_answer_do_so_whatever_the_metadata_says() -> None:
    made = convert(WRITTEN["gpt-2"], "t.gguf")
    assert made.eos_token_ids == (2, 0)
    named = {**WRITTEN["gpt-2"], "tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.eom_token_id": 8}
    assert convert(named, "t.gguf").eos_token_ids == (7, 8, 2, 0)
    # text that only looks like it does not
    plain = {**WRITTEN["gpt-2"], "tokenizer.ggml.token_type": [1] * len(WRITTEN["gpt-2"]["tokenizer.ggml.tokens"])}
    assert convert(plain, "t.gguf").eos_token_ids == (2,)


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


def charsmap() -> bytes:
    """A trie that turns A into xy, as SentencePiece lays one out: the root's children lie at 0 ^ 256 ^ label."""
    trie = [0] * 1024
    trie[0] = 256 << 10
    # the child for A; its value lies at its own place ^ 512, reached by the label 0
    child = 256 ^ ord("A")
    trie[child] = 512 << 10 | ord("A") | 1 << 8
    trie[child ^ 512] = 1 << 31 | 0
    return struct.pack("<I1024I", 4096, *trie) + b"xy\0"


TOKENS = ["a", "b", "ab"]
SCORES = [0.0, -1.0, -2.0]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no tokenizer": ({"model": None}, "no tokenizer.ggml.model"),
    "no scores": ({"model": "llama"}, "scores does not give a number for each of 3"),
    "few scores": ({"model": "llama", "scores": [1.0]}, "scores does not give a number for each of 3"),
    "scores of text": ({"model": "t5", "scores": ["a", "b", "c"]}, "scores does not give a number"),
    "scores of nothing": ({"model": "t5", "scores": [0.0, float("nan"), 0.0]}, "scores holds NaN"),
    "flag of another type": ({"model": "llama", "scores": SCORES, "add_space_prefix": 3}, "add_space_prefix is 3"),
    "unknown beyond": ({"model": "t5", "scores": SCORES, "unknown_token_id": 9}, "unknown_token_id is 9"),
    "a very long token": ({"model": "llama", "scores": SCORES, "tokens": ["a", "b", "a" * 1025]}, "1025 characters"),
    "charsmap of text": ({"model": "t5", "scores": SCORES, "precompiled_charsmap": "abcd"}, "not an array of bytes"),
    "charsmap of numbers": ({"model": "t5", "scores": SCORES, "precompiled_charsmap": [999]}, "not an array of bytes"),
    "charsmap cut": ({"model": "t5", "scores": SCORES, "precompiled_charsmap": [8, 0, 0, 0, 1]}, "a trie of 8 in 5"),
    "charsmap of a wild trie": (
        {"model": "t5", "scores": SCORES, "precompiled_charsmap": list(struct.pack("<II", 4, 9 << 10) + b"a\0")},
        "leads out of itself at node 0",
    ),
    "charsmap of a wild value": (
        {"model": "t5", "scores": SCORES, "precompiled_charsmap": list(charsmap()[:-3])},
        f"leads out of itself at node {256 ^ ord('A')}",
    ),
    "other kind": ({"model": "rwkv"}, "'rwkv'"),
    "no pre": ({"pre": None}, "names no pre-tokenizer"),
    "unknown pre": ({"pre": "qwen3"}, "smollm, solar-open"),
    "pre of another type": ({"pre": ["gpt-2"]}, "smollm, solar-open"),
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


def test_a_charsmap_is_handed_on_whole() -> None:
    data = {**KINDS["t5"], "tokenizer.ggml.precompiled_charsmap": [b - 256 if b > 127 else b for b in charsmap()]}
    document = json.loads(convert(data, "t.gguf").json)
    step = document["normalizer"]["normalizers"][0]
    assert base64.b64decode(step["precompiled_charsmap"]) == charsmap()
    made = Tokenizer.from_str(json.dumps(document))
    assert made.normalizer.normalize_str("bAb  c") == "bxyb c"


@settings(deadline=None, max_examples=200)
@given(edits=st.lists(st.tuples(st.integers(0, 4103), st.integers(0, 255)), max_size=12), text=st.text(max_size=12))
def test_a_charsmap_that_is_taken_can_be_used(edits: list[tuple[int, int]], text: str) -> None:
    """The library panics on one that leads nowhere, and a panic is no exception one can catch by name."""
    data = bytearray(charsmap())
    for at, value in edits:
        data[at % len(data)] = value
    try:
        found = convert({**KINDS["t5"], "tokenizer.ggml.precompiled_charsmap": list(data)}, "t.gguf")
    except FewbitError:
        return
    Tokenizer.from_str(found.json).encode(text + "A")
