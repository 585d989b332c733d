"""Quantize to a size: what bits are worth is measured, bits are chosen, written, and judged beside one format."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit import store
from fewbit.allocation import Allocation, Choice, Item, allocate
from fewbit.blocks import fast_product
from fewbit.calibration import collect as collect_windows
from fewbit.checkpoint._writer import Planned, file_bytes
from fewbit.curve import Curve, fitted
from fewbit.errors import FewbitError
from fewbit.judge import Verdict, judge
from fewbit.methods import Target, gptq, silent
from fewbit.quantizer import Options, Summary, quantize
from fewbit.rates import Config, Joint, Meter, Part
from fewbit.source import FLOATS, Source, open_source
from fewbit.tokenizer import Tokenizer
from fewbit.walk import Progress, device_of, identity

# what a matrix may become; zero points win back more than they take at few bits
SPECS = (
    "int2g64a", "int2g32a", "int3g128a", "int3g64a", "int3g32a", "int4g128a", "int4g64a", "int4g32a",
    "int5g64a", "int6g64", "int8",
)  # fmt: skip
# where the method is run to know them all
ANCHORS = ("int2g64a", "int3g64a", "int4g64a", "int6g64")
# of the calibration text: the first windows are to measure parts on, the last to judge whole models on
MEASURED, HELD_OUT = 24, 24
# counted up when what is kept, or how it is measured, changes
VERSION = 1
LENGTH = 512


@dataclass(frozen=True)
class Fitted:
    """What was written, and why. `mixed` and `uniform` are verdicts on text held out, where there was something to
    compare; `uniform_spec` is the best single format of the size, `kept` says which of the two it is.
    """

    summary: Summary
    budget: int
    predicted: float
    kept: str
    uniform_spec: str | None
    mixed: Verdict | None = None
    uniform: Verdict | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Choices:
    """What a size leads to, before anything is written."""

    mixed: Allocation
    uniform: str | None
    curve: Curve

    @property
    def predicted(self) -> float:
        """The divergence of the mixture in nats a token."""
        return self.curve.predicted(self.mixed.loss)


def fit(
    model: str | Path,
    out: str | Path,
    *,
    size: int | None = None,
    bits_per_weight: float | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
    **options: Any,
) -> Fitted:
    """Quantize `model` into the new folder `out`, its weight files at most `size` bytes together.

    bits_per_weight  the size as bits for each weight of all matrices, instead
    options          those of `quantize` but format, head and recipe
    The mixture is judged beside the best single format of that size on calibration text that neither was made with, and
    what diverges less is kept. Raises FewbitError, with the smallest size that works where this one does not.
    """
    told, say = progress or _quiet, note or silent
    source, out = open_source(model), Path(out)
    budget = _budget(source, size, bits_per_weight)
    device = device_of(options.get("device", "auto"))
    windows = _windows(source, options.get("calibration"), options.get("windows"), options.get("length"))
    parts, joints = measure(source, device, windows, told)
    found = choose(source, parts, fitted(parts, joints), budget)
    say(f"chosen for {budget / 1e6:.1f} MB: {_census(parts, found.mixed)}; predicted KL {found.predicted:.4f}")
    known = {field.name for field in fields(Options)}
    if any(m.NEEDS for m in Options(**{k: v for k, v in options.items() if k in known}).modules):
        # what is judged on is not calibrated on
        options["windows"] = len(windows) - HELD_OUT
    else:
        options = {k: v for k, v in options.items() if k not in ("calibration", "windows")}

    def write(folder: Path, picks: dict[str, Choice]) -> Summary:
        return _write(model, parts, folder, picks, progress=progress, note=note, **options)

    summary = write(out, found.mixed.picks)
    if found.uniform is None:
        say("no single format is that small: nothing to compare with")
        return Fitted(summary, budget, found.predicted, "mixed", None)
    if all(choice.spec == found.uniform for choice in found.mixed.picks.values()):
        return Fitted(summary, budget, found.predicted, "uniform", found.uniform)
    other = out.with_name(f".{out.name}.uniform")
    shutil.rmtree(other, ignore_errors=True)
    try:
        rival = write(other, dict.fromkeys(found.mixed.picks, Choice(found.uniform, 0, 0.0)))
        mixed, uniform = _judged(source, [out, other], windows[-HELD_OUT:], device, told)
        better = mixed.kl <= uniform.kl
        say(
            f"measured on text held out: mixed {mixed.kl:.4f} ± {mixed.error:.4f}, {found.uniform} everywhere "
            f"{uniform.kl:.4f} ± {uniform.error:.4f}: {'the mixture' if better else 'the single format'} is kept"
        )
        if not better:
            _exchange(other, out)
            summary = replace(rival, path=str(out))
            store.remember(out, summary.to_dict())
    finally:
        shutil.rmtree(other, ignore_errors=True)
    kept = "mixed" if better else "uniform"
    return Fitted(summary, budget, found.predicted, kept, found.uniform, mixed, uniform)


def choose(source: Source, parts: list[Part], curve: Curve, budget: int) -> Choices:
    """The best mixture, and the best single format, whose weight files take at most `budget` bytes."""
    items = [curve.weighted(part) for part in parts]
    allowed = budget - (_file_bytes(source, parts, None) - sum(item.least for item in items))
    while True:
        found = allocate(items, allowed)
        over = _file_bytes(source, parts, found.picks) - budget
        if over <= 0:
            break
        # what the files say of themselves grows with the number of formats
        allowed -= over
    fitting = []
    for k, spec in enumerate(c.spec for c in items[0].choices):
        picks = {item.name: item.choices[k] for item in items}
        if _file_bytes(source, parts, picks) <= budget:
            fitting.append((sum(c.loss for c in picks.values()), spec))
    return Choices(found, min(fitting)[1] if fitting else None, curve)


def _file_bytes(source: Source, parts: list[Part], picks: dict[str, Choice] | None) -> int:
    """Of the weight files with these choices; None: the smallest of each."""
    specs: dict[str, str] = {}
    for part in parts:
        pick = picks[part.name] if picks is not None else min(part.item.choices, key=lambda c: c.nbytes)
        specs |= dict.fromkeys(part.tensors, pick.spec)
    sixteen = next(s for s, d in FLOATS.items() if d == source.dtype)

    def spec(name: str) -> str:
        stored = source.spec(name)
        return specs.get(name, stored if stored in FLOATS else sixteen)

    return file_bytes([Planned(w.name, spec(w.name), w.shape) for w in source.weights], source.dtype)


def _budget(source: Source, size: int | None, bits_per_weight: float | None) -> int:
    if size is not None:
        return size
    if bits_per_weight is None:
        raise ValueError("fit wants a size or bits per weight")
    weights = sum(torch.Size(w.shape).numel() for w in source.weights if w.role in ("linear", "embedding", "head"))
    return int(weights * bits_per_weight / 8)


def _census(parts: list[Part], found: Allocation) -> str:
    """Such as `int4g64a 61 %, int6g64 39 %` of the weights' bytes."""
    total: dict[str, int] = {}
    for part in parts:
        pick = found.picks[part.name]
        total[pick.spec] = total.get(pick.spec, 0) + pick.nbytes
    ordered = sorted(total.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{spec} {100 * count / found.nbytes:.0f} %" for spec, count in ordered)


def _write(model: str | Path, parts: list[Part], out: Path, picks: dict[str, Choice], **options: Any) -> Summary:
    table = {name: picks[part.name].spec for part in parts for name in part.tensors}
    inside = [picks[part.name] for part in parts if part.inside]
    # the method goes by the format that most of the blocks' bytes have
    total: dict[str, int] = {}
    for choice in inside:
        total[choice.spec] = total.get(choice.spec, 0) + max(1, choice.nbytes)
    usual = max(total, key=lambda spec: total[spec])
    return quantize(model, out, format=usual, head="16bit", recipe=table, **options)


def _judged(
    source: Source, outs: list[Path], windows: Tensor, device: torch.device, progress: Progress
) -> list[Verdict]:
    total = sum(torch.Size(w.shape).numel() for w in source.weights)
    return judge(
        source, [open_source(out) for out in outs], windows, device, fast_product(source, device),
        lambda text, share: progress(int(share * total), total, text),
    )  # fmt: skip


def _exchange(better: Path, out: Path) -> None:
    """`better` takes the place of `out`; at every moment one of them lies there whole or beside it."""
    aside = out.with_name(f".{out.name}.mixed")
    shutil.rmtree(aside, ignore_errors=True)
    out.rename(aside)
    better.rename(out)
    shutil.rmtree(aside, ignore_errors=True)


def _windows(
    source: Source, calibration: str | None = None, count: int | None = None, length: int | None = None
) -> Tensor:
    """int64 [n, length]: those the method calibrates on, and HELD_OUT more. FewbitError where the text is too short."""
    tokenizer = Tokenizer(source.checkpoint.tokenizer())
    length = length or min(source.args.max_position_embeddings, LENGTH)
    found = collect_windows(calibration, tokenizer, None if count is None else count + HELD_OUT, length).windows
    if len(found) < 2 * HELD_OUT:
        raise FewbitError(
            "The calibration text is too short to choose bits by.",
            f"It has {len(found)} windows of {length} tokens; {2 * HELD_OUT} are the least.",
            "Give a longer text, or leave --calibration out: fewbit has one.",
        )
    return found


def measure(
    source: Source, device: torch.device, windows: Tensor, progress: Progress
) -> tuple[list[Part], list[Joint]]:
    """What `source` loses by part and spec, and the divergences of a few configurations; kept for the next size."""
    product = fast_product(source, device)
    kept = _kept_file(source, windows)
    if (found := _read(kept)) is not None:
        return found
    total = sum(torch.Size(w.shape).numel() for w in source.weights)
    target = Target(source.dtype, effort=0)
    meter = Meter(
        source, gptq, target, device, product, lambda text, share: progress(int(share * total), total, text), ANCHORS
    )
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".measuring-", dir=kept.parent) as folder:
        found = meter.measure(windows[:MEASURED], SPECS, Path(folder), windows[-HELD_OUT:], configurations(source))
    _keep(kept, *found)
    return found


def configurations(source: Source) -> list[Config]:
    """One format for all, and mixtures that tell apart what blocks and ends cost, and what many bits lost cost."""
    ends = frozenset(w.name for w in source.weights if w.block is None)
    few, fair, many = ANCHORS[1:]
    uniform = [partial(_ends, ends, spec, spec) for spec in (few, fair, many)]
    mixed = [partial(_ends, ends, *pair) for pair in ((few, many), (many, few), (many, fair))]
    return [*uniform, *mixed]


def _ends(ends: frozenset[str], outside: str, inside: str, name: str) -> str:
    return outside if name in ends else inside


def _kept_file(source: Source, windows: Tensor) -> Path:
    """Named by all that decides what is measured."""
    facts = [VERSION, identity(source), SPECS, ANCHORS, hashlib.sha256(windows.numpy().tobytes()).hexdigest()]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    return store.cache_dir() / "rates" / f"{name}.json"


def _keep(file: Path, parts: list[Part], joints: list[Joint]) -> None:
    content = {"parts": [asdict(part) for part in parts], "joints": [asdict(joint) for joint in joints]}
    beside = file.with_suffix(".new")
    beside.write_text(json.dumps(content), encoding="utf-8")
    beside.replace(file)


def _read(file: Path) -> tuple[list[Part], list[Joint]] | None:
    """What `_keep` wrote; None where it is not there or is something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        parts = [Part(p["name"], tuple(p["tensors"]), _item(p["item"]), bool(p["inside"])) for p in content["parts"]]
        return parts, [Joint(j["picks"], float(j["kl"])) for j in content["joints"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _item(found: dict[str, Any]) -> Item:
    choices = (Choice(c["spec"], int(c["nbytes"]), float(c["loss"])) for c in found["choices"])
    return Item(found["name"], tuple(choices))


def _quiet(done: int, total: int, doing: str) -> None:
    """Nobody watches."""
