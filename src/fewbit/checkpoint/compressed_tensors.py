"""Folders of packed integers: compressed-tensors `pack-quantized`, and fewbit's wider spelling of the same idea.

A matrix `x.weight` [N, K] lies as `x.weight_packed` int32, `x.weight_scale`, `x.weight_shape` int64 [2] and, where it
is asymmetric, `x.weight_zero_point`. What compressed-tensors can say is written as such, and vLLM, SGLang and
transformers load the folder. What it can't (a quantized embedding or head, ragged groups, other widths than 4 and 8)
keeps the spelling under `quant_method: "fewbit"`. fewbit's own facts lie in the files' `__metadata__["fewbit"]`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from fewbit.checkpoint import Checkpoint, TokenizerData
from fewbit.checkpoint._folder import read_json, tokenizer_data, weight_files
from fewbit.checkpoint._safetensors import Shards
from fewbit.checkpoint._writer import SPELLING
from fewbit.checkpoint.huggingface import SPECS
from fewbit.errors import FewbitError
from fewbit.formats import Layout, parse
from fewbit.qtensor import QTensor

METHODS = ("compressed-tensors", "fewbit")


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
