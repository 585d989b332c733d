"""The list of folders fewbit wrote, and what a folder's own files say of how it was made."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.store import places

# the header of a safetensors file is read for its notes alone
MAX_HEADER = 1 << 25


@dataclass(frozen=True)
class Written:
    """A folder fewbit wrote."""

    name: str
    path: Path
    facts: dict[str, Any]

    @property
    def detail(self) -> str:
        """Such as `int4g64 rtn, head int8, 4.72 bits per weight`."""
        return detail(self.facts)


def remember(path: Path, facts: Mapping[str, Any]) -> bool:
    """Put a folder fewbit wrote on the list; `format`, `method`, `head`, `bits_per_weight` of the facts are shown.

    False where the list can't be written: the folder itself is unharmed. What lies in fewbit's cache is found there
    and not listed.
    """
    path = path.absolute()
    if path.parent == places.quantized_dir():
        return True
    shown = {k: facts[k] for k in ("format", "method", "head", "bits_per_weight") if k in facts}
    return _rewrite(path, [{"path": str(path), "facts": shown}])


def forget(path: Path) -> bool:
    """Take a folder off the list."""
    return _rewrite(path.absolute(), [])


def remembered() -> list[Written]:
    """Written folders that still exist, oldest first."""
    found = []
    for item in _read_list():
        path = Path(item["path"])
        with suppress(OSError, ValueError):
            if path.is_dir():
                found.append(Written(path.name, path, item["facts"]))
    return found


def kept() -> list[Written]:
    """Models that were quantized into fewbit's cache, oldest first."""
    folders = []
    with suppress(OSError):
        folders = [f for f in places.quantized_dir().iterdir() if not f.name.startswith(".") and f.is_dir()]
    return [Written(f.name, f, notes(f)) for f in sorted(folders, key=lambda f: f.stat().st_mtime)]


def notes(folder: Path) -> dict[str, Any]:
    """What fewbit noted in a folder's weight files of its own work; empty where it did not write them."""
    for file in sorted(folder.glob("*.safetensors"))[:1]:
        with suppress(OSError, ValueError, RecursionError, KeyError, TypeError), file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length <= min(MAX_HEADER, file.stat().st_size):
                found = json.loads(json.loads(opened.read(length))["__metadata__"]["fewbit"])
                return found if isinstance(found, dict) else {}
    return {}


def detail(facts: Mapping[str, Any]) -> str:
    """Format, method, head and bits in words."""
    parts = [" ".join(str(facts[k]) for k in ("format", "method") if k in facts)]
    if "head" in facts:
        parts.append(f"head {facts['head']}")
    if isinstance(facts.get("bits_per_weight"), int | float):
        parts.append(f"{facts['bits_per_weight']:.2f} bits per weight")
    return ", ".join(p for p in parts if p)


def _list_file() -> Path:
    return places.data_dir() / "models.json"


def _rewrite(path: Path, added: list[dict[str, Any]]) -> bool:
    """The list without `path` and with what is added at its end; False where it can't be written."""
    target = _list_file()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with places.lock(target.parent):
            others = [item for item in _read_list() if item["path"] != str(path)]
            text = json.dumps({"models": [*others, *added]}, indent=1, default=str)
            beside = target.with_name(f"{target.name}.{os.getpid()}")
            beside.write_text(text, encoding="utf-8")
            beside.replace(target)
    except OSError:
        return False
    return True


def _read_list() -> list[dict[str, Any]]:
    """The stored items; a missing or broken list is empty, a broken item left out."""
    try:
        stored = json.loads(_list_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    items = stored.get("models") if isinstance(stored, dict) else None
    return [
        item
        for item in (items if isinstance(items, list) else [])
        if isinstance(item, dict) and isinstance(item.get("path"), str) and isinstance(item.get("facts"), dict)
    ]
