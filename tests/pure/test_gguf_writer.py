"""GGUF files as they are written, read by the gguf package and by fewbit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from fewbit.checkpoint import gguf
from fewbit.checkpoint._gguf_writer import GgufTensor, GgufWriter
from fewbit.errors import FewbitError
from fewbit.formats import parse

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "a.text": "naïve ☕",
    "a.count": 4096,
    "a.large": 1 << 40,
    "a.negative": -3,
    "a.share": 0.25,
    "a.yes": True,
    "a.words": ["", "b", "ü"],
    "a.kinds": [1, 3, 6],
    "a.scores": [-1.5, 0.0],
    "a.flags": [True, False],
}


def tensors() -> dict[str, tuple[GgufTensor, torch.Tensor]]:
    """A tensor of each kind, with odd sizes between aligned ones."""
    w = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    found = {"norm.weight": (GgufTensor("norm.weight", "f32", (3,)), torch.tensor([1.0, 2.0, 3.0]))}
    for spec in ("f16", "bf16", "gguf:q4_0", "gguf:q6_k"):
        fmt = parse(spec)
        params = fmt.fit(w)
        data = next(iter(fmt.pack(fmt.round(w, params), params).parts.values()))
        found[spec] = (GgufTensor(spec, spec, (6, 256)), data)
    stack = parse("gguf:q8_0")
    params = stack.fit(w)
    data = stack.pack(stack.round(w, params), params).parts["blocks"]
    found["stack"] = (GgufTensor("stack", "gguf:q8_0", (2, 3, 256)), data)
    return found


def write(path: Path) -> dict[str, tuple[GgufTensor, torch.Tensor]]:
    found = tensors()
    with GgufWriter(path, METADATA, [t for t, _ in found.values()]) as writer:
        for name, (_, data) in found.items():
            cut = len(data) // 2
            writer.write(name, data[:cut])
            writer.write(name, data[cut:])
    return found


def test_gguf_and_fewbit_read_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    expected = write(path)
    reader = GGUFReader(path)
    assert {k: reader.fields[k].contents() for k in METADATA} == METADATA
    assert [t.name for t in reader.tensors] == list(expected)
    for t in reader.tensors:
        planned, data = expected[t.name]
        assert tuple(reversed(t.shape.tolist())) == planned.shape
        assert t.data.tobytes() == data.contiguous().view(torch.uint8).numpy().tobytes()
        assert t.data_offset % 32 == 0
    ours = gguf.open(path)
    assert {k: ours.config[k] for k in METADATA} == METADATA
    for name, (planned, data) in expected.items():
        q = ours.read(name)
        assert (q.spec, q.shape) == (planned.spec, planned.shape)
        assert np.array_equal(
            next(iter(q.parts.values())).contiguous().view(torch.uint8).numpy().reshape(-1),
            data.contiguous().view(torch.uint8).numpy().reshape(-1),
        )
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("how", ["missing", "surplus", "out of order", "interrupted"])
def test_what_goes_wrong_leaves_nothing(tmp_path: Path, how: str) -> None:
    two = [GgufTensor("a", "f32", (4,)), GgufTensor("b", "f32", (4,))]

    def attempt() -> None:
        with GgufWriter(tmp_path / "m.gguf", {}, two) as writer:
            if how == "out of order":
                writer.write("b", torch.zeros(4))
            writer.write("a", torch.zeros(5 if how == "surplus" else 4))
            if how == "interrupted":
                raise KeyboardInterrupt

    with pytest.raises((ValueError, KeyboardInterrupt)):
        attempt()
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_text("mine")
    with pytest.raises(FewbitError, match="exists already"):
        write(path)
    assert path.read_text() == "mine"
    with pytest.raises(FewbitError, match="does not exist"):
        write(tmp_path / "nowhere" / "m.gguf")


def test_another_that_was_faster_stays(tmp_path: Path) -> None:
    path, found = tmp_path / "m.gguf", tensors()
    writer = GgufWriter(path, {}, [found["f16"][0]]).__enter__()
    writer.write("f16", found["f16"][1])
    path.write_text("theirs")
    with pytest.raises(FewbitError, match="exists already"):
        writer.__exit__(None, None, None)
    assert path.read_text() == "theirs"
    assert len(list(tmp_path.iterdir())) == 1
