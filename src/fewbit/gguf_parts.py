"""The names of a GGUF model's parts: NAME-00001-of-00003.gguf and so on, as llama-gguf-split gives them."""

from __future__ import annotations

import re
from pathlib import Path

PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)


def all_parts(path: Path) -> list[Path]:
    """The paths of all parts in order, whether they are there or not; `path` alone where it is no part."""
    found = PART.fullmatch(path.name)
    if not found or not 1 <= int(found["number"]) <= int(found["count"]):
        return [path]
    count = int(found["count"])
    return [
        path.with_name(f"{found['name']}-{n:05d}-of-{found['count']}{found['suffix']}") for n in range(1, count + 1)
    ]
