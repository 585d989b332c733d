"""argparse with three-part errors that name the nearest option."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from fewbit.cli._failures import UsageError
from fewbit.config_values import parse_bytes
from fewbit.errors import FewbitError
from fewbit.lookup import nearest

# what MODEL may be, for the verbs that take one
MODEL_HELP = "alias, hub id (owner/name[@revision][:file or format]), folder or .gguf file"
BITS_HELP = "2 to 8; 8 means int8, others intNg64"


class Parser(argparse.ArgumentParser):
    """The parser of one verb."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Parse `argv`; raises UsageError (FewbitError) for anything left over."""
        # intermixed: plain argparse decides that PROMPT is absent as soon as an option follows MODEL
        args, extra = self.parse_known_intermixed_args(argv)
        if not extra:
            return args
        first = extra[0]
        if first.startswith("-"):
            options = sorted({o for a in self._actions for o in a.option_strings if o.startswith("--")})
            raise self._mistake(f"{self.prog} has no option {first!r}.", suggest(first.partition("=")[0], options))
        raise self._mistake(
            f"{self.prog} does not expect another argument: {first!r}.", "Quote an argument that holds spaces."
        )

    def error(self, message: str) -> NoReturn:
        """argparse's own complaint, in three parts."""
        raise self._mistake(f"{self.prog}: {message}.", f"See `{self.prog} --help`.")

    def _mistake(self, what: str, next_step: str) -> UsageError:
        return UsageError(FewbitError(what, " ".join(self.format_usage().split()), next_step))


def suggest(name: str, known: list[str]) -> str:
    """A sentence with the spellings nearest to `name`, or all of them."""
    hint = nearest(name, known)
    return hint[0].upper() + hint[1:]


def add_cache(parser: argparse._ActionsContainer) -> None:
    """The option of every verb that runs a model; `runtime.engine.CACHES` has the same names."""
    parser.add_argument(
        "--cache",
        choices=("16bit", "int8", "int4"),
        help="keep keys and values in 16 bits (default), in 8: half the memory, less to read at long contexts; or in "
        "4: less than a third, at a price in quality; exact runs keep them in float32",
    )


def count(text: str) -> int:
    """An option's whole number from 1 up."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return number


def format_of_bits(bits: int) -> str:
    """What `--bits N` stands for: 8 bits need no groups to be near lossless, fewer do."""
    return "int8" if bits == 8 else f"int{bits}g64"


def add_device(parser: argparse._ActionsContainer, default: str = "auto") -> None:
    """`--device` of every verb that runs a model."""
    parser.add_argument(
        "--device",
        metavar="WHERE",
        default=default,
        help="auto (a card that has room, else the CPU), cpu, cuda or cuda:N (default %(default)s)",
    )


def size(text: str) -> int:
    """An option's bytes: `40GB`, `16GiB`, `56MB`."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
