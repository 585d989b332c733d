"""What Hugging Face folders share: config.json, the list of weight files, the tokenizer's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewbit.checkpoint import TokenizerData
from fewbit.errors import FewbitError

# files are read whole, so their size is bounded first
MAX_JSON_BYTES = 1 << 28
Json = dict[str, Any]


def read_json(file: Path) -> Json:
    """A JSON object from a file; FewbitError names the line where it is broken."""
    try:
        size = file.stat().st_size
        if size > MAX_JSON_BYTES:
            raise FewbitError(
                f"{file.name} is too large to be what its name says.",
                f"{file}: {size:,} bytes, at most {MAX_JSON_BYTES:,} are read.",
                "Check where the file came from.",
            )
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise FewbitError(f"{file.name} is not valid JSON.", f"{file}: {e}.", "Download or copy the file again.") from e
    except OSError as e:
        raise FewbitError(
            f"{file.name} can't be read.", f"{file}: {e.strerror}.", "Check that the file exists and may be read."
        ) from e
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
    config = _optional(folder / "tokenizer_config.json")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    added = read_json(file).get("added_tokens") or []
    by_text = {t.get("content"): t.get("id") for t in added if isinstance(t, dict)}
    text = file.read_text(encoding="utf-8")
    bos, eos = (_token_id(config.get(key), by_text) for key in ("bos_token", "eos_token"))
    ends = [] if eos is None else [eos]
    for source in ("generation_config.json", "config.json"):
        listed = _optional(folder / source).get("eos_token_id")
        ends += [e for e in (listed if isinstance(listed, list) else [listed]) if isinstance(e, int)]
    return TokenizerData(
        json=text,
        chat_template=template if isinstance(template, str) else None,
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys(ends)),
        add_bos=bool(config.get("add_bos_token")),
    )


def _optional(file: Path) -> Json:
    return read_json(file) if file.exists() else {}


def _token_id(token: Any, by_text: dict[Any, Any]) -> int | None:
    found = by_text.get(token.get("content") if isinstance(token, dict) else token)
    return found if isinstance(found, int) else None
