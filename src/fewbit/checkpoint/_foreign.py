"""What readers of other tools' folders share: their settings, and matrices stored as `qweight`, `qzeros` and `scales`.

A matrix `x.weight` [N, K] with G groups of columns lies transposed: `x.scales` [G, N], `x.qzeros` int32
[G, N * bits / 32] (zero points, packed along N) and `x.qweight` int32, packed along K (GPTQ) or along N (AWQ). Bits and
sizes follow from the parts' shapes, so per-layer overrides need no look at the tool's own patterns.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint import Checkpoint, Extent, TokenizerData
from fewbit.checkpoint._folder import Json, read_json, tokenizer_data, weight_files
from fewbit.checkpoint._safetensors import Shards
from fewbit.checkpoint.huggingface import SPECS
from fewbit.config_values import shown
from fewbit.errors import FewbitError
from fewbit.formats import parse
from fewbit.formats._bitstream import pack_rows, words
from fewbit.qtensor import QTensor

QWEIGHT, QZEROS, SCALES, G_IDX = ".qweight", ".qzeros", ".scales", ".g_idx"
# settings that older tools wrote beside config.json, and the method where they do not name it
BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}

# AutoRound's own spelling, of its method and of its layout like AWQ's
AUTO_ROUND = ("auto-round", "intel/auto-round")
AUTO_ROUND_AWQ = ("auto_round:awq", "auto_round:auto_awq")


def read_settings(path: Path) -> Json:
    """How a folder says it is quantized, `quant_method` among it; empty where it does not say."""
    config = path / "config.json"
    if not path.is_dir() or not config.is_file():
        return {}
    found = read_json(config).get("quantization_config")
    if found:
        return found if isinstance(found, dict) else {}
    for name, method in BESIDE.items():
        if (path / name).is_file():
            return {"quant_method": method} | read_json(path / name)
    return {}


def auto_round_packing(settings: Json) -> Any:
    """AutoRound's name of its layout; None where another tool wrote the folder."""
    if settings.get("quant_method") not in AUTO_ROUND:
        return None
    # "backend" until its version 0.4
    return settings.get("packing_format") or settings.get("backend") or "auto"


def unreadable(facts: str) -> FewbitError:
    """A folder whose settings name a layout that is not read."""
    return FewbitError(
        "The checkpoint is quantized in a way fewbit can't read.",
        f"{facts}.",
        "Use a GPTQ, AWQ (gemm) or compressed-tensors folder of the model, or its full-precision checkpoint.",
    )


@dataclass(frozen=True)
class Stored:
    """A packed matrix, by its header and the settings. `group` None: the whole row shares a scale."""

    stem: str
    shape: tuple[int, int]
    bits: int
    group: int | None
    groups: int


class Foreign(Checkpoint):
    """Packed tensors become integer QTensors; the others are read as they are stored."""

    # widths that the layout is known for
    widths: tuple[int, ...]

    def __init__(self, path: Path, settings: Json) -> None:
        _check_settings(settings)
        self.path, self.settings = path, settings
        self.config: dict[str, Any] = read_json(path / "config.json")
        self.shards = Shards(weight_files(path))
        # logical name -> stem of a packed matrix, None for a tensor that is stored as it is
        self._stems: dict[str, str | None] = {}
        for stored in self.shards.home:
            stem = next((stored.removesuffix(s) for s in (QWEIGHT, QZEROS, SCALES, G_IDX) if stored.endswith(s)), None)
            if stem is None or f"{stem}{QWEIGHT}" not in self.shards:
                self._stems[stored] = None
            elif f"{stem}.weight" in self.shards:
                raise _apart(f"{stem}.weight", f"It is stored twice, as '{stem}.weight' and as '{stem}{QWEIGHT}'")
            else:
                self._stems[f"{stem}.weight"] = stem
        self._plans: dict[str, Stored] = {}
        self._symmetric: dict[str, bool] = {}

    @abstractmethod
    def sizes(
        self, bits: int, n: int, qweight: tuple[int, ...], order: tuple[int, ...] | None
    ) -> tuple[int, int] | None:
        """(N, K) of a matrix whose scales have N columns, by the shapes of its parts; None where `bits` do not fit."""

    @abstractmethod
    def packed(self, plan: Stored, qweight: Tensor) -> Tensor:
        """Codes as fewbit packs them, int32 [N, words(K)], of what is stored."""

    @abstractmethod
    def zeros(self, plan: Stored, qzeros: Tensor) -> Tensor:
        """Zero points, uint8 [G, N], of what is stored."""

    @abstractmethod
    def says_symmetric(self) -> bool:
        """Whether the settings promise that every zero point is the middle code."""

    def names(self) -> list[str]:
        return list(self._stems)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shards.shape(name) if (stem := self._stems[name]) is None else self._plan(stem).shape

    def spec(self, name: str) -> str:
        """Of a matrix that is said to be symmetric the zero points are read too: the promise is not always kept."""
        if (stem := self._stems[name]) is not None:
            plan = self._plan(stem)
            ending = "" if self._is_symmetric(plan) else "a"
            return f"int{plan.bits}{f'g{plan.group}' if plan.group else ''}{ending}"
        dtype = self.shards.dtype(name)
        if dtype not in SPECS:
            raise FewbitError(
                f"The tensor {name!r} is stored as {dtype}.",
                f"What is not packed must be one of {', '.join(SPECS.values())}.",
                "Quantize or download the model again.",
            )
        return SPECS[dtype]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> QTensor:
        if self._stems[name] is None:
            weight = self.shards.read(name, rows)
            return QTensor(self.spec(name), tuple(weight.shape), {"weight": weight})
        q = self.assemble(name, {part: self.shards.read(stored) for part, stored in self._stored(name).items()})
        return q if rows is None else parse(q.spec).take(q, torch.arange(*rows))

    def scattered(self, name: str) -> bool:
        stem = self._stems[name]
        return stem is not None and self._order(self._plan(stem)) is not None

    def _stored(self, name: str) -> dict[str, str]:
        """What the parts of a tensor are called in the files; zero points only where they differ."""
        if (stem := self._stems[name]) is None:
            return {"weight": name}
        wanted = (QWEIGHT, SCALES) if self._is_symmetric(self._plan(stem)) else (QWEIGHT, SCALES, QZEROS)
        return {part: f"{stem}{part}" for part in wanted}

    def extents(self, name: str) -> dict[str, Extent]:
        return {part: self.shards.extent(stored) for part, stored in self._stored(name).items()}

    def assemble(self, name: str, stored: dict[str, Tensor]) -> QTensor:
        spec, stem = self.spec(name), self._stems[name]
        if stem is None:
            return QTensor(spec, self.shape(name), stored)
        plan = self._plan(stem)
        parts = {"packed": self.packed(plan, stored[QWEIGHT]), "scale": stored[SCALES].t().contiguous()}
        if QZEROS in stored:
            parts["zero"] = pack_rows(self.zeros(plan, stored[QZEROS]), plan.bits).t().contiguous()
        if (order := self._order(plan)) is not None:
            parts["g_idx"] = order.to(parts["scale"].device)
        return QTensor(spec, plan.shape, parts)

    def _plan(self, stem: str) -> Stored:
        """Sizes of a packed matrix; FewbitError where its parts do not fit together."""
        if stem not in self._plans:
            self._plans[stem] = self._planned(stem)
        return self._plans[stem]

    def _planned(self, stem: str) -> Stored:
        found = {part: f"{stem}{part}" for part in (QWEIGHT, QZEROS, SCALES, G_IDX) if f"{stem}{part}" in self.shards}
        shapes = {part: self.shards.shape(name) for part, name in found.items()}
        facts = f"Its parts are { {part[1:]: shape for part, shape in shapes.items()} }"
        if not {QWEIGHT, QZEROS, SCALES} <= shapes.keys():
            raise _apart(f"{stem}.weight", f"{facts}; qweight, qzeros and scales are needed")
        for part, name in found.items():
            wanted: set[torch.dtype] = set(SPECS) if part == SCALES else {torch.int32}
            if (dtype := self.shards.dtype(name)) not in wanted:
                raise _apart(f"{stem}.weight", f"{part[1:]} is stored as {dtype}")
        order = shapes.get(G_IDX)
        if any(len(shapes[p]) != 2 or min(shapes[p]) <= 0 for p in (QWEIGHT, QZEROS, SCALES)) or (
            order is not None and len(order) != 1
        ):
            raise _apart(f"{stem}.weight", facts)
        groups, n = shapes[SCALES]
        said = self.settings.get("bits", self.settings.get("w_bit"))
        fitting = {
            bits: sizes
            for bits in self.widths
            if shapes[QZEROS] == (groups, words(n, bits)) and (sizes := self.sizes(bits, n, shapes[QWEIGHT], order))
        }
        if len(fitting) > 1 and isinstance(said, int) and said in fitting:
            fitting = {said: fitting[said]}
        if len(fitting) != 1:
            widths = ", ".join(str(w) for w in self.widths)
            raise _apart(
                f"{stem}.weight", f"{facts}; they fit none or several of {widths} bits, {shown(said)} are said"
            )
        ((bits, shape),) = fitting.items()
        return Stored(stem, shape, bits, self._group(stem, shape[1], groups), groups)

    def _group(self, stem: str, columns: int, groups: int) -> int | None:
        """Columns that share a scale: as the settings say where that fits the scales, else by division."""
        said = self.settings.get("group_size", self.settings.get("q_group_size"))
        usable = isinstance(said, int) and not isinstance(said, bool) and 0 < said < 10**7
        if isinstance(said, int) and usable and -(-columns // said) == groups:
            return said
        if groups == 1:
            return None
        # overridden for this layer
        if columns % groups == 0:
            return columns // groups
        raise _apart(f"{stem}.weight", f"{groups:,} groups of {shown(said)} columns do not make {columns:,}")

    def _is_symmetric(self, plan: Stored) -> bool:
        if plan.stem not in self._symmetric:
            middle = 1 << (plan.bits - 1)
            self._symmetric[plan.stem] = self.says_symmetric() and self._all_zeros_are(middle, plan)
        return self._symmetric[plan.stem]

    def _all_zeros_are(self, middle: int, plan: Stored) -> bool:
        return bool((self.zeros(plan, self.shards.read(f"{plan.stem}{QZEROS}")) == middle).all())

    def _order(self, plan: Stored) -> Tensor | None:
        if f"{plan.stem}{G_IDX}" not in self.shards:
            return None
        order = self.shards.read(f"{plan.stem}{G_IDX}")
        return scattered(f"{plan.stem}.weight", order, plan.groups, plan.group or len(order))

    def tokenizer(self) -> TokenizerData:
        return tokenizer_data(self.path)

    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.shards.files)


def scattered(name: str, order: Tensor, groups: int, span: int) -> Tensor | None:
    """Each column's group, int32 [K], where groups are not `span` neighbours; None where they are."""
    low, high = int(order.min()), int(order.max())
    if low < 0 or high >= groups:
        raise _apart(name, f"g_idx runs from {low:,} to {high:,}, there are {groups:,} groups")
    return None if torch.equal(order, (torch.arange(len(order)) // span).int()) else order


def _apart(name: str, facts: str) -> FewbitError:
    return FewbitError(
        f"The quantized tensor {name!r} does not fit together.",
        f"{facts}.",
        "Download the model again, or check where the folder came from.",
    )


def _check_settings(settings: Json) -> None:
    """What would make the weights mean something else than code, zero point and scale say."""
    turned = [key for key in ("rotation_config", "spinquant_config") if settings.get(key)]
    kind, activations = settings.get("data_type") or "int", settings.get("act_bits") or 16
    if turned or kind != "int" or not isinstance(activations, int) or activations < 16:
        noted = f", {turned[0]} is set" if turned else ""
        raise unreadable(f"Its data_type is {shown(kind)}, act_bits {shown(activations)}{noted}")
