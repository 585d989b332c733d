"""`fewbit ls`: the models that can be run by name."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from fewbit.cli._parser import Parser
from fewbit.cli._terminal import Column, megabytes, note, print_json, print_table

HELP = "list the models that can be run by name"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print the list as JSON")


def run(args: argparse.Namespace) -> int:
    from fewbit import store

    entries, prepared = store.listing(), store.prepared_bytes()
    if args.json:
        models = [{**asdict(e), "path": str(e.path)} for e in entries]
        print_json({"cache": str(store.cache_dir()), "prepared_bytes": prepared, "models": models})
        return 0
    columns = [
        Column("name", right=False),
        Column("size"),
        *(Column(t, right=False) for t in ("kind", "detail", "path")),
    ]
    print_table(columns, [[e.name, megabytes(e.bytes), e.kind, e.detail, str(e.path)] for e in entries])
    if prepared:
        note(f"Prepared layouts take {megabytes(prepared)} in {store.prepared_dir()}; removed, they are made again.")
    return 0
