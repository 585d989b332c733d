"""GGUF, the checkpoint of ggml and llama.cpp: one file, or several that llama-gguf-split made of one.

The parts of a model are named NAME-00001-of-00003.gguf; the first has all metadata, each has its number (`split.no`),
the number of parts (`split.count`) and of all tensors (`split.tensors.count`). `_gguf_file` reads one file.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, Final

import torch

from fewbit import formats
from fewbit.checkpoint import Checkpoint, Extent, TokenizerData, _gguf_tokenizer
from fewbit.checkpoint._gguf_file import SPECS, TYPE_NAMES, Entry, GgufFile, type_name
from fewbit.errors import FewbitError
from fewbit.gguf_parts import all_parts
from fewbit.lookup import nearest
from fewbit.qtensor import QTensor

SPLIT_KEYS: Final = ("split.no", "split.count", "split.tensors.count")


def matches(path: Path) -> bool:
    """A file that begins with the magic or is called `.gguf`."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def open(path: Path) -> Gguf:  # noqa: A001
    """Read the header at `path`; FewbitError where it is broken or foreign, or its other parts are."""
    return Gguf(path)


class Gguf(Checkpoint):
    """An open model. Tensors are views of private mappings: writing to one never reaches a file."""

    naming = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        opened = GgufFile(path)
        self._files = [opened] if _count(opened) <= 1 else _parts(opened)
        self.config: dict[str, Any] = self._files[0].metadata
        self._home = {name: file for file in self._files for name in file.entries}

    def names(self) -> list[str]:
        """ggml's own tensor names (`blk.0.attn_q.weight`), in file order."""
        return list(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        """(out, in): ggml's dims the other way round."""
        return self._entry(name).shape

    def spec(self, name: str) -> str:
        """The spec of a tensor's ggml type; FewbitError where fewbit does not read that type."""
        kind = self._entry(name).kind
        if kind not in SPECS:
            called = TYPE_NAMES.get(kind)
            raise FewbitError(
                f"fewbit does not read the ggml type {called or f'number {kind}'} of {name!r}.",
                f"{self.path.name} holds {self._census()}; readable: {', '.join(type_name(k) for k in SPECS)}.",
                "Use a file of the same model in another type, Q4_K say, or quantize its safetensors with fewbit.",
            )
        return SPECS[kind]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> QTensor:
        """The tensor as a view of the file, or the rows [start, stop) of its first axis."""
        spec, entry = self.spec(name), self._entry(name)
        # every readable type is one part
        ((part, place),) = self.extents(name).items()
        dtype, shape = place.dtype, place.shape
        stored = torch.frombuffer(self._home[name].data, dtype=dtype, count=prod(shape), offset=entry.start).view(shape)
        if rows is None:
            return QTensor(spec, entry.shape, {part: stored})
        start, stop = rows
        if len(shape) < 2 or not 0 <= start < stop <= shape[0]:
            raise ValueError(f"{name} of shape {entry.shape} has no rows {start} to {stop}")
        return QTensor(spec, (stop - start, *entry.shape[1:]), {part: stored[start:stop]})

    def extents(self, name: str) -> dict[str, Extent]:
        """The tensor's bytes as they are."""
        entry = self._entry(name)
        layout = formats.parse(self.spec(name)).layout(entry.shape, torch.float32)
        file = self._home[name].path
        return {part: Extent(file, entry.start, dtype, shape) for part, (dtype, shape) in layout.items()}

    def assemble(self, name: str, stored: dict[str, torch.Tensor]) -> QTensor:
        """The tensor of its bytes."""
        return QTensor(self.spec(name), self.shape(name), stored)

    def tokenizer(self) -> TokenizerData:
        """The tokenizer in the metadata, as a tokenizer.json."""
        return _gguf_tokenizer.convert(self.config, self.path.name)

    def weight_bytes(self) -> int:
        """The size of the file, or of all parts."""
        return sum(len(file.data) for file in self._files)

    def _entry(self, name: str) -> Entry:
        if name not in self._home:
            raise FewbitError(
                f"There is no tensor {name!r} in {self.path.name}.",
                f"It holds {len(self._home)} tensors.",
                nearest(name, list(self._home)[:1000]),
            )
        return self._home[name].entries[name]

    def _census(self) -> str:
        kinds = [type_name(file.entries[name].kind) for name, file in self._home.items()]
        return ", ".join(f"{kinds.count(k)} tensors of {k}" for k in dict.fromkeys(kinds))


def _count(file: GgufFile) -> int:
    """The number of parts the model has; 0 or 1 where it is one file."""
    count = file.metadata.get("split.count", 1)
    if not isinstance(count, int) or isinstance(count, bool):
        raise _strange(file.path, f"Its header says split.count = {str(count)[:40]}.")
    return count


def _parts(opened: GgufFile) -> list[GgufFile]:
    """All parts in order; FewbitError where one is missing, or is of another model."""
    count, paths = _count(opened), all_parts(opened.path)
    if len(paths) != count:
        raise _strange(
            opened.path,
            f"Its header says it is one of {count} parts, and its name is not NAME-00001-of-{count:05d}.gguf.",
        )
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FewbitError(
            f"{opened.path.name} is one part of a model whose other parts are missing.",
            f"Of {count} parts {len(missing)} are not in {opened.path.parent}: {', '.join(missing[:3])}"
            + (" ..." if missing[3:] else "."),
            "Put all parts into one folder, under the names they were published with.",
        )
    files = [opened if path == opened.path else GgufFile(path) for path in paths]
    _check_one_model(files)
    return files


def _check_one_model(files: list[GgufFile]) -> None:
    """Parts must agree in what they say of the split, and hold each tensor once."""
    first, tensors = files[0], sum(len(file.entries) for file in files)
    said = (len(files), first.metadata.get("split.tensors.count"))
    seen: dict[str, Path] = {}
    for number, file in enumerate(files):
        found = tuple(file.metadata.get(key) for key in SPLIT_KEYS)
        # the first says nothing of others' keys; where a part repeats one, it must be the same
        for key in ("general.architecture", "general.name"):
            if key in file.metadata and file.metadata[key] != first.metadata.get(key):
                raise _other(file.path, f"{key} is {str(file.metadata[key])[:40]!r} there.", first.path)
        if found != (number, *said):
            wanted = ", ".join(f"{key} = {value}" for key, value in zip(SPLIT_KEYS, (number, *said), strict=True))
            raise _other(file.path, f"It says {', '.join(str(f)[:40] for f in found)} for {wanted}.", first.path)
        for name in file.entries:
            if name in seen:
                raise _other(file.path, f"The tensor {name[:80]!r} is in {seen[name].name} as well.", first.path)
            seen[name] = file.path
    if said[1] is not None and said[1] != tensors:
        raise _strange(first.path, f"Its header says the parts have {said[1]} tensors, and they have {tensors}.")


def _other(path: Path, facts: str, first: Path) -> FewbitError:
    return FewbitError(
        f"{path.name} and {first.name} are not parts of one model.",
        facts,
        "Download the parts that are of another one.",
    )


def _strange(path: Path, facts: str) -> FewbitError:
    return FewbitError(
        f"{path.name} is one part of a split model, and the others are not to be found.",
        facts,
        "Give all parts the names they were published with, or join them: llama-gguf-split --merge FIRST-PART OUT.gguf",
    )
