"""Where models live: paths, aliases, the hub's cache, folders fewbit wrote, and what it keeps of them.

Nothing heavy is loaded here: the hub's library only where something is fetched or removed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fewbit.errors import FewbitError
from fewbit.lookup import advice
from fewbit.store.aliases import ALIASES, Alias, fetched
from fewbit.store.hub_names import PREFIX, HubName, parse
from fewbit.store.inventory import Entry, listing
from fewbit.store.places import (
    cache_dir,
    compiled_dir,
    content_files,
    data_dir,
    prepared_bytes,
    prepared_dir,
    quantized_dir,
    size_text,
    stamp,
)
from fewbit.store.written import forget, kept, notes, remember, remembered

Progress = Callable[[int, int, str], None]

__all__ = [
    "ALIASES",
    "Alias",
    "Entry",
    "HubName",
    "Progress",
    "cache_dir",
    "compiled_dir",
    "content_files",
    "data_dir",
    "forget",
    "hub_name",
    "kept",
    "listing",
    "locate",
    "notes",
    "prepared_bytes",
    "prepared_dir",
    "quantized_dir",
    "remember",
    "remembered",
    "size_text",
    "stamp",
    "title",
]


def locate(model: str | Path, progress: Progress | None = None) -> Path:
    """The path of a model given as a path, an alias, the name of a folder fewbit wrote, or a hub id.

    An existing path wins. What is not here is fetched: an alias at first use, a model of the hub where its cache lacks
    it (`fewbit pull` asks whether there is a newer one). `progress` (done, total, doing; standard error where None) is
    told what and how big. Raises FewbitError where nothing goes by that name, or the fetch fails.
    """
    name = str(model)
    found = _here(name)
    if found is not None:
        return found
    if name in ALIASES:
        return fetched(ALIASES[name], progress or _to_stderr)
    wanted = hub_name(name)
    if wanted is not None:
        from fewbit.store import hub, hub_cache

        if (path := hub_cache.lookup(wanted)) is not None:
            return path
        if Path(wanted.owner).exists() and not wanted.explicit:
            raise _maybe_a_path(name, wanted)
        try:
            return hub.pull(wanted, progress or _to_stderr).path
        except FewbitError:
            # what another tool left out may not matter, and there is no way to ask for it
            if (path := hub_cache.lookup(wanted, lacking_tokenizer=True)) is not None:
                return path
            raise
    raise _nothing(name)


def hub_name(model: str | Path) -> HubName | None:
    """The hub's model that a text stands for; None where it is a path, an alias, or a folder's name."""
    name = str(model)
    return None if name in ALIASES or _here(name) is not None else parse(name)


def title(path: Path) -> str:
    """What a model's path is called: owner/name@commit in the hub's cache, else the last part of the path."""
    from fewbit.store import hub_cache

    return hub_cache.title(path) or path.name


def _here(name: str) -> Path | None:
    """A path, or the newest folder fewbit wrote of that name."""
    path = Path(name)
    with suppress(RuntimeError):
        path = path.expanduser()
    # a name too long for the file system is no path either; the empty one would be the current folder
    with suppress(OSError):
        if name and path.exists():
            return path
    return next((w.path for w in reversed([*kept(), *remembered()]) if w.name == name), None)


def _to_stderr(done: int, _total: int, text: str) -> None:
    # what is fetched; a line for each step of it would be too many
    if done == 0:
        print(text, file=sys.stderr, flush=True)


def _nothing(name: str) -> FewbitError:
    """No model goes by `name`."""
    known = [*ALIASES, *dict.fromkeys(w.name for w in (*remembered(), *kept()))]
    shown = name if len(name) <= 200 else name[:200] + "…"
    return FewbitError(
        f"There is no model {shown!r}.",
        "No file or folder lies at that path, and it is neither an alias nor a folder fewbit wrote.",
        f"{advice(name, known)} Or give a hub id (owner/name), or the path of a model's folder or of a .gguf file.",
    )


def _maybe_a_path(name: str, wanted: HubName) -> FewbitError:
    return FewbitError(
        f"There is no model {name!r}.",
        f"A folder {wanted.owner!r} is here, and nothing of that name in it.",
        f"Correct the path of the model's folder or .gguf file; for the hub's model, write {PREFIX}{wanted}.",
    )
