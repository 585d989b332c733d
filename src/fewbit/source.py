"""A checkpoint seen through its architecture: canonical names, config.json's vocabulary, checked shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fewbit import store
from fewbit.checkpoint import Checkpoint, Extent, open_checkpoint
from fewbit.errors import FewbitError
from fewbit.formats import parse
from fewbit.models import WeightInfo, find_gguf_model, find_model
from fewbit.qtensor import QTensor

# of one layer; what a file says is bounded before lists are made of it
MOST_EXPERTS = 4096
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: a stored name, and which matrix of it where it is a stack of experts'."""

    name: str
    expert: int | None = None


class Source:
    """Reads a model's tensors by canonical (Hugging Face) names, whatever file they lie in.

    Opening reads headers only and checks that every tensor the architecture needs is there in the right shape.
    """

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.checkpoint, self.name = checkpoint, name
        self._gguf = checkpoint.naming == "gguf"
        config = checkpoint.config
        # what is worth telling whoever opens the model
        self.notes: list[str] = []
        self.module: ModuleType = find_gguf_model(config) if self._gguf else find_model(str(config.get("model_type")))
        self._rename: Callable[[str], str | None] | None = None
        if hasattr(self.module, "text_part"):
            config, self._rename = self.module.text_part(config), self.module.text_name
            self.notes.append(self.module.NOTE)
            self.module = find_model(config["model_type"])
        self._stored: dict[str, Place] = {}
        for stored in checkpoint.names():
            self._stored |= {name: Place(stored, expert) for name, expert in self._canonical(stored)}
        if self._gguf:
            config = self.module.gguf_config(config, set(checkpoint.names()), self._read_float)
            if "vocab_size" not in config and "token_embd.weight" in checkpoint.names():
                config["vocab_size"] = checkpoint.shape("token_embd.weight")[0]
        self.config: dict[str, Any] = config
        self.args = self.module.args(config)
        self.weights: list[WeightInfo] = self.module.weights(self.args)
        self._planned = {w.name: w for w in self.weights}
        self._check()
        self._check_biases()

    @property
    def path(self) -> Path:
        """Where the checkpoint lies."""
        return self.checkpoint.path

    @property
    def dtype(self) -> torch.dtype:
        """The 16-bit type that suits the model: what scales and a head kept in 16 bits are stored in.

        bf16 unless the matrices are f16; of a quantized source, what config.json says, or f16 (ggml's scales are).
        """
        specs = {self.spec(w.name) for w in self.weights if len(w.shape) > 1}
        if specs & {"bf16", "f32"}:
            return torch.bfloat16
        named = str(self.config.get("dtype") or self.config.get("torch_dtype") or "")
        return torch.bfloat16 if named in ("bfloat16", "float32") and "f16" not in specs else torch.float16

    def _canonical(self, stored: str) -> list[tuple[str, int | None]]:
        """Canonical names of a stored tensor; with an expert's number where it holds the matrices of all of them."""
        if not self._gguf:
            name = self._rename(stored) if self._rename else stored
            return [] if name is None else [(name, None)]
        block = stored.split(".")[1] if stored.startswith("blk.") else ""
        pattern = stored.replace(f"blk.{block}.", "blk.{}.", 1) if block else stored
        found: str = self.module.GGUF.get(pattern, stored)
        found = found.replace("{}", block, 1)
        if "{}" not in found:
            return [(found, None)]
        shape = self.checkpoint.shape(stored)
        # a name for each row of something else would be a list of any length
        count = shape[0] if len(shape) == 3 and shape[0] <= MOST_EXPERTS else 0
        return [(found.format(e), e) for e in range(count)]

    def _read_float(self, stored: str) -> torch.Tensor:
        q = self.checkpoint.read(stored)
        return parse(q.spec).dequantize(q)

    def _check(self) -> None:
        for w in self.weights:
            if w.name not in self._stored:
                raise FewbitError(
                    f"The tensor {w.name!r} is missing.",
                    f"{self.path} has {len(self._stored)} tensors; the config asks for {len(self.weights)}.",
                    "Download the whole model again, or check that config.json belongs to these weights.",
                )
            place = self._stored[w.name]
            found = self.checkpoint.shape(place.name)[0 if place.expert is None else 1 :]
            if found != w.shape:
                raise FewbitError(
                    f"The tensor {w.name!r} has the wrong shape.",
                    f"The file has {found}, the config asks for {w.shape}.",
                    "Check that config.json belongs to these weights.",
                )

    def _check_biases(self) -> None:
        """A bias the config does not speak of is no part of the model, for other engines neither; it must be zero."""
        for w in self.weights:
            name = f"{w.name.removesuffix('weight')}bias"
            if w.role != "linear" or name in self._planned or name not in self._stored:
                continue
            if bool((self._read_float(self._stored[name].name) != 0).any()):
                raise FewbitError(
                    "The checkpoint has biases that its config does not speak of.",
                    f"The first is {name!r}; attention_bias and mlp_bias of config.json say which layers have them.",
                    "Correct config.json, or check that it belongs to these weights.",
                )

    def has(self, name: str) -> bool:
        """Whether the model has the tensor: the architecture's list says so, and opening checked that it is there."""
        return name in self._planned

    def spec(self, name: str) -> str:
        """Format spec of a tensor, from the header."""
        return self.checkpoint.spec(self._stored[name].name)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> QTensor:
        """One tensor in canonical row order, or its rows [start, stop)."""
        place = self._stored[name]
        order = self._order(name)
        if place.expert is not None:
            q = _one_of(self.checkpoint.read(place.name, (place.expert, place.expert + 1)))
            return q if rows is None else parse(q.spec).take(q, torch.arange(*rows))
        if order is None:
            q = self.checkpoint.read(place.name, rows)
            if self._has_offset(name):
                return QTensor("f32", q.shape, {"weight": parse(q.spec).dequantize(q) - self.args.norm_offset})
            return q
        q = self.checkpoint.read(place.name)
        return parse(q.spec).take(q, order if rows is None else order[slice(*rows)])

    def _order(self, name: str) -> torch.Tensor | None:
        """The rows of a stored matrix in canonical order, where that is another."""
        return self.module.gguf_rows(name, self.args) if self._gguf else None

    def _has_offset(self, name: str) -> bool:
        """Whether a norm is stored with what is added to it, as ggml's are."""
        return bool(self._gguf and self.args.norm_offset and self._planned[name].role == "norm")

    def scattered(self, name: str) -> bool:
        """Whether a matrix has groups of columns that are no neighbours."""
        return self.checkpoint.scattered(self._stored[name].name)

    def extents(self, name: str) -> dict[str, Extent]:
        """Where what a tensor is made of lies in files; empty where only `read` gives it."""
        place = self._stored[name]
        return {} if place.expert is not None or self._has_offset(name) else self.checkpoint.extents(place.name)

    def assemble(self, name: str, stored: dict[str, torch.Tensor]) -> QTensor:
        """What `read` gives, of what lies at `extents`, on the device where that was brought."""
        q, order = self.checkpoint.assemble(self._stored[name].name, stored), self._order(name)
        return q if order is None else parse(q.spec).take(q, order.to(next(iter(stored.values())).device))


def _one_of(q: QTensor) -> QTensor:
    """The matrix of a stack [1, out, in]."""
    return QTensor(q.spec, q.shape[1:], {name: part[0] for name, part in q.parts.items()})


def open_source(model: str | Path, progress: store.Progress | None = None) -> Source:
    """Open an alias, a model of the hub, a folder or a GGUF file; what is not here is fetched, as `progress` is told.

    FewbitError where there is none, or it is broken or unknown.
    """
    path = store.locate(str(model), progress)
    return Source(open_checkpoint(path), str(model))


@dataclass(frozen=True)
class TensorLine:
    """One stored tensor."""

    name: str
    shape: tuple[int, ...]
    spec: str
    nbytes: int


@dataclass(frozen=True)
class Description:
    """What a checkpoint holds, from headers alone. Bytes per spec count tensors; `weight_bytes` counts whole files."""

    name: str
    path: str
    architecture: str
    parameters: int
    weight_bytes: int
    float16_bytes: int
    bits_per_weight: float
    quantized: bool
    context: int
    # spec -> (tensors, weights, bytes)
    specs: dict[str, tuple[int, int, int]]
    tensors: list[TensorLine]
    facts: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def describe(model: str | Path, progress: store.Progress | None = None) -> Description:
    """Tensors, formats and sizes of a model; only headers are read."""
    return describe_source(open_source(model, progress))


def describe_source(source: Source) -> Description:
    """The description of an opened model. `bits_per_weight` counts the matrices, with scales and zero points."""
    dtype = source.dtype
    lines = [
        TensorLine(w.name, w.shape, spec := source.spec(w.name), parse(spec).nbytes(w.shape, dtype))
        for w in source.weights
    ]
    specs: dict[str, tuple[int, int, int]] = {}
    for line in lines:
        tensors, weights, nbytes = specs.get(line.spec, (0, 0, 0))
        specs[line.spec] = (tensors + 1, weights + _count(line.shape), nbytes + line.nbytes)
    matrices = [line for line in lines if len(line.shape) > 1]
    parameters = sum(_count(line.shape) for line in lines)
    return Description(
        name=source.name,
        path=str(source.path),
        architecture=str(source.config.get("model_type")),
        parameters=parameters,
        weight_bytes=source.checkpoint.weight_bytes(),
        float16_bytes=2 * parameters,
        bits_per_weight=8 * sum(m.nbytes for m in matrices) / sum(_count(m.shape) for m in matrices),
        quantized=any(m.spec not in FLOATS for m in matrices),
        context=source.args.max_position_embeddings,
        specs=specs,
        tensors=lines,
        facts=source.checkpoint.facts(),
    )


@lru_cache(maxsize=4096)
def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
