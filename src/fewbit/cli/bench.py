"""`fewbit bench`: how fast a model reads and writes on this machine, beside what the machine gives at most."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fewbit.cli._failures import UsageError
from fewbit.cli._parser import Parser, add_cache, add_device, count
from fewbit.cli._terminal import Column, megabytes, note, print_json, print_table, progress
from fewbit.errors import FewbitError

if TYPE_CHECKING:
    from fewbit.runtime.speed import Speed

HELP = "measure prompt and decode tokens/s, as shares of what the machine gives; load time, peak memory"
# of random weights
FORMAT = "int4g128"
SHARES = """\
A prompt is bound by multiplying, decoding by reading the weights from memory. Each figure has its share of a ceiling
measured between the runs, on the same threads:
  prefill   multiply-adds of all linears (weights times tokens) a second, over those of a plain loop of the integer
            dot product in registers
  decode    bytes of packed weights that a token reads, times tokens a second, over a plain read of a buffer far
            larger than the caches; an embedding counts only where it is the head as well
On a card the ceilings are a plain read of its memory and a large f16 product of cuBLAS.
Rates are medians; lowest and highest run stand in brackets. The rest of a share is attention, norms, unpacking and
waiting, and on a small model weights that the caches hold: there decode may come to more than 100 %."""


def add_arguments(parser: Parser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = SHARES
    parser.add_argument("model", metavar="MODEL", nargs="?", help="alias, folder or .gguf file")
    parser.add_argument(
        "--random", metavar="SHAPE", help="a known shape with random weights instead, such as llama-2-70b: no download"
    )
    parser.add_argument(
        "--format",
        metavar="SPEC",
        help=f"of random weights; exceptions by name: int2g64,down_proj=int3g64 (default {FORMAT})",
    )
    parser.add_argument("--head", metavar="SPEC", help="of a random model's embedding and head (default: --format's)")
    parser.add_argument("--prompt", type=count, default=512, metavar="N", help="prompt tokens (default %(default)s)")
    parser.add_argument(
        "--tokens", "--new", type=count, default=64, metavar="N", help="tokens to decode (default %(default)s)"
    )
    parser.add_argument("--rounds", type=count, default=5, metavar="N", help="runs to take (default %(default)s)")
    parser.add_argument("--context", type=count, metavar="N", help="tokens to keep room for (default: the model's own)")
    parser.add_argument("--threads", type=count, metavar="N", help="default: the machine's cores")
    add_device(parser)
    add_cache(parser)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    if (args.model is None) == (args.random is None):
        raise UsageError(
            FewbitError(
                "One model is needed.",
                "Got both MODEL and --random." if args.model else "Got neither MODEL nor --random.",
                "Give one of them: fewbit bench MODEL, or fewbit bench --random llama-3.2-1b",
            )
        )
    if args.model and (args.format or args.head):
        raise UsageError(
            FewbitError(
                f"{'--format' if args.format else '--head'} is for --random.",
                "A MODEL is measured in the formats its files have.",
                "Leave it out, or quantize the model first: fewbit quantize MODEL -o OUT --format SPEC",
            )
        )
    from fewbit.random_models import random_model
    from fewbit.runtime.speed import measure_speed

    with progress() as report:
        speed = measure_speed(
            random_model(args.random, args.format or FORMAT, args.head) if args.random else args.model,
            prompt=args.prompt,
            new=args.tokens,
            threads=args.threads,
            device=args.device,
            context=args.context,
            repeat=args.rounds,
            cache=args.cache,
            progress=report,
        )
    for reason in (speed.device_note, speed.prepared_note):
        if reason:
            note(f"note: {reason}")
    if args.json:
        print_json(speed.to_dict())
        return 0
    print_table([Column("", right=False)] * 4, rows(speed))
    return 0


def rows(speed: Speed) -> list[list[str]]:
    """Three lines: prefill, decode, and what they were measured on."""
    backends = ", ".join(f"{name} ({times})" for name, times in speed.backends.items())
    return [
        [
            "prefill",
            f"{speed.prompt_rate:.1f} tokens/s ({spread(speed.prompt_rates)})",
            _share(speed.prompt_share, speed.dot_ceiling, "multiply-adds/s"),
            f"{speed.prompt_tokens} tokens",
        ],
        [
            "decode",
            f"{speed.decode_rate:.1f} tokens/s ({spread(speed.decode_rates)})",
            _share(speed.decode_share, speed.read_ceiling, "B/s"),
            f"{speed.new_tokens} tokens, {megabytes(speed.read_bytes)} each, {speed.cache} cache",
        ],
        [
            "model",
            f"{speed.model}, {megabytes(speed.weight_bytes)}",
            f"loaded in {speed.load_seconds:.2f} s, {speed.peak_memory / 2**20:.0f} MiB at most above imports",
            f"{machine(speed)}: {backends}",
        ],
    ]


def machine(speed: Speed) -> str:
    """What ran it: threads and their instruction set, or the card and what is in use of its memory."""
    if speed.card_memory is None:
        return f"{speed.threads} threads, {speed.instruction_set or 'no native kernels'}"
    return f"{speed.device}, {speed.card_memory / 2**30:.1f} GiB of it in use"


def spread(rates: tuple[float, ...]) -> str:
    """`40.1 to 42.3` of several rates."""
    return f"{min(rates):.1f} to {max(rates):.1f}"


def _share(share: float | None, ceiling: float | None, unit: str) -> str:
    if share is None or ceiling is None:
        return "no ceiling known"
    return f"{100 * share:.0f} % of {ceiling / 1e9:.1f} G{' ' if unit[0] == 'm' else ''}{unit}"
