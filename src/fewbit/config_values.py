"""Values of a config.json, or of a GGUF file's metadata, checked before anything is built or allocated from them."""

from __future__ import annotations

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
