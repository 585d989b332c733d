"""One module per way a model lies on disk; the file name is the registry.

Each module has `matches(path) -> bool` and `open(path) -> Checkpoint`. Headers are read when a checkpoint is opened,
tensors one by one when asked for. Files come from elsewhere and are hostile until checked.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import FewbitError
from fewbit.lookup import names
from fewbit.qtensor import QTensor


@dataclass(frozen=True)
class TokenizerData:
    """What a checkpoint says of its tokenizer: `json` is the text of a tokenizer.json (tokenizers library)."""

    json: str = field(repr=False)
    chat_template: str | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    add_bos: bool = False


@dataclass(frozen=True)
class Extent:
    """Where the bytes of something stored lie in a file."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """How many."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Checkpoint(ABC):
    """A model on disk, opened lazily under its own tensor names."""

    path: Path
    # the config.json of a folder, the metadata of a GGUF file
    config: dict[str, Any]
    # "huggingface" or "gguf": which of a model's name tables applies
    naming: str = "huggingface"

    @abstractmethod
    def names(self) -> list[str]:
        """Logical tensor names in file order (`x.weight`, never `x.weight_packed`)."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape, from the header alone."""

    @abstractmethod
    def spec(self, name: str) -> str:
        """Format spec of a tensor, from the header alone."""

    @abstractmethod
    def read(self, name: str, rows: tuple[int, int] | None = None) -> QTensor:
        """One tensor, or the rows [start, stop) of a matrix."""

    def extents(self, name: str) -> dict[str, Extent]:
        """Where the large things lie that `read` makes a tensor of, by the names `assemble` takes; empty: read it."""
        return {}

    def assemble(self, name: str, stored: dict[str, Tensor]) -> QTensor:
        """What `read` gives, of what lies at `extents`, on the device where that was brought."""
        raise NotImplementedError

    def scattered(self, name: str) -> bool:
        """Whether a matrix has groups of columns that are no neighbours (activation order)."""
        return False

    @abstractmethod
    def tokenizer(self) -> TokenizerData:
        """The tokenizer that belongs to the weights; FewbitError where there is none."""

    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes of all weight files."""

    def facts(self) -> dict[str, Any]:
        """What the writer noted of its own work (method, source, calibration); empty for foreign files."""
        return {}


def open_checkpoint(path: Path) -> Checkpoint:
    """Open whatever lies at `path`; FewbitError where nothing fewbit reads does."""
    if not path.exists():
        raise FewbitError(
            f"There is no model at {str(path)!r}.",
            "Neither a file nor a folder of that name exists.",
            "Give a folder with config.json and safetensors files, a .gguf file, or an alias (see `fewbit ls`).",
        )
    for name in names(__name__):
        module = importlib.import_module(f"{__name__}.{name}")
        if module.matches(path):
            checkpoint: Checkpoint = module.open(path)
            return checkpoint
    if path.suffix == ".safetensors":
        raise FewbitError(
            f"{str(path)!r} holds weights alone.",
            "config.json and tokenizer.json, which belong to them, lie beside it in a model's folder.",
            f"Give the folder that holds it: {str(path.parent)!r}.",
        )
    raise FewbitError(
        f"{str(path)!r} is not a model fewbit can read.",
        "A folder needs config.json and *.safetensors; a file needs to be GGUF.",
        "Check the path, or convert the weights to safetensors first.",
    )
