"""`fewbit ls`: the models that are here, what they take, and when they were used."""

from __future__ import annotations

import argparse
import time

from fewbit.cli._parser import Parser
from fewbit.cli._terminal import Column, megabytes, note, print_json, print_table

HELP = "list the models that are here, with what they take"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print the list as JSON")


def run(args: argparse.Namespace) -> int:
    from fewbit import store
    from fewbit.store import hub_cache, inventory

    entries = store.listing()
    prepared = [e for e in entries if e.kind == "prepared"]
    models = [e for e in entries if e.kind != "prepared"]
    prepared_bytes, total = store.prepared_bytes(), inventory.distinct_bytes(entries)
    if args.json:
        print_json(
            {
                "cache": str(store.cache_dir()),
                "hub_cache": str(hub_cache.hub_dir()),
                "total_bytes": total,
                "prepared_bytes": prepared_bytes,
                "models": [e.to_dict() for e in models],
                "prepared": [e.to_dict() for e in prepared],
            }
        )
        return 0
    columns = [
        Column("name", right=False),
        Column("size"),
        *(Column(t, right=False) for t in ("kind", "used", "detail", "path")),
    ]
    rows = [[e.name, megabytes(e.bytes), e.kind, since(e.used), e.detail, str(e.path)] for e in entries]
    print_table(columns, rows)
    note(f"{store.size_text(total)} on the disk in all; files that several models share count once.")
    if prepared:
        note(f"Prepared layouts take {megabytes(prepared_bytes)}; fewbit rm --prepared removes what is made again.")
    return 0


def since(used: float | None) -> str:
    """When that was, in days: file systems note it no finer."""
    if used is None:
        return "-"
    days = int((time.time() - used) // 86_400)
    return "today" if days < 1 else f"{days} day{'s' if days > 1 else ''} ago"
