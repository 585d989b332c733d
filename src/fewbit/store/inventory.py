"""What lies on this machine: models of every kind with their bytes and last use, and what fewbit keeps of them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewbit.store import aliases, hub_cache, places, written
from fewbit.store.hub_cache import Snapshot
from fewbit.store.hub_choice import gguf_names, gguf_parts, quant_of
from fewbit.store.layout_files import SUFFIX, UselessError, opened_layout, read_header

# weights, by how their files end
_WEIGHTS = (".safetensors", ".gguf")


@dataclass(frozen=True)
class Entry:
    """A line of `fewbit ls`.

    kind     alias, hub, folder (fewbit wrote it somewhere), quantized (in fewbit's cache), unfinished, prepared
    bytes    of its files, those it shares with others counted too; of an alias what it will take
    used     when its weights were last read, in seconds since 1970, as far as the file system notes that
    """

    name: str
    path: Path
    kind: str
    bytes: int
    detail: str
    used: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "path": str(self.path)}


def listing() -> list[Entry]:
    """Aliases, models of the hub's cache, folders fewbit wrote (oldest first), quantized models, prepared layouts."""
    return [*_aliases(), *_hub(), *_folders(), *_quantized(), *prepared_layouts()]


def distinct_bytes(entries: Iterable[Entry]) -> int:
    """Bytes on the disk of everything listed, each file once; an alias that was not fetched has none."""
    seen: dict[tuple[int, int], int] = {}
    for entry in entries:
        for file in _files(entry.path):
            with suppress(OSError):
                facts = file.stat()
                seen[facts.st_dev, facts.st_ino] = facts.st_size
    return sum(seen.values())


def prepared_layouts() -> list[Entry]:
    """Packed weights that were kept, by the model they were packed from."""
    found = []
    for file in sorted(places.prepared_dir().glob(f"*{SUFFIX}")):
        with suppress(OSError):
            facts = file.lstat()
            found.append(Entry(_model_of(file), file, "prepared", facts.st_size, "packed weights", facts.st_mtime))
    return found


def _model_of(file: Path) -> str:
    """The model that prepared weights belong to, as its path or the hub calls it."""
    try:
        with opened_layout(file) as opened:
            path = Path(read_header(opened)[0]["purpose"]["path"])
        return hub_cache.title(path) or str(path)
    except (OSError, UselessError, KeyError, TypeError, ValueError):
        return "another version's"


def _aliases() -> list[Entry]:
    found = []
    for alias in aliases.ALIASES.values():
        path = aliases.place(alias)
        here = aliases.is_whole(path, alias)
        state = "fetched" if here else "fetched at first use"
        detail = f"{alias.note}, {alias.licence}, {state}"
        found.append(Entry(alias.name, path, "alias", alias.bytes, detail, _used([path]) if here else None))
    return found


def _hub() -> list[Entry]:
    found = []
    for repo, folder in hub_cache.repos():
        for snapshot in hub_cache.snapshots(repo, folder):
            found += _snapshot(snapshot)
        if parts := hub_cache.unfinished(folder):
            found.append(
                Entry(repo, folder / "blobs", "unfinished", _sizes(parts), "fewbit pull goes on with it", None)
            )
    return found


def _snapshot(snapshot: Snapshot) -> list[Entry]:
    """The folder of safetensors, and each GGUF file, by the name that runs it; what is neither, as it is."""
    names = snapshot.files()
    models = gguf_names(names)
    found = []
    for name in models:
        files = [snapshot.path / part for part in gguf_parts(name, names)]
        found.append(
            Entry(f"{snapshot.name}:{name}", files[0], "hub", _sizes(files), quant_of(name) or "GGUF", _used(files))
        )
    rest = [snapshot.path / n for n in names if not n.endswith(".gguf")]
    if not models or any(f.suffix == ".safetensors" for f in rest):
        found.insert(0, Entry(snapshot.name, snapshot.path, "hub", _sizes(rest), _kind(snapshot.path), _used(rest)))
    return found


def _kind(folder: Path) -> str:
    """Architecture and format, as config.json says them."""
    config = hub_cache.describe(folder)
    model = config.get("model_type")
    if not isinstance(model, str) or not any(folder.glob("*.safetensors")):
        return "no weights that fewbit reads"
    method = config.get("quantization_config")
    if isinstance(method, dict):
        bits = next((method[k] for k in ("bits", "w_bit") if isinstance(method.get(k), int)), None)
        method = f"{method.get('quant_method', 'quantized')}{f' {bits} bits' if bits else ''}"
    dtype = config.get("dtype", config.get("torch_dtype"))
    return f"{model[:40]}, {str(method or f'full precision, {dtype}')[:60]}"


def _folders() -> list[Entry]:
    return [
        Entry(w.name, w.path, "folder", _sizes(_files(w.path)), w.detail, _used(_files(w.path)))
        for w in written.remembered()
    ]


def _quantized() -> list[Entry]:
    found = []
    for w in written.kept():
        files = _files(w.path)
        origin = f", of {w.facts['source']}" if "source" in w.facts else ""
        found.append(Entry(w.name, w.path, "quantized", _sizes(files), w.detail + origin, _used(files)))
    with suppress(OSError):
        for folder in sorted(places.quantized_dir().glob(".*.partial")):
            name = folder.name[1 : -len(".partial")]
            detail = "the same fewbit run goes on with it"
            found.append(Entry(name, folder, "unfinished", _sizes(_files(folder)), detail, None))
    return found


def _files(path: Path) -> list[Path]:
    """A file, or the files right in a folder."""
    with suppress(OSError):
        return [f for f in path.iterdir() if f.is_file()] if path.is_dir() else [path]
    return []


def _sizes(files: Iterable[Path]) -> int:
    """Bytes of files, contents that several names lead to once."""
    total = 0
    for file in {f.resolve() for f in files}:
        with suppress(OSError):
            total += file.stat().st_size
    return total


def _used(files: Iterable[Path]) -> float | None:
    times = []
    for file in files:
        if file.suffix in _WEIGHTS:
            with suppress(OSError):
                times.append(file.stat().st_atime)
    return max(times, default=None)
