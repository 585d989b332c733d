"""Folders published in few-bit floating point: FP8 with a scale for blocks (DeepSeek, Qwen), MXFP4 (gpt-oss).

FP8      `x.weight` float8_e4m3fn [N, K], `x.weight_scale_inv` [ceil(N / 128), ceil(K / 128)], by which it is multiplied
         in spite of its name; `weight_block_size` of the config says the block; without one, a scale a tensor or row.
MXFP4    `x_blocks` uint8 [..., K / 32, 16], two numbers a byte; `x_scales` uint8 [..., K / 32].
Both are read as they are, to run or to quantize from.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch

from fewbit.checkpoint import Checkpoint, TokenizerData, _eight_bits
from fewbit.checkpoint._folder import Json, read_json, tokenizer_data, weight_files
from fewbit.checkpoint._foreign import read_settings, unreadable
from fewbit.checkpoint._safetensors import Shards
from fewbit.checkpoint.huggingface import SPECS
from fewbit.config_values import shown
from fewbit.errors import FewbitError
from fewbit.qtensor import QTensor

METHODS = ("fp8", "mxfp4")
SCALES = ("weight_scale_inv", "weight_scale")
BLOCKS, EXPONENTS = "_blocks", "_scales"
# what engines round activations by
OF_INPUTS = ("input_scale", "activation_scale")


def matches(path: Path) -> bool:
    """A folder whose quantization is one of the two."""
    return read_settings(path).get("quant_method") in METHODS


class BlockFloats(Checkpoint):
    """Tensors with their scales; the others are read as they are stored."""

    def __init__(self, path: Path, settings: Json) -> None:
        self.path = path
        self.config: dict[str, Any] = read_json(path / "config.json")
        self.shards = Shards(weight_files(path))
        self._block = _block_size(settings)
        self._names = [name for stored in self.shards.home if (name := self._logical(stored))]

    def _logical(self, stored: str) -> str | None:
        """The name of the tensor that a stored one is the main part of; None for what belongs to another."""
        stem, _, last = stored.rpartition(".")
        if stored.endswith(BLOCKS) and stored.removesuffix(BLOCKS) + EXPONENTS in self.shards:
            return stored.removesuffix(BLOCKS)
        microscale = stored.endswith(EXPONENTS) and stored.removesuffix(EXPONENTS) + BLOCKS in self.shards
        scale = last in (*SCALES, *OF_INPUTS) and f"{stem}.weight" in self.shards
        return None if microscale or scale else stored

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._microscaled(name) if self._is_microscaled(name) else self.shards.shape(name)

    def spec(self, name: str) -> str:
        if self._is_microscaled(name):
            self._microscaled(name)
            return "mxfp4"
        dtype = self.shards.dtype(name)
        if dtype == _eight_bits.FLOAT:
            return self._plan(name).spec
        if dtype not in SPECS:
            raise FewbitError(
                f"The tensor {name!r} is stored as {dtype}.",
                f"What has no scale must be one of {', '.join(SPECS.values())}.",
                "Download the model again.",
            )
        return SPECS[dtype]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> QTensor:
        spec = self.spec(name)
        if spec == "mxfp4":
            shape = self._microscaled(name)
            parts = {
                "packed": self.shards.read(name + BLOCKS, rows).flatten(-2),
                "scale": self.shards.read(name + EXPONENTS, rows),
            }
            return QTensor(spec, (len(parts["scale"]), *shape[1:]), parts)
        if spec in SPECS.values():
            weight = self.shards.read(name, rows)
            return QTensor(spec, tuple(weight.shape), {"weight": weight})
        return _eight_bits.read(self.shards, self._plan(name), rows)

    def _plan(self, name: str) -> _eight_bits.EightBits:
        stem = name.rpartition(".")[0]
        scale = next((s for last in SCALES if (s := f"{stem}.{last}") in self.shards), f"{stem}.{SCALES[0]}")
        return _eight_bits.plan(self.shards, name, scale, self._block)

    def _is_microscaled(self, name: str) -> bool:
        return name + BLOCKS in self.shards and name not in self.shards

    def _microscaled(self, name: str) -> tuple[int, ...]:
        """Logical shape of an MXFP4 tensor; FewbitError where its two parts do not fit."""
        blocks, scales = self.shards.shape(name + BLOCKS), self.shards.shape(name + EXPONENTS)
        kinds = {self.shards.dtype(name + part) for part in (BLOCKS, EXPONENTS)}
        if kinds != {torch.uint8} or len(blocks) < 3 or blocks != (*scales, 16) or not prod(blocks):
            raise FewbitError(
                f"The quantized tensor {name!r} does not fit together.",
                f"Its blocks are {blocks}, its scales {scales}, stored as {', '.join(sorted(map(str, kinds)))}.",
                "Download the model again.",
            )
        return (*blocks[:-2], blocks[-2] * 32)

    def tokenizer(self) -> TokenizerData:
        return tokenizer_data(self.path)

    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.shards.files)


def _block_size(settings: Json) -> tuple[int, int] | None:
    """Rows and columns of a block; None where there are none."""
    found = settings.get("weight_block_size")
    if found is None:
        return None
    whole = isinstance(found, list) and len(found) == 2 and all(isinstance(n, int) and 0 < n < 10**7 for n in found)
    if not whole:
        raise unreadable(f"Its weight_block_size is {shown(found)}")
    return int(found[0]), int(found[1])


def open(path: Path) -> BlockFloats:  # noqa: A001
    """Open a folder."""
    return BlockFloats(path, read_settings(path))
