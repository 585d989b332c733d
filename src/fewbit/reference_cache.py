"""What the reference predicted on a window, kept on disk so that it need not run again.

A full set of log-probabilities takes 50 MB a window. Kept are, for each scored position, the TOP likeliest tokens, the
mass of all others (the tail), and SAMPLES tokens drawn from that tail. With one bucket for the tail the mean KL would
lack 8 % at 256 tokens and still 0.7 % at 4,096 (SmolLM2-135M on WikiText-2), so the divergence inside the tail is
estimated from the sample (systematic sampling and a regression estimator: Cochran, Sampling Techniques, chapters 8, 7).

Files are safetensors, one a window, named by hashes of the reference's content and the tokens. A file is used when its
name, version, shapes, value ranges and its own digest are right, and is otherwise as if it were not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fewbit import __version__, store
from fewbit.scoring import ROWS, Prediction
from fewbit.source import Source

# counted up when the protocol, what is kept or how the reference runs changes: older files are then not found
VERSION = 1
TOP, SAMPLES = 256, 256
MAX_BYTES = 1 << 30
# log-probabilities that differ by more are not those of the same model
TOLERANCE = 1e-3
SUFFIX = ".safetensors"
# a temporary file this old was left by a process that was killed
STALE_SECONDS = 3600


@dataclass(frozen=True)
class Compressed:
    """The reference's predictions at n positions.

    ids, log_probs              the TOP likeliest tokens, falling; int64 and float32 [n, k]
    tail_ids, tail_log_probs    tokens drawn from the others, each as often as it is likely; [n, s]
    tail_mass                   probability of the others, float64 [n]
    best, target_log_probs      the likeliest token int64 [n]; the text's own token's log-probability float32 [n]
    """

    ids: Tensor
    log_probs: Tensor
    tail_ids: Tensor
    tail_log_probs: Tensor
    tail_mass: Tensor
    best: Tensor
    target_log_probs: Tensor

    def targets(self, ids: Tensor) -> Tensor:
        """Log-probabilities float64 [n] of the text's tokens, which were kept."""
        return self.target_log_probs.double()

    def top(self, row: int, count: int) -> list[tuple[int, float]]:
        """The likeliest tokens of one position with their probabilities."""
        pair = (self.ids[row, :count].tolist(), self.log_probs[row, :count].double().exp().tolist())
        return list(zip(*pair, strict=True))

    def kl(self, other: Prediction) -> Tensor:
        """KL(self || other) in nats, float64 [n], at least that over the kept tokens and one bucket for the tail."""
        p, q = self.log_probs.double(), other.at(self.ids)
        # p log(p / q) + q - p is never negative and forgives what rounding takes from the sum of p
        kept = (p.exp() * (p - q) + q.exp() - p.exp()).sum(-1)
        if not self.tail_ids.shape[1]:
            return kept.clamp_min(0)
        mass, theirs = self.tail_mass, (1 - q.exp().sum(-1)).clamp_min(1e-30)
        bucket = torch.xlogy(mass, mass / theirs) + theirs - mass
        known = (kept + bucket).clamp_min(0)
        d = self.tail_log_probs.double() - mass.clamp_min(1e-30).log()[:, None]
        d -= other.at(self.tail_ids) - theirs.log()[:, None]
        return known + mass * _mean_inside(d, mass).clamp_min(0)

    def is_of(self, exact: Prediction) -> bool:
        """Whether these are the predictions `exact`, as far as float32 sums in another order may differ."""
        pairs = ((self.log_probs, exact.at(self.ids)), (self.tail_log_probs, exact.at(self.tail_ids)))
        return all(bool(((a.double() - b).abs() <= TOLERANCE).all()) for a, b in pairs)


def _mean_inside(d: Tensor, mass: Tensor) -> Tensor:
    """KL between the two tails from samples d [n, s] of log p - log q under p, float64 [n].

    q / p - 1 has the mean zero, so any multiple of it may be added. The multiple of least variance is near one where
    the models are close (the sum is then the never negative d + exp(-d) - 1) and falls where q / p is wild.
    """
    excess = (-d).clamp_max(50).expm1()
    d_off, off = d - d.mean(-1, keepdim=True), excess - excess.mean(-1, keepdim=True)
    weight = mass.square()[:, None]
    variance = (weight * off.square()).sum()
    share = -(weight * d_off * off).sum() / variance if variance > 0 else torch.ones(())
    return (d + share.clamp(0, 1) * excess).mean(-1)


def compress(exact: Prediction, targets: Tensor, seed: int) -> Compressed:
    """Keep the top and a sample of the tail; `seed` decides what is drawn."""
    count, vocab = exact.logits.shape
    k, samples = min(TOP, vocab), 0 if vocab <= TOP else SAMPLES
    random = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, count, ROWS):
        p = exact.rows(start, start + ROWS)
        top, ids = p.topk(k)
        tail = p.exp().scatter_(1, ids, 0.0)
        running = tail.cumsum(-1)
        begin = torch.rand(len(p), 1, generator=random, dtype=torch.float64)
        wanted = (torch.arange(samples) + begin) / max(samples, 1) * running[:, -1:]
        drawn = torch.searchsorted(running, wanted, right=True).clamp_max(vocab - 1)
        parts.append((ids, top.float(), drawn, p.gather(1, drawn).float(), running[:, -1]))
    ids, top, drawn, found, mass = (torch.cat(column) for column in zip(*parts, strict=True))
    return Compressed(ids, top, drawn, found, mass, exact.best, exact.targets(targets).float())


class ReferenceCache:
    """The cached predictions of one reference model."""

    def __init__(self, source: Source, folder: Path | None = None, max_bytes: int = MAX_BYTES) -> None:
        self.folder = folder or store.cache_dir() / "references"
        self.max_bytes = max_bytes
        self.vocab: int = source.args.vocab_size
        self._files = store.content_files(source.path)
        self._stamp = store.stamp(self._files)
        self._model = _fingerprint(self._files)

    def path(self, window: Tensor) -> Path:
        """Where the predictions on a window int64 [w] lie, or would."""
        text = json.dumps([VERSION, TOP, SAMPLES, __version__, window.tolist()])
        return self.folder / f"{self._model[:24]}-{hashlib.sha256(text.encode()).hexdigest()[:40]}{SUFFIX}"

    def has(self, window: Tensor) -> bool:
        """Whether a file of the name is there; `read` decides whether it is any good."""
        return self.path(window).is_file()

    def touch(self, window: Tensor) -> None:
        """Make a window's file, where there is one, the last to be removed."""
        with suppress(OSError):
            os.utime(self.path(window))

    def read(self, window: Tensor, positions: int) -> Compressed | None:
        """The predictions at the scored `positions` of a window; None where there are none that can be trusted."""
        file = self.path(window)
        wanted = _layout(positions, self.vocab)
        limit = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in wanted.values()) + 4096
        try:
            # a pipe or a device would block, a file of another size is not ours
            if not file.is_file() or file.stat().st_size > limit:
                return None
            with safe_open(file, framework="pt") as opened:
                noted = opened.metadata() or {}
                if set(opened.keys()) != set(wanted):
                    return None
                parts = {name: opened.get_tensor(name) for name in wanted}
        except (OSError, SafetensorError, ValueError):
            return None
        if any((t.dtype, tuple(t.shape)) != wanted[name] for name, t in parts.items()):
            return None
        if noted.get("fewbit") != file.stem or noted.get("sha256") != _digest(parts.values()):
            return None
        found = Compressed(**{name: t.long() if "ids" in name or name == "best" else t for name, t in parts.items()})
        if not _is_sane(found, self.vocab):
            return None
        # the oldest are removed first, and this one was just of use
        with suppress(OSError):
            os.utime(file)
        return found

    def write(self, window: Tensor, exact: Prediction, targets: Tensor) -> bool:
        """Keep the predictions on a window; False where that can't be done, which costs no more than time."""
        if store.stamp(self._files) != self._stamp:
            # the files changed after they were hashed: what was loaded may not be what the name says
            return False
        file = self.path(window)
        kept = compress(exact, targets, seed=int(file.stem[-12:], 16))
        kinds = _layout(len(targets), self.vocab)
        parts = {f.name: getattr(kept, f.name).to(kinds[f.name][0]).contiguous() for f in fields(kept)}
        data = save(parts, metadata={"fewbit": file.stem, "sha256": _digest(parts.values())})
        beside = self.folder / f".{secrets.token_hex(8)}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(data)
            beside.replace(file)
            self.trim()
        except OSError:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            return False
        return True

    def trim(self) -> None:
        """Remove what killed processes left, and the files not used for longest, until the folder is small enough."""
        for left in self.folder.glob(".*.part"):
            with suppress(OSError):
                if left.stat().st_mtime < time.time() - STALE_SECONDS:
                    left.unlink()
        found = []
        for file in self.folder.glob(f"*{SUFFIX}"):
            with suppress(OSError):
                facts = file.lstat()
                found.append((facts.st_mtime_ns, facts.st_size, file))
        size = sum(nbytes for _, nbytes, _ in found)
        for _, nbytes, file in sorted(found):
            if size <= self.max_bytes:
                break
            with suppress(OSError):
                file.unlink()
                size -= nbytes


def _layout(count: int, vocab: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor of a file."""
    k, samples = min(TOP, vocab), 0 if vocab <= TOP else SAMPLES
    token = torch.uint16 if vocab <= 1 << 16 else torch.int32
    return {
        "ids": (token, (count, k)),
        "log_probs": (torch.float32, (count, k)),
        "tail_ids": (token, (count, samples)),
        "tail_log_probs": (torch.float32, (count, samples)),
        "tail_mass": (torch.float64, (count,)),
        "best": (token, (count,)),
        "target_log_probs": (torch.float32, (count,)),
    }


def _is_sane(found: Compressed, vocab: int) -> bool:
    """Ids of the vocabulary, log-probabilities of at most 0, a mass from 0 to 1: what follows indexes with them."""
    ids = (found.ids, found.tail_ids, found.best)
    logs = (found.log_probs, found.tail_log_probs, found.target_log_probs)
    return (
        all(not t.numel() or (int(t.min()) >= 0 and int(t.max()) < vocab) for t in ids)
        and all(bool((t.isfinite() & (t <= 1e-6)).all()) for t in logs)
        and bool(((found.tail_mass >= 0) & (found.tail_mass <= 1 + 1e-9)).all())
    )


def _digest(parts: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in parts:
        found.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _fingerprint(files: list[Path]) -> str:
    """SHA-256 over every byte of the files: sizes and times would let a changed model pass for the old one."""
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            found.update(hashlib.file_digest(opened, "sha256").digest() + file.name.encode())
    return found.hexdigest()
