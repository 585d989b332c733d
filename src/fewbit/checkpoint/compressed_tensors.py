"""compressed-tensors folders: `pack-quantized`, fewbit's wider spelling of the same idea, and plain 8-bit numbers.

A matrix `x.weight` [N, K] lies as `x.weight_packed` int32, `x.weight_scale`, `x.weight_shape` int64 [2] and, where it
is asymmetric, `x.weight_zero_point`; older folders with activation order give each column's group in `x.weight_g_idx`.
What compressed-tensors can say is written as such, and vLLM, SGLang and transformers load the folder. What it can't (a
quantized embedding or head, ragged groups, other widths than 4 and 8) keeps the spelling under `quant_method:
"fewbit"`. fewbit's own facts lie in the files' `__metadata__["fewbit"]`. Read only: `int-quantized` and
`float-quantized`, whose `x.weight` is int8 or float8_e4m3fn, and `mxfp4-pack-quantized`, whose parts are bytes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint import Checkpoint, Extent, TokenizerData, _eight_bits
from fewbit.checkpoint._eight_bits import EightBits
from fewbit.checkpoint._folder import read_json, tokenizer_data, weight_files
from fewbit.checkpoint._foreign import scattered, unreadable
from fewbit.checkpoint._safetensors import Shards
from fewbit.checkpoint._schemes import Scheme, Schemes
from fewbit.checkpoint._writer import SPELLING
from fewbit.checkpoint.huggingface import SPECS
from fewbit.config_values import shown
from fewbit.errors import FewbitError
from fewbit.formats import Format, Layout, parse
from fewbit.formats.integer import IntegerFormat
from fewbit.qtensor import QTensor

METHODS = ("compressed-tensors", "fewbit")
MXFP4 = "mxfp4"


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
            name = re.sub(r"(_packed|_scale|_zero_point|_shape|_g_idx)$", "", stored)
            if f"{name}_packed" in self.shards:
                self._specs.setdefault(name, "")
            elif stored == name:
                # a dtype no weight has stays empty until somebody asks for the tensor
                self._specs[name] = SPECS.get(self.shards.dtype(stored), "")
        schemes = Schemes(self.config["quantization_config"])
        noted = self._facts.get("specs")
        self._eight: dict[str, EightBits] = {}
        for name in self._specs:
            if f"{name}_packed" not in self.shards:
                if not self._specs[name] and f"{name}_scale" in self.shards:
                    self._eight[name] = self._eight_bits(name, schemes.find(name))
                    self._specs[name] = self._eight[name].spec
            elif self.shards.dtype(f"{name}_packed") == torch.uint8:
                self._specs[name] = self._microscaled(name)
            else:
                found = noted.get(name) if isinstance(noted, dict) else _foreign_spec(schemes, name)
                self._specs[name] = self._integer_spec(name, found)

    def _eight_bits(self, name: str, scheme: Scheme | None) -> EightBits:
        """A matrix that lies as 8-bit numbers."""
        zero = f"{name}_zero_point"
        said = scheme or Scheme(None, "")
        return _eight_bits.plan(
            self.shards, name, f"{name}_scale", said.block, said.bits, zero if zero in self.shards else None
        )

    def _microscaled(self, name: str) -> str:
        """Numbers of 4 bits, two a byte; FewbitError where their scales are not powers of two, a byte each."""
        packed, scale = self.shards.shape(f"{name}_packed"), f"{name}_scale"
        fits = scale in self.shards and self.shards.dtype(scale) == torch.uint8 and len(packed) == 2
        if not fits or self.shards.shape(scale) != (packed[0], packed[1] // 16) or packed[1] % 16 or 0 in packed:
            raise unreadable(f"{shown(name)} is packed in bytes {packed}, and not as MXFP4")
        return MXFP4

    def _integer_spec(self, name: str, found: Any) -> str:
        """The spec a packed tensor is said to have, which must be one that packs."""
        if found is None:
            raise FewbitError(
                f"Nothing says in which format {name!r} is stored.",
                f"Neither the files' metadata nor quantization_config in {self.path / 'config.json'}.",
                "Quantize the model again, or check where the folder came from.",
            )
        if name in self.shards:
            raise _wrong_shape(name, f"It is stored twice, as {name!r} and as {name + '_packed'!r}")
        if not isinstance(found, str) or len(found) > 32 or not isinstance(parse(found), IntegerFormat):
            raise _wrong_shape(name, f"It is packed, and its format is said to be {shown(found)}, not an integer one")
        return found

    def names(self) -> list[str]:
        return list(self._specs)

    def shape(self, name: str) -> tuple[int, ...]:
        if f"{name}_packed" not in self.shards:
            return self.shards.shape(name)
        if self._specs[name] == MXFP4:
            rows, columns = self.shards.shape(f"{name}_packed")
            return rows, columns * 2
        said = self._said_shape(f"{name}_shape")
        stored = {part: self.shards.shape(f"{name}{s}") for part, s in SPELLING.items() if f"{name}{s}" in self.shards}
        if len(said) != 2 or min(said) <= 0:
            raise _wrong_shape(name, f"{name}_shape says {said}, the parts are {stored}")
        shape = (said[0], said[1])
        planned = parse(self._specs[name]).layout(shape, torch.float32)
        if stored != {part: where for part, (_, where) in planned.items()}:
            raise _wrong_shape(name, f"{self._specs[name]} of {shape} needs {_shapes(planned)}, the parts are {stored}")
        return shape

    def _said_shape(self, stored: str) -> list[int]:
        """The two numbers of a `_shape` tensor; empty where it is missing or something else."""
        if stored not in self.shards or self.shards.shape(stored) != (2,):
            return []
        return [int(n) for n in self.shards.read(stored)] if self.shards.dtype(stored) == torch.int64 else []

    def spec(self, name: str) -> str:
        if not self._specs[name]:
            raise FewbitError(
                f"The tensor {name!r} is stored as {self.shards.dtype(name)}.",
                f"What is not packed must be one of {', '.join(SPECS.values())}.",
                "Quantize or download the model again.",
            )
        return self._specs[name]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> QTensor:
        if name in self._eight:
            return _eight_bits.read(self.shards, self._eight[name], rows)
        if self.spec(name) == MXFP4:
            parts = {part: self.shards.read(f"{name}_{part}", rows) for part in ("packed", "scale")}
            return QTensor(MXFP4, (len(parts["packed"]), self.shape(name)[1]), parts)
        if f"{name}_packed" not in self.shards:
            weight = self.shards.read(name, rows)
            return QTensor(self.spec(name), tuple(weight.shape), {"weight": weight})
        q = self.assemble(name, {part: self.shards.read(stored) for part, stored in self._stored(name).items()})
        return q if rows is None else parse(q.spec).take(q, torch.arange(*rows))

    def scattered(self, name: str) -> bool:
        if f"{name}_g_idx" not in self.shards:
            return False
        (rows, columns), fmt = self.shape(name), parse(self.spec(name))
        groups = fmt.layout((rows, columns), torch.float32)["scale"][1][1]
        return self._order(name, columns, groups, fmt) is not None

    def _stored(self, name: str) -> dict[str, str]:
        """What the parts of a tensor are called in the files."""
        if f"{name}_packed" not in self.shards:
            return {"weight": name}
        return {
            part: f"{name}{SPELLING[part]}" for part in parse(self.spec(name)).layout(self.shape(name), torch.float32)
        }

    def extents(self, name: str) -> dict[str, Extent]:
        if name in self._eight or self.spec(name) == MXFP4:
            return {}
        return {part: self.shards.extent(stored) for part, stored in self._stored(name).items()}

    def assemble(self, name: str, stored: dict[str, Tensor]) -> QTensor:
        shape, spec, parts = self.shape(name), self.spec(name), dict(stored)
        if f"{name}_packed" not in self.shards:
            return QTensor(spec, shape, parts)
        if parts["scale"].dtype not in SPECS or any(parts[p].dtype != torch.int32 for p in parts if p != "scale"):
            raise _wrong_shape(name, f"dtypes are { {p: str(t.dtype) for p, t in parts.items()} }")
        if (order := self._order(name, shape[1], parts["scale"].shape[1], parse(spec))) is not None:
            parts["g_idx"] = order.to(parts["scale"].device)
        return QTensor(spec, shape, parts)

    def _order(self, name: str, columns: int, groups: int, fmt: Format) -> Tensor | None:
        """Each column's group, where groups are not neighbouring columns."""
        stored = f"{name}_g_idx"
        if stored not in self.shards or not isinstance(fmt, IntegerFormat):
            return None
        if self.shards.shape(stored) != (columns,) or self.shards.dtype(stored) != torch.int32:
            raise _wrong_shape(name, f"g_idx is {self.shards.dtype(stored)} {self.shards.shape(stored)}")
        order = self.shards.read(stored)
        # what was never set is all -1, and means neighbours
        return None if bool((order == -1).all()) else scattered(name, order, groups, fmt.span(columns))

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


def _foreign_spec(schemes: Schemes, name: str) -> str | None:
    """Spec of a matrix by the scheme of its config group, None where no group is for it; FewbitError for a scheme that
    is not known.
    """
    scheme = schemes.find(name)
    if scheme is not None and scheme.spec is None:
        raise unreadable(f"{shown(name)} is packed by a scheme that is not known: {scheme.said}")
    return None if scheme is None else scheme.spec
