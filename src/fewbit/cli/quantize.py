"""`fewbit quantize`: a model in, a folder of few-bit weights out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbit.cli._parser import BITS_HELP, MODEL_HELP, Parser, count, format_of_bits, size
from fewbit.cli._terminal import megabytes, note, print_json, progress, write
from fewbit.errors import FewbitError

if TYPE_CHECKING:
    from fewbit.quantizer import Summary

# options that mean the same whether one format is given or a size
SHARED = (
    "method", "effort", "scales", "calibration", "windows", "length", "drift", "prefix", "weighting", "offload",
    "device", "restart", "log",
)  # fmt: skip
HELP = "store a model's weights in few bits"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "-o", "--output", metavar="OUT", required=True, type=Path, help="folder to write; must not exist"
    )
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument(
        "--format", metavar="SPEC", help="intN, intNgM or intNgMa: N bits, M inputs share a scale (default int4g64)"
    )
    bits.add_argument(
        "--bits",
        choices=(*map(str, range(2, 9)), "mixed"),
        metavar="N|mixed",
        help=f"{BITS_HELP}; mixed: int4g64 with int8 where it matters most, 6 bits for the head",
    )
    bits.add_argument(
        "--size", type=size, metavar="40GB", help="choose bits for every matrix so that the weight files take so much"
    )
    bits.add_argument("--bpw", type=bits_per_weight, metavar="N", help="the same by bits for each weight, such as 3.2")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="JSON: names of tensors (with *) and their formats")
    parser.add_argument(
        "--method", default="auto", help="auto, rtn, gptq, awq, awq+gptq or tuned (default %(default)s)"
    )
    parser.add_argument(
        "--effort",
        type=int,
        choices=range(4),
        default=1,
        metavar="N",
        help="0: no calibration, seconds; 1: minutes; 2: longer; 3: best, wants a GPU (default %(default)s)",
    )
    parser.add_argument("--head", metavar="int8|16bit|SPEC", help="embedding and output head (default int8)")
    parser.add_argument(
        "--scales",
        choices=("search", "minmax"),
        default="search",
        help="least squared error, or the textbook map (default %(default)s)",
    )
    _add_calibration(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default %(default)s)")
    parser.add_argument("--restart", action="store_true", help="begin anew where an unfinished output lies")
    parser.add_argument("--log", type=Path, metavar="FILE", help="append one JSON line a matrix: errors and seconds")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def _add_calibration(parser: Parser) -> None:
    group = parser.add_argument_group("calibration (methods other than rtn)")
    group.add_argument(
        "--calibration",
        metavar="FILE|DATASET|self",
        help="a text or .jsonl file, owner/name of a hub dataset, or self: the model writes it (default: fewbit's own)",
    )
    group.add_argument("--windows", type=count, metavar="N", help="windows of text (default 128)")
    group.add_argument("--length", type=count, metavar="N", help="tokens a window (default 512)")
    group.add_argument(
        "--drift",
        type=float,
        metavar="SHARE",
        help="let each linear make good this share of what the quantized ones before it changed (default: a quarter "
        "up to 3 bits, 0 above)",
    )
    group.add_argument(
        "--weighting",
        choices=("loss", "even"),
        default="loss",
        help="what a token counts: by the loss's gradients, or all the same (default %(default)s)",
    )
    group.add_argument(
        "--prefix",
        choices=("quantized", "original"),
        default="quantized",
        help="whose activations to calibrate on (default %(default)s)",
    )
    group.add_argument("--offload", action="store_true", help="keep activations on disk instead of in memory")


def run(args: argparse.Namespace) -> int:
    shared = {name: getattr(args, name) for name in SHARED}
    fitted = args.size is not None or args.bpw is not None
    if fitted and (args.recipe or args.head):
        raise FewbitError(
            "A size leaves no format to choose.",
            f"--{'recipe' if args.recipe else 'head'} names one, and --size or --bpw choose all of them.",
            "Leave out one of the two.",
        )
    with progress() as report:
        return _fit(args, shared, report) if fitted else _quantize(args, shared, report)


def _quantize(args: argparse.Namespace, shared: dict[str, Any], report: Callable[[int, int, str], None]) -> int:
    import fewbit

    mixed = args.bits == "mixed"
    summary = fewbit.quantize(
        args.model,
        args.output,
        format=args.format or format_of_bits(4 if mixed else int(args.bits or 4)),
        recipe=args.bits if mixed else args.recipe,
        head=args.head or "int8",
        progress=report,
        note=note,
        **shared,
    )
    if args.json:
        print_json(summary.to_dict())
    else:
        write(describe(summary))
    return 0


def _fit(args: argparse.Namespace, shared: dict[str, Any], report: Callable[[int, int, str], None]) -> int:
    from fewbit.fitting import fit

    found = fit(args.model, args.output, size=args.size, bits_per_weight=args.bpw, progress=report, note=note, **shared)
    if args.json:
        print_json(found.to_dict())
        return 0
    write(describe(found.summary))
    verdict = found.uniform if found.kept == "uniform" else found.mixed
    if verdict is not None:
        write(
            f"  KL {verdict.kl:.4f} ± {verdict.error:.4f} on calibration text held out (a mixture, predicted "
            f"{found.predicted:.4f})\n"
        )
    return 0


def bits_per_weight(text: str) -> float:
    """An option's number from 1 to 16."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 1 <= number <= 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 16")
    return number


def describe(summary: Summary) -> str:
    """The summary in three lines."""
    return (
        f"{summary.path}: {summary.format} by {summary.method}, head {summary.head}, in {summary.seconds:.1f} s\n"
        f"  {megabytes(summary.weight_bytes)} of weights, {summary.bits_per_weight:.2f} bits per weight\n"
        f"  {summary.float16_bytes / summary.weight_bytes:.2f} x smaller than 16 bits "
        f"({megabytes(summary.float16_bytes)}), {summary.source_bytes / summary.weight_bytes:.2f} x smaller than the "
        f"source ({megabytes(summary.source_bytes)})\n"
    )
