"""Values of a config.json, or of a GGUF file's metadata, checked before anything is built or allocated from them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fewbit.errors import FewbitError

_MISSING = object()


def number(config: Mapping[str, Any], key: str, default: int | None = None, most: int = 2**31 - 1) -> int:
    """A whole number from 1 to `most`; a missing or null one is `default`. FewbitError where it is something else."""
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        raise _unusable(key, value, f"a whole number from 1 to {most:,}")
    return value


def real(config: Mapping[str, Any], key: str, default: float | None, least: float, most: float) -> float:
    """A number from `least` to `most`, so neither infinite nor NaN; a missing one is `default`, null is refused."""
    value = config.get(key, _MISSING if default is None else default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise _unusable(key, None if value is _MISSING else value, f"a number from {least:g} to {most:g}")
    return float(value)


def flag(config: Mapping[str, Any], key: str) -> bool:
    """true or false; a missing or null one is false. FewbitError where it is something else."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise _unusable(key, value, "true or false")
    return bool(value)


def shown(value: Any) -> str:
    """A value from a file as an error shows it: never longer than a line."""
    # numbers beyond a float's are not printed: Python refuses very long ones
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a whole number of {value.bit_length():,} bits"
    return repr(value[:60] if isinstance(value, str | list) else value)[:80]


def _unusable(key: str, value: Any, wanted: str) -> FewbitError:
    return FewbitError(
        f"The model's config has no usable {key!r}.",
        f"Found {shown(value)} where {wanted} belongs.",
        "Check config.json (in a GGUF file: its metadata) against the original model's.",
    )


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(text: str) -> int:
    """`40GB`, `16GiB`, `56 MB` or a plain number of bytes; ValueError where it is none, or not positive."""
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?i?)B?\s*", text, re.IGNORECASE)
    unit = _UNITS.get(found[2].upper()) if found else None
    count = int(float(found[1]) * unit) if found and unit else 0
    if count < 1:
        raise ValueError(f"{text!r} is not a size such as 40GB, 16GiB or 56MB")
    return count
