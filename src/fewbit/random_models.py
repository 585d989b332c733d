"""Models of well-known shapes with random weights: how fast a machine runs them, without a download.

Tensors are made one by one, when they are read, on the device they are meant for, straight in their stored parts.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint import Checkpoint, TokenizerData
from fewbit.errors import FewbitError
from fewbit.formats import parse
from fewbit.formats.integer import IntegerFormat
from fewbit.lookup import advice
from fewbit.models import WeightInfo, find_model
from fewbit.qtensor import QTensor
from fewbit.shapes import SHAPES
from fewbit.source import Source

# one token: the library wants a vocabulary, and text is not what random weights are for
TOKENIZER = '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"}}'


class RandomCheckpoint(Checkpoint):
    """A checkpoint that lies nowhere. `device` is where tensors are made."""

    def __init__(self, name: str, specs: dict[str, str], config: dict[str, Any]) -> None:
        self.path = Path(f"{name}, random weights")
        self.config = config
        self.device = torch.device("cpu")
        module = find_model(config["model_type"])
        self._weights: dict[str, WeightInfo] = {w.name: w for w in module.weights(module.args(config))}
        self._specs = specs
        self._dtype = getattr(torch, config["dtype"])

    def names(self) -> list[str]:
        """Those of the architecture."""
        return list(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        """The architecture's."""
        return self._weights[name].shape

    def spec(self, name: str) -> str:
        """The format that was asked for; norms and biases are floats."""
        return self._specs[name]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> QTensor:
        """The same numbers for a name and a device at each call."""
        w, fmt = self._weights[name], parse(self._specs[name])
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6])
        random = torch.Generator(self.device).manual_seed(seed)
        parts = {
            part: self._made(w, self._specs[name], part, dtype, shape, random)
            for part, (dtype, shape) in fmt.layout(w.shape, self._dtype).items()
        }
        q = QTensor(self._specs[name], w.shape, parts)
        return q if rows is None else fmt.take(q, torch.arange(*rows, device=self.device))

    def _made(
        self, w: WeightInfo, spec: str, part: str, dtype: torch.dtype, shape: tuple[int, ...], random: torch.Generator
    ) -> Tensor:
        if not dtype.is_floating_point:
            return torch.randint(-(2**31), 2**31, shape, dtype=dtype, device=self.device, generator=random)
        if w.role == "norm":
            return torch.ones(shape, dtype=dtype, device=self.device)
        spread = w.shape[-1] ** -0.5
        if part == "scale":
            # every code is as likely as any other
            fmt = parse(spec)
            bits = fmt.bits if isinstance(fmt, IntegerFormat) else 4
            spread /= ((4**bits - 1) / 12) ** 0.5
            return (torch.rand(shape, device=self.device, generator=random) + 0.5).mul_(spread).to(dtype)
        return torch.randn(shape, dtype=dtype, device=self.device, generator=random).mul_(spread)

    def tokenizer(self) -> TokenizerData:
        """One that knows a single token."""
        return TokenizerData(TOKENIZER)

    def weight_bytes(self) -> int:
        """What the tensors would take in files."""
        return sum(parse(self._specs[n]).nbytes(w.shape, self._dtype) for n, w in self._weights.items())


def random_model(name: str, formats: str, head: str | None = None) -> Source:
    """A model of SHAPES with random weights.

    formats  a format for all linears, and others for those whose names end so: `int2g64,down_proj=int3g64`
    head     the format of embedding and head (default: that of the linears)
    Raises FewbitError where the name or a format is unknown, or a format can't store a tensor.
    """
    if name not in SHAPES:
        raise FewbitError(
            f"{name!r} is no shape that fewbit knows.", f"Shapes: {', '.join(SHAPES)}.", advice(name, list(SHAPES))
        )
    first, *others = formats.split(",")
    exceptions = dict(_exception(other) for other in others)
    module = find_model(SHAPES[name]["model_type"])
    weights: list[WeightInfo] = module.weights(module.args(SHAPES[name]))
    specs = {}
    for w in weights:
        ending = w.name.removesuffix(".weight").rpartition(".")[2]
        spec = {"linear": exceptions.get(ending, first), "embedding": head or first, "head": head or first}
        specs[w.name] = spec.get(w.role, "bf16")
        if reason := parse(specs[w.name]).accepts(w.shape):
            raise FewbitError(f"{w.name} can't be stored as {specs[w.name]}.", f"{reason}.", "Choose another format.")
    endings = {w.name.removesuffix(".weight").rpartition(".")[2] for w in weights if w.role == "linear"}
    if unknown := set(exceptions) - endings:
        raise FewbitError(
            f"No linear of {name} is called {min(unknown)!r}.",
            f"Its linears: {', '.join(sorted(endings))}.",
            "Give FORMAT,NAME=FORMAT with one of these names.",
        )
    return Source(RandomCheckpoint(name, specs, SHAPES[name]), f"{name} (random weights)")


def _exception(text: str) -> tuple[str, str]:
    ending, equals, spec = text.partition("=")
    if not equals:
        raise FewbitError(
            f"{text!r} does not say which linears it is for.",
            "After the first format come exceptions, such as down_proj=int3g64.",
            "Give FORMAT,NAME=FORMAT.",
        )
    return ending, spec
