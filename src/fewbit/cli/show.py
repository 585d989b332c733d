"""`fewbit show`: what a model is made of."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fewbit.cli._models import fetch
from fewbit.cli._parser import MODEL_HELP, Parser
from fewbit.cli._terminal import Column, megabytes, print_json, print_table, write

if TYPE_CHECKING:
    from fewbit.source import Description

HELP = "tell what a model is made of: sizes, formats, tensors"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--tensors", action="store_true", help="one line for each tensor")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    from fewbit.source import describe

    fetch(args.model)
    found = describe(args.model)
    if args.json:
        print_json(found.to_dict())
        return 0
    print_overview(found)
    write("\n")
    numbers = [Column("tensors"), Column("weights"), Column("size"), Column("share")]
    rows = [
        [spec, f"{tensors:,}", f"{weights:,}", megabytes(size), f"{100 * size / found.weight_bytes:.1f} %"]
        for spec, (tensors, weights, size) in found.specs.items()
    ]
    print_table([Column("format", right=False), *numbers], rows)
    if args.tensors:
        write("\n")
        rows = [[t.name, " x ".join(map(str, t.shape)), t.spec, f"{t.nbytes:,}"] for t in found.tensors]
        columns = [Column(title, right=False) for title in ("tensor", "shape", "format")]
        print_table([*columns, Column("bytes")], rows)
    return 0


def print_overview(found: Description) -> None:
    """The model in a few lines: what it is, how large, where it came from."""
    rows = [
        ["model", found.name],
        ["path", str(found.path)],
        ["architecture", found.architecture],
        ["parameters", f"{found.parameters:,}"],
        ["weights", f"{megabytes(found.weight_bytes)}, {found.bits_per_weight:.2f} bits per weight"],
        ["in 16 bits", f"{megabytes(found.float16_bytes)}, {found.float16_bytes / found.weight_bytes:.2f} x as large"],
        ["quantized", "yes" if found.quantized else "no"],
        ["context", f"{found.context:,} tokens"],
        # what the writer noted for each tensor is in --tensors
        *([name, str(value)] for name, value in found.facts.items() if isinstance(value, str | int | float)),
    ]
    print_table([Column("", right=False), Column("", right=False)], rows)
