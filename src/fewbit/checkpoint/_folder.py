"""What Hugging Face folders share: config.json, the list of weight files, the tokenizer's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewbit.checkpoint import TokenizerData
from fewbit.config_values import shown
from fewbit.errors import FewbitError

# files are read whole, so their size is bounded first
MAX_JSON_BYTES = 1 << 28
Json = dict[str, Any]


def read_text(file: Path) -> str:
    """A small file as UTF-8 text; FewbitError where it is none."""
    try:
        size = file.stat().st_size
        if size > MAX_JSON_BYTES:
            raise FewbitError(
                f"{file.name} is too large to be what its name says.",
                f"{file}: {size:,} bytes, at most {MAX_JSON_BYTES:,} are read.",
                "Check where the file came from.",
            )
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise FewbitError(
            f"{file.name} is not UTF-8 text.",
            f"{file}: {e.reason} at byte {e.start:,}.",
            "Download or copy the file again.",
        ) from e
    except OSError as e:
        raise FewbitError(
            f"{file.name} can't be read.", f"{file}: {e.strerror}.", "Check that it is a file and may be read."
        ) from e


def read_json(file: Path) -> Json:
    """A JSON object from a file; FewbitError names the line where it is broken."""
    return parse_json(file, read_text(file))


def parse_json(file: Path, text: str) -> Json:
    """The JSON object that is `text`, read from `file`; FewbitError names the line where it is broken."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise FewbitError(f"{file.name} is not valid JSON.", f"{file}: {e}.", "Download or copy the file again.") from e
    if not isinstance(found, dict):
        raise FewbitError(
            f"{file.name} does not hold a JSON object.",
            f"{file}: found a {type(found).__name__}.",
            "Download or copy the file again.",
        )
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index where it has one; FewbitError where one is missing."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FewbitError(
                f"There are no weights in {str(folder)!r}.",
                f"No *.safetensors file among {sum(1 for _ in folder.iterdir())} files.",
                "Download the model's safetensors files (pickled .bin files are never read).",
            )
        return files
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise FewbitError(
            f"{index.name} has no usable weight_map.", f"{index}", "Download or copy the index file again."
        )
    found = sorted(set(table.values()))
    for name in found:
        # an index must not lead out of its folder
        if Path(name).name != name or not (folder / name).is_file():
            raise FewbitError(
                f"The weight file {name!r} is missing.",
                f"{index.name} names {len(found)} files in {folder}.",
                "Download the missing file, or the whole model again.",
            )
    return [folder / name for name in found]


def tokenizer_data(folder: Path) -> TokenizerData:
    """The tokenizer's files of a folder."""
    file = folder / "tokenizer.json"
    if not file.exists():
        raise FewbitError(
            "The model has no tokenizer.json.",
            f"{folder} holds none; older formats (tokenizer.model, vocab.txt) are not read.",
            "Save the tokenizer with transformers (AutoTokenizer … save_pretrained) into the folder.",
        )
    settings = folder / "tokenizer_config.json"
    config = _optional(settings)
    text = read_text(file)
    by_text = _added_tokens(file, text)
    bos, eos = (_token_id(settings, key, config.get(key), by_text) for key in ("bos_token", "eos_token"))
    ends = [] if eos is None else [eos]
    for source in ("generation_config.json", "config.json"):
        ends += _end_ids(folder / source, _optional(folder / source).get("eos_token_id"))
    return TokenizerData(
        json=text,
        chat_template=_template(folder, settings, config.get("chat_template")),
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys(ends)),
        add_bos=bool(config.get("add_bos_token")),
    )


def _optional(file: Path) -> Json:
    return read_json(file) if file.exists() else {}


def _unusable(file: Path, key: str, value: Any, wanted: str) -> FewbitError:
    return FewbitError(
        f"{file.name} has no usable {key!r}.",
        f"{file}: found {shown(value)} where {wanted} belongs.",
        "Download or copy the file again.",
    )


def _template(folder: Path, settings: Path, found: Any) -> str | None:
    """A file of its own wins; tokenizer_config.json has one template, or several by name."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return read_text(file)
    if isinstance(found, list):
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        raise _unusable(settings, "chat_template", found, "text")
    return found


def _added_tokens(file: Path, text: str) -> dict[str, int]:
    """Text -> id of the tokens outside the vocabulary proper, special ones among them."""
    added = parse_json(file, text).get("added_tokens")
    if added is not None and not isinstance(added, list):
        raise _unusable(file, "added_tokens", added, "a list")
    found: dict[str, int] = {}
    for token in added or []:
        content, number = (token.get("content"), token.get("id")) if isinstance(token, dict) else (None, None)
        if not isinstance(content, str) or not isinstance(number, int) or not _is_id(number):
            raise _unusable(file, "added_tokens", token, "a token with its content and id")
        found[content] = number
    return found


def _token_id(file: Path, key: str, token: Any, by_text: dict[str, int]) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise _unusable(file, key, token, "a token's text")
    return None if text is None else by_text.get(text)


def _end_ids(file: Path, found: Any) -> list[int]:
    """Ids that end an answer; null and negative ones stand for none."""
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(_is_id(i) or (isinstance(i, int) and i < 0) for i in ids):
        raise _unusable(file, "eos_token_id", found, "a token id or a list of them")
    return [i for i in ids if i >= 0]


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
