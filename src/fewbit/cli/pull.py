"""`fewbit pull`: bring a model here, or bring it up to date."""

from __future__ import annotations

import argparse

from fewbit.cli._parser import Parser
from fewbit.cli._terminal import note, print_json, progress, write

HELP = "fetch a model of the hub, or its newest version"


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="hub id: owner/name, with @revision, and with :FILE or a format such as :Q4_K_M for a GGUF; or an alias",
    )
    parser.add_argument("--json", action="store_true", help="print path, commit and bytes as JSON")


def run(args: argparse.Namespace) -> int:
    from fewbit import store

    wanted = store.hub_name(args.model)
    if wanted is None:
        # an alias, or what is here already
        with progress() as report:
            path = store.locate(args.model, report)
        if args.json:
            print_json({"name": args.model, "path": str(path), "commit": None})
        else:
            write(f"{path}\n")
        return 0
    from fewbit.store import hub

    with progress() as report:
        pulled = hub.pull(wanted, report)
    if args.json:
        print_json(pulled.to_dict())
        return 0
    came = f"{store.size_text(pulled.fetched)} fetched" if pulled.fetched else "nothing new"
    note(f"{pulled.name}: commit {pulled.commit[:8]}, {store.size_text(pulled.bytes)}, {came}")
    write(f"{pulled.path}\n")
    return 0
