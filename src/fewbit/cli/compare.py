"""`fewbit compare`: eval's figures for anybody's quantized files, beside what the files say of themselves."""

from __future__ import annotations

import argparse

from fewbit.cli._models import fetch
from fewbit.cli._parser import Parser
from fewbit.cli._terminal import Column, megabytes, print_table, write
from fewbit.cli.eval import add_measuring, measure, named_files, task_names

HELP = "check anybody's quantized files (GPTQ, AWQ, compressed-tensors, GGUF) against the model they were made from"

COLUMNS = [
    Column("model", right=False),
    Column("method", right=False),
    Column("format", right=False),
    Column("bits"),
    Column("size"),
    Column("bits/weight"),
]


def add_arguments(parser: Parser) -> None:
    add_measuring(parser)
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="run the default kernels, which may round activations (default: float activations)",
    )


def run(args: argparse.Namespace) -> int:
    # usage errors come before the table
    task_names(args, "compare")
    named_files(args.text or [])
    from fewbit.origin import origin
    from fewbit.source import describe_source, open_source

    fetch(*args.model, args.against)
    sources = [open_source(model) for model in args.model]
    said = [origin(source) for source in sources]
    if not args.json:
        rows = []
        for source, found in zip(sources, said, strict=True):
            size = describe_source(source)
            counted = f"{size.bits_per_weight:.2f}"
            rows.append([source.name, found.method, found.format, found.bits, megabytes(size.weight_bytes), counted])
        print_table(COLUMNS, rows)
        write("\n")
    return measure(args, exact=not args.kernels, origins=[found.to_dict() for found in said])
