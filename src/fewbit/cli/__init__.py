"""The command line: a thin layer over the Python API, one module per verb, and the file name is the registry.

A verb module has `HELP` (one line), `add_arguments(parser)` and `run(args) -> exit code`; it imports what is heavy
inside `run`, so that help and usage errors answer at once. Data goes to standard output, everything else to standard
error. Exit codes: 0, 1 for an error, 2 for a usage error, 130 after Ctrl-C, 141 when the reader went away.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence

from fewbit.cli._failures import UsageError, explain
from fewbit.cli._parser import Parser, suggest
from fewbit.cli._terminal import print_error
from fewbit.errors import FewbitError
from fewbit.lookup import find, names

OVERVIEW = """\
usage: fewbit COMMAND [ARGUMENTS]

Quantize large language models to 2-8 bits, measure what was lost, and run them on this machine.

commands:
{commands}

MODEL is an alias (such as smollm2), a hub id (owner/name, owner/name:Q4_K_M), a folder with config.json and
safetensors files, or a .gguf file.

examples:
  fewbit run smollm2 "Why is the sky blue?"
  fewbit quantize smollm2 --format int4g32 -o out
  fewbit eval out --against smollm2 --text examples/text.txt

`fewbit COMMAND --help` tells a command's options; `fewbit --version` prints the version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Never a traceback for a user's mistake."""
    argv = list(sys.argv[1:] if argv is None else argv)
    started = time.monotonic()
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader has what it wanted; the interpreter must not complain at its own last flush either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (Exception, KeyboardInterrupt) as error:
        failure = explain(error, shlex.join(["fewbit", *argv]), time.monotonic() - started)
        if failure is None:
            raise
        print_error(failure.error, as_json="--json" in argv)
        return failure.exit_code


def _dispatch(argv: list[str]) -> int:
    verbs = names(__name__)
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {verb:<10}{find(__name__, verb).HELP}" for verb in verbs]
        print(OVERVIEW.format(commands="\n".join(lines)))
        return 0
    verb, rest = argv[0], argv[1:]
    if verb == "--version":
        from fewbit import __version__

        print(f"fewbit {__version__}")
        return 0
    if verb not in verbs:
        kind = "option" if verb.startswith("-") else "command"
        what = f"fewbit has no {kind} {verb!r}."
        raise UsageError(FewbitError(what, "A command comes first, then its arguments.", suggest(verb, verbs)))
    module = find(__name__, verb)
    parser = Parser(prog=f"fewbit {verb}", description=module.HELP)
    module.add_arguments(parser)
    code: int = module.run(parser.parse(rest))
    return code
