"""A GGUF file, as llama.cpp and Ollama load it: every tensor in one of ggml's types, metadata, tokenizer.

A full-precision model is rounded to the type by fewbit's own search. Of a quantized one codes are kept where the type
can say them (a symmetric int4 of any group of whole blocks is q4_0, int8 is q8_0), and are rounded a second time,
which is told, where it can't.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import fewbit
from fewbit import store
from fewbit.checkpoint._gguf_writer import GgufTensor, GgufWriter, Value
from fewbit.checkpoint._writer import Planned
from fewbit.errors import FewbitError
from fewbit.exports import Summary, _gguf_metadata, _gguf_tokens
from fewbit.exports._ggml_mapping import keeps_codes, mapped
from fewbit.formats import parse
from fewbit.lookup import advice
from fewbit.methods import Target, rtn
from fewbit.models import WeightInfo
from fewbit.qtensor import QTensor
from fewbit.source import FLOATS, Source
from fewbit.walk import Progress, quantized

LAYOUT = "gguf"
# type -> (spec, general.file_type): llama_ftype of llama.h
TYPES = {
    "f32": ("f32", 0), "f16": ("f16", 1), "bf16": ("bf16", 32),
    "q4_0": ("gguf:q4_0", 2), "q4_1": ("gguf:q4_1", 3), "q5_0": ("gguf:q5_0", 8), "q5_1": ("gguf:q5_1", 9),
    "q8_0": ("gguf:q8_0", 7), "q4_k": ("gguf:q4_k", 14), "q5_k": ("gguf:q5_k", 16), "q6_k": ("gguf:q6_k", 18),
}  # fmt: skip
# what llama.cpp takes where rows are no whole blocks of 256
FALLBACK = {"gguf:q4_k": "gguf:q5_0", "gguf:q5_k": "gguf:q5_1", "gguf:q6_k": "gguf:q8_0"}
# of the layout in which the types are stored
QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class _Part:
    """One canonical tensor and where it goes: a tensor of the file, or one expert's matrix of a stack."""

    weight: WeightInfo
    name: str
    spec: str


@dataclass
class _Told:
    """What became of the values."""

    twice: Counter[tuple[str, str]] = field(default_factory=Counter)
    halves: int = 0
    changed: int = 0
    cast: int = 0
    inexact: bool = False

    @property
    def exact(self) -> bool:
        """Whether every weight has the value it has in the source."""
        return not (self.inexact or self.changed or self.cast)

    def notes(self) -> list[str]:
        """In words."""
        found = [
            f"{count} tensors are rounded twice: {stored} to {spec.removeprefix('gguf:')}"
            for (stored, spec), count in self.twice.items()
        ]
        if self.changed:
            found.append(f"codes are kept; {self.changed:,} of {self.halves:,} scales and minima are rounded to f16")
        if self.cast:
            found.append(f"{self.cast:,} weights changed when they were cast to 16 bits of another kind")
        return found


def write(
    source: Source,
    out: Path,
    type: str | None,  # noqa: A002
    head: str | None,
    progress: Progress,
    note: Callable[[str], None],
) -> Summary:
    """Write `source` to the file `out`; see `fewbit.exports.export`."""
    spec, file_type = _type(type or _default(source))
    head_spec = _type(head)[0] if head else _head(source, spec)
    described, small, notes = _gguf_metadata.describe(source)
    parts = _plan(source, spec, head_spec)
    notes += _fallbacks(parts, spec, head_spec)
    for text in notes:
        note(text)
    tokens = _gguf_tokens.metadata(source.checkpoint.tokenizer(), source.args.vocab_size, source.config)
    facts = source.checkpoint.facts()
    tensors = _tensors(parts, small)
    told = _Told()
    with GgufWriter(out, _general(source, file_type, facts) | described | tokens, tensors) as writer:
        total, done = sum(torch.Size(p.weight.shape).numel() for p in parts), 0
        for name, factors in small.items():
            writer.write(name, factors.float())
        for p in parts:
            progress(done, total, p.name)
            for piece in _pieces(source, p, told):
                writer.write(p.name, piece)
            done += torch.Size(p.weight.shape).numel()
    specs = Counter(t.spec for t in tensors)
    return Summary(
        str(out), LAYOUT, spec.removeprefix("gguf:"), str(facts.get("method", "none")), store.title(source.path),
        told.exact, out.stat().st_size, source.checkpoint.weight_bytes(), dict(specs), notes + told.notes(),
    )  # fmt: skip


def _type(name: str) -> tuple[str, int]:
    if name.lower() not in TYPES:
        raise FewbitError(
            f"fewbit writes no GGUF type {name!r}.", f"Known: {', '.join(TYPES)}.", advice(name.lower(), list(TYPES))
        )
    return TYPES[name.lower()]


def _default(source: Source) -> str:
    """The smallest type that says what a quantized model holds; q4_k for one in full precision."""
    stored = {(source.spec(w.name), w.shape[1]) for w in source.weights if w.role == "linear"}
    for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"):
        if all(keeps_codes(s, TYPES[name][0], columns) for s, columns in stored):
            return name
    if len({s for s, _ in stored}) == 1 and (only := next(iter(stored))[0]).removeprefix("gguf:") in TYPES:
        return "q4_k" if only in FLOATS else only.removeprefix("gguf:")
    return "q4_k"


def _head(source: Source, spec: str) -> str:
    """Embedding and head: as the rest in 16 bits and more; else q8_0 where that keeps their codes, and q6_k."""
    if spec in FLOATS:
        return spec
    ends = [w for w in source.weights if w.role in ("embedding", "head")]
    quantized_ends = all(source.spec(w.name) not in FLOATS for w in ends)
    if spec == "gguf:q8_0" or (
        quantized_ends and all(keeps_codes(source.spec(w.name), "gguf:q8_0", w.shape[1]) for w in ends)
    ):
        return "gguf:q8_0"
    return "gguf:q6_k"


def _plan(source: Source, spec: str, head: str) -> list[_Part]:
    """Every tensor with its name and type, stacks of experts together."""
    places = _places(source)
    found = []
    for w in source.weights:
        wanted = spec if w.role == "linear" else head if w.role in ("embedding", "head") else "f32"
        found.append(_Part(w, places[w.name], _fitting(wanted, w.shape[-1])))
    # a stack is written in one go
    first = {p.name: i for i, p in reversed(list(enumerate(found)))}
    return sorted(found, key=lambda p: first[p.name])


def _places(source: Source) -> dict[str, str]:
    """Canonical name -> ggml's."""
    module = source.module if hasattr(source.module, "GGUF") else None
    if module is None:
        from fewbit.models import find_gguf_model

        module = find_gguf_model({"general.architecture": _gguf_metadata.architecture(source)})
    found: dict[str, str] = {}
    for theirs, ours in module.GGUF.items():
        blocks = range(source.args.num_hidden_layers) if "{}" in theirs else range(1)
        for i in blocks:
            name, canonical = theirs.replace("{}", str(i), 1), ours.replace("{}", str(i), 1)
            if "{}" in canonical:
                found |= {canonical.format(e): name for e in range(source.args.experts)}
            else:
                found[canonical] = name
    return found


def _fitting(spec: str, columns: int) -> str:
    """The type itself where rows are whole blocks of it, else what llama.cpp falls back to."""
    if parse(spec).accepts((1, columns)):
        spec = FALLBACK.get(spec, spec)
    return "f16" if parse(spec).accepts((1, columns)) else spec


def _fallbacks(parts: list[_Part], spec: str, head: str) -> list[str]:
    """Which tensors are of another type than was asked for, in words."""
    found: Counter[tuple[str, str, int]] = Counter()
    for p in parts:
        wanted = spec if p.weight.role == "linear" else head
        if p.weight.role in ("linear", "embedding", "head") and p.spec != wanted:
            found[wanted, p.spec, p.weight.shape[-1]] += 1
    return [
        f"{count} tensors of {columns:,} columns, no whole blocks of {wanted.removeprefix('gguf:')}, are "
        f"{got.removeprefix('gguf:')}, as llama.cpp would have them"
        for (wanted, got, columns), count in found.items()
    ]


def _tensors(parts: list[_Part], small: dict[str, Tensor]) -> list[GgufTensor]:
    """The file's tensors in the order they are written in."""
    found = [GgufTensor(name, "f32", tuple(t.shape)) for name, t in small.items()]
    members: dict[str, list[_Part]] = {}
    for p in parts:
        members.setdefault(p.name, []).append(p)
    for name, stack in members.items():
        shape = stack[0].weight.shape
        # ggml's name says that it is a stack, even of one expert
        found.append(GgufTensor(name, stack[0].spec, (len(stack), *shape) if "_exps." in name else shape))
    return found


def _general(source: Source, file_type: int, facts: dict[str, object]) -> dict[str, Value]:
    """Who made what of which model."""
    found: dict[str, Value] = {
        "general.type": "model",
        "general.name": str(facts.get("source") or store.title(source.path)),
        "general.file_type": file_type,
        "general.quantization_version": QUANTIZATION_VERSION,
        "fewbit.version": fewbit.__version__,
    }
    found |= {f"fewbit.{key}": str(facts[key]) for key in ("format", "method", "source") if facts.get(key)}
    return found


def _pieces(source: Source, p: _Part, told: _Told) -> Iterator[Tensor]:
    """The stored bytes of a tensor, in slices of rows where its rows stay in order."""
    order = _order(source, p.weight.name)
    made = _stored(source, p, told)
    if order is None:
        for q in made:
            yield next(iter(q.parts.values()))
        return
    rows = torch.cat([next(iter(q.parts.values())) for q in made])
    yield rows[order]


def _order(source: Source, name: str) -> Tensor | None:
    """Row order of ggml's tensor: the inverse of what reading it does."""
    module = source.module
    if not hasattr(module, "gguf_rows"):
        from fewbit.models import find_gguf_model

        module = find_gguf_model({"general.architecture": _gguf_metadata.architecture(source)})
    found = module.gguf_rows(name, source.args)
    return None if found is None else torch.argsort(found)


def _stored(source: Source, p: _Part, told: _Told) -> Iterator[QTensor]:
    """The tensor in its type: codes kept, cast, or rounded."""
    w, stored = p.weight, source.spec(p.weight.name)
    if w.role == "norm" and source.args.norm_offset:
        q = source.read(w.name)
        yield QTensor("f32", q.shape, {"weight": parse(q.spec).dequantize(q) + source.args.norm_offset})
        return
    if stored not in FLOATS and keeps_codes(stored, p.spec, w.shape[-1]):
        q = source.read(w.name)
        if "g_idx" not in q.parts:
            found = mapped(q, p.spec)
            told.halves += found.halves
            told.changed += found.changed
            yield found.q
            return
    if stored in FLOATS and p.spec in FLOATS:
        yield from _cast(source, p, told)
        return
    told.inexact = True
    if stored not in FLOATS:
        told.twice[stored, p.spec] += 1
    # the search minds an error in a weight by its size, as rounding to nearest does everywhere in fewbit
    yield from quantized(source, Planned(w.name, p.spec, w.shape), rtn, Target(torch.float16))


def _cast(source: Source, p: _Part, told: _Told) -> Iterator[QTensor]:
    """Floating point in another dtype, and how many numbers that changed."""
    start = 0
    for q in quantized(source, Planned(p.weight.name, p.spec, p.weight.shape), rtn, Target(torch.float16)):
        if source.spec(p.weight.name) != p.spec:
            rows = (start, start + len(q.parts["weight"])) if len(p.weight.shape) > 1 else None
            before = source.read(p.weight.name, rows).parts["weight"]
            told.cast += int((before.float() != q.parts["weight"].float()).sum())
            start += len(q.parts["weight"])
        yield q
