"""A Hugging Face folder in full precision: config.json, one or many safetensors files, tokenizer.json."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fewbit.checkpoint import Checkpoint, Extent, TokenizerData
from fewbit.checkpoint._folder import read_json, tokenizer_data, weight_files
from fewbit.checkpoint._safetensors import Shards
from fewbit.config_values import shown
from fewbit.errors import FewbitError
from fewbit.qtensor import QTensor

SPECS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def matches(path: Path) -> bool:
    """A folder with a config.json (quantized ones are matched before)."""
    return path.is_dir() and (path / "config.json").is_file()


class HuggingFace(Checkpoint):
    """Tensors as they are stored: f32, f16 or bf16."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / "config.json")
        if quantization := self.config.get("quantization_config"):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise FewbitError(
                f"The checkpoint is quantized in a way fewbit can't read: {shown(method)}.",
                "fewbit reads full precision, compressed-tensors (pack-quantized), GPTQ, AWQ and AutoRound.",
                "Start from the model's full-precision checkpoint.",
            )
        self.shards = Shards(weight_files(path))

    def names(self) -> list[str]:
        return list(self.shards.home)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shards.shape(name)

    def spec(self, name: str) -> str:
        dtype = self.shards.dtype(name)
        if dtype not in SPECS:
            raise FewbitError(
                f"The tensor {name!r} is stored as {dtype}.",
                f"A full-precision checkpoint holds {', '.join(SPECS.values())}.",
                "Convert the checkpoint to bf16 first.",
            )
        return SPECS[dtype]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> QTensor:
        weight = self.shards.read(name, rows)
        return QTensor(self.spec(name), tuple(weight.shape), {"weight": weight})

    def extents(self, name: str) -> dict[str, Extent]:
        return {"weight": self.shards.extent(name)}

    def assemble(self, name: str, stored: dict[str, Tensor]) -> QTensor:
        return QTensor(self.spec(name), self.shape(name), stored)

    def tokenizer(self) -> TokenizerData:
        return tokenizer_data(self.path)

    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.shards.files)


def open(path: Path) -> HuggingFace:  # noqa: A001
    """Open a folder."""
    return HuggingFace(path)
