"""What the exports to folders share: which tensor becomes what, and the writing.

Quantized linears are spelled anew without touching a code; embedding and head are written in 16 bits, since no engine
takes them quantized; norms and biases stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import fewbit
from fewbit import companions, store
from fewbit.checkpoint._writer import Planned, Writer
from fewbit.errors import FewbitError
from fewbit.exports import _limits
from fewbit.formats import parse
from fewbit.formats._bitstream import unpack_rows
from fewbit.formats.integer import IntegerFormat
from fewbit.methods import Target, rtn
from fewbit.models import WeightInfo
from fewbit.qtensor import QTensor
from fewbit.source import FLOATS, Source
from fewbit.walk import Progress, identity, quantized


@dataclass(frozen=True)
class Written:
    """What an export did to the tensors: how many of each spec, and what became of their values, in words."""

    specs: dict[str, int]
    exact: bool
    notes: list[str]


def zero_points(q: QTensor) -> Tensor:
    """uint8 [N, G]; the middle code where the format has none."""
    fmt, scale = parse(q.spec), q.parts["scale"]
    if not isinstance(fmt, IntegerFormat):
        raise TypeError(q.spec)
    if not fmt.asymmetric:
        return torch.full(scale.shape, 1 << (fmt.bits - 1), dtype=torch.uint8)
    return unpack_rows(q.parts["zero"].t().contiguous(), fmt.bits, q.shape[0]).t().contiguous()


def half_scales(name: str, q: QTensor) -> Tensor:
    """Scales f16 [N, G]; FewbitError where one is too large."""
    scale = q.parts["scale"]
    half = scale.half()
    if not bool(half.isfinite().all()):
        raise FewbitError(
            "The model's scales are too large for this layout.",
            f"{name} has scales up to {float(scale.float().abs().max()):g}; they are stored in f16, up to 65504.",
            "Export to compressed-tensors, which keeps bf16 scales.",
        )
    return half


def plan(source: Source, target: ModuleType, spec: str | None) -> list[Planned]:
    """Every tensor as it will be written; `spec` is the linears' where they are to be quantized, None keeps theirs."""
    sixteen = next(s for s, d in FLOATS.items() if d == source.dtype)
    return [_planned(w, target, sixteen, source, spec) for w in source.weights]


def _planned(w: WeightInfo, target: ModuleType, sixteen: str, source: Source, spec: str | None) -> Planned:
    stored = source.spec(w.name)
    if w.role == "linear":
        found = spec or stored
        kind = target.Packed if isinstance(parse(found), IntegerFormat) else Planned
        planned: Planned = kind(w.name, found, w.shape)
        return planned
    if w.role in ("embedding", "head") or stored not in FLOATS:
        return Planned(w.name, sixteen, w.shape)
    return Planned(w.name, stored, w.shape)


def check(source: Source, target: ModuleType, engine: str, tensors: list[Planned]) -> None:
    """FewbitError where `engine` would not load the folder, before anything is written."""
    roles = {w.name: w.role for w in source.weights}
    linears = [t for t in tensors if roles[t.name] == "linear"]
    _limits.check(target.LAYOUT, engine, linears)
    if not getattr(target, "SCATTERED", False) and (name := _scattered(source, linears)):
        raise FewbitError(
            f"A {target.LAYOUT} folder can't hold this model.",
            f"{name} has groups of scattered columns (activation order), which engines refuse in that layout.",
            "The nearest that works: --to gptq.",
        )


def _scattered(source: Source, linears: list[Planned]) -> str | None:
    """The first matrix whose groups are scattered columns; only other tools write such."""
    if source.checkpoint.facts() or source.checkpoint.naming == "gguf":
        return None
    packed = (t for t in linears if isinstance(parse(source.spec(t.name)), IntegerFormat))
    return next((t.name for t in packed if "g_idx" in source.read(t.name).parts), None)


def write(source: Source, target: ModuleType, tensors: list[Planned], out: Path, progress: Progress) -> Written:
    """Write the folder; the linears are quantized already."""
    linears = {w.name for w in source.weights if w.role in ("linear", "head")}
    more: dict[str, Any] = {}
    if getattr(target, "SCATTERED", False):
        more["scattered"] = _scattered(source, [t for t in tensors if isinstance(t, target.Packed)]) is not None
    known = source.checkpoint.facts()
    facts = {k: v for k, v in known.items() if k not in ("specs", "export", "exported_from")}
    facts = {"version": fewbit.__version__, **facts, "export": target.LAYOUT, "exported_from": store.title(source.path)}
    rounding = _Rounding()
    total, done = sum(torch.Size(t.shape).numel() for t in tensors), 0
    with Writer(out, tensors, source.dtype, facts, facts | {"source_files": identity(source)}) as writer:
        companions.write(writer, source, target.settings(tensors, linears, **more))
        for t in tensors:
            progress(done, total, t.name)
            writer.write(t, rounding.pieces(source, t, half=target.LAYOUT != "compressed-tensors"))
            done += torch.Size(t.shape).numel()
        writer.commit("all", tensors)
    return Written(dict(Counter(t.spec for t in tensors)), not rounding.notes, rounding.told())


class _Rounding:
    """Hands tensors on and keeps count of what was rounded once more."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.scales = self.changed = 0

    def pieces(self, source: Source, planned: Planned, half: bool) -> Iterator[QTensor]:
        """A tensor as it is stored, or cast."""
        stored = source.spec(planned.name)
        if isinstance(planned.format, IntegerFormat):
            q = source.read(planned.name)
            scale = q.parts["scale"]
            if half:
                self.scales += scale.numel()
                self.changed += int((scale.half().float() != scale.float()).sum())
            elif scale.dtype != source.dtype:
                q = QTensor(q.spec, q.shape, q.parts | {"scale": scale.to(source.dtype)})
                self.scales += scale.numel()
                self.changed += int((q.parts["scale"].float() != scale.float()).sum())
            yield q
            return
        if stored != planned.spec and (stored, planned.spec) not in (("f16", "f32"), ("bf16", "f32")):
            self.notes.append(f"{planned.name} was {stored} and is rounded to {planned.spec}")
        yield from quantized(source, planned, rtn, Target(source.dtype))

    def told(self) -> list[str]:
        """What was rounded, in words."""
        if self.changed:
            self.notes.append(f"{self.changed:,} of {self.scales:,} scales are rounded to 16 bits of another kind")
        return self.notes
