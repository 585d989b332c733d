"""Writes quantized folders: planned from names and shapes alone, streamed tensor by tensor, renamed when whole."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewbit.checkpoint._safetensors import ShardWriter
from fewbit.errors import FewbitError
from fewbit.formats import Format, Layout, parse
from fewbit.formats.integer import IntegerFormat
from fewbit.qtensor import QTensor

# part of a format -> what is added to the tensor's name, as compressed-tensors spells it
SPELLING = {"packed": "_packed", "scale": "_scale", "zero": "_zero_point"}
SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Planned:
    """One tensor to be written: logical name and shape, and the spec it will have."""

    name: str
    spec: str
    shape: tuple[int, ...]

    @property
    def format(self) -> Format:
        """The parsed spec."""
        return parse(self.spec)

    def stored(self, scale_dtype: torch.dtype) -> Layout:
        """Names as they lie in the file, with dtypes and shapes."""
        layout = self.format.layout(self.shape, scale_dtype)
        if "packed" not in layout:
            return {self.name: layout["weight"]}
        found = {f"{self.name}{SPELLING[part]}": where for part, where in layout.items()}
        return found | {f"{self.name}_shape": (torch.int64, (2,))}


def quantization_config(tensors: Sequence[Planned], linears: set[str]) -> dict[str, Any] | None:
    """`quantization_config` of config.json: compressed-tensors where it can say it, else fewbit; None if nothing is
    quantized. `linears` are the names of the matrices other engines treat as Linear modules, head included.
    """
    packed = [t for t in tensors if isinstance(t.format, IntegerFormat)]
    if not packed:
        return None
    fmt = packed[0].format
    sayable = (
        len({t.spec for t in packed}) == 1
        and isinstance(fmt, IntegerFormat)
        and fmt.bits in (4, 8)
        and all(t.name in linears and t.shape[1] % fmt.span(t.shape[1]) == 0 for t in packed)
        and not any(fmt.asymmetric and t.shape[0] % (32 // fmt.bits) for t in packed)
    )
    if not sayable or not isinstance(fmt, IntegerFormat):
        return {"quant_method": "fewbit", "format": "pack-quantized", "specs": sorted({t.spec for t in packed})}
    scheme = {
        "num_bits": fmt.bits,
        "type": "int",
        "symmetric": not fmt.asymmetric,
        "strategy": "group" if fmt.group else "channel",
        "group_size": fmt.group,
        "dynamic": False,
    }
    names = {t.name for t in packed}
    group: dict[str, Any] = {"targets": ["Linear"], "format": "pack-quantized", "weights": scheme}
    group |= {"input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": sorted({n.removesuffix(".weight") for n in linears - names} | {"lm_head"} - _modules(names)),
        "config_groups": {"group_0": group},
    }


def _modules(names: set[str]) -> set[str]:
    return {name.removesuffix(".weight") for name in names}


class Writer:
    """Writes a folder beside `out` under a name of its own and renames it into place when it is whole.

    Used as a context manager: leaving it by an error, Ctrl-C included, removes everything it wrote.
    """

    def __init__(self, out: Path, tensors: Sequence[Planned], scale_dtype: torch.dtype, facts: dict[str, Any]) -> None:
        self.out, self.tensors, self.scale_dtype = out.absolute(), tensors, scale_dtype
        specs = {t.name: t.spec for t in tensors if isinstance(t.format, IntegerFormat)}
        self.facts = facts | {"specs": specs}
        self.partial: Path | None = None
        self.home: dict[str, ShardWriter] = {}
        self.stack = ExitStack()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, before anything is written."""
        return sum(_bytes(t.stored(self.scale_dtype)) for t in self.tensors)

    def __enter__(self) -> Writer:
        self._check()
        try:
            # never a guessable name: what lies there could be somebody else's, or lead somewhere else
            self.partial = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", suffix=".partial", dir=self.out.parent))
            self._open_shards(self.partial)
        except BaseException:
            self.stack.close()
            self._discard()
            raise
        return self

    def _check_absent(self) -> None:
        if self.out.exists() or self.out.is_symlink():
            raise FewbitError(
                f"The output {str(self.out)!r} exists already.",
                "fewbit never overwrites a model.",
                f"Choose another name, or remove it first: rm -r {shlex.quote(str(self.out))}",
            )

    def _check(self) -> None:
        self._check_absent()
        parent = self.out.parent
        if not parent.is_dir():
            raise FewbitError(
                f"The output's folder {str(parent)!r} does not exist.",
                f"Asked for {self.out}.",
                f"Make it first: mkdir -p {shlex.quote(str(parent))}",
            )
        if not os.access(parent, os.W_OK | os.X_OK):
            raise FewbitError(
                f"The output's folder {str(parent)!r} can't be written to.",
                f"Asked for {self.out}; the folder's permissions refuse it.",
                "Change its permissions, or choose another output.",
            )
        free = shutil.disk_usage(parent).free
        if free < self.nbytes:
            raise FewbitError(
                "The disk is too full for the output.",
                f"{self.nbytes:,} bytes are needed, {free:,} are free at {parent}.",
                "Free some space, or choose an output folder on another disk.",
            )

    def _open_shards(self, folder: Path) -> None:
        shards = list(_split(self.tensors, self.scale_dtype))
        metadata = {"fewbit": json.dumps(self.facts, sort_keys=True)}
        table: dict[str, str] = {}
        for i, members in enumerate(shards):
            file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            stored: Layout = {}
            for t in members:
                stored |= t.stored(self.scale_dtype)
            writer = self.stack.enter_context(ShardWriter(folder / file, stored, metadata))
            self.home |= {t.name: writer for t in members}
            table |= dict.fromkeys(stored, file)
        if len(shards) > 1:
            self.text("model.safetensors.index.json", {"metadata": {"total_size": self.nbytes}, "weight_map": table})

    def write(self, planned: Planned, pieces: Iterable[QTensor]) -> None:
        """One tensor, in pieces of rows; all but the last must hold a multiple of 32 rows."""
        writer = self.home[planned.name]
        for q in pieces:
            for part, data in q.parts.items():
                writer.write(planned.name + SPELLING.get(part, ""), data)
        if f"{planned.name}_shape" in writer.place:
            writer.write(f"{planned.name}_shape", torch.tensor(planned.shape))

    def text(self, name: str, content: dict[str, Any] | str) -> None:
        """A text or JSON file beside the weights."""
        if not isinstance(content, str):
            content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        if self.partial is None:
            raise ValueError("a Writer writes only inside its `with` block")
        (self.partial / name).write_text(content, encoding="utf-8")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: Any) -> None:
        try:
            self.stack.__exit__(kind, error, at)
            if kind is None and self.partial is not None:
                # another process may have been faster
                self._check_absent()
                self.partial.chmod(0o755)
                self.partial.rename(self.out)
                self.partial = None
        finally:
            self._discard()

    def _discard(self) -> None:
        if self.partial is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial = None


def _bytes(layout: Layout) -> int:
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in layout.values())


def _split(tensors: Sequence[Planned], scale_dtype: torch.dtype) -> Iterator[list[Planned]]:
    """Tensors in files of at most SHARD_BYTES (a single larger tensor gets a file of its own)."""
    members: list[Planned] = []
    size = 0
    for t in tensors:
        nbytes = _bytes(t.stored(scale_dtype))
        if members and size + nbytes > SHARD_BYTES:
            yield members
            members, size = [], 0
        members.append(t)
        size += nbytes
    yield members
