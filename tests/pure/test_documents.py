"""Documents: how they are told apart, read from lines of JSON, and had from the hub."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fewbit.calibration import collect
from fewbit.checkpoint import TokenizerData
from fewbit.documents import Document, hub_id, interleave, turns
from fewbit.errors import FewbitError
from fewbit.tokenizer import Tokenizer
from tests.conftest import TEMPLATE, byte_tokenizer

PLAIN, CHAT = (Tokenizer(TokenizerData(byte_tokenizer().to_str(), t, 256, (257,))) for t in (None, TEMPLATE))
ALPHABET = "The quick brown fox jumps over the lazy dog, 12 times.\n"


def test_files_are_interleaved_by_the_part_of_each_that_was_given() -> None:
    def of(name: str, *sizes: int) -> list[Document]:
        return [Document(name * size) for size in sizes]

    found = interleave([of("a", 10, 10), of("b", 5, 5, 5, 5), of("c", 1)])
    assert [d.text[0] for d in found] == list("abcbabb")
    assert interleave([]) == []


def test_turns_are_read_where_there_are_any() -> None:
    assert turns("User: Hi\nthere\n\nAssistant: User: is a word.\nUser: Bye") == (
        {"role": "user", "content": "Hi\nthere"},
        {"role": "assistant", "content": "User: is a word."},
        {"role": "user", "content": "Bye"},
    )
    assert turns("A play.\nUser: Hi\n") == ()
    assert turns("Users: many") == ()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"{", "Line 2: Expecting"),
        (b"[" * 100_000, "Line 2"),
        (b'"text"', "neither a `text`"),
        (b'{"text": 1}', "neither a `text`"),
        (b'{"messages": []}', "neither a `text`"),
        (b'{"messages": [{"role": "user"}]}', "neither a `text`"),
        (b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant"}]}', "neither a `text`"),
        (b'{"messages": ["hello"]}', "neither a `text`"),
        (b'{"text": "\xff"}', "byte 10 of it is 0xff"),
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path: Path, row: bytes, reason: str) -> None:
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "fine"}\n' + row + b"\n")
    with pytest.raises(FewbitError, match="a line that is no document") as e:
        collect(str(tmp_path / "d.jsonl"), PLAIN)
    assert reason in e.value.facts


# the hub


@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/na.me-2:config", ("owner/na.me-2", "config", "train")),
        ("owner/name:test", ("owner/name", None, "test")),
        ("owner/name:20231101.de:train[:1%]", ("owner/name", "20231101.de", "train[:1%]")),
        ("owner/name::odd", ("owner/name", None, "odd")),
        ("name", None),
        ("owner/name.txt", None),
        ("./owner/name", None),
        ("/owner/name", None),
        ("a/b/c", None),
        ("here/name", None),
        ("C:\\texts\\name", None),
        ("~/name", None),
        ("", None),
    ],
)
def test_what_may_be_a_path_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str, found: Any
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub_id(chosen) == found
    if found is None:
        with pytest.raises(FewbitError, match="There is no calibration text") as e:
            collect(chosen, PLAIN)
        assert "No file lies at that path" in e.value.facts
        assert "owner/name[:config][:split]" in e.value.facts


class Hub(ModuleType):
    """Stands in for the `datasets` library."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        super().__init__("datasets")
        self.rows, self.asked, self.given = rows, (), 0

    def load_dataset(self, *args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        self.asked = (*args, kwargs)
        for row in self.rows:
            self.given += 1
            yield row


def hub(monkeypatch: pytest.MonkeyPatch, *rows: dict[str, Any]) -> Hub:
    stand_in = Hub(list(rows))
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    return stand_in


def test_a_dataset_is_streamed_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = hub(monkeypatch, *[{"id": i, "text": f"{i} {ALPHABET}"} for i in range(100)])
    found = collect("owner/name:config:test", PLAIN, count=2, length=64)
    assert stand_in.asked == ("owner/name", "config", {"split": "test", "streaming": True})
    assert stand_in.given == 3
    assert PLAIN.decode(found.windows.flatten().tolist()) == "".join(f"{i} {ALPHABET}" for i in range(3))[:126]
    assert found.facts["name"] == "owner/name:config:test"


def test_messages_or_the_first_column_of_text_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ALPHABET}]
    hub(monkeypatch, {"prompt": "not this", "messages": talk})
    found = collect("owner/name", CHAT, count=1, length=60)
    assert CHAT.decode(found.windows[0].tolist(), skip_special=False).startswith("<|im_start|>user\nHi<|im_end|>")
    assert found.facts["templated"]
    rows = [{"id": 1, "body": None, "title": "First"}, {"id": 2, "body": "no", "title": ALPHABET}, {"id": 3}]
    hub(monkeypatch, *rows)
    assert PLAIN.decode(collect("owner/name", PLAIN, count=1, length=50).windows[0].tolist()).startswith("FirstThe")


@pytest.mark.parametrize(
    ("rows", "column"),
    [
        ([{"url": "http://somewhere.far/away" * 9, "text": ALPHABET}], "text"),
        ([{"url": "x" * 99, "Content": ALPHABET}], "Content"),
        ([{"content": "x" * 99, "text": ALPHABET}], "text"),
        ([{"title": "First", "id": "7", "story": ALPHABET}, {"title": "Next", "id": "8", "story": ALPHABET}], "story"),
        # the first row is not like the others
        ([{"title": "x" * 30, "text": None}, {"title": "y", "text": ALPHABET}, {"title": "y"}], "text"),
        ([{"title": "x" * 30, "story": None}, {"title": "y", "story": ALPHABET}, {"title": None}], "story"),
        # the text of some rows is missing: no other column takes its place
        ([{"title": "First", "text": ALPHABET[:20]}, {"title": "x" * 99, "text": None}, {"text": ALPHABET}], "text"),
    ],
)
def test_the_column_that_is_the_text(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], column: str) -> None:
    stand_in = hub(monkeypatch, *rows, *[{**rows[-1], column: f"{i} {ALPHABET}"} for i in range(50)])
    found = collect("owner/name", PLAIN, count=1, length=200)
    shown = PLAIN.decode(found.windows[0].tolist())
    parts = [row.get(column) or "" for row in rows] + [f"{i} {ALPHABET}" for i in range(9)]
    assert "".join(parts).startswith(shown)
    assert len(shown) > 190
    assert found.facts["column"] == column
    assert stand_in.given <= 16


def test_a_conversation_among_texts_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = {"messages": [{"role": "user", "content": "Hi"}], "note": "x"}
    hub(monkeypatch, {"note": ALPHABET, "messages": None}, talk, *[{"note": ALPHABET}] * 30)
    found = collect("owner/name", CHAT, count=1, length=150)
    assert "<|im_start|>user\nHi<|im_end|>" in CHAT.decode(found.windows[0].tolist(), skip_special=False)
    hub(monkeypatch, talk)
    assert collect("owner/name", CHAT, count=1, length=8).facts["column"] == "messages"


def test_only_a_dataset_has_a_column(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a text that is long enough"}')
    assert "column" not in collect(str(tmp_path / "d.jsonl"), PLAIN, count=1, length=20).facts


def test_what_can_go_wrong_with_a_dataset_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, {"id": 1, "label": 0})
    with pytest.raises(FewbitError, match="has no text") as e:
        collect("owner/name", PLAIN)
    assert "id (int), label (int)" in e.value.facts
    hub(monkeypatch, *[{"title": "", "story": " "}] * 100)
    with pytest.raises(FewbitError, match="has no text") as e:
        collect("owner/name", PLAIN)
    assert "title (str), story (str)" in e.value.facts
    hub(monkeypatch)
    with pytest.raises(FewbitError, match="is empty"):
        collect("owner/name", PLAIN)

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("the hub is\nfar away")

    hub(monkeypatch).load_dataset = fails
    with pytest.raises(FewbitError, match="can't be had") as e:
        collect("owner/name", PLAIN)
    assert "No file lies at that path" in e.value.facts
    assert "ConnectionError: the hub is far away" in e.value.facts
    # a module that is None is one that is not installed
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FewbitError, match="library that is not installed") as e:
        collect("owner/name", PLAIN)
    assert "No file lies at that path" in e.value.facts
    assert "pip install 'fewbit[datasets]'" in e.value.next_step
