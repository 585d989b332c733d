"""What a model is calibrated on: where the text comes from, how it is cut, and what is said where it can't be."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Inner
from tokenizers import models, pre_tokenizers

import fewbit
from fewbit import documents
from fewbit.calibration import collect, read_text, separator, windows
from fewbit.checkpoint import TokenizerData
from fewbit.documents import shipped, split
from fewbit.errors import FewbitError
from fewbit.tokenizer import Tokenizer
from tests.conftest import TEMPLATE, byte_tokenizer

TEXTS = Path(fewbit.__file__).parent / "texts"
KINDS = ("code", "dialogue", "essays", "languages", "mathematics", "prose", "tables")
ALPHABET = "The quick brown fox jumps over the lazy dog, 12 times.\n"


def tokenizer(template: str | None = None, add_bos: bool = False) -> Tokenizer:
    return Tokenizer(TokenizerData(byte_tokenizer().to_str(), template, 256, (257,), add_bos=add_bos))


PLAIN, CHAT = tokenizer(), tokenizer(TEMPLATE)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(ALPHABET * 20)
    return tmp_path / "text.txt"


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


# the text that ships


def test_every_kind_of_text_is_there() -> None:
    assert sorted(f.stem for f in TEXTS.glob("*.txt")) == sorted(KINDS)
    for kind in KINDS:
        found = (TEXTS / f"{kind}.txt").read_text(encoding="utf-8")
        assert len(split(found)) > 3, kind
        # a separator that is not on a line of its own would be text
        assert found.count(documents.SEPARATOR) <= len(split(found)), kind
        assert not any(documents.SEPARATOR in d.text for d in split(found)), kind
    assert 200_000 <= sum(f.stat().st_size for f in TEXTS.glob("*.txt")) <= 320_000


def test_the_text_that_ships_varies_as_prose_does() -> None:
    whole = "".join((TEXTS / f"{kind}.txt").read_text(encoding="utf-8") for kind in KINDS)
    data = whole.encode()
    assert 0.33 <= len(gzip.compress(data, 9)) / len(data) <= 0.50
    words = whole.split()
    grams = Counter(tuple(words[i : i + 8]) for i in range(len(words) - 7))
    assert 1 - len(grams) / grams.total() < 0.01


def test_all_of_the_dialogue_is_read_as_turns() -> None:
    for document in split((TEXTS / "dialogue.txt").read_text(encoding="utf-8")):
        roles = [m["role"] for m in document.messages]
        assert roles[0] == "user"
        assert all(a != b for a, b in pairwise(roles)), document.text[:80]
        assert all(m["content"].strip() for m in document.messages), document.text[:80]


def test_any_prefix_has_every_kind() -> None:
    of = {d.text: kind for kind in KINDS for d in split((TEXTS / f"{kind}.txt").read_text(encoding="utf-8"))}
    found = [of[d.text] for d in shipped()]
    assert len(found) == len(of)
    assert set(found[:7]) == set(KINDS)
    sizes = Counter[str]()
    for document in shipped():
        sizes[of[document.text]] += len(document.text)
    given, largest = Counter[str](), {kind: max(len(d) for d in of if of[d] == kind) for kind in KINDS}
    for document in shipped():
        given[of[document.text]] += len(document.text)
        part = given.total() / sizes.total()
        for kind in KINDS:
            # never further from its share than a document or two
            assert abs(given[kind] - part * sizes[kind]) <= 2 * max(largest.values()), kind


def test_it_fills_the_windows_asked_for_in_order() -> None:
    all_of_it = collect(None, PLAIN)
    assert all_of_it.windows.shape == (128, 512)
    some = collect(None, PLAIN, count=5, length=64)
    assert some.windows.shape == (5, 64)
    assert torch.equal(some.windows.flatten(), all_of_it.windows.flatten()[:320])
    documents_in = shipped()
    assert PLAIN.decode(some.windows.flatten().tolist()) == (documents_in[0].text)[:320]
    assert some.facts["name"] == "default"


def test_the_same_arguments_give_the_same_windows() -> None:
    one, two = collect(None, CHAT, count=40), collect(None, CHAT, count=40)
    assert torch.equal(one.windows, two.windows)
    assert one.facts == two.facts == json.loads(json.dumps(one.facts))
    ids = one.windows.flatten().tolist()
    assert one.facts["sha256"] == hashlib.sha256(struct.pack(f"<{len(ids)}q", *ids)).hexdigest()
    assert (one.facts["windows"], one.facts["length"]) == (40, 512)
    assert collect(None, CHAT, count=41).facts["sha256"] != one.facts["sha256"]


def test_an_installation_without_the_texts_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents.resources, "files", lambda _: tmp_path)
    with pytest.raises(FewbitError, match="comes with fewbit is missing"):
        collect(None, PLAIN)


# files


def test_a_file_is_cut_as_the_evaluator_cuts_it(text: Path) -> None:
    found = collect(str(text), PLAIN, count=9, length=64)
    assert torch.equal(found.windows, windows(read_text(text), PLAIN, 64, 9))
    assert found.windows.dtype == torch.int64
    assert found.facts["name"] == "text.txt"
    assert not found.facts["templated"]


def test_of_a_long_file_only_the_lines_needed_are_read(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes("zwölf Boxkämpfer\r\nüber\rden Deich\n".encode() * 9)
    whole = read_text(tmp_path / "text.txt")
    assert "\r" not in whole
    assert whole == (tmp_path / "text.txt").read_text(encoding="utf-8")
    for most in range(40, 120):
        part = read_text(tmp_path / "text.txt", most)
        assert whole.startswith(part)
        assert part.endswith("\n")
        assert most - 40 < len(part.encode()) <= most
    assert read_text(tmp_path / "text.txt", 10_000) == whole
    (tmp_path / "text.txt").write_text("\u0436" * 50, encoding="utf-8")
    assert read_text(tmp_path / "text.txt", 41) == "\u0436" * 20
    (tmp_path / "text.txt").write_bytes(b"ab\xff" + b"c" * 50)
    with pytest.raises(FewbitError, match="not a UTF-8 text") as e:
        read_text(tmp_path / "text.txt", 20)
    assert "Byte 2 is 0xff" in e.value.facts


def test_a_separator_in_a_file_is_left_to_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(f"{ALPHABET}<|endoftext|>\n{ALPHABET}" * 9)
    found = collect(str(tmp_path / "text.txt"), PLAIN, count=1, length=512)
    assert PLAIN.decode(found.windows[0].tolist()).count("\n<|endoftext|>\n") > 2


def test_without_a_count_a_file_gives_what_it_has(text: Path) -> None:
    found = collect(str(text), PLAIN, length=100)
    assert found.windows.shape == (len(ALPHABET) * 20 // 100, 100)
    with pytest.raises(FewbitError, match="too short") as e:
        collect(str(text), PLAIN, length=200)
    assert "1,100 tokens; 8 x 200 take 1,600" in e.value.facts
    assert "ask for 5 of them at most" in e.value.next_step
    assert collect(str(text), PLAIN, count=5, length=200).windows.shape == (5, 200)
    with pytest.raises(FewbitError, match="too short"):
        collect(str(text), PLAIN, count=6, length=200)
    with pytest.raises(FewbitError, match="too short") as e:
        collect(str(text), PLAIN, count=1, length=1101)
    assert "shorter windows" in e.value.next_step


def test_json_lines_are_documents(tmp_path: Path) -> None:
    rows = [
        {"text": "one document"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        {"conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "It is."}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "pa"}, {"type": "text", "text": "rts"}]}]},
        {"text": "the last one, long enough for all"},
    ]
    path = lines(tmp_path / "d.jsonl", *rows[:2], "", *rows[2:])
    plain = collect(path, PLAIN, count=1, length=70)
    between = [257]
    expected = [PLAIN.encode(t, bos=False) for t in ("one document", "Hi\nHo\n", "Is it?\nIt is.\n", "parts\n")]
    ids = [i for e in expected for i in [*e, *between]] + PLAIN.encode("the last one, long enough for all", bos=False)
    assert plain.windows[0].tolist() == ids[:70]
    assert not plain.facts["templated"]
    found = collect(path, CHAT, count=1, length=110)
    shown = CHAT.decode(found.windows[0].tolist(), skip_special=False)
    assert found.facts["templated"]
    assert "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>" in shown
    assert "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\nIt is.<|im_end|>" in shown
    assert "<|im_start|>user\nparts<|im_end|>" in shown
    assert shown.startswith("one document<|im_end|>")


def test_no_more_lines_are_read_than_needed(tmp_path: Path) -> None:
    path = lines(tmp_path / "d.jsonl", {"text": ALPHABET}, {"text": ALPHABET}, "broken")
    assert collect(path, PLAIN, count=2, length=50).windows.shape == (2, 50)
    with pytest.raises(FewbitError, match="no document"):
        collect(path, PLAIN, count=3, length=50)


def test_blank_documents_are_none(tmp_path: Path) -> None:
    blank = [{"text": ""}] * 50 + [{"text": " \n"}, {"messages": [{"role": "user", "content": ""}]}]
    rows = [*blank, {"text": ALPHABET}, *blank, {"text": ALPHABET}, *blank]
    once, filled = (lines(tmp_path / f"{i}.jsonl", *r) for i, r in enumerate([[{"text": ALPHABET}] * 2, rows]))
    for known in (PLAIN, CHAT):
        expected = collect(once, known, count=1, length=2 * len(ALPHABET) + 1)
        assert torch.equal(collect(filled, known, count=1, length=2 * len(ALPHABET) + 1).windows, expected.windows)
    with pytest.raises(FewbitError, match="too short"):
        collect(filled, PLAIN, count=1, length=2 * len(ALPHABET) + 2)
    with pytest.raises(FewbitError, match="is empty"):
        collect(lines(tmp_path / "blank.jsonl", *blank), PLAIN)


def test_documents_of_which_no_token_is_left_are_none(tmp_path: Path) -> None:
    # no unknown token: what it does not know is left out
    inner = Inner(models.BPE(vocab={"a": 0, "b": 1, "<end>": 2}, merges=[]))
    known = Tokenizer(TokenizerData(inner.to_str(), eos_token_ids=(2,)))
    path = lines(tmp_path / "d.jsonl", {"text": "ab"}, *[{"text": "?"}] * 9, {"text": "ba"})
    assert collect(path, known, count=1, length=5).windows.tolist() == [[0, 1, 2, 1, 0]]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + ALPHABET.encode() * 9)
    assert read_text(tmp_path / "a.txt") == ALPHABET * 9
    assert read_text(tmp_path / "a.txt", 100) == ALPHABET
    # within the text it is a character as any other
    (tmp_path / "a.txt").write_bytes(mark + mark + b"a" + mark)
    assert read_text(tmp_path / "a.txt") == "\ufeffa\ufeff"
    row = json.dumps({"text": ALPHABET}).encode() + b"\n"
    expected = collect(lines(tmp_path / "d.jsonl", {"text": ALPHABET}), PLAIN, count=1, length=50)
    for before in (mark, mark + b"\n", mark + b"\r\n"):
        (tmp_path / "d.jsonl").write_bytes(before + row)
        assert torch.equal(collect(str(tmp_path / "d.jsonl"), PLAIN, count=1, length=50).windows, expected.windows)
    (tmp_path / "d.jsonl").write_bytes(row + mark + row)
    with pytest.raises(FewbitError, match="no document"):
        collect(str(tmp_path / "d.jsonl"), PLAIN, count=2, length=50)


# templates, and what stands between texts


def test_dialogue_goes_through_the_template_and_nothing_else_does() -> None:
    plain, chat = collect(None, PLAIN), collect(None, CHAT)
    assert not plain.facts["templated"]
    assert chat.facts["templated"]
    without, with_it = (
        t.decode(c.windows.flatten().tolist(), skip_special=False) for t, c in ((PLAIN, plain), (CHAT, chat))
    )
    first = next(d for d in shipped() if d.messages)
    assert first.text in without
    assert first.text not in with_it
    assert "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in first.messages) in with_it
    assert next(d for d in shipped() if not d.messages).text in with_it


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% for %}", "{{ messages[9].content }}"])
def test_a_broken_template_is_said(template: str) -> None:
    with pytest.raises(FewbitError, match="chat template can't write the calibration text") as e:
        collect(None, tokenizer(template))
    assert "Error" in e.value.facts
    assert "--raw" not in str(e.value)


def test_a_template_that_writes_the_date_writes_the_same_every_day() -> None:
    dated = tokenizer("{{ strftime_now('%d %b %Y %H:%M') }} " + TEMPLATE)
    found = collect(None, dated)
    assert "01 Jan 2025 00:00 <|im_start|>" in dated.decode(found.windows.flatten().tolist(), skip_special=False)


def test_a_bos_takes_the_place_of_each_windows_first_token() -> None:
    plain, with_bos = collect(None, PLAIN, count=9), collect(None, tokenizer(add_bos=True), count=9)
    assert with_bos.windows[:, 0].tolist() == [256] * 9
    # between texts it stands for the end that PLAIN has there
    same = (with_bos.windows == plain.windows) | (with_bos.windows == 256)
    assert same.all()


def test_texts_are_parted_as_the_model_knows_it() -> None:
    assert separator(PLAIN) == [257]
    assert separator(tokenizer(add_bos=True)) == [256]
    assert separator(Tokenizer(TokenizerData(byte_tokenizer().to_str()))) == PLAIN.encode("\n\n")
    knows = byte_tokenizer()
    knows.add_special_tokens(["<|endoftext|>"])
    assert separator(Tokenizer(TokenizerData(knows.to_str(), None, 256, (257,), add_bos=True))) == [258]


def test_a_template_that_begins_with_the_separator_is_not_given_another(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": ALPHABET}]}
    opens = tokenizer(TEMPLATE, add_bos=True)
    found = collect(lines(tmp_path / "d.jsonl", row, row), opens, count=1, length=100).windows[0].tolist()
    assert found.count(256) == 2
    assert (256, 256) not in pairwise(found)


# what the tokenizer knows


def unknown_mostly(**special: Any) -> Tokenizer:
    inner = Inner(models.WordLevel({"<unk>": 0, "the": 1, "lazy": 2}, unk_token="<unk>"))  # noqa: S106
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(TokenizerData(inner.to_str(), **special))


def test_a_tokenizer_that_knows_too_little_is_said(text: Path, tmp_path: Path) -> None:
    with pytest.raises(FewbitError, match="tokenizer knows too little") as e:
        collect(str(text), unknown_mostly(), count=1, length=100)
    assert "84 of its 100 tokens" in e.value.facts
    (tmp_path / "known.txt").write_text("the lazy " * 30 + "fox " * 55)
    assert collect(str(tmp_path / "known.txt"), unknown_mostly(), count=1, length=110).windows.shape == (1, 110)
    nothing = Inner(models.BPE(vocab={"\u0416": 0}, merges=[]))
    with pytest.raises(FewbitError, match="tokenizer knows too little") as e:
        collect(str(text), Tokenizer(TokenizerData(nothing.to_str())), count=1)
    assert "1,100 characters were left out" in e.value.facts
    pieces = Inner(models.Unigram([("<unk>", 0.0), ("z", -1.0)], unk_id=0, byte_fallback=False))
    pieces.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    with pytest.raises(FewbitError, match="tokenizer knows too little"):
        collect(str(text), Tokenizer(TokenizerData(pieces.to_str())), count=1, length=100)


def test_one_token_all_over_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 1000)
    with pytest.raises(FewbitError, match="tokenizer knows too little") as e:
        collect(str(tmp_path / "a.txt"), PLAIN, count=1)
    assert "tokens are the same one" in e.value.facts
    with pytest.raises(FewbitError, match="too short"):
        collect(str(tmp_path / "a.txt"), PLAIN, count=1, length=1001)
    (tmp_path / "b.txt").write_text("a" * 511 + "b")
    assert collect(str(tmp_path / "b.txt"), PLAIN, count=1).windows.shape == (1, 512)


# wrong input


def test_wrong_input_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "binary.txt").write_bytes(b"abc\xff\xfe")
    for words, chosen, more in (
        ("is empty", "empty.txt", {}),
        ("is empty", "empty.jsonl", {}),
        ("not a UTF-8 text", "binary.txt", {}),
        ("can't be read", ".", {}),
        ("count of calibration windows is out of range", "empty.txt", {"count": 0}),
        ("length of a calibration window is out of range", "empty.txt", {"length": 0}),
        ("There is no calibration text", "none.txt", {}),
    ):
        with pytest.raises(FewbitError, match=words) as e:
            collect(str(tmp_path / chosen), PLAIN, **more)
        assert all(e.value.to_dict().values())


def test_self_takes_what_the_model_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # not a file of that name
    Path("self").write_text(ALPHABET * 90)
    asked = []

    def write(count: int, length: int) -> list[list[int]]:
        asked.append((count, length))
        return [[(i * j) % 250 for j in range(length)] for i in range(1, count + 1)]

    found = collect("self", PLAIN, length=64, write=write)
    assert asked == [(128, 64)]
    assert found.windows.tolist() == write(128, 64)
    assert found.facts["name"] == "self"
    with pytest.raises(FewbitError, match="can't write its own"):
        collect("self", PLAIN)
    with pytest.raises(FewbitError, match="too short"):
        collect("self", PLAIN, count=8, write=lambda *_: [[1, 2]])
