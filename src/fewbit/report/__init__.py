"""`eval --report`: one page that shows what quantization lost, for a person, without a network.

Everything is in the file: figures, charts, the JavaScript that draws them. A content security policy by hash allows
that script and nothing else, neither other code nor any request.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fewbit.errors import FewbitError
from fewbit.report import charts, page, weights
from fewbit.source import Source, open_source

if TYPE_CHECKING:
    from fewbit.evaluator import Quality


def check_report(out: Path) -> None:
    """FewbitError where a report could not be written to `out`; before the hours of measuring, not after them."""
    charts.require()
    if out.is_dir():
        raise FewbitError(
            f"The report cannot be written to {str(out)!r}.", "It is a folder.", "Name a file, such as report.html."
        )
    if not out.parent.is_dir():
        raise FewbitError(
            f"The report cannot be written to {str(out)!r}.",
            f"There is no folder {str(out.parent)!r}.",
            "Make the folder first, or name a file elsewhere.",
        )
    partial = _partial(out)
    try:
        partial.touch(exist_ok=False)
    except OSError as error:
        raise FewbitError(
            f"The report cannot be written to {str(out)!r}.",
            f"The system says: {error.strerror}.",
            "Change the folder's permissions, or name a file elsewhere.",
        ) from error
    finally:
        # where nothing can be made, nothing is there to remove
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_report(out: Path, against: str, qualities: Sequence[Quality]) -> None:
    """Write the page of `qualities` (at least one, measured against `against`) to `out`; an older report is replaced.

    Reads every matrix of the reference and of the candidates once more, one at a time. Raises FewbitError where Altair
    is not installed, where `out` is a folder or lies in none, and where a model cannot be opened.
    """
    check_report(out)
    reference = open_source(against)
    candidates = [open_source(q.model) for q in qualities]
    unlike = [weights.unlike(reference, c) for c in candidates]
    fitting = [i for i, why in enumerate(unlike) if not why]
    measured = weights.layer_errors(reference, [candidates[i] for i in fitting])
    layers: list[list[weights.LayerError]] = [[] for _ in qualities]
    for i, found in zip(fitting, measured, strict=True):
        layers[i] = found
    views = [_views(reference, c, found) for c, found in zip(candidates, layers, strict=True)]
    _write(out, page.render(against, reference, qualities, page.Weights(layers, views, unlike)))


def _views(
    reference: Source, candidate: Source, layers: Sequence[weights.LayerError]
) -> list[tuple[str, weights.Rounding]]:
    found = ((why, weights.rounding(reference, candidate, layer)) for why, layer in weights.notable(layers))
    return [(why, view) for why, view in found if view is not None]


def _write(out: Path, text: str) -> None:
    """Beside its place, then renamed: a report is whole or not there, and a link is replaced, not followed."""
    partial = _partial(out)
    try:
        with partial.open("xb") as file:
            # a path may hold bytes that are not UTF-8
            file.write(text.encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name[:100]}.{secrets.token_hex(4)}.partial")
