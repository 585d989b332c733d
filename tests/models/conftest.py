"""What the tests of prepared layouts share: a small quantized model, and what its cache holds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from torch import Tensor

import fewbit
from fewbit import prepared
from fewbit.runtime.cache import Sequence
from fewbit.store import prepared_dir
from tests.conftest import write_folder

IDS = [1, 5, 257, 30, 2]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of several formats, some linears of which have biases."""
    home = tmp_path_factory.mktemp("quantized")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(home / "data"))
        config = {"attention_bias": True, "tie_word_embeddings": False}
        write_folder(home / "float", **config)
        fewbit.quantize(home / "float", home / "model", format="int4g32a", head="int8", method="rtn")
    return home / "model"


@pytest.fixture
def model(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of one's own, and a cache that takes models of any size."""
    monkeypatch.setattr(prepared, "SMALL_BYTES", 0)
    return Path(shutil.copytree(quantized, tmp_path / "model"))


def logits(path: Path) -> tuple[Tensor, str | None]:
    """Logits after IDS, and the note."""
    loaded = fewbit.load(path)
    return loaded.prefill(Sequence(), IDS), loaded.prepared_note


def without_cache(path: Path) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "SMALL_BYTES", 1 << 60)
        return logits(path)[0]


def files() -> list[Path]:
    """Everything in the folder of prepared layouts."""
    return sorted(prepared_dir().iterdir()) if prepared_dir().is_dir() else []


def the_file() -> Path:
    (file,) = files()
    assert file.suffix == prepared.SUFFIX
    return file
