"""A model in the layouts that other engines load. One module per target; the file name is the registry.

`export` writes a GGUF file, or a folder of compressed-tensors, GPTQ or AWQ. What an engine would refuse is refused
before anything is written.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from fewbit import store
from fewbit.checkpoint._writer import Planned
from fewbit.errors import FewbitError
from fewbit.exports import _folders, _limits
from fewbit.exports._folders import Written
from fewbit.formats import parse
from fewbit.formats.integer import IntegerFormat
from fewbit.lookup import advice, find, names
from fewbit.methods import silent
from fewbit.quantizer import quantize
from fewbit.source import FLOATS, Source, describe_source, open_source
from fewbit.walk import Progress


@dataclass(frozen=True)
class Summary:
    """What an export wrote. `exact`: every weight has the value it has in the source; `notes` say what does not."""

    path: str
    to: str
    format: str
    method: str
    source: str
    exact: bool
    weight_bytes: int
    source_bytes: int
    specs: dict[str, int]
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def targets() -> list[str]:
    """What `to` may be."""
    return [name.replace("_", "-") for name in names(__name__)]


def export(
    model: str | Path,
    out: str | Path,
    *,
    to: str,
    type: str | None = None,  # noqa: A002
    format: str | None = None,  # noqa: A002
    head: str | None = None,
    engine: str = "vllm",
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
    **options: Any,
) -> Summary:
    """Write `model` (alias, folder or GGUF file) to `out` so that other engines load it.

    to        `gguf` (a file), `compressed-tensors`, `gptq` or `awq` (folders)
    type      of a GGUF file's matrices: `q4_0`, `q4_k`, ..., `f16`
    format    a folder's linears are quantized to it first; None keeps a quantized model's, or takes the target's own
    head      of a GGUF file's embedding and output head; folders keep them in 16 bits
    engine    whose limits a folder keeps to: `vllm` (SGLang too) or `transformers`
    options   of `fewbit.quantize`, where a folder's linears are quantized first
    Raises FewbitError; what lies at `out` is whole or nothing.
    """
    start = time.perf_counter()
    if to not in targets():
        raise FewbitError(f"There is no export to {to!r}.", f"Known: {', '.join(targets())}.", advice(to, targets()))
    target = find(__name__, to.replace("-", "_"))
    source = open_source(model, progress)
    report, tell = progress or _quiet, note or silent
    out = Path(out)
    if to == "gguf":
        _unused(to, format=format, **options)
        found: Summary = target.write(source, out, type, head, report, tell)
    else:
        _unused(to, type=type, head=None if head == "16bit" else head)
        found = _folder(source, target, out, format, engine, options, report, tell)
    return Summary(**{**found.to_dict(), "seconds": time.perf_counter() - start})


def _quiet(done: int, total: int, doing: str) -> None:
    """Nobody watches."""


def _unused(to: str, **options: Any) -> None:
    idle = [name for name, value in options.items() if value is not None]
    if idle:
        how = {
            "gguf": "A GGUF file's weights are rounded to --type; quantize first and export the result for more.",
        }.get(to, "Folders keep embedding and head in 16 bits, and their linears are told by --format.")
        raise FewbitError(f"The export to {to} has no use for {', '.join(idle)}.", how, "Leave that out.")


def _folder(
    source: Source,
    target: ModuleType,
    out: Path,
    format: str | None,  # noqa: A002
    engine: str,
    options: dict[str, Any],
    progress: Progress,
    note: Callable[[str], None],
) -> Summary:
    """Spell a quantized model anew, or quantize it first."""
    if engine not in _limits.ENGINES:
        raise FewbitError(
            f"fewbit knows no limits of the engine {engine!r}.", f"Known: {', '.join(_limits.ENGINES)}.", "Use vllm."
        )
    stored = {source.spec(w.name) for w in source.weights if w.role == "linear"}
    packed = all(isinstance(parse(s), IntegerFormat) for s in stored)
    wanted = None if packed and format is None else format or target.DEFAULT
    _writer_is_integer(wanted)
    tensors = _folders.plan(source, target, wanted)
    _folders.check(source, target, engine, tensors)
    facts = source.checkpoint.facts()
    notes: list[str] = []
    if wanted is None:
        idle = {k: v for k, v in options.items() if v is not None}
        _unused(target.LAYOUT, **idle)
        written = _folders.write(source, target, tensors, out, progress)
        method = str(facts.get("method", "-"))
    else:
        if not stored <= set(FLOATS):
            notes.append(f"the linears are rounded twice: they were {', '.join(sorted(stored))} already")
        written, method = _quantized(source, target, out, wanted, options, progress, note)
    spec = wanted or ", ".join(sorted(stored))
    done = open_source(out)
    bits = {"format": spec, "method": method, "head": "16bit"}
    store.remember(out, bits)
    return Summary(
        str(out), target.LAYOUT, spec, method, store.title(source.path), written.exact and wanted is None,
        done.checkpoint.weight_bytes(), source.checkpoint.weight_bytes(), written.specs, notes + written.notes,
    )  # fmt: skip


def _writer_is_integer(spec: str | None) -> None:
    if spec is not None and not isinstance(parse(spec), IntegerFormat):
        raise FewbitError(
            f"{spec} is no format for this export.", "These layouts hold integers.", "Use --format int4g64."
        )


def _quantized(
    source: Source,
    target: ModuleType,
    out: Path,
    spec: str,
    options: dict[str, Any],
    progress: Progress,
    note: Callable[[str], None],
) -> tuple[Written, str]:
    """Quantize, into a folder beside `out` where the target spells its tensors another way than fewbit does."""
    chosen = {k: v for k, v in options.items() if v is not None}

    def made(place: Path) -> str:
        return quantize(source.path, place, format=spec, head="16bit", progress=progress, note=note, **chosen).method

    if target.Packed is Planned:
        method = made(out)
        specs = Counter(line.spec for line in describe_source(open_source(out)).tensors)
        return Written(dict(specs), False, []), method
    if out.exists() or out.is_symlink():
        raise FewbitError(
            f"The output {str(out)!r} exists already.", "fewbit never overwrites a model.", "Choose another name."
        )
    between = out.absolute().parent / f".{out.name}.quantized"
    _clear(between)
    try:
        method = made(between)
        again = open_source(between)
        return _folders.write(again, target, _folders.plan(again, target, None), out, progress), method
    finally:
        # what is unfinished lies under a name of its own, and the same command goes on with it
        _clear(between)


def _clear(folder: Path) -> None:
    """Remove what a killed export left; nothing else is called so."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
