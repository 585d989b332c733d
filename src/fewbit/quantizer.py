"""The walk: a checkpoint's tensors one after the other, each quantized by its recipe and written as it goes.

Peak memory is about one matrix in float32; embedding and head are walked in slices of rows.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import fewbit
from fewbit import store
from fewbit.checkpoint._writer import Planned, Writer, quantization_config
from fewbit.errors import FewbitError
from fewbit.formats import parse
from fewbit.lookup import find
from fewbit.methods import Target
from fewbit.models import WeightInfo
from fewbit.qtensor import QTensor
from fewbit.source import FLOATS, Source, describe, open_source

Progress = Callable[[int, int, str], None]

# rows of one slice hold about this many weights; a multiple of 32 rows keeps packed zero points whole
SLICE_WEIGHTS = 1 << 24


@dataclass(frozen=True)
class Summary:
    """What a quantization wrote."""

    path: str
    format: str
    method: str
    head: str
    seconds: float
    weight_bytes: int
    source_bytes: int
    float16_bytes: int
    bits_per_weight: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Recipe:
    """Which spec each tensor gets: `format` for the linears of the blocks, `head` for embedding and output head.

    `sixteen` is what 16 bits mean for the model: f16 or bf16.
    """

    format: str
    head: str
    sixteen: str

    def spec(self, w: WeightInfo, stored: str) -> str:
        """The spec of a tensor; norms and biases stay as they are `stored`."""
        if w.role == "linear":
            return self.format
        if w.role in ("embedding", "head"):
            return self.sixteen if self.head == "16bit" else self.head
        return stored if stored in FLOATS else self.sixteen


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    format: str = "int4g64",  # noqa: A002
    method: str = "rtn",
    head: str = "int8",
    scales: str = "search",
    progress: Progress | None = None,
) -> Summary:
    """Quantize `model` (alias, folder or GGUF file) into the new folder `out`.

    format  spec of the linears, such as `int4g64`; method  a module of `fewbit.methods`; head  spec of embedding and
    output head, or `16bit`; scales  `search` (least squared error) or `minmax` (textbook).
    Nothing is left behind if it fails. Raises FewbitError.
    """
    start = time.perf_counter()
    chosen = find("fewbit.methods", method)
    if scales not in ("search", "minmax"):
        raise FewbitError(f"There is no {scales!r} for scales.", "Known: search, minmax.", "Use --scales search.")
    for spec in (format, *([] if head == "16bit" else [head])):
        _writable(spec)
    note = (lambda text: progress(0, 1, text)) if progress else None
    source = open_source(model, note)
    recipe = Recipe(format, head, next(s for s, d in FLOATS.items() if d == source.dtype))
    plan = _plan(source, recipe)
    facts: dict[str, Any] = {
        "version": fewbit.__version__,
        "format": format,
        "method": method,
        "head": head,
        "scales": scales,
    }
    facts |= {"source": source.path.name, "source_bytes": source.checkpoint.weight_bytes(), "calibration": None}
    out = Path(out)
    try:
        with Writer(out, plan, source.dtype, facts) as writer:
            _companions(writer, source, plan)
            _walk(writer, source, plan, chosen, Target(source.dtype, scales == "search"), progress)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise FewbitError(
            "The disk is full.",
            f"Writing {out} stopped: {e.strerror}; what was written is removed.",
            "Free some space, or choose an output folder on another disk.",
        ) from e
    seconds = time.perf_counter() - start
    found = describe(out)
    bits = round(found.bits_per_weight, 2)
    store.remember(out, {"format": format, "method": method, "head": head, "bits_per_weight": bits})
    return Summary(
        str(out), format, method, head, seconds, found.weight_bytes, facts["source_bytes"], found.float16_bytes,
        found.bits_per_weight,
    )  # fmt: skip


def _writable(spec: str) -> None:
    fmt = parse(spec)
    if spec in FLOATS or spec.startswith("int"):
        return
    raise FewbitError(
        f"fewbit reads {fmt.spec} and does not write it.",
        "Writable: int2 … int8 with an optional group and a (asymmetric), f32, f16, bf16.",
        "Use int4g64, or int8.",
    )


def _plan(source: Source, recipe: Recipe) -> list[Planned]:
    plan = []
    for w in source.weights:
        spec = recipe.spec(w, source.spec(w.name))
        if reason := parse(spec).accepts(w.shape):
            raise FewbitError(f"{w.name} can't be stored as {spec}.", f"{reason}.", "Choose another format.")
        plan.append(Planned(w.name, spec, w.shape))
    return plan


def _companions(writer: Writer, source: Source, plan: list[Planned]) -> None:
    """config.json and the tokenizer's files, as Hugging Face tools expect them."""
    config = {k: v for k, v in source.config.items() if k not in ("quantization_config", "torch_dtype")}
    config["dtype"] = str(source.dtype).removeprefix("torch.")
    linears = {w.name for w in source.weights if w.role in ("linear", "head")}
    if quantization := quantization_config(plan, linears):
        config["quantization_config"] = quantization
    data = source.checkpoint.tokenizer()
    if data.bos_token_id is not None:
        config.setdefault("bos_token_id", data.bos_token_id)
    ends = list(data.eos_token_ids)
    if ends:
        config.setdefault("eos_token_id", ends[0])
        writer.text("generation_config.json", {"eos_token_id": ends[0] if len(ends) == 1 else ends})
    writer.text("config.json", config)
    writer.text("tokenizer.json", data.json)
    from fewbit.tokenizer import Tokenizer

    tokens = Tokenizer(data).inner
    ids = {"bos_token": data.bos_token_id, "eos_token": ends[0] if ends else None}
    named = {key: tokens.id_to_token(i) for key, i in ids.items() if i is not None}
    writer.text(
        "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": data.add_bos, **named},
    )
    if data.chat_template is not None:
        writer.text("chat_template.jinja", data.chat_template)


def _walk(
    writer: Writer, source: Source, plan: list[Planned], method: ModuleType, target: Target, progress: Progress | None
) -> None:
    total = sum(torch.Size(p.shape).numel() for p in plan)
    done = 0

    def pieces(planned: Planned) -> Iterator[QTensor]:
        nonlocal done
        for piece in _quantized(source, planned, method, target):
            done += piece.numel
            if progress:
                progress(done, total, planned.name)
            yield piece

    for planned in plan:
        writer.write(planned, pieces(planned))


def _quantized(source: Source, planned: Planned, method: ModuleType, target: Target) -> Iterator[QTensor]:
    """A tensor's slices of rows, quantized or cast."""
    fmt = parse(planned.spec)
    slices: list[tuple[int, int] | None] = [None]
    if len(planned.shape) > 1:
        rows = max(32, SLICE_WEIGHTS // planned.shape[1] // 32 * 32)
        slices = [(i, min(i + rows, planned.shape[0])) for i in range(0, planned.shape[0], rows)]
    for part in slices:
        q = source.read(planned.name, part)
        w = parse(q.spec).dequantize(q)
        if planned.spec in FLOATS:
            # also what the narrower type can't hold
            w = w.to(FLOATS[planned.spec])
        if not torch.isfinite(w.float().sum()):
            _name_the_broken(planned, w, part)
        yield fmt.pack(w, {}) if planned.spec in FLOATS else method.quantize(w, fmt, {}, target)


def _name_the_broken(planned: Planned, w: torch.Tensor, part: tuple[int, int] | None) -> None:
    broken = ~torch.isfinite(w)
    if count := int(broken.sum()):
        first = [int(i) for i in broken.nonzero()[0]]
        first[0] += part[0] if part else 0
        as_stored = f" as {planned.spec}" if planned.spec in FLOATS else ""
        raise FewbitError(
            f"The tensor {planned.name!r} holds NaN or infinity{as_stored}.",
            f"{count:,} of {w.numel():,} weights; the first at {first}.",
            "The checkpoint is damaged, or its weights are too large for the type: download it again, or keep bf16.",
        )
