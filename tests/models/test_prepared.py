"""The cache of packed weights: what it gives is what packing gives, and what is not right is not used."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fewbit
from fewbit import prepared
from fewbit.kernels import cpu
from fewbit.runtime.cache import Sequence
from fewbit.source import Source
from fewbit.store import prepared_bytes
from tests.conftest import write_folder
from tests.models.conftest import IDS, files, logits, the_file, without_cache

pytestmark = pytest.mark.skipif(cpu.backend() is None, reason="fewbit._cpu is not built")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that are read from models from now on."""
    found: list[str] = []
    read = Source.read

    def noted(self: Source, name: str, rows: tuple[int, int] | None = None) -> Any:
        found.append(name)
        return read(self, name, rows)

    monkeypatch.setattr(Source, "read", noted)
    return found


def test_what_is_mapped_is_what_was_packed(model: Path, reads: list[str]) -> None:
    right = without_cache(model)
    assert not files()
    assert len(reads) == len(set(reads)) > 20
    assert torch.equal(logits(model)[0], right)
    file = the_file()
    before = file.read_bytes()
    os.utime(file, (1, 1))
    reads.clear()
    progress: list[tuple[int, int, str]] = []
    loaded = fewbit.load(model, progress=lambda *step: progress.append(step))
    assert torch.equal(loaded.prefill(Sequence(), IDS), right)
    assert loaded.prepared_note is None
    # norms and biases alone come from the model
    assert reads
    assert all("norm" in name or name.endswith(".bias") for name in reads)
    assert progress[-1][0] == progress[-1][1] == len(reads)
    assert prepared_bytes() == len(before)
    # a use is noted, nothing else is written
    assert file.read_bytes() == before
    assert file.stat().st_mtime > 2
    assert file.stat().st_mode & 0o077 == 0
    # it stays usable when the file is gone
    file.unlink()
    assert torch.equal(loaded.prefill(Sequence(), IDS), right)


def test_small_models_and_exact_runs_keep_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fewbit.load(model, exact=True)
    monkeypatch.setattr(prepared, "SMALL_BYTES", 1 << 40)
    fewbit.load(model)
    monkeypatch.setattr(prepared, "SMALL_BYTES", 0)
    # nothing of a float model is packed
    fewbit.load(write_folder(model.parent / "float"))
    assert not files()


def test_a_changed_model_is_packed_again(model: Path) -> None:
    first, _ = logits(model)
    with safe_open(model / "model.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
    weights = load_file(model / "model.safetensors")
    scales = "model.layers.0.mlp.down_proj.weight_scale"
    time.sleep(0.01)
    facts = (model / "model.safetensors").stat()
    save_file(weights | {scales: -weights[scales]}, model / "model.safetensors", metadata)
    # the same size and the same time: the system still tells that it was written
    os.utime(model / "model.safetensors", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert (model / "model.safetensors").stat().st_size == facts.st_size
    right = without_cache(model)
    assert not torch.equal(first, right)
    for _ in range(2):
        found, note = logits(model)
        assert torch.equal(found, right)
        assert note is None
    the_file()


# Files that are something else


def header_of(data: bytes) -> tuple[dict[str, Any], int]:
    _, end, length, _ = prepared.START.unpack(data[: prepared.START.size])
    return json.loads(data[end : end + length]), end


def sealed(data: bytes, text: bytes, end: int | None = None) -> bytes:
    """The file with another header, whose own sum is right."""
    place = header_of(data)[1]
    start = prepared.START.pack(prepared.MAGIC, place if end is None else end, len(text), hashlib.sha256(text).digest())
    return start + data[prepared.START.size : place] + text


def with_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def damaged(data: bytes) -> bytes:
        header, _ = header_of(data)
        other = change(header)
        return sealed(data, json.dumps(header if other is None else other).encode())

    return damaged


def with_matrix(index: int, **changes: Any) -> Callable[[bytes], bytes]:
    return with_header(lambda header: header["matrices"][index].update(changes))


def flipped(place: Callable[[bytes], int]) -> Callable[[bytes], bytes]:
    def damaged(data: bytes) -> bytes:
        i = place(data)
        return data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]

    return damaged


def swapped(header: dict[str, Any]) -> None:
    """Two matrices of other shapes under each other's names."""
    a, b = header["matrices"][0], header["matrices"][1]
    a["names"], b["names"] = b["names"], a["names"]


def overlapping(header: dict[str, Any]) -> None:
    """Two matrices of one size on the same bytes, with the right sum."""
    same = [m for m in header["matrices"] if m["names"][0].endswith("down_proj")]
    same[1].update(offset=same[0]["offset"], sum=same[0]["sum"])


def twice(header: dict[str, Any]) -> None:
    """Two matrices of one size under one name."""
    same = [m for m in header["matrices"] if m["names"][0].endswith("down_proj")]
    same[1]["names"] = same[0]["names"]


def longer(data: bytes) -> bytes:
    """A range that takes in the header."""
    header, end = header_of(data)
    header["matrices"][-1]["offset"] = end - 64
    return sealed(data, json.dumps(header).encode())


def zeroed(data: bytes) -> bytes:
    """What a power failure leaves: the header, and nothing between."""
    start, end = 1 << 12, header_of(data)[1]
    return data[:start] + bytes(end - start) + data[end:]


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "a few bytes": lambda data: data[:10],
    "cut at the end": lambda data: data[:-1],
    "cut in the middle": lambda data: data[: len(data) // 2],
    "longer": lambda data: data + b" ",
    "something else": lambda data: hashlib.sha256(data).digest() * 1000,
    "a flipped bit in the magic": flipped(lambda _: 3),
    "a flipped bit in the header": flipped(lambda data: header_of(data)[1] + 40),
    "a flipped bit in the codes": flipped(lambda data: header_of(data)[0]["matrices"][2]["offset"] + 5),
    "a flipped bit in the last scales": flipped(
        lambda data: (m := header_of(data)[0]["matrices"][-1])["offset"] + m["bytes"] - 1
    ),
    "zeros for weights": zeroed,
    "a header at no place": lambda data: sealed(data, b"{}", (1 << 64) - 2),
    "a header of no length": lambda data: sealed(data, b""),
    "no JSON": lambda data: sealed(data, b'{"format": 1,'),
    "deep JSON": lambda data: sealed(data, b"[" * 100_000),
    "a list": with_header(lambda _: [1]),
    "a number for matrices": with_header(lambda h: h.update(matrices=7)),
    "numbers for matrices": with_header(lambda h: h.update(matrices=[7])),
    "twice the same": with_header(lambda h: h["matrices"].append(h["matrices"][-1])),
    "two of one name": with_header(twice),
    "overlapping": with_header(overlapping),
    "swapped": with_header(swapped),
    "into the header": longer,
    "beyond the end": with_matrix(1, offset=1 << 40),
    "far beyond the end": with_matrix(1, offset=1 << 70),
    "before the beginning": with_matrix(0, offset=-64),
    "on the beginning": with_matrix(0, offset=0),
    "out of line": with_header(lambda h: h["matrices"][0].update(offset=h["matrices"][0]["offset"] + 1)),
    "a fraction": with_header(lambda h: h["matrices"][0].update(offset=float(h["matrices"][0]["offset"]))),
    "true": with_matrix(0, bytes=True),
    "no bytes": with_matrix(0, bytes=0),
    "fewer bytes": with_header(lambda h: h["matrices"][0].update(bytes=h["matrices"][0]["bytes"] - 64)),
    "more bytes": with_header(lambda h: h["matrices"][0].update(bytes=h["matrices"][0]["bytes"] + 64)),
    "another sum": with_matrix(0, sum=0),
    "no sum": with_matrix(0, sum=None),
    "unknown names": with_matrix(0, names=["nobody"]),
    "no names": with_matrix(0, names=[]),
    "wild names": with_matrix(0, names=[{}]),
    "an unknown backend": with_matrix(0, backend="reference"),
    "a wild backend": with_matrix(0, backend=[]),
    "no description": with_matrix(0, weights=None),
    "an empty description": with_matrix(0, weights={}),
    "more rows": with_header(lambda h: h["matrices"][0]["weights"]["blocks"][0].__setitem__(0, 1 << 30)),
    "other columns": with_header(lambda h: h["matrices"][0]["weights"].update(columns=1 << 62)),
}


def test_files_that_are_not_right_are_not_used(model: Path, subtests: pytest.Subtests) -> None:
    right = logits(model)[0]
    file = the_file()
    good = file.read_bytes()
    for name, damaged in DAMAGED.items():
        with subtests.test(name):
            found = damaged(good)
            assert found != good
            # another file of the name: what is mapped stays as it was
            file.unlink()
            file.write_bytes(found)
            again, note = logits(model)
            assert torch.equal(again, right)
            assert note is not None
            assert "damaged" in note
            assert str(the_file()) in note
            # and it is as good as new
            assert header_of(file.read_bytes()) == header_of(good)
            assert logits(model)[1] is None


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.update(format=0),
        lambda h: h.update(purpose=None),
        lambda h: h["purpose"].update(version="0"),
        lambda h: h["purpose"].update(path="/elsewhere"),
        lambda h: h["purpose"].update(backends=["cpu 0", "dense", "reference"]),
        lambda h: h["purpose"].update(backends=h["purpose"]["backends"][1:]),
        lambda h: h["purpose"]["files"].clear(),
    ],
)
def test_files_of_another_version_are_replaced(model: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    right = logits(model)[0]
    file = the_file()
    good = file.read_bytes()
    file.write_bytes(with_header(change)(good))
    again, note = logits(model)
    assert torch.equal(again, right)
    assert note is None
    assert header_of(the_file().read_bytes()) == header_of(good)


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_what_is_no_file_does_no_harm(model: Path, kind: str) -> None:
    right = logits(model)[0]
    file = the_file()
    file.unlink()
    {"pipe": os.mkfifo, "folder": os.mkdir, "loop": lambda f: f.symlink_to(f)}[kind](file)
    again, note = logits(model)
    assert torch.equal(again, right)
    assert note
    assert not [f for f in files() if f.suffix != prepared.SUFFIX]
