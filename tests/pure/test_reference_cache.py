"""What is kept of a reference's predictions: how near it comes, and what becomes of files that are something else."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewbit.reference_cache import SAMPLES, TOP, Compressed, ReferenceCache, _digest, compress
from fewbit.scoring import Prediction
from fewbit.source import open_source

VOCAB, COUNT = 320, 9
WINDOW = torch.arange(512) % 300
TARGETS = torch.arange(COUNT)


def pair(vocab: int, count: int, apart: float) -> tuple[Prediction, Prediction]:
    """A peaked distribution with a long tail, and one that is `apart` from it in each logit."""
    random = torch.Generator().manual_seed(vocab)
    logits = 2 * torch.randn(count, vocab, generator=random)
    return Prediction(logits), Prediction(logits + apart * torch.randn(count, vocab, generator=random))


def exact_kl(one: Prediction, two: Prediction) -> Tensor:
    p, q = one.logits.double().softmax(-1), two.logits.double().softmax(-1)
    return (p * (p / q).log()).sum(-1)


def one_bucket(kept: Compressed, other: Prediction) -> Tensor:
    """KL over the kept tokens and all others as one: never more than the whole."""
    p, q = kept.log_probs.double().exp(), other.logits.double().softmax(-1).gather(1, kept.ids)
    rest, theirs = 1 - p.sum(-1), 1 - q.sum(-1)
    return (p * (p / q).log()).sum(-1) + rest * (rest / theirs).log()


# What compression loses


@pytest.mark.parametrize("apart", [0.03, 0.3, 1.0, 2.5])
def test_the_divergence_inside_the_tail_is_estimated(apart: float) -> None:
    one, two = pair(4000, 60, apart)
    truth = exact_kl(one, two)
    seen = torch.stack([compress(one, torch.zeros(60, dtype=torch.long), seed).kl(two) for seed in range(20)])
    bucket = one_bucket(compress(one, torch.zeros(60, dtype=torch.long), 0), two)
    missing = float((truth - bucket).mean())
    # what the sample is for: without it, this much of the figure is lost
    assert missing > 0.2 * float(truth.mean())
    assert (seen >= bucket - 1e-7).all()
    assert abs(float(seen.mean() - truth.mean())) < 0.005 * missing
    # one draw is a figure one can use
    assert float((seen.mean(1) - truth.mean()).abs().max()) < 0.06 * missing


def test_small_differences_are_not_lost_in_rounding() -> None:
    one, two = pair(4000, 60, 3e-5)
    kept = compress(one, torch.zeros(60, dtype=torch.long), 0)
    truth = exact_kl(one, two)
    assert 2e-10 < float(truth.mean()) < 5e-10
    assert torch.allclose(one.kl(two), truth, rtol=1e-4, atol=1e-14)
    assert float(kept.kl(two).mean()) == pytest.approx(float(truth.mean()), rel=0.05)
    assert 0 <= float(kept.kl(one).min()) <= float(kept.kl(one).max()) < 1e-11


@pytest.mark.parametrize("vocab", [3, 100, TOP, TOP + 1])
def test_a_vocabulary_that_is_kept_whole_loses_nothing(vocab: int) -> None:
    one, two = pair(vocab, 30, 0.5)
    kept = compress(one, torch.zeros(30, dtype=torch.long), 0)
    assert torch.allclose(kept.kl(two), exact_kl(one, two), atol=1e-6)


def test_a_tail_without_mass_is_no_trouble() -> None:
    logits = torch.full((4, 1000), -300.0)
    logits[:, :5] = 10.0
    other = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    kept = compress(Prediction(logits), torch.zeros(4, dtype=torch.long), 0)
    assert torch.allclose(kept.kl(Prediction(other)), exact_kl(Prediction(logits), Prediction(other)))


def test_what_is_kept_beside_the_divergence() -> None:
    one, _ = pair(1000, 20, 0.1)
    targets = torch.arange(20) * 7
    kept = compress(one, targets, 3)
    logs = one.logits.double().log_softmax(-1)
    assert torch.allclose(kept.targets(targets), logs.gather(1, targets[:, None])[:, 0], atol=1e-6)
    assert torch.equal(kept.best, logs.argmax(-1))
    for (token, p), (same, q) in zip(kept.top(5, 3), one.top(5, 3), strict=True):
        assert token == same
        assert p == pytest.approx(q, rel=1e-6)
    assert kept.tail_ids.shape == (20, SAMPLES)
    # nothing kept at the top is drawn again
    assert not (kept.tail_ids[:, :, None] == kept.ids[:, None, :]).any()
    assert kept.is_of(one)
    assert not kept.is_of(Prediction(one.logits + 0.01 * torch.randn(20, 1000)))


# Files


@pytest.fixture
def cache(tiny_folder: Path, tmp_path: Path) -> ReferenceCache:
    return ReferenceCache(open_source(tiny_folder), tmp_path / "references")


@pytest.fixture
def exact() -> Prediction:
    return pair(VOCAB, COUNT, 0.1)[0]


def test_what_is_written_is_read(cache: ReferenceCache, exact: Prediction) -> None:
    assert not cache.has(WINDOW)
    assert cache.read(WINDOW, COUNT) is None
    assert cache.write(WINDOW, exact, TARGETS)
    assert cache.has(WINDOW)
    found = cache.read(WINDOW, COUNT)
    assert found is not None
    assert found.is_of(exact)
    assert torch.equal(found.best, exact.best)
    assert torch.allclose(found.targets(TARGETS), exact.targets(TARGETS), atol=1e-6)
    assert not list(cache.folder.glob(".*"))
    # the same each time: what is drawn follows from the name
    assert cache.write(WINDOW, exact, TARGETS)
    again = cache.read(WINDOW, COUNT)
    assert again is not None
    assert torch.equal(again.tail_ids, found.tail_ids)


def test_another_window_is_another_file(cache: ReferenceCache, exact: Prediction) -> None:
    cache.write(WINDOW, exact, TARGETS)
    other = WINDOW.clone()
    other[-1] += 1
    assert cache.read(other, COUNT) is None
    # a file under another's name is not taken either
    cache.path(other).write_bytes(cache.path(WINDOW).read_bytes())
    assert cache.has(other)
    assert cache.read(other, COUNT) is None


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_changed_model_is_another_one(cache: ReferenceCache, exact: Prediction, tiny_folder: Path, file: str) -> None:
    cache.write(WINDOW, exact, TARGETS)
    changed = tiny_folder / file
    facts, data = changed.stat(), bytearray(changed.read_bytes())
    at = data.rindex(b"1e-05") if file == "config.json" else len(data) - 1
    data[at] ^= 2
    changed.write_bytes(bytes(data))
    # not even the same size and time make it pass
    os.utime(changed, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert changed.stat().st_size == facts.st_size
    again = ReferenceCache(open_source(tiny_folder), cache.folder)
    assert again.read(WINDOW, COUNT) is None
    assert again.path(WINDOW) != cache.path(WINDOW)


def test_nothing_is_kept_of_a_model_that_changes_meanwhile(
    cache: ReferenceCache, exact: Prediction, tiny_folder: Path
) -> None:
    weights = tiny_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert not cache.write(WINDOW, exact, TARGETS)
    assert not cache.has(WINDOW)


def test_a_copy_of_the_model_is_the_same_one(
    cache: ReferenceCache, exact: Prediction, tiny_folder: Path, tmp_path: Path
) -> None:
    import shutil

    cache.write(WINDOW, exact, TARGETS)
    shutil.copytree(tiny_folder, tmp_path / "copy")
    assert ReferenceCache(open_source(tmp_path / "copy"), cache.folder).read(WINDOW, COUNT) is not None


def test_truncated_and_flipped_files_are_not_taken(cache: ReferenceCache, exact: Prediction) -> None:
    cache.write(WINDOW, exact, TARGETS)
    file = cache.path(WINDOW)
    whole = file.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert cache.read(WINDOW, COUNT) is None, length
    random = torch.Generator().manual_seed(0)
    for at in torch.randint(0, len(whole), (200,), generator=random).tolist():
        data = bytearray(whole)
        data[at] ^= 1 << int(torch.randint(0, 8, (1,), generator=random))
        file.write_bytes(bytes(data))
        found = cache.read(WINDOW, COUNT)
        # spaces that pad the header, or its "format", may change without a loss
        assert found is None or found.is_of(exact), at
    file.write_bytes(whole + b"x")
    assert cache.read(WINDOW, COUNT) is None
    # and the next run puts it right
    assert cache.write(WINDOW, exact, TARGETS)
    assert cache.read(WINDOW, COUNT) is not None


def test_hostile_values_under_a_right_digest_are_not_taken(cache: ReferenceCache, exact: Prediction) -> None:
    cache.write(WINDOW, exact, TARGETS)
    file = cache.path(WINDOW)
    good = load_file(file)

    def taken(**changes: Tensor) -> bool:
        parts = good | changes
        save_file(parts, file, {"fewbit": file.stem, "sha256": _digest(parts[name] for name in good_order)})
        return cache.read(WINDOW, COUNT) is not None

    good_order = list(Compressed.__dataclass_fields__)
    assert taken()
    for name in ("ids", "tail_ids", "best"):
        assert not taken(**{name: torch.full_like(good[name].int(), VOCAB).to(torch.uint16)}), name
        assert not taken(**{name: good[name].int()}), name
    for name in ("log_probs", "tail_log_probs", "target_log_probs", "tail_mass"):
        for value in (float("nan"), float("inf"), 1.5):
            assert not taken(**{name: torch.full_like(good[name], value)}), (name, value)
        assert not taken(**{name: good[name][1:].contiguous()}), name
    assert not taken(extra=torch.zeros(1))
    assert not taken(tail_mass=-good["tail_mass"] - 0.1)


def test_what_is_no_file_of_ours_is_left_alone(cache: ReferenceCache, exact: Prediction, tmp_path: Path) -> None:
    cache.folder.mkdir()
    file = cache.path(WINDOW)
    file.mkdir()
    assert cache.read(WINDOW, COUNT) is None
    assert not cache.write(WINDOW, exact, TARGETS)
    file.rmdir()
    os.mkfifo(file)
    assert cache.read(WINDOW, COUNT) is None
    file.unlink()
    # a header that claims 2^60 bytes, and a file too large to be looked into
    file.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    assert cache.read(WINDOW, COUNT) is None
    with file.open("wb") as sparse:
        sparse.truncate(1 << 32)
    assert cache.read(WINDOW, COUNT) is None
    file.write_bytes(b"\x80\x04\x95pickle.")
    assert cache.read(WINDOW, COUNT) is None


def test_a_write_that_fails_leaves_nothing(
    cache: ReferenceCache, exact: Prediction, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path
) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        assert not cache.write(WINDOW, exact, TARGETS)
    assert list(cache.folder.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert not ReferenceCache(open_source(tiny_folder), tmp_path / "file" / "in").write(WINDOW, exact, TARGETS)


def test_the_folder_stays_small(cache: ReferenceCache, exact: Prediction, tiny_folder: Path) -> None:
    windows = [WINDOW + i for i in range(5)]
    for age, window in enumerate(windows):
        cache.write(window, exact, TARGETS)
        os.utime(cache.path(window), (1000 + age, 1000 + age))
    # reading makes the oldest the newest
    assert cache.read(windows[0], COUNT) is not None
    size = cache.path(WINDOW).stat().st_size
    tight = ReferenceCache(open_source(tiny_folder), cache.folder, max_bytes=3 * size)
    (cache.folder / "notes.txt").write_text("not ours")
    tight.write(WINDOW + 9, exact, TARGETS)
    left = [i for i, window in enumerate(windows) if cache.has(window)]
    assert left == [0, 4]
    assert cache.has(WINDOW + 9)
    assert (cache.folder / "notes.txt").exists()


def test_what_killed_processes_left_is_removed(cache: ReferenceCache, exact: Prediction) -> None:
    cache.folder.mkdir()
    old, young = cache.folder / ".aa.part", cache.folder / ".bb.part"
    for file in (old, young):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    cache.write(WINDOW, exact, TARGETS)
    assert not old.exists()
    assert young.exists()
