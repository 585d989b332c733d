"""Tensors read ahead by threads into a ring: the same as read at once, in any order, and told in words where not."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit import FewbitError, fetching
from fewbit.fetching import Fetcher
from fewbit.layers import Weights
from fewbit.qtensor import QTensor
from fewbit.runtime.engine import LanguageModel
from fewbit.runtime.placement import CardMemoryError, Placement, Plan
from fewbit.source import Source, open_source

CPU = torch.device("cpu")


@pytest.fixture(params=["bf16", "int4g32a"])
def source(
    request: pytest.FixtureRequest, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Source:
    """A tiny model whose tensors are cut into many pieces, in a ring of few."""
    monkeypatch.setattr(fetching, "PIECE_BYTES", 1000)
    monkeypatch.setattr(fetching, "PIECES", 5)
    monkeypatch.setattr(fetching, "READERS", 3)
    if request.param == "bf16":
        return open_source(tiny_folder)
    out = tmp_path / "quantized"
    fewbit.quantize(tiny_folder, out, format=request.param, method="rtn")
    return open_source(out)


def names(source: Source) -> list[str]:
    return [w.name for w in source.weights]


def fetch_all(source: Source) -> list[QTensor]:
    with Fetcher(source, names(source), CPU) as fetcher:
        return [fetcher.read(name) for name in names(source)]


def same(a: QTensor, b: QTensor) -> bool:
    alike = (a.spec, a.shape, set(a.parts)) == (b.spec, b.shape, set(b.parts))
    return alike and all(torch.equal(a.parts[p], b.parts[p]) and a.parts[p].dtype == b.parts[p].dtype for p in a.parts)


@pytest.mark.parametrize("order", ["planned", "backwards", "every second"])
def test_what_is_fetched_is_what_is_read(source: Source, order: str) -> None:
    before = threading.active_count()
    planned = names(source)
    asked = {"planned": planned, "backwards": planned[::-1], "every second": planned[1::2]}[order]
    with Fetcher(source, planned, CPU) as fetcher:
        assert all(same(fetcher.read(name), source.read(name)) for name in asked)
        if len(asked) == len(planned):
            # every slot is there to be written again but the one that is kept
            assert len(fetcher._free) == len(fetcher._ring) - 1
        # a second time, and what was never planned
        assert same(fetcher.read(asked[0]), source.read(asked[0]))
    with Fetcher(source, planned[:1], CPU) as fetcher:
        assert same(fetcher.read(planned[-1]), source.read(planned[-1]))
    assert threading.active_count() == before


def test_a_file_that_became_shorter_is_told(source: Source) -> None:
    """A mapped one would end the process."""
    last = max((p for n in names(source) for p in source.extents(n).values()), key=lambda p: p.offset)
    file = last.file
    os.truncate(file, last.offset + last.nbytes // 2)
    with pytest.raises(FewbitError, match="can't be read") as caught:
        fetch_all(source)
    assert f"it ends at byte {file.stat().st_size:,}" in caught.value.facts
    file.unlink()
    with pytest.raises(FewbitError, match="can't be read"):
        fetch_all(source)


def test_an_interrupt_leaves_no_thread_and_no_file_open(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    before, open_files = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    def interrupted(self: Source, name: str, stored: dict[str, torch.Tensor]) -> QTensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(Source, "assemble", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_all(source)
    assert threading.active_count() == before
    assert len(list(Path("/proc/self/fd").iterdir())) == open_files


def test_a_full_card_is_told_with_the_plan_and_gives_everything_back(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card's allocator stands in: it has no more after some tensors."""
    given: list[weakref.ref[torch.Tensor]] = []
    real = Fetcher._brought

    def brought(self: Fetcher, *args: Any) -> torch.Tensor:
        if len(given) == 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        found = real(self, *args)
        given.append(weakref.ref(found))
        return found

    def load(self: LanguageModel, progress: object) -> Any:
        with Fetcher(self.source, names(self.source), CPU) as fetcher:
            weights = Weights(fetcher.read, self.source.has, self.backends, self.backends[0].ops, [])
            return self.source.module.Model(self.source.args, weights)

    before = threading.active_count()
    placement = Placement(CPU, Plan(7 << 30, 1 << 30, 2 << 30))
    with monkeypatch.context() as patch:
        patch.setattr(Fetcher, "_brought", brought)
        patch.setattr(LanguageModel, "_load", load)
        patch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 30, 24 << 30))
        with pytest.raises(CardMemoryError, match="no memory left") as caught:
            LanguageModel(source, False, 64, placement=placement)
    assert "weights 7.00 GiB" in caught.value.facts
    assert "1.00 GiB of 24.00 GiB are free now" in caught.value.facts
    gc.collect()
    assert len(given) == 12
    assert [ref() for ref in given] == [None] * 12
    assert threading.active_count() == before
    assert LanguageModel(source, False, 64).model is not None


def test_a_header_that_changed_is_noticed(source: Source) -> None:
    place = source.extents(names(source)[0])
    file = next(iter(place.values())).file
    data = bytearray(file.read_bytes())
    # other offsets than the library has checked
    at = data.index(b"data_offsets")
    data[at : at + 12] = b"data_offsetz"
    file.write_bytes(data)
    source.checkpoint.shards._ranges.clear()  # type: ignore[attr-defined]
    with pytest.raises(FewbitError, match="changed while it was being read"):
        source.extents(names(source)[0])
