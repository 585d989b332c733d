"""A full-precision model in few bits, because a command asked for it so: quantized once, kept in fewbit's cache.

Round to nearest, tensor by tensor, straight into a folder like any that `quantize` writes: it holds a slice of a tensor
at a time, a run that was stopped goes on, and the next start opens the folder at once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

from fewbit import store
from fewbit.checkpoint import open_checkpoint
from fewbit.errors import FewbitError
from fewbit.quantizer import quantize
from fewbit.source import Source, describe_source

# embedding and output head, as `quantize` stores them where nothing else is asked for
HEAD = "int8"


def in_few_bits(
    model: str | Path,
    format: str,  # noqa: A002
    *,
    progress: store.Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Path:
    """The folder of `model` (hub id, folder, GGUF file) in `format`, made where it is not in the cache yet.

    A model of the hub that was quantized before need not be here any more. Raises FewbitError where the model is
    quantized already, or where `quantize` does.
    """
    before = _of_the_hub(model, format)
    if before is not None:
        return before
    path = store.locate(model, progress)
    out = store.quantized_dir() / _name(path, str(model), format)
    if out.is_dir():
        return out
    source = Source(open_checkpoint(path), str(model))
    _check_precision(source, format)
    out.parent.mkdir(parents=True, exist_ok=True)
    quantize(path, out, format=format, method="rtn", head=HEAD, device="cpu", supersede=True, progress=progress)
    if note:
        size = sum(f.stat().st_size for f in out.iterdir())
        note(
            f"{model} is kept as {out.name} ({store.size_text(size)}); the original takes "
            f"{store.size_text(source.checkpoint.weight_bytes())}."
        )
    return out


def _name(path: Path, called: str, format: str) -> str:  # noqa: A002
    """Readable, and another one for another source: the hub's commit, or the files' state."""
    title = store.title(path)
    wanted = store.hub_name(called)
    of_the_hub = "@" in title
    source = title if of_the_hub else [str(path.resolve()), store.stamp(store.content_files(path))]
    key = hashlib.sha256(json.dumps([source, format, HEAD]).encode()).hexdigest()[:8]
    base = wanted.repo.partition("/")[2] if wanted else path.resolve().name.removesuffix(".gguf")
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', base).strip('-.')[:80] or 'model'}-{format}-{key}"


def _of_the_hub(model: str | Path, format: str) -> Path | None:  # noqa: A002
    """What was made of the hub's model before, where the model itself is not here any more."""
    wanted = store.hub_name(model)
    if wanted is None:
        return None
    from fewbit.store import hub_cache

    if hub_cache.lookup(wanted) is not None:
        return None
    prefix = f"{wanted.repo}@" if wanted.revision == "main" else f"{wanted.repo}@{wanted.revision}"
    for found in reversed(store.kept()):
        source, facts = str(found.facts.get("source", "")), found.facts
        same_part = source.partition(":")[2] == (wanted.part or "")
        if source.startswith(prefix) and same_part and (facts.get("format"), facts.get("head")) == (format, HEAD):
            return found.path
    return None


def _check_precision(source: Source, format: str) -> None:  # noqa: A002
    found = describe_source(source)
    if found.quantized:
        specs = [s for s in found.specs if s not in ("f32", "f16", "bf16")]
        raise FewbitError(
            f"{source.name} is quantized already.",
            f"Its matrices are {', '.join(specs)}, {found.bits_per_weight:.2f} bits a weight; rounding them again to "
            f"{format} loses more.",
            "Run it as it is, start from the full-precision model, or use fewbit quantize if you mean it.",
        )
