"""Where documents come from: the text that ships with fewbit, lines of JSON, datasets of the Hugging Face hub."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

from fewbit.errors import FewbitError

SEPARATOR: Final = "<|endoftext|>"
BYTE_ORDER_MARK: Final = "\ufeff"
_SEPARATOR_LINE = re.compile(rf"^{re.escape(SEPARATOR)}[ \t]*$", re.MULTILINE)
_TURN = re.compile(r"^(User|Assistant): ", re.MULTILINE)
# ShareGPT's names of who speaks
_ROLES: Final = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.+-]*))?(?::([\w.+\[\]%:-]+))?")
_SPLITS: Final = frozenset({"train", "test", "validation", "dev"})
_TURNS: Final = ("messages", "conversations")
# columns that are a dataset's text by their name, and the rows looked at where none has such a name
_TEXTS: Final = ("text", "content", "document", "article")
_LOOKED_AT: Final = 16
# a hub id never ends like one of these; a path that was mistyped does
_ENDINGS: Final = (
    ".txt",
    ".text",
    ".md",
    ".raw",
    ".json",
    ".jsonl",
    ".csv",
    ".tsv",
    ".parquet",
    ".gz",
    ".xz",
    ".zip",
    ".html",
)


@dataclass(frozen=True)
class Document:
    """One text. `messages` are the turns of a conversation ({"role", "content"}), which a chat model's template writes
    its own way; empty for anything else. `column` of a dataset is where it stood, None elsewhere.
    """

    text: str
    messages: tuple[dict[str, Any], ...] = ()
    column: str | None = None


def shipped() -> list[Document]:
    """The documents that come with fewbit, kinds interleaved; FewbitError where the installation lacks them."""
    folder = resources.files("fewbit") / "texts"
    files = [f for f in folder.iterdir() if f.name.endswith(".txt")] if folder.is_dir() else []
    found = interleave([split(f.read_text(encoding="utf-8")) for f in sorted(files, key=lambda f: f.name)])
    if not found:
        raise FewbitError(
            "The calibration text that comes with fewbit is missing.",
            f"{str(folder)!r} has no documents in it.",
            "Install fewbit again, or give a text of your own: --calibration FILE.",
        )
    return found


def split(text: str) -> list[Document]:
    """The documents of a text that has them separated by lines `<|endoftext|>`; dialogues are read as such."""
    pieces = (piece.strip("\n") for piece in _SEPARATOR_LINE.split(text))
    return [Document(piece + "\n", turns(piece)) for piece in pieces if piece.strip()]


def turns(text: str) -> tuple[dict[str, Any], ...]:
    """The messages of a dialogue whose turns begin with `User: ` or `Assistant: `; empty where it is none."""
    found = _TURN.split(text)
    # what stands before the first turn, then a name and a content for each
    if len(found) < 3 or found[0].strip():
        return ()
    return tuple(
        {"role": name.lower(), "content": content.strip("\n")}
        for name, content in zip(found[1::2], found[2::2], strict=True)
    )


def interleave(files: Sequence[Sequence[Document]]) -> list[Document]:
    """One document after another, each from the file of which the smallest part has been given so far."""
    keyed = []
    for place, documents in enumerate(files):
        total, before = sum(len(d.text) for d in documents), 0
        for document in documents:
            keyed.append((before / total, place, document))
            before += len(document.text)
    return [document for _, _, document in sorted(keyed, key=lambda k: k[:2])]


def json_lines(file: Path) -> Iterator[Document]:
    """A document for each line: {"text"}, {"messages"} or {"conversations"}; FewbitError names a line that is off."""
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.removeprefix(BYTE_ORDER_MARK.encode() if number == 1 else b"").strip():
                    yield _json_document(file, number, line)
    except OSError as e:
        raise FewbitError(
            f"The text {str(file)!r} can't be read.", f"{e.strerror}.", "Check the path and its permissions."
        ) from e


def _json_document(file: Path, number: int, line: bytes) -> Document:
    try:
        text = line.decode("utf-8")
        found = _document(json.loads(text.removeprefix(BYTE_ORDER_MARK) if number == 1 else text))
    except UnicodeDecodeError as e:
        raise _bad_line(file, number, f"byte {e.start:,} of it is {line[e.start]:#04x}, which is not UTF-8") from e
    except (ValueError, RecursionError) as e:
        raise _bad_line(file, number, str(e) or "it nests too deep") from e
    if found is None:
        raise _bad_line(file, number, "it has neither a `text` nor `messages` with a role and a content each")
    return found


def _bad_line(file: Path, number: int, reason: str) -> FewbitError:
    return FewbitError(
        f"{str(file)!r} has a line that is no document.",
        f"Line {number:,}: {reason}.",
        'Each line is a JSON object: {"text": "…"} or {"messages": [{"role": "user", "content": "…"}, …]}.',
    )


def _document(row: Any) -> Document | None:
    if not isinstance(row, Mapping):
        return None
    key = _turns_column(row)
    if key is not None:
        return _conversation(row[key])
    return Document(row["text"]) if isinstance(row.get("text"), str) else None


def _turns_column(row: Mapping[str, Any]) -> str | None:
    return next((k for k in _TURNS if isinstance(row.get(k), Sequence) and not isinstance(row[k], str)), None)


def _conversation(found: Sequence[Any]) -> Document | None:
    messages = [_message(m) for m in found]
    known = tuple(m for m in messages if m is not None)
    if not known or len(known) < len(messages):
        return None
    return Document("\n".join(m["content"] for m in known) + "\n", known)


def _message(found: Any) -> dict[str, Any] | None:
    """{"role", "content"} of either spelling; content in parts becomes one text."""
    if not isinstance(found, Mapping):
        return None
    role, content = found.get("role", found.get("from")), found.get("content", found.get("value"))
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(p["text"] for p in content if isinstance(p, Mapping) and isinstance(p.get("text"), str))
    if not isinstance(role, str) or not isinstance(content, str):
        return None
    return {**found, "role": _ROLES.get(role, role), "content": content}


def hub_id(chosen: str) -> tuple[str, str | None, str] | None:
    """(dataset, configuration, split) of `owner/name[:config][:split]`; None for what may be meant as a path."""
    match = _HUB_ID.fullmatch(chosen)
    if match is None:
        return None
    name, config, part = match.groups()
    owner = name.partition("/")[0]
    if name.lower().endswith(_ENDINGS) or Path(owner).exists():
        return None
    if part is None and config in _SPLITS:
        config, part = None, config
    return name, config or None, part or "train"


def hub_dataset(chosen: str, name: str, config: str | None, part: str) -> Iterator[Document]:
    """Documents of a hub dataset, streamed: its messages, or one column of text for all rows.

    The column is `text`, `content`, `document` or `article`, whichever comes first and has text in the first row;
    where none has, the same of the first 16 rows, else the column with most characters in them.
    Raises FewbitError where the `datasets` library is not installed, the dataset can't be had, or holds no text.
    """
    try:
        # optional, so no import of this package
        datasets = importlib.import_module("datasets")
    except ImportError as e:
        raise FewbitError(
            f"The dataset {chosen!r} needs a library that is not installed.",
            f"No file lies at that path, so it was taken for a dataset of the hub; {e}.",
            "Run pip install 'fewbit[datasets]', or give the path of a text.",
        ) from e
    rows, column = _streamed(datasets, chosen, name, config, part), None
    for row in rows:
        if column is None and _conversation_in(row) is None:
            first = [row]
            if (column := _named_text(first)) is None:
                first += islice(rows, _LOOKED_AT - 1)
                column = _named_text(first) or _most_text(chosen, first)
            yield from (_conversation_in(each) or _text_in(each, column) for each in first)
        else:
            yield _conversation_in(row) or _text_in(row, column)


def _conversation_in(row: Mapping[str, Any]) -> Document | None:
    column = _turns_column(row)
    found = None if column is None else _conversation(row[column])
    return None if found is None else replace(found, column=column)


def _text_in(row: Mapping[str, Any], column: str | None) -> Document:
    text = None if column is None else row.get(column)
    return Document(text if isinstance(text, str) else "", column=column)


def _named_text(rows: Iterable[Mapping[str, Any]]) -> str | None:
    """The column that is the text by its name, if any of the rows has something in it."""
    has = {key for row in rows for key, value in row.items() if isinstance(value, str) and value.strip()}
    return next((key for name in _TEXTS for key in sorted(has) if key.lower() == name), None)


def _most_text(chosen: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The column with most characters in the rows; FewbitError where none has any."""
    sizes: dict[str, int] = {}
    for key, value in chain.from_iterable(row.items() for row in rows):
        if isinstance(value, str):
            sizes[key] = sizes.get(key, 0) + len(value.strip())
    if not any(sizes.values()):
        columns = ", ".join(f"{key} ({type(value).__name__})" for key, value in rows[0].items())
        raise FewbitError(
            f"The dataset {chosen!r} has no text fewbit can find.",
            f"Nothing is written in its columns {columns[:300]}.",
            "Choose a dataset with a column of text or of messages.",
        )
    return max(sizes, key=sizes.__getitem__)


def _streamed(datasets: Any, chosen: str, name: str, config: str | None, part: str) -> Iterator[Mapping[str, Any]]:
    try:
        yield from datasets.load_dataset(name, config, split=part, streaming=True)
    # the library has its own errors, its file systems' and its readers'
    except Exception as e:
        said = " ".join(str(e).split())
        raise FewbitError(
            f"The dataset {chosen!r} can't be had.",
            f"No file lies at that path, and the hub's split {part!r} of it failed: {type(e).__name__}: {said[:300]}.",
            "Check the name (owner/name[:config][:split]) and the network, or give the path of a text.",
        ) from e
