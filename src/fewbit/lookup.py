"""The file name is the registry: what a package can do is the list of its modules."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType

from fewbit.errors import FewbitError


def names(package: str) -> list[str]:
    """Public module names of `package`, sorted; nothing but the package itself is imported."""
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))


def nearest(name: str, known: list[str]) -> str:
    """A half-sentence that names the known spellings closest to `name`, or all of them."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return ("did you mean " + " or ".join(close) + "?") if close else "known: " + ", ".join(known)


def advice(name: str, known: list[str]) -> str:
    """A sentence on which name to use instead of `name`."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}? Use that name."
    return f"Use one of the known names: {', '.join(known)}." if known else "Check the installation: none is known."


def find(package: str, name: str) -> ModuleType:
    """Import the module called `name` from `package`.

    Raises FewbitError with the valid names where there is none.
    """
    known = names(package)
    if name not in known:
        kind = package.rpartition(".")[2]
        raise FewbitError(
            f"There is no {name!r} in {kind}.", f"Known: {', '.join(known) or 'none'}.", advice(name, known)
        )
    return importlib.import_module(f"{package}.{name}")
