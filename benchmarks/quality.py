"""Quality of round-to-nearest on a full-precision model, by the protocol of docs/architecture.md.

    python benchmarks/quality.py MODEL_FOLDER TEXT [--windows 64] [--only int8]

The marks are for SmolLM2-135M-Instruct and WikiText-2's raw test text. Writes the table of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from _marks import Mark, finish

import fewbit
from fewbit.evaluator import Quality

# name, format, head, exact, bound on mean KL (None: no mark, shown beside the others)
ROWS = [
    ("int8, int8 head, exact", "int8", "int8", True, 0.006),
    ("int8, int8 head, default kernels", "int8", "int8", False, 0.009),
    ("int4g64, body only", "int4g64", "16bit", True, 0.455),
    ("int4g64a, body only", "int4g64a", "16bit", True, 0.405),
    ("int4g32, body only", "int4g32", "16bit", True, 0.36),
    ("int4g32, int8 head, default kernels", "int4g32", "int8", False, None),
]
DOCS = Path(__file__).parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- quality: begin -->", "<!-- quality: end -->"


def table(found: list[tuple[str, Quality]]) -> str:
    """The rows as Markdown."""
    heads = ["format", "bits a weight", "MB", "PPL", "mean KL", "median", "p99", "top-1 %"]
    rows = [heads, ["---"] * len(heads)]
    for name, q in found:
        perplexity, kl = f"{q.perplexity:.2f} ± {q.perplexity_error:.2f}", f"{q.mean_kl:.4f} ± {q.mean_kl_error:.4f}"
        size = [f"{q.bits_per_weight:.2f}", f"{q.weight_bytes / 1e6:.1f}"]
        rows.append([name, *size, perplexity, kl, f"{q.median_kl:.4f}", f"{q.p99_kl:.3f}", f"{100 * q.top1:.1f}"])
    reference = found[0][1]
    rows.append(["full precision", "16", "", f"{reference.reference_perplexity:.3f}", "0", "0", "0", "100"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--only", help="rows whose name holds this")
    parser.add_argument("--scales", default="search", choices=("search", "minmax"))
    args = parser.parse_args()
    rows = [row for row in ROWS if not args.only or args.only in row[0]]
    found: dict[str, Quality] = {}
    scratch = Path(tempfile.mkdtemp())
    try:
        for exact in (True, False):
            # the reference runs once for all candidates of a call
            chosen = [row for row in rows if row[3] is exact]
            outs = [scratch / f"{spec}-{head}-{exact}" for _, spec, head, _, _ in chosen]
            for (_, spec, head, _, _), out in zip(chosen, outs, strict=True):
                fewbit.quantize(args.model, out, format=spec, head=head, scales=args.scales)
            if outs:
                measured = fewbit.evaluate(outs, args.model, args.text, windows=args.windows, exact=exact)
                found |= {row[0]: quality for row, quality in zip(chosen, measured, strict=True)}
    finally:
        shutil.rmtree(scratch)
    marks = [Mark(f"mean KL, {name}", found[name].mean_kl, bound) for name, *_, bound in rows if bound is not None]
    ordered = [(name, found[name]) for name, *_ in rows]
    text = table(ordered)
    print(text)
    if not args.only and DOCS.exists():
        page = DOCS.read_text()
        before, _, rest = page.partition(BEGIN)
        DOCS.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    finish("quality", marks, [{"row": name} | q.to_dict() for name, q in ordered])


if __name__ == "__main__":
    main()
