"""A model in several GGUF files, as gguf-py splits it; then parts that are missing, swapped or of another model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from fewbit.checkpoint import gguf, open_checkpoint
from fewbit.errors import FewbitError
from fewbit.gguf_parts import all_parts
from fewbit.store import content_files

TENSORS = {f"t{i}": np.full((2, 8), i, dtype=np.float32) for i in range(6)}


def write(folder: Path, name: str = "model", tensors: int = 5, most: int = 2) -> list[Path]:
    """Three parts: 2, 2 and 1 tensors."""
    folder.mkdir(exist_ok=True)
    writer = GGUFWriter(folder / f"{name}.gguf", "llama", split_max_tensors=most)
    writer.add_name(name)
    for key, w in list(TENSORS.items())[:tensors]:
        writer.add_tensor(key, w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob(f"{name}-*.gguf"))


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    found = write(tmp_path / "m")
    assert [p.name for p in found] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return found


@pytest.mark.parametrize("number", [0, 1, 2])
def test_any_part_opens_the_whole_model(parts: list[Path], number: int) -> None:
    checkpoint = open_checkpoint(parts[number])
    assert checkpoint.names() == list(TENSORS)[:5]
    assert checkpoint.config["general.name"] == "model"
    for name, w in list(TENSORS.items())[:5]:
        assert checkpoint.shape(name) == w.shape
        assert np.array_equal(checkpoint.read(name).parts["weight"].numpy(), w)
        assert np.array_equal(checkpoint.read(name, (1, 2)).parts["weight"].numpy(), w[1:])
    assert checkpoint.weight_bytes() == sum(p.stat().st_size for p in parts)
    assert content_files(parts[number]) == parts


def test_one_file_is_no_split(tmp_path: Path) -> None:
    (only,) = write(tmp_path / "m", tensors=2, most=0) or [tmp_path / "m" / "model.gguf"]
    assert gguf.open(only).names() == ["t0", "t1"]
    assert all_parts(only) == [only]
    assert content_files(only) == [only]
    # a name alone makes no parts
    alone = only.rename(only.with_name("model-00003-of-00001.gguf"))
    assert all_parts(alone) == [alone]
    assert gguf.open(alone).names() == ["t0", "t1"]


def lose(folder: Path, parts: list[Path]) -> None:
    parts[1].unlink()


def lose_the_first(folder: Path, parts: list[Path]) -> None:
    parts[0].unlink()


def rename_all(folder: Path, parts: list[Path]) -> None:
    for i, part in enumerate(parts):
        part.rename(folder / f"part{i}.gguf")


def swap(folder: Path, parts: list[Path]) -> None:
    kept = parts[1].read_bytes()
    shutil.copy(parts[2], parts[1])
    parts[2].write_bytes(kept)


def repeat(folder: Path, parts: list[Path]) -> None:
    data = parts[1].read_bytes()
    parts[1].write_bytes(data.replace(b"t2", b"t0"))


def mix_longer(folder: Path, parts: list[Path]) -> None:
    shutil.copy(write(folder / "other", "other", tensors=4, most=1)[1], parts[1])


def mix_same_split(folder: Path, parts: list[Path]) -> None:
    shutil.copy(write(folder / "other", "other", tensors=6)[2], parts[2])


def damage(folder: Path, parts: list[Path]) -> None:
    parts[2].write_bytes(b"GGUF" + bytes(10))


BROKEN: dict[str, tuple[Callable[[Path, list[Path]], None], str, str]] = {
    "a part is missing": (lose, "other parts are missing", "model-00002-of-00003.gguf"),
    "the first is missing": (lose_the_first, "other parts are missing", "model-00001-of-00003.gguf"),
    "other names": (rename_all, "others are not to be found", "one of 3 parts"),
    "swapped": (swap, "not parts of one model", "split.no = 1"),
    "a tensor twice": (repeat, "not parts of one model", "'t0' is in model-00001-of-00003.gguf as well"),
    "of a longer model": (mix_longer, "not parts of one model", "split.count = 3"),
    "of a model of another size": (mix_same_split, "not parts of one model", "split.tensors.count = 5"),
    "damaged": (damage, "not a whole GGUF file", "14 bytes"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_with_parts_is_said(parts: list[Path], case: str) -> None:
    breaks, what, facts = BROKEN[case]
    breaks(parts[0].parent, parts)
    left = next(p for p in [*parts[::-1], parts[0].with_name("part1.gguf")] if p.is_file())
    if case == "damaged":
        left = parts[0]
    with pytest.raises(FewbitError) as caught:
        gguf.open(left)
    assert what in caught.value.what
    assert facts in caught.value.facts
    assert caught.value.next_step


def test_a_tensor_too_few_is_noticed(tmp_path: Path) -> None:
    parts = write(tmp_path / "m")
    data = parts[2].read_bytes()
    at = data.index(b"GGUF") + 8
    # the last part says it has no tensor, and its table is what was metadata's end
    assert int.from_bytes(data[at : at + 8], "little") == 1
    parts[2].write_bytes(data[:at] + bytes(8) + data[at + 8 :])
    with pytest.raises(FewbitError) as caught:
        gguf.open(parts[0])
    assert "5 tensors, and they have 4" in caught.value.facts
