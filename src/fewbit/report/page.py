"""The page: figures as tables, charts as data for the script, tokens as text. Everything that comes from a model or a
text is hostile: jinja2 escapes what becomes HTML, and `_json` what becomes data inside a script element.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

import fewbit
from fewbit.report import charts
from fewbit.report.weights import LayerError, Rounding, ratio
from fewbit.source import Source, describe_source

if TYPE_CHECKING:
    from fewbit.evaluator import DomainQuality, Quality, WorstToken

_SIGNS = {"\n": "↵", "\t": "⇥", "\r": "␍"}
_HIDING = ("Cc", "Cf", "Cs", "Zl", "Zp")


@dataclass(frozen=True)
class Weights:
    """What is shown of the candidates' weights, an entry for each candidate.

    layers   the error of each matrix
    views    matrices looked at more closely, each with why
    unlike   why there is neither; "" where there is
    """

    layers: Sequence[Sequence[LayerError]]
    views: Sequence[Sequence[tuple[str, Rounding]]]
    unlike: Sequence[str]


def render(
    against: str,
    reference: Source,
    qualities: Sequence[Quality],
    weights: Weights,
) -> str:
    """The whole page as text. Each list of `weights` has an entry for each of `qualities`."""
    layers, views = weights.layers, weights.views
    names = short_names([q.model for q in qualities])
    kinds = list(dict.fromkeys(layer.kind for found in layers for layer in found if layer.block is not None))
    specs = {f"layers-{k}": charts.layer_chart(layers, k, k == kinds[-1]) for k in kinds}
    brief = trimmed(names)
    size = charts.size_chart(qualities, brief)
    if size:
        specs["size"] = size
    for i, found in enumerate(views):
        for j, (_, view) in enumerate(found):
            specs[f"steps-{i}-{j}"] = charts.rounding_chart(view)
            specs[f"group-{i}-{j}"] = charts.group_chart(view)
    environment = Environment(
        loader=FunctionLoader(_file), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"signs": signs, "lines": lines, "number": number, "percent": percent}
    # a carriage return would be read as a line feed, and the hash would not fit
    scripts = [text.replace("\r", "") for text in (charts.javascript(), _file("page.js"))]
    return environment.get_template("page.html.j2").render(
        against=against,
        base=describe_source(reference),
        candidates=[
            _candidate(*each) for each in zip(qualities, names, brief, layers, views, weights.unlike, strict=True)
        ],
        all_kinds=list(dict.fromkeys(layer.kind for found in layers for layer in found)),
        cache_error=max(q.cache_error for q in qualities),
        shared=names[0][: 1 + len(names[0]) - len(brief[0])] if brief != names else "",
        domains=_domains(qualities),
        kinds=kinds,
        has_size=size is not None,
        without_loss=[name for name, q in zip(names, qualities, strict=True) if q.mean_kl <= 0],
        missing=[name for name, q in zip(names, qualities, strict=True) if not math.isfinite(q.mean_kl)],
        paired=any(q.paired for q in qualities),
        texts=", ".join(d.name for d in qualities[0].domains),
        first=qualities[0],
        date=datetime.now().astimezone().strftime("%Y-%m-%d"),
        version=fewbit.__version__,
        data=_json({"specs": specs, "tops": [_top(found) for found in layers]}),
        scripts=scripts,
        style=_file("page.css"),
        allowed=" ".join(f"'sha256-{_digest(text)}'" for text in scripts),
    )


def short_names(models: Sequence[str]) -> list[str]:
    """The last part of each path, and as many parts before it as tell the models apart; the same model twice keeps
    one name."""
    parts = [[p for p in Path(m).parts if p != "/"] or [m] for m in models]
    kept = [1] * len(parts)
    for _ in range(max(map(len, parts))):
        found = ["/".join(p[-n:]) for p, n in zip(parts, kept, strict=True)]
        for i, name in enumerate(found):
            same = [j for j, other in enumerate(found) if other == name and parts[j] != parts[i]]
            if same and kept[i] < len(parts[i]):
                kept[i] += 1
    return ["/".join(p[-n:]) for p, n in zip(parts, kept, strict=True)]


def trimmed(names: Sequence[str]) -> list[str]:
    """The names without a long beginning that they share, for where room is short."""
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    shared = re.sub(r"[^-_./ ]*$", "", "".join(column[0] for column in alike))
    long = len(shared) > 6 and max(map(len, names)) > 24
    cut = len(shared) if long and len(set(names)) > 1 and shared not in names else 0
    return [f"…{name[cut:]}" for name in names] if cut else list(names)


def _candidate(
    quality: Quality,
    name: str,
    brief: str,
    layers: Sequence[LayerError],
    views: Sequence[tuple[str, Rounding]],
    unlike: str,
) -> dict[str, Any]:
    return {
        "quality": quality,
        "name": name,
        "brief": brief,
        "layers": layers,
        "unlike": unlike,
        "kinds": _by_kind(layers),
        "views": [
            {"why": why, "layer": v.layer, "outside": v.outside, "place": v.place, "grid": len(v.grid)}
            for why, v in views
        ],
        "worst": [_token(w) for w in quality.worst],
    }


def _token(worst: WorstToken) -> dict[str, Any]:
    def side(tokens: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
        return [
            {
                "text": text,
                "p": p,
                "width": f"{100 * min(max(p, 0.0), 1.0) if math.isfinite(p) else 0:.2f}",
                "actual": text == worst.actual,
            }
            for text, p in tokens
        ]

    return {"token": worst, "sides": [("before", side(worst.expected)), ("after", side(worst.found))]}


def _domains(qualities: Sequence[Quality]) -> list[tuple[DomainQuality, list[tuple[int, DomainQuality]]]]:
    """(the domain, (candidate, its figures) of each) where there is more than one domain."""
    order: dict[str, list[tuple[int, DomainQuality]]] = {}
    for i, quality in enumerate(qualities):
        for domain in quality.domains:
            order.setdefault(domain.name, []).append((i, domain))
    return [(found[0][1], found) for found in order.values()] if len(order) > 1 else []


def _by_kind(layers: Sequence[LayerError]) -> dict[str, float | None]:
    """Relative squared error of all matrices of a kind together."""
    sums: dict[str, tuple[float, float]] = {}
    for layer in layers:
        lost, total = sums.get(layer.kind, (0.0, 0.0))
        sums[layer.kind] = (lost + layer.lost, total + layer.total)
    return {kind: ratio(*pair) for kind, pair in sums.items()}


def _top(layers: Sequence[LayerError]) -> float:
    """The end of the axis of a candidate's layer charts."""
    return 1.05 * max((layer.relative or 0.0 for layer in layers if layer.block is not None), default=0.0) or 1e-9


def signs(text: str) -> str:
    """A token on one line, with its spaces, line ends and invisible characters to be seen."""
    text = "".join(_SIGNS.get(c, c) for c in text)
    inner = text.strip(" ")
    start = len(text) - len(text.lstrip(" ")) if inner else len(text)
    end = len(text) - start - len(inner)
    return "␣" * start + lines(inner) + "␣" * end


def lines(text: str) -> str:
    """Text with its line ends, and escapes for what would hide or turn what stands around it: format characters
    (direction marks, joiners, soft hyphens), controls, and Unicode's own line ends."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in _HIDING else f"⟨U+{ord(c):04X}⟩" for c in text)


def number(x: float, digits: int, signed: bool = False) -> str:
    """A figure with thousands separated; a word where it is not finite."""
    return f"{x:{'+' if signed else ''},.{digits}f}".replace("-", "\N{MINUS SIGN}") if math.isfinite(x) else str(x)


def percent(x: float | None) -> str:
    """Three digits that matter, as a percentage."""
    if x is None:
        return "not a number"
    text = f"{100 * x:#.3g}"
    return f"{text.rstrip('.') if x else '0'} %"


def _json(value: Any) -> str:
    """JSON that is safe inside a script element: no character of it can end the element or start a comment."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    for c in "<>&":
        text = text.replace(c, f"\\u{ord(c):04x}")
    return text


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
