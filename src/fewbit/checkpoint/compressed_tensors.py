"""Folders of packed integers: compressed-tensors `pack-quantized`, and fewbit's wider spelling of the same idea.

A matrix `x.weight` [N, K] lies as `x.weight_packed` int32, `x.weight_scale`, `x.weight_shape` int64 [2] and, where it
is asymmetric, `x.weight_zero_point`. What compressed-tensors can say is written as such, and vLLM, SGLang and
transformers load the folder. What it can't (a quantized embedding or head, ragged groups, other widths than 4 and 8)
keeps the spelling under `quant_method: "fewbit"`. fewbit's own facts lie in the files' `__metadata__["fewbit"]`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewbit.checkpoint import Checkpoint, TokenizerData
from fewbit.checkpoint._folder import read_json, tokenizer_data, weight_files
from fewbit.checkpoint._safetensors import Shards, ShardWriter
from fewbit.checkpoint.huggingface import SPECS
from fewbit.errors import FewbitError
from fewbit.formats import Format, Layout, parse
from fewbit.formats.integer import IntegerFormat
from fewbit.qtensor import QTensor

METHODS = ("compressed-tensors", "fewbit")
SPELLING = {"packed": "_packed", "scale": "_scale", "zero": "_zero_point"}
SHARD_BYTES = 4 << 30


def matches(path: Path) -> bool:
    """A folder whose config.json names one of the two quantization methods."""
    config = path / "config.json"
    if not path.is_dir() or not config.is_file():
        return False
    quantization = read_json(config).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") in METHODS


class CompressedTensors(Checkpoint):
    """Packed tensors stay packed; the others are read as they are stored."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / "config.json")
        self.shards = Shards(weight_files(path))
        self._facts = _read_facts(self.shards)
        self._specs: dict[str, str] = {}
        for stored in self.shards.home:
            name = re.sub(r"(_packed|_scale|_zero_point|_shape)$", "", stored)
            if f"{name}_packed" in self.shards:
                self._specs.setdefault(name, "")
            elif stored == name:
                self._specs[name] = SPECS.get(self.shards.dtype(stored), "")
        noted = self._facts.get("specs")
        for name, spec in self._specs.items():
            if not spec:
                found = noted.get(name) if isinstance(noted, dict) else _foreign_spec(self.config, name)
                if not isinstance(found, str):
                    raise FewbitError(
                        f"Nothing says in which format {name!r} is stored.",
                        f"Neither the files' metadata nor quantization_config in {path / 'config.json'}.",
                        "Quantize the model again, or check where the folder came from.",
                    )
                self._specs[name] = found

    def names(self) -> list[str]:
        return list(self._specs)

    def shape(self, name: str) -> tuple[int, ...]:
        if f"{name}_packed" not in self.shards:
            return self.shards.shape(name)
        said = self.shards.read(f"{name}_shape").tolist() if f"{name}_shape" in self.shards else []
        stored = {part: self.shards.shape(f"{name}{s}") for part, s in SPELLING.items() if f"{name}{s}" in self.shards}
        if len(said) != 2 or any(not isinstance(n, int) or n <= 0 for n in said) or said[0] != stored["packed"][0]:
            raise _wrong_shape(name, f"weight_shape says {said}, the parts are {stored}")
        shape = (int(said[0]), int(said[1]))
        planned = parse(self._specs[name]).layout(shape, torch.float32)
        if stored != {part: where for part, (_, where) in planned.items()}:
            raise _wrong_shape(name, f"{self._specs[name]} of {shape} needs {_shapes(planned)}, the parts are {stored}")
        return shape

    def spec(self, name: str) -> str:
        return self._specs[name]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> QTensor:
        shape, spec = self.shape(name), self._specs[name]
        if f"{name}_packed" not in self.shards:
            weight = self.shards.read(name, rows)
            return QTensor(spec, tuple(weight.shape), {"weight": weight})
        fmt = parse(spec)
        parts = {part: self.shards.read(f"{name}{SPELLING[part]}") for part in fmt.layout(shape, torch.float32)}
        if parts["scale"].dtype not in SPECS or any(parts[p].dtype != torch.int32 for p in parts if p != "scale"):
            raise _wrong_shape(name, f"dtypes are { {p: str(t.dtype) for p, t in parts.items()} }")
        q = QTensor(spec, shape, parts)
        return q if rows is None else fmt.take(q, torch.arange(*rows))

    def tokenizer(self) -> TokenizerData:
        return tokenizer_data(self.path)

    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.shards.files)

    def facts(self) -> dict[str, Any]:
        return self._facts


def open(path: Path) -> CompressedTensors:  # noqa: A001
    """Open a folder."""
    return CompressedTensors(path)


def _read_facts(shards: Shards) -> dict[str, Any]:
    for metadata in shards.metadata.values():
        if "fewbit" in metadata:
            try:
                found = json.loads(metadata["fewbit"])
            except (ValueError, RecursionError):
                return {}
            return found if isinstance(found, dict) else {}
    return {}


def _shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    return {part: shape for part, (_, shape) in layout.items()}


def _wrong_shape(name: str, facts: str) -> FewbitError:
    return FewbitError(
        f"The quantized tensor {name!r} does not fit together.", f"{facts}.", "Quantize or download the model again."
    )


def _foreign_spec(config: dict[str, Any], name: str) -> str | None:
    """Spec of a matrix by the scheme of its config group; None where no group has it or the scheme is unknown."""
    groups = config["quantization_config"].get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else []:
        targets = group.get("targets") or []
        module = name.removesuffix(".weight")
        if not any(t == "Linear" or t == module or (t[:3] == "re:" and re.match(t[3:], module)) for t in targets):
            continue
        w = group.get("weights") or {}
        bits, size = w.get("num_bits"), w.get("group_size")
        known = w.get("type") == "int" and bits in (2, 4, 8) and w.get("actorder") != "group"
        if not known or (w.get("strategy") == "group") != isinstance(size, int):
            return None
        if w.get("strategy") not in ("group", "channel"):
            return None
        return f"int{bits}{f'g{size}' if w['strategy'] == 'group' else ''}{'' if w.get('symmetric') else 'a'}"
    return None


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
    """Writes a quantized folder beside `out` and renames it into place when it is whole.

    Used as a context manager: leaving it by an error removes everything it wrote.
    """

    def __init__(self, out: Path, tensors: Sequence[Planned], scale_dtype: torch.dtype, facts: dict[str, Any]) -> None:
        self.out, self.tensors, self.scale_dtype = out, tensors, scale_dtype
        self.partial = out.with_name(f".{out.name}.partial")
        specs = {t.name: t.spec for t in tensors if isinstance(t.format, IntegerFormat)}
        self.facts = facts | {"specs": specs}
        self.home: dict[str, ShardWriter] = {}
        self.stack = ExitStack()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, before anything is written."""
        return sum(_bytes(t.stored(self.scale_dtype)) for t in self.tensors)

    def __enter__(self) -> Writer:
        if self.out.exists():
            raise FewbitError(
                f"The output {str(self.out)!r} exists already.",
                "fewbit never overwrites a model.",
                f"Choose another name, or remove it first: rm -r {self.out}",
            )
        parent = self.out.absolute().parent
        if not parent.is_dir():
            raise FewbitError(
                f"The output's folder {str(parent)!r} does not exist.", f"Asked for {self.out}.", f"mkdir -p {parent}"
            )
        free = shutil.disk_usage(parent).free
        if free < self.nbytes:
            raise FewbitError(
                "The disk is too full for the output.",
                f"{self.nbytes:,} bytes are needed, {free:,} are free at {parent}.",
                "Free some space, or choose an output folder on another disk.",
            )
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir()
        try:
            self._open_shards()
        except BaseException:
            self._discard()
            raise
        return self

    def _open_shards(self) -> None:
        shards = list(_split(self.tensors, self.scale_dtype))
        metadata = {"fewbit": json.dumps(self.facts, sort_keys=True)}
        table: dict[str, str] = {}
        for i, members in enumerate(shards):
            file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            stored: Layout = {}
            for t in members:
                stored |= t.stored(self.scale_dtype)
            writer = self.stack.enter_context(ShardWriter(self.partial / file, stored, metadata))
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
        (self.partial / name).write_text(content, encoding="utf-8")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: Any) -> None:
        try:
            self.stack.__exit__(kind, error, at)
            if kind is None:
                self.partial.rename(self.out)
        finally:
            self._discard()

    def _discard(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)


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
