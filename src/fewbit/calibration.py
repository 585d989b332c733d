"""Text into token windows: those a model is measured on, and those it is calibrated on."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fewbit import documents
from fewbit.documents import BYTE_ORDER_MARK, SEPARATOR, Document
from fewbit.errors import FewbitError
from fewbit.tokenizer import Tokenizer

# windows where no count is given: as many, or as there are, and fewer than the least are no calibration
MOST_WINDOWS: Final = 128
LEAST_WINDOWS: Final = 8
# bytes of a file that are read for each token wanted; no text has tokens as long
BYTES_PER_TOKEN: Final = 64
# what a template that writes the date is told: tomorrow's windows must be today's
DATE: Final = datetime(2025, 1, 1)
# gives `count` lists of `length` tokens
Writer = Callable[[int, int], list[list[int]]]


@dataclass(frozen=True)
class Calibration:
    """Token windows to calibrate on, and what they are.

    windows  int64 [n, length]
    facts    JSON values: name, windows (n), length, sha256 of the ids as little-endian int64, and whether a chat
             template wrote some of them (templated); for a dataset of the hub also the column they came from (column)
    """

    windows: Tensor
    facts: dict[str, Any]


@dataclass(frozen=True)
class _Tokens:
    name: str
    ids: list[int]
    # characters the ids were made of; None where there was no text
    characters: int | None
    templated: bool = False
    # of a dataset
    column: str | None = None


def read_text(file: Path, most: int | None = None) -> str:
    """A text file as UTF-8, without a byte order mark, or its lines within the first `most` bytes.

    Raises FewbitError where it is something else.
    """
    try:
        with file.open("rb") as opened:
            data = opened.read() if most is None else opened.read(most + 1)
        cut = most is not None and len(data) > most
        if cut:
            data = data[: data.rfind(b"\n", 0, most) + 1 or most]
        # what is cut may end within a character, which is left out
        text = codecs.getincrementaldecoder("utf-8")().decode(data, final=not cut).removeprefix(BYTE_ORDER_MARK)
        # every way to end a line is one, as Python reads texts
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as e:
        raise FewbitError(
            f"{str(file)!r} is not a UTF-8 text.", f"Byte {e.start:,} is {e.object[e.start]:#04x}.", "Give a text file."
        ) from e
    except OSError as e:
        raise FewbitError(
            f"The text {str(file)!r} can't be read.", f"{e.strerror}.", "Check the path and its permissions."
        ) from e


def windows(text: str, tokenizer: Tokenizer, length: int, most: int) -> Tensor:
    """The first `most` consecutive windows of `length` tokens, int64 [n, length].

    A model that begins its texts with a BOS gets it in place of each window's first token. Raises FewbitError where
    the text does not fill one window.
    """
    ids = tokenizer.encode(text, bos=False)
    count = min(len(ids) // length, most)
    if not count:
        raise FewbitError(
            "The text is too short.",
            f"It has {len(ids):,} tokens; one window takes {length}.",
            "Give a longer text: a few thousand words measure well.",
        )
    return _cut(ids, tokenizer, count, length)


def _cut(ids: Sequence[int], tokenizer: Tokenizer, count: int, length: int) -> Tensor:
    found = torch.tensor(ids[: count * length], dtype=torch.int64).reshape(count, length)
    if tokenizer.add_bos and tokenizer.data.bos_token_id is not None:
        found[:, 0] = tokenizer.data.bos_token_id
    return found


def collect(
    chosen: str | None,
    tokenizer: Tokenizer,
    count: int | None = None,
    length: int = 512,
    write: Writer | None = None,
) -> Calibration:
    """The windows to calibrate a model on; the same arguments give the same windows.

    chosen  None: the text that comes with fewbit, kinds interleaved. A file: UTF-8 text, whose windows are those of
            `windows`, or .jsonl with `text` or `messages` on each line. `self`: what `write` gives. Otherwise
            `owner/name[:config][:split]`, a dataset of the hub, read by the `datasets` library.
    count   windows wanted; None: 128, or as many as there are, if at least 8
    length  tokens of a window
    Conversations go through the model's chat template, where it has one. Raises FewbitError where there is no such
    text, it can't be read or is too short, the template fails, or the tokenizer knows too little of it.
    """
    for name, value in (("count of calibration windows", count), ("length of a calibration window", length)):
        if value is not None and value < 1:
            raise FewbitError(f"The {name} is out of range.", f"Got {value}; it must be 1 or more.", "Leave it out.")
    wanted = count or MOST_WINDOWS
    tokens = _tokens(chosen, tokenizer, wanted, length, write)
    _check_known(tokens, tokenizer, wanted, length)
    found = _cut(tokens.ids, tokenizer, _fitting(tokens, count, length), length)
    return Calibration(
        found,
        {
            "name": tokens.name,
            "windows": len(found),
            "length": length,
            "sha256": hashlib.sha256(found.numpy().astype("<i8").tobytes()).hexdigest(),
            "templated": tokens.templated,
        }
        | ({} if tokens.column is None else {"column": tokens.column}),
    )


def _tokens(chosen: str | None, tokenizer: Tokenizer, count: int, length: int, write: Writer | None) -> _Tokens:
    """At least the tokens that are needed, if there are as many."""
    needed = count * length
    if chosen is None:
        return _joined("default", documents.shipped(), tokenizer, needed)
    if chosen == "self":
        if write is None:
            raise FewbitError(
                "The model can't write its own calibration text here.",
                "Nothing was given that runs the model.",
                "Pass `write` (see fewbit.self_calibration), or name a text.",
            )
        return _Tokens("self", [i for window in write(count, length) for i in window], None)
    path = _existing(chosen)
    if path is not None:
        if path.suffix.lower() == ".jsonl":
            return _joined(path.name, documents.json_lines(path), tokenizer, needed)
        text = read_text(path, max(BYTES_PER_TOKEN * needed, 1 << 22))
        return _Tokens(path.name, tokenizer.encode(text, bos=False), len(text))
    hub = documents.hub_id(chosen)
    if hub is None:
        raise FewbitError(
            f"There is no calibration text {chosen[:200]!r}.",
            "No file lies at that path, and it is not written as a dataset of the hub is (owner/name[:config][:split], "
            "where no folder here is called owner).",
            "Check the path, name a dataset, write `self`, or leave --calibration out.",
        )
    return _joined(chosen, documents.hub_dataset(chosen, *hub), tokenizer, needed)


def _existing(chosen: str) -> Path | None:
    # no home of that name, or a name too long for the file system: no path either
    with suppress(RuntimeError, OSError):
        path = Path(chosen).expanduser()
        return path if chosen and path.exists() else None
    return None


def _joined(name: str, found: Iterable[Document], tokenizer: Tokenizer, needed: int) -> _Tokens:
    """Documents one after another, with what the model knows as the end of a text between them; blank ones are none."""
    between = separator(tokenizer)
    ids: list[int] = []
    characters, templated, column = 0, False, None
    for document in found:
        text = document.text
        if not text.strip():
            continue
        if document.messages and tokenizer.chat_template is not None:
            text, templated = rendered(document.messages, tokenizer), True
        characters += len(text)
        column = document.column
        new = tokenizer.encode(text, bos=False)
        if not new:
            continue
        if ids and new[: len(between)] != between:
            ids += between
        ids += new
        if len(ids) >= needed:
            break
    return _Tokens(name, ids, characters, templated, column)


def separator(tokenizer: Tokenizer) -> list[int]:
    """What stands between two texts as the model read them in its training: `<|endoftext|>`, its BOS, or its EOS."""
    known = tokenizer.inner.token_to_id(SEPARATOR)
    if known is None and tokenizer.add_bos:
        known = tokenizer.data.bos_token_id
    if known is None:
        known = next(iter(tokenizer.data.eos_token_ids), None)
    return tokenizer.encode("\n\n", bos=False) if known is None else [known]


def rendered(messages: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> str:
    """A finished conversation as the model's chat template writes it; FewbitError where the template fails."""
    try:
        return tokenizer.render(messages, add_generation_prompt=False, now=DATE)
    except FewbitError as e:
        raise FewbitError(
            "The model's chat template can't write the calibration text.",
            f"{e.what} {e.facts}",
            "Give a text without conversations (--calibration FILE), or mend the model's chat template.",
        ) from e


def _fitting(tokens: _Tokens, count: int | None, length: int) -> int:
    """How many windows to take; FewbitError where the text has too few."""
    have = len(tokens.ids) // length
    least = LEAST_WINDOWS if count is None else count
    if have >= least:
        return min(have, count or MOST_WINDOWS)
    fits = f"ask for {have} of them at most, or shorter ones" if have else "ask for shorter windows"
    raise FewbitError(
        "The calibration text is too short.",
        f"{tokens.name!r} has {len(tokens.ids):,} tokens; {least} x {length:,} take {least * length:,}.",
        f"Give a longer text, or {fits}.",
    )


def _check_known(tokens: _Tokens, tokenizer: Tokenizer, count: int, length: int) -> None:
    """FewbitError for an empty text, and for one of which the tokenizer makes nothing that calibrates."""
    ids = tokens.ids[: count * length]
    if not ids and not tokens.characters:
        raise FewbitError(
            "The calibration text is empty.",
            f"{tokens.name!r} has no text in it.",
            "Give a text of a few thousand words.",
        )
    unknown = _unknown_id(tokenizer)
    if not ids:
        facts = f"All of its {tokens.characters:,} characters were left out"
    elif len(ids) >= max(length, 2) and ids.count(ids[0]) == len(ids):
        facts = f"All of its {len(ids):,} tokens are the same one, {ids[0]}"
    elif unknown is not None and ids.count(unknown) * 2 > len(ids):
        facts = f"{ids.count(unknown):,} of its {len(ids):,} tokens are the one for unknown text, {unknown}"
    else:
        return
    raise FewbitError(
        "The tokenizer knows too little of the calibration text.",
        f"{facts} ({tokens.name!r}).",
        "Check that the tokenizer belongs to the model, or give a text in a language it knows.",
    )


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    model = json.loads(tokenizer.data.json).get("model", {})
    if model.get("unk_token") is not None:
        return tokenizer.inner.token_to_id(model["unk_token"])
    found = model.get("unk_id")
    return found if isinstance(found, int) else None
