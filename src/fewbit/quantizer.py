"""Quantize a model: what was asked for, checked; what each tensor becomes, planned; then the walk."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import fewbit
from fewbit import companions, recipes, store
from fewbit.blocks import fast_product
from fewbit.calibration import Calibration
from fewbit.calibration import collect as collect_windows
from fewbit.checkpoint._writer import Planned, Writer, quantization_config
from fewbit.errors import FewbitError
from fewbit.formats import parse
from fewbit.formats.integer import IntegerFormat
from fewbit.lookup import find
from fewbit.methods import Target, auto, silent
from fewbit.models import WeightInfo
from fewbit.source import FLOATS, Source, describe, open_source
from fewbit.walk import Log, Progress, Walk, device_of, identity

# tokens of a calibration window
WINDOW = 512


@dataclass(frozen=True)
class Summary:
    """What a quantization wrote. `unseen`: linears of experts that no calibration token came to, rounded to nearest (of
    the blocks that this run quantized).
    """

    path: str
    format: str
    method: str
    head: str
    seconds: float
    weight_bytes: int
    source_bytes: int
    float16_bytes: int
    bits_per_weight: float
    unseen: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Specs:
    """Which spec each tensor gets: `format` for the linears of the blocks, `head` for embedding and output head.

    `sixteen` is what 16 bits mean for the model: f16 or bf16. `others` are tensors by name whose spec is another.
    """

    format: str
    head: str
    sixteen: str
    others: Mapping[str, str]

    def spec(self, w: WeightInfo, stored: str) -> str:
        """The spec of a tensor; norms and biases stay as they are `stored`."""
        if w.name in self.others:
            return self.others[w.name]
        if w.role == "linear":
            return self.format
        if w.role in ("embedding", "head"):
            return self.sixteen if self.head == "16bit" else self.head
        return stored if stored in FLOATS else self.sixteen


@dataclass(frozen=True)
class Options:
    """What `quantize` was asked for, checked."""

    format: str = "int4g64"
    method: str = "auto"
    head: str = "int8"
    scales: str = "search"
    effort: int = 1
    calibration: str | None = None
    windows: int | None = None
    length: int | None = None
    drift: float | None = None
    prefix: str = "quantized"
    weighting: str = "loss"
    device: str = "auto"
    offload: bool = False
    restart: bool = False
    supersede: bool = False
    recipe: recipes.Recipe | str | Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _known("scales", self.scales, ("search", "minmax"))
        _known("prefix", self.prefix, ("quantized", "original"))
        _known("weighting", self.weighting, ("loss", "even"))
        if self.drift is not None and not 0 <= self.drift <= 1:
            raise FewbitError(
                f"There is no drift of {self.drift:g}.",
                "It is the share of the prefix's drift that linears make good, 0 to 1.",
                f"Use --drift {auto.DRIFT}.",
            )
        if self.prefix == "original" and self.drift:
            raise FewbitError(
                "--drift has nothing to correct under --prefix original.",
                "It is the difference between the original's activations and those of the quantized prefix.",
                "Leave out one of the two.",
            )
        if self.effort not in range(4):
            raise FewbitError(f"There is no effort {self.effort}.", "Known: 0, 1, 2, 3.", "Use --effort 1.")
        for spec in (self.format, *([] if self.head == "16bit" else [self.head])):
            _writable(spec)

    @property
    def label(self) -> str:
        """What the formats are called together."""
        return self.format if self.recipe is None else f"mixed ({self.format})"

    def exceptions(self, source: Source) -> dict[str, str]:
        """The specs by tensor that the recipe asks for."""
        if self.recipe is None:
            return {}
        if self.recipe == recipes.MIXED:
            return recipes.mixed(source.weights)
        table = recipes.read(Path(self.recipe)) if isinstance(self.recipe, str | Path) else self.recipe
        found = recipes.resolved(table, source.weights)
        for spec in sorted(set(found.values())):
            _writable(spec)
        return found

    @property
    def weighted(self) -> bool:
        """Whether tokens count by what the loss makes of them."""
        return self.weighting == "loss"

    @property
    def resolved(self) -> str:
        """The method's name, with `auto` replaced by what it stands for."""
        if self.method != "auto":
            return self.method
        fmt = parse(self.format)
        return auto.chosen(fmt.bits, self.effort) if isinstance(fmt, IntegerFormat) else "rtn"

    @property
    def share(self) -> float:
        """Of the drift that linears make good: what was asked for, or what measured best for width and method."""
        if self.drift is not None:
            return self.drift
        fmt = parse(self.format)
        if self.prefix == "original" or not isinstance(fmt, IntegerFormat):
            return 0.0
        return auto.drift(fmt.bits, self.resolved)

    @property
    def modules(self) -> list[ModuleType]:
        """The method's modules, `a+b` in that order; FewbitError where there is none of that name."""
        found = [find("fewbit.methods", name) for name in self.resolved.split("+")]
        if not hasattr(found[-1], "quantize") or not all(hasattr(m, "prepare") for m in found[:-1]):
            raise FewbitError(
                f"{self.method!r} is no method.",
                "In a+b, a must prepare blocks (awq does) and b choose codes (rtn, gptq, awq, tuned).",
                "Use auto, rtn, gptq, awq, awq+gptq or tuned.",
            )
        return found


def _known(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise FewbitError(
            f"There is no {value!r} for {what}.", f"Known: {', '.join(choices)}.", f"Use --{what} {choices[0]}."
        )


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    progress: Progress | None = None,
    log: Path | None = None,
    note: Callable[[str], None] | None = None,
    **options: Any,
) -> Summary:
    """Quantize `model` (alias, hub id, folder or GGUF file) into the new folder `out`.

    format       spec of the blocks' linears, such as `int4g64`
    method       `auto`, or modules of `fewbit.methods`: `rtn`, `gptq`, `awq`, `awq+gptq`, `tuned`
    head         spec of embedding and output head, or `16bit`
    recipe       `mixed` (the textbook's rule), a JSON file or a table of names or patterns with *, or a function of the
                 name: matrices whose spec is another
    scales       `search` (least squared error) or `minmax` (textbook)
    effort       0 to 3: more time for less loss
    calibration  None (the text that comes with fewbit), a text file, `self`, or a dataset of the hub
    windows, length   calibration windows (128) and their tokens (512, or the model's context where it is shorter)
    drift        share (0 to 1) of what the quantized prefix changed that each linear makes good (asymmetric
                 calibration); None: a quarter up to 3 bits, where it helps the method, and 0 above
    weighting    tokens count by the `loss` (its squared gradients), or `even`
    prefix       calibrate on what the `quantized` prefix hands on, or on the `original` model's activations
    device       `auto`, `cpu`, `cuda`, `cuda:1`
    offload      keep calibration activations on disk
    restart      begin anew where an unfinished output lies
    supersede    begin anew where that is another run's, and go on with one of this run
    progress, note   told how far the walk is, and what is worth knowing; log  a file of one JSON line a matrix
    A run that was stopped goes on where it was, and writes the same bytes. Raises FewbitError.
    """
    start = time.perf_counter()
    asked = Options(**options)
    modules = asked.modules
    source = open_source(model, progress)
    specs = Specs(
        asked.format, asked.head, next(s for s, d in FLOATS.items() if d == source.dtype), asked.exceptions(source)
    )
    plan = _plan(source, specs)
    out = Path(out)
    calibration = _calibration(source, asked, modules, progress)
    facts, fingerprint = _facts(source, asked, calibration)
    fingerprint["specs"] = {p.name: p.spec for p in plan}
    target = Target(source.dtype, asked.scales == "search", asked.effort, note or silent)
    try:
        with (
            Writer(out, plan, source.dtype, facts, fingerprint, asked.restart, asked.supersede) as writer,
            Log(log) as lines,
        ):
            linears = {w.name for w in source.weights if w.role in ("linear", "router", "head")}
            companions.write(writer, source, quantization_config(plan, linears))
            walk = Walk(source, writer, plan, modules, target, asked, progress or _quiet, lines, note or silent)
            walk.run(calibration.windows if calibration else None)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        full = FewbitError(
            "The disk is full.",
            f"Writing {out} stopped: {e.strerror}.",
            "Free some space and give the same command again, or choose an output folder on another disk.",
        )
        for kept in getattr(e, "__notes__", ()):
            full.add_note(kept)
        raise full from e
    seconds = time.perf_counter() - start
    found = describe(out)
    bits = round(found.bits_per_weight, 2)
    store.remember(out, {"format": asked.label, "method": asked.resolved, "head": asked.head, "bits_per_weight": bits})
    return Summary(
        str(out), asked.label, asked.resolved, asked.head, seconds, found.weight_bytes, facts["source_bytes"],
        found.float16_bytes, found.bits_per_weight, tuple(walk.unseen),
    )  # fmt: skip


def _quiet(done: int, total: int, doing: str) -> None:
    """Nobody watches."""


def _calibration(
    source: Source, asked: Options, modules: list[ModuleType], progress: Progress | None
) -> Calibration | None:
    """The windows a method needs; None for methods that look at weights alone."""
    if not any(m.NEEDS for m in modules):
        _unused(asked, "calibration", "windows", "drift", "offload", "prefix", "weighting")
        return None
    if asked.resolved.split("+")[-1] not in auto.CORRECTING:
        _unused(asked, "drift")
    limit = source.args.max_position_embeddings
    length = min(limit, WINDOW) if asked.length is None else asked.length
    if length > limit:
        raise FewbitError(
            f"Calibration windows of {length:,} tokens are too long.",
            f"{source.name} was made for at most {limit:,}.",
            f"Use --length {min(limit, WINDOW)}.",
        )
    from fewbit.tokenizer import Tokenizer

    def write(count: int, length: int) -> list[list[int]]:
        from fewbit import self_calibration

        return self_calibration.write(source.path, count, length, progress=progress)

    found = collect_windows(asked.calibration, Tokenizer(source.checkpoint.tokenizer()), asked.windows, length, write)
    most = int(found.windows.max())
    if most >= source.args.vocab_size:
        raise FewbitError(
            "The tokenizer does not belong to the model.",
            f"It gives token {most:,}; the model has {source.args.vocab_size:,}.",
            "Check tokenizer.json against the original model's.",
        )
    return found


def _unused(asked: Options, *names: str) -> None:
    """FewbitError where one of these was asked for, which the method has no use for."""
    plain = Options()
    idle = [name for name in names if getattr(asked, name) not in (getattr(plain, name), 0)]
    if idle:
        raise FewbitError(
            f"The method {asked.resolved} has no use for {', '.join(idle)}.",
            "rtn and awq know no drift, and rtn looks at weights alone.",
            "Leave that out, or use --method gptq.",
        )


def _facts(source: Source, asked: Options, calibration: Calibration | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What goes into the files' metadata, and the fingerprint that an unfinished output is known by."""
    facts: dict[str, Any] = {
        "version": fewbit.__version__,
        "format": asked.label,
        "method": asked.resolved,
        "head": asked.head,
        "scales": asked.scales,
        "source": store.title(source.path),
        "source_bytes": source.checkpoint.weight_bytes(),
        "calibration": calibration.facts if calibration else None,
    }
    if calibration:
        facts |= {"effort": asked.effort, "drift": asked.share, "prefix": asked.prefix, "weighting": asked.weighting}
    device = device_of(asked.device)
    machine = {"device": str(device), "torch": torch.__version__}
    if calibration and device.type == "cpu":
        # another number of threads sums in another order, and the files would differ in their last bits
        machine["threads"] = str(torch.get_num_threads())
        machine["instructions"] = f"{torch.backends.cpu.get_cpu_capability()}, {fast_product(source, device)}"
    elif calibration:
        machine["card"] = torch.cuda.get_device_name(device)
    return facts, facts | machine | {"source_files": identity(source)}


def _writable(spec: str) -> None:
    fmt = parse(spec)
    if spec in FLOATS or spec.startswith("int"):
        return
    raise FewbitError(
        f"fewbit reads {fmt.spec} and does not write it.",
        "Writable: int2 … int8 with an optional group and a (asymmetric), f32, f16, bf16.",
        "Use int4g64, or int8.",
    )


def _plan(source: Source, specs: Specs) -> list[Planned]:
    plan = []
    for w in source.weights:
        spec = specs.spec(w, source.spec(w.name))
        if reason := parse(spec).accepts(w.shape):
            raise FewbitError(f"{w.name} can't be stored as {spec}.", f"{reason}.", "Choose another format.")
        plan.append(Planned(w.name, spec, w.shape))
    return plan
