"""`fewbit eval`: what quantization lost, against a reference model on a text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fewbit.cli._parser import Parser, count
from fewbit.cli._terminal import Column, print_json, print_table, progress, write

if TYPE_CHECKING:
    from fewbit.evaluator import Quality

HELP = "measure what was lost: KL divergence, perplexity, top-1"

COLUMNS = [
    Column("model", right=False),
    Column("MB"),
    Column("bits/weight"),
    Column("mean KL"),
    Column("median KL"),
    Column("99 % KL"),
    Column("top-1 %"),
    Column("PPL"),
]


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="+", help="alias, folder or .gguf file; one or several")
    parser.add_argument("--against", metavar="REF", required=True, help="the reference model, run in float32")
    parser.add_argument("--text", metavar="FILE", required=True, type=Path, help="UTF-8 text to measure on")
    parser.add_argument(
        "--windows", type=count, default=64, metavar="N", help="windows of 512 tokens (default %(default)s)"
    )
    parser.add_argument("--exact", action="store_true", help="float activations: the weights' own error alone")
    parser.add_argument("--threads", type=count, metavar="N", help="default: the machine's cores")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    import fewbit

    with progress() as report:
        found = fewbit.evaluate(
            args.model,
            args.against,
            args.text,
            windows=args.windows,
            exact=args.exact,
            threads=args.threads,
            progress=report,
        )
    if args.json:
        print_json({"against": args.against, "text": str(args.text), "models": [q.to_dict() for q in found]})
    else:
        print_table(COLUMNS, [row(q) for q in found])
        first = found[0]
        reference = f"{first.reference_perplexity:.3f} ± {first.reference_perplexity_error:.3f}"
        write(f"against {args.against}: PPL {reference}, {first.tokens:,} predictions scored; KL in nats\n")
    return 0


def row(q: Quality) -> list[str]:
    """One line of the table; KL in nats, errors are one standard error."""
    return [
        q.model,
        f"{q.weight_bytes / 1e6:.1f}",
        f"{q.bits_per_weight:.2f}",
        f"{q.mean_kl:.5f} ± {q.mean_kl_error:.5f}",
        f"{q.median_kl:.4f}",
        f"{q.p99_kl:.4f}",
        f"{100 * q.top1:.2f} ± {100 * q.top1_error:.2f}",
        f"{q.perplexity:.3f} ± {q.perplexity_error:.3f}",
    ]
