"""Writes quantized folders: planned from names and shapes alone, streamed tensor by tensor, renamed when whole."""

from __future__ import annotations

import errno
import glob
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint import _journal as journal
from fewbit.checkpoint._journal import Journal
from fewbit.checkpoint._safetensors import ShardWriter, laid_out
from fewbit.errors import FewbitError
from fewbit.formats import Format, Layout, parse
from fewbit.formats.integer import IntegerFormat
from fewbit.qtensor import QTensor

# part of a format -> what is added to the tensor's name, as compressed-tensors spells it
SPELLING = {"packed": "_packed", "scale": "_scale", "zero": "_zero_point"}
SHARD_BYTES = 4 << 30
# what a file says of how it was made takes less, beside the specs
FACTS_BYTES = 4096
# config_groups that are written
MOST_SCHEMES = 8


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

    def spelled(self, q: QTensor) -> dict[str, Tensor]:
        """A piece's parts under the names of `stored`."""
        return {self.name + SPELLING.get(part, ""): data for part, data in q.parts.items()}


def quantization_config(tensors: Sequence[Planned], linears: set[str]) -> dict[str, Any] | None:
    """`quantization_config` of config.json: compressed-tensors where it can say it, else fewbit; None if nothing is
    quantized. `linears` are the names of the matrices other engines treat as Linear modules, head included.
    """
    packed = [t for t in tensors if isinstance(t.format, IntegerFormat)]
    if not packed:
        return None
    specs = Counter(t.spec for t in packed)
    if not all(t.name in linears and _sayable(t) for t in packed) or len(specs) > MOST_SCHEMES:
        return {"quant_method": "fewbit", "format": "pack-quantized", "specs": sorted(specs)}
    (usual, _), *others = specs.most_common()
    groups = {"group_0": _group(usual, ["Linear"])}
    # a module's name goes before its class
    for i, (spec, _) in enumerate(others):
        groups[f"group_{i + 1}"] = _group(spec, sorted(_modules({t.name for t in packed if t.spec == spec})))
    names = {t.name for t in packed}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": sorted({n.removesuffix(".weight") for n in linears - names} | {"lm_head"} - _modules(names)),
        "config_groups": groups,
    }


def _sayable(t: Planned) -> bool:
    """Whether compressed-tensors can say it: 4 or 8 bits, whole groups, zero points that fill their words."""
    fmt = t.format
    return (
        isinstance(fmt, IntegerFormat)
        and fmt.bits in (4, 8)
        and t.shape[1] % fmt.span(t.shape[1]) == 0
        and not (fmt.asymmetric and t.shape[0] % (32 // fmt.bits))
    )


def _group(spec: str, targets: list[str]) -> dict[str, Any]:
    """One of `config_groups`."""
    fmt = parse(spec)
    if not isinstance(fmt, IntegerFormat):
        raise TypeError(spec)
    scheme = {
        "num_bits": fmt.bits,
        "type": "int",
        "symmetric": not fmt.asymmetric,
        "strategy": "group" if fmt.group else "channel",
        "group_size": fmt.group,
        "dynamic": False,
    }
    group: dict[str, Any] = {"targets": targets, "format": "pack-quantized", "weights": scheme}
    return group | {"input_activations": None, "output_activations": None}


def _modules(names: set[str]) -> set[str]:
    return {name.removesuffix(".weight") for name in names}


class Writer:
    """Writes a folder beside `out` and renames it into place when it is whole.

    `fingerprint` says which run the output belongs to: an unfinished folder of the same run is gone on with, one of
    another run is refused with what differs (`supersede` throws that away, `restart` any). Used as a context manager:
    leaving it by an error, Ctrl-C included, keeps the units that were committed, and removes everything where there
    are none.
    """

    def __init__(
        self,
        out: Path,
        tensors: Sequence[Planned],
        scale_dtype: torch.dtype,
        facts: dict[str, Any],
        fingerprint: dict[str, Any] | None = None,
        restart: bool = False,
        supersede: bool = False,
    ) -> None:
        self.out, self.tensors, self.scale_dtype = out.absolute(), tensors, scale_dtype
        specs = {t.name: t.spec for t in tensors if isinstance(t.format, IntegerFormat)}
        self.facts = facts | {"specs": specs}
        self.fingerprint, self.restart, self.supersede = fingerprint or {}, restart, supersede
        self.journal: Journal | None = None
        self.home: dict[str, ShardWriter] = {}
        self.stack = ExitStack()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, before anything is written."""
        return sum(_bytes(t.stored(self.scale_dtype)) for t in self.tensors)

    @property
    def unfinished(self) -> Path:
        """Where the output lies until it is whole."""
        return self.out.parent / f".{self.out.name}.partial"

    @property
    def done(self) -> list[str]:
        """Units that are whole on the disk."""
        return self.journal.done if self.journal is not None else []

    @property
    def folder(self) -> Path:
        """The folder while it is written; only inside the `with` block."""
        if self.journal is None:
            raise ValueError("a Writer writes only inside its `with` block")
        return self.journal.folder

    def __enter__(self) -> Writer:
        self._check_place()
        try:
            self.journal = self._kept()
            if self.journal is None:
                self._check_space()
                self._begin()
            else:
                self._open_shards(self.unfinished, resume=True)
        except BaseException:
            self._leave(*sys.exc_info())
            raise
        return self

    def _begin(self) -> None:
        journal.sweep(f".{glob.escape(self.out.name)}.*.new", self.out.parent)
        # made under a name nobody can guess and renamed: what lies under the final name is whole and ours
        fresh = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", suffix=".new", dir=self.out.parent))
        self.journal = Journal.begin(fresh, self.fingerprint)
        self._open_shards(fresh, resume=False)
        try:
            self.journal.rename(self.unfinished)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise journal.busy(self.unfinished) from e

    def _kept(self) -> Journal | None:
        """The journal of an unfinished output of this run; None where there is none."""
        place = self.unfinished
        if not place.exists() and not place.is_symlink():
            return None
        found = Journal.reopen(place)
        if found is None:
            raise FewbitError(
                f"{str(place)!r} is in the way.",
                "It is no unfinished output of fewbit's that belongs to this user.",
                f"Remove it (rm -r {shlex.quote(str(place))}), or choose another output.",
            )
        if self.restart:
            found.discard()
            return None
        if changed := journal.differences(found.fingerprint, self.fingerprint):
            if self.supersede:
                found.discard()
                return None
            found.close()
            raise FewbitError(
                f"An unfinished output of another run lies at {str(place)!r}.",
                "; ".join(changed) + ".",
                "Run the command as before to go on with it, add --restart to begin anew, or choose another output.",
            )
        return found

    def _check_absent(self) -> None:
        journal.tidy(self.out)
        if self.out.exists() or self.out.is_symlink():
            raise FewbitError(
                f"The output {str(self.out)!r} exists already.",
                "fewbit never overwrites a model.",
                f"Choose another name, or remove it first: rm -r {shlex.quote(str(self.out))}",
            )

    def _check_place(self) -> None:
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

    def _check_space(self) -> None:
        parent = self.out.parent
        free = shutil.disk_usage(parent).free
        if free < self.nbytes:
            raise FewbitError(
                "The disk is too full for the output.",
                f"{self.nbytes:,} bytes are needed, {free:,} are free at {parent}.",
                "Free some space, or choose an output folder on another disk.",
            )

    def _open_shards(self, folder: Path, resume: bool) -> None:
        shards = list(_split(self.tensors, self.scale_dtype))
        metadata = {"fewbit": json.dumps(self.facts, sort_keys=True)}
        table: dict[str, str] = {}
        for i, members in enumerate(shards):
            file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            stored: Layout = {}
            for t in members:
                stored |= t.stored(self.scale_dtype)
            writer = self.stack.enter_context(ShardWriter(folder / file, stored, metadata, resume))
            self.home |= {t.name: writer for t in members}
            table |= dict.fromkeys(stored, file)
        if len(shards) > 1:
            self.text("model.safetensors.index.json", {"metadata": {"total_size": self.nbytes}, "weight_map": table})

    def write(self, planned: Planned, pieces: Iterable[QTensor]) -> None:
        """One tensor, in pieces of rows; all but the last must hold a multiple of 32 rows."""
        writer = self.home[planned.name]
        for q in pieces:
            for name, data in planned.spelled(q).items():
                writer.write(name, data)
        if f"{planned.name}_shape" in writer.place:
            writer.write(f"{planned.name}_shape", torch.tensor(planned.shape))

    def commit(self, unit: str, tensors: Iterable[Planned]) -> None:
        """The unit's `tensors` are written: bring them to the disk, and note it."""
        for shard in {id(self.home[t.name]): self.home[t.name] for t in tensors}.values():
            shard.sync()
        if self.journal is not None:
            self.journal.commit(unit)

    def keep(self, tensors: Iterable[Planned]) -> None:
        """These tensors were committed by an earlier run."""
        for planned in tensors:
            for stored in planned.stored(self.scale_dtype):
                self.home[planned.name].kept(stored)

    def text(self, name: str, content: dict[str, Any] | str) -> None:
        """A text or JSON file beside the weights."""
        if not isinstance(content, str):
            content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        with (self.folder / name).open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None and self.journal is not None:
                self.stack.close()
                # another process may have been faster
                self._check_absent()
                self.folder.chmod(0o755)
                # named first, tidied after: a kill in between costs nothing
                self.journal.rename(self.out)
                self.journal.remove()
                self.journal = None
        except BaseException:
            kind, error, at = sys.exc_info()
            raise
        finally:
            self._leave(kind, error, at)

    def _leave(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close everything; without a committed unit nothing stays."""
        try:
            self.stack.__exit__(kind, error, at)
        finally:
            if self.journal is not None and not self.done:
                self.journal.discard()
            elif self.journal is not None:
                self.journal.close()
            self.journal = None


def _bytes(layout: Layout) -> int:
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in layout.values())


def file_bytes(tensors: Sequence[Planned], scale_dtype: torch.dtype) -> int:
    """What the weight files take at most, headers included, before anything is written."""
    specs = {t.name: t.spec for t in tensors if isinstance(t.format, IntegerFormat)}
    metadata = {"fewbit": json.dumps({"specs": specs})}
    total = 0
    for members in _split(tensors, scale_dtype):
        stored: Layout = {}
        for t in members:
            stored |= t.stored(scale_dtype)
        beginning, _, end = laid_out(stored, metadata)
        total += len(beginning) + end + FACTS_BYTES
    return total


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
