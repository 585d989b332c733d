"""What a browser would make of a report, and a candidate to report on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from fewbit.evaluator import DomainQuality, Quality, WorstToken

ATTACK = "</script><script>alert(1)</script>"


@dataclass
class Page(HTMLParser):
    """What a browser would make of the page: tags with attributes, text of scripts, rows of tables, all text."""

    html: str
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.feed(self.html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.ends.append(tag)

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and len(self.scripts) > self.ends.count("script"):
            self.scripts[-1] += data
            return
        self.text += data
        if self.rows and self.rows[-1] and len(self.rows) > self.ends.count("tr"):
            self.rows[-1][-1] += data

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found


def quality(model: Path | str, kl: float = 0.0712, **changes: Any) -> Quality:
    """A candidate with figures that are all different, so that a wrong one shows."""
    domains = tuple(
        DomainQuality(
            name,
            kl * n,
            0.00113 * n,
            0.0127 * n,
            0.61 * n,
            0.91 - n / 50,
            0.0031,
            19.5 + n,
            0.42,
            18.5 + n,
            0.37,
            510 * n,
        )
        for n, name in ((1, "prose"), (2, f"code {ATTACK}"))
    )
    worst = WorstToken(
        "prose", 7, 301, 5.4321, f"He said{ATTACK}\u202eand & then\x1b[31m", ATTACK,
        ((" turned", 0.6204), (ATTACK, 0.113), ("\n", 0.08)), ((" fore<b>cast", 0.3402), ("  ", 0.05), ("</p>", 0.02)),
    )  # fmt: skip
    figures: dict[str, Any] = {
        "mean_kl": kl, "mean_kl_error": 0.00142, "median_kl": 0.02848, "p99_kl": 0.6408, "top1": 0.9066,
        "top1_error": 0.0024, "perplexity": 17.353, "perplexity_error": 0.331, "reference_perplexity": 16.247,
        "reference_perplexity_error": 0.308, "tokens": 16320, "weight_bytes": 84_993_212, "bits_per_weight": 4.904,
        "exact": False, "domains": domains, "worst": (worst,),
    }  # fmt: skip
    return Quality(str(model), **(figures | changes))
