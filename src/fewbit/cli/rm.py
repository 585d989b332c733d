"""`fewbit rm`: free what models take."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from fewbit.cli._failures import UsageError
from fewbit.cli._parser import Parser
from fewbit.cli._terminal import note, print_json, write
from fewbit.errors import FewbitError

if TYPE_CHECKING:
    from fewbit.store import removal

HELP = "remove models and say what that freed"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="*", help="as fewbit ls shows it, or the path of a folder")
    parser.add_argument(
        "--prepared", action="store_true", help="packed weights and compiled kernels, which the next load makes again"
    )
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    parser.add_argument("--json", action="store_true", help="print what was freed as JSON")


def run(args: argparse.Namespace) -> int:
    if not args.name and not args.prepared:
        raise UsageError(
            FewbitError(
                "fewbit rm needs a name.", "Neither NAME nor --prepared was given.", "fewbit ls shows the names."
            )
        )
    from fewbit.store import removal

    removal.sweep()
    removals = [removal.plan(name) for name in dict.fromkeys(args.name)]
    if args.prepared:
        removals.append(removal.plan_prepared())
    freed = {}
    for planned in removals:
        if planned.asks and not args.yes and not _confirmed(planned):
            note(f"{planned.name} stays.")
            continue
        freed[planned.name] = planned.carry_out()
        if not args.json:
            write(f"{planned.name}: {_size(freed[planned.name])} freed\n")
        if planned.note:
            note(planned.note)
    if args.json:
        print_json({"freed_bytes": sum(freed.values()), "removed": freed})
    return 0 if len(freed) == len(removals) else 1


def _size(count: int) -> str:
    from fewbit.store import size_text

    return size_text(count) if count else "nothing"


def _confirmed(planned: removal.Removal) -> bool:
    if sys.stdin is None or not sys.stdin.isatty():
        raise FewbitError(
            f"{planned.name} is removed only when you say so.",
            f"{planned.asks}? Nobody is there to answer.",
            "Add --yes to remove it without a question.",
        )
    write(f"{planned.asks}? [y/N] ", sys.stderr)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
