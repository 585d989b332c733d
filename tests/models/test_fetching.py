"""Tensors read ahead by threads into a ring: the same as read at once, in any order, and told in words where not."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

import fewbit
from fewbit import FewbitError, fetching
from fewbit.fetching import Fetcher
from fewbit.qtensor import QTensor
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
        # a second time, and what was never planned
        assert same(fetcher.read(asked[0]), source.read(asked[0]))
    with Fetcher(source, planned[:1], CPU) as fetcher:
        assert same(fetcher.read(planned[-1]), source.read(planned[-1]))
    assert threading.active_count() == before


def test_a_file_that_became_shorter_is_told(source: Source) -> None:
    """A mapped one would end the process."""
    last = max((p for n in names(source) for p in source.places(n).values()), key=lambda p: p.offset)
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
