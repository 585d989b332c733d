"""Quality of every method at every width, beside the peers: writes the table of docs/benchmarks.md.

    python benchmarks/quality.py MODEL_FOLDER TEXT CALIBRATION [--text NAME=FILE ...] [--rows int4g64/gptq ...]
        [--device cuda] [--results quality.npz] [--with peers.npz more.npz] [--table]

The marks are for SmolLM2-135M-Instruct, WikiText-2's raw test text (windows 1 to 64) and the first 128 windows of 512
tokens of CALIBRATION; body quantized, embedding and head in 16 bits, float activations. Rows are SPEC/METHOD or
SPEC/METHOD/EFFORT. Tuned rows take minutes on a GPU and hours on two cores; results of several runs, also on other
machines, are put together by --with (the peers' are made by benchmarks/peers.py); what was measured so far lies in
benchmarks/measured, so that a row need not be measured again to stand beside a new one. `--table` only writes the table
of what --results and --with hold, and judges the marks; a row that is not there misses its mark.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _chain import Reference, windows
from _clusters import by_window, clustered_error
from _marks import Mark, finish

import fewbit
from fewbit.walk import device_of

WIDTHS = ("int8", "int4g64", "int4g64a", "int3g64", "int2g64")
METHODS = ("rtn", "awq", "gptq", "awq+gptq", "tuned/3")
ROWS = [f"{spec}/{method}" for spec in WIDTHS for method in METHODS if spec != "int8" or method in ("rtn", "gptq")]
# row -> bound on mean KL
BOUNDS = {"int4g64/gptq": 0.23, "int4g64/tuned/3": 0.17, "int3g64/gptq": 0.73, "int3g64/tuned/3": 0.55}
BOUNDS |= {"int8/gptq": 0.004}
MOST_PERPLEXITY = ("int2g64/tuned/3", 300.0)
MEASURED = Path(__file__).parent / "measured"
DOCS = Path(__file__).parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- quality: begin -->", "<!-- quality: end -->"


class Results:
    """KL by window (.npz) and figures (.json beside it) of rows; a row of a further text is named ROW@TEXT."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kl: dict[str, np.ndarray] = dict(np.load(path)) if path.exists() else {}
        figures = path.with_suffix(".json")
        self.figures: dict[str, Any] = json.loads(figures.read_text()) if figures.exists() else {}
        for name, kl in self.kl.items():
            # the windows know: what a file states may be of an older formula
            self.figures[name]["mean_kl_error"] = clustered_error(kl, 1)

    def add(self, name: str, scores: dict[str, np.ndarray], about: dict[str, Any]) -> None:
        """Take a row in and rewrite the files."""
        kl = scores["kl"].astype(np.float64)
        self.kl[name] = by_window(kl)
        self.figures[name] = about | {
            "mean_kl": float(kl.mean()),
            "mean_kl_error": clustered_error(kl),
            "median_kl": float(np.median(kl)),
            "p99_kl": float(np.quantile(kl, 0.99)),
            "top1": float(scores["agrees"].mean()),
            "perplexity": float(np.exp(scores["loss"].mean(dtype=np.float64))),
            "reference_perplexity": float(np.exp(scores["reference_loss"].mean(dtype=np.float64))),
            "tokens": len(kl),
        }
        np.savez(self.path, **self.kl)
        self.path.with_suffix(".json").write_text(json.dumps(self.figures, indent=2) + "\n")


def measure(args: argparse.Namespace, results: Results) -> None:
    """Quantize and score every row asked for."""
    device = device_of(args.device)
    # an empty name: the text the marks are for
    texts = {"": windows(args.model, args.text, 64, args.first)}
    for entry in args.texts:
        name, _, file = entry.partition("=")
        texts[name] = windows(args.model, Path(file), 64)
    reference = Reference(args.model, texts, device)
    scratch = Path(tempfile.mkdtemp())
    try:
        for row in args.rows or ROWS:
            spec, method, *effort = row.split("/")
            start = time.perf_counter()
            out = scratch / row.replace("/", "-")
            fewbit.quantize(
                args.model, out, format=spec, method=method, effort=int(effort[0]) if effort else 1, head="16bit",
                calibration=str(args.calibration), windows=128, device=args.device, note=print,
            )  # fmt: skip
            seconds = time.perf_counter() - start
            about = {"quantizer": f"fewbit {fewbit.__version__}", "seconds": round(seconds, 1), "device": str(device)}
            for name, scores in reference.score(out).items():
                results.add(f"{row}@{name}" if name else row, scores, about)
                figures = results.figures[f"{row}@{name}" if name else row]
                print(
                    f"{row:20} {name:12} KL {figures['mean_kl']:.4f} PPL {figures['perplexity']:.2f} {seconds:.0f} s",
                    flush=True,
                )
            shutil.rmtree(out)
    finally:
        shutil.rmtree(scratch)


def spec_of(row: str) -> str:
    """`int4g64` of our `int4g64/gptq` and of a peer's `autoround-int4`."""
    if "/" in row:
        return row.split("/")[0]
    width = row.rpartition("-")[2]
    return f"int{width[3]}g64{'a' if width.endswith('a') else ''}"


def table(found: Results) -> str:
    """All rows as Markdown by width; a width's lowest is bold where it is lower by two paired errors."""
    heads = ["weights", "quantizer", "mean KL", "median", "p99", "top-1 %", "PPL", *sorted(domains(found))]
    lines = [heads, ["---"] * len(heads)]
    for spec in sorted({spec_of(r) for r in found.kl if "@" not in r}, key=lambda s: (-int(s[3]), s)):
        rows = [r for r in found.kl if "@" not in r and spec_of(r) == spec]
        rows.sort(key=lambda r: -found.figures[r]["mean_kl"])
        for row in rows:
            f = found.figures[row]
            name = (
                f"**fewbit** {row.partition('/')[2]}"
                if "/" in row
                else f"{row.rpartition('-')[0]} {f.get('version', '')}"
            )
            kl = f"{f['mean_kl']:.4f} ± {f['mean_kl_error']:.4f}"
            if row == rows[-1] and len(rows) > 1 and is_lower(found, row, rows[-2]):
                kl = f"**{kl}**"
            others = [
                f"{found.figures[f'{row}@{d}']['mean_kl']:.4f}" if f"{row}@{d}" in found.figures else ""
                for d in sorted(domains(found))
            ]
            lines.append(
                [
                    spec,
                    name,
                    kl,
                    f"{f['median_kl']:.4f}",
                    f"{f['p99_kl']:.3f}",
                    f"{100 * f['top1']:.1f}",
                    f"{f['perplexity']:.2f}",
                    *others,
                ]
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def domains(found: Results) -> set[str]:
    """Names of the further texts."""
    return {row.partition("@")[2] for row in found.kl if "@" in row}


def is_lower(found: Results, row: str, other: str) -> bool:
    """Whether the mean KL of `row` is lower by more than two paired standard errors (over windows)."""
    difference = found.kl[other] - found.kl[row]
    return bool(difference.mean() > 2 * clustered_error(difference, 1))


def marks(found: Results, whole: bool) -> list[Mark]:
    """What the figures must hold; of the whole table, a row that was not measured is a mark missed."""

    def figure(row: str, name: str) -> float:
        return float(found.figures[row][name]) if row in found.kl else float("inf")

    rows = [Mark(f"mean KL, {row}", figure(row, "mean_kl"), bound) for row, bound in BOUNDS.items()]
    rows.append(Mark(f"perplexity, {MOST_PERPLEXITY[0]}", figure(MOST_PERPLEXITY[0], "perplexity"), MOST_PERPLEXITY[1]))
    for spec in WIDTHS:
        of_width = [r for r in found.kl if "@" not in r and spec_of(r) == spec]
        best = min((r for r in of_width if "/" in r), key=lambda r: figure(r, "mean_kl"), default=None)
        peer = min((r for r in of_width if "/" not in r), key=lambda r: figure(r, "mean_kl"), default=None)
        if best and peer:
            name = f"{spec}: {best} lower than {peer} by two paired errors"
            rows.append(Mark(name, float(is_lower(found, best, peer)), 1, True))
    for domain in sorted(domains(found)):
        for spec in WIDTHS[1:]:
            kls = [figure(f"{spec}/{method}@{domain}", "mean_kl") for method in ("rtn", "gptq", "tuned/3")]
            falls = kls == sorted(kls, reverse=True) and max(kls) < float("inf")
            rows.append(Mark(f"{spec}: rtn, gptq, tuned in this order on {domain}", float(falls), 1, True))
    return rows if whole else [m for m in rows if m.value < float("inf") and "order" not in m.name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--text", dest="texts", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument(
        "--first", type=int, default=0, help="first window of TEXT; choices are made on windows from 64"
    )
    parser.add_argument("--rows", nargs="*", default=[])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--results", type=Path, default=MEASURED / "quality.npz")
    parser.add_argument("--with", dest="others", nargs="*", default=[MEASURED / "peers.npz"], type=Path)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    args.results.parent.mkdir(exist_ok=True, parents=True)
    results = Results(args.results)
    if not args.table:
        measure(args, results)
    for other in args.others:
        more = Results(other)
        results.kl |= more.kl
        results.figures |= {name: f for name, f in more.figures.items() if name in more.kl}
    text = table(results)
    print(text)
    if args.table and DOCS.exists():
        page = DOCS.read_text()
        before, _, rest = page.partition(BEGIN)
        DOCS.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    finish("quality-marks", marks(results, args.table), results.figures)


if __name__ == "__main__":
    main()
