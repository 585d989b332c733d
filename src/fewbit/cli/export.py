"""`fewbit export`: a model in the layouts that other engines load."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fewbit.cli._parser import Parser, count
from fewbit.cli._terminal import Column, megabytes, note, print_json, print_table, progress, write

if TYPE_CHECKING:
    from fewbit.exports import Summary
    from fewbit.verification import Check, Verification

HELP = "write a model so that llama.cpp, vLLM and others load it"
TARGETS = ("gguf", "compressed-tensors", "gptq", "awq")
TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k", "f16", "bf16", "f32")


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="alias, folder or .gguf file; quantized or in full precision")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, type=Path, help="file or folder to write")
    parser.add_argument("--to", required=True, choices=TARGETS, help="gguf: llama.cpp, Ollama; others: vLLM and kin")
    parser.add_argument(
        "--type", choices=TYPES, metavar="TYPE", help=f"gguf: {', '.join(TYPES)} (default: what keeps codes, or q4_k)"
    )
    parser.add_argument(
        "--head", metavar="TYPE", help="gguf: type of embedding and head (folders keep them in 16 bits)"
    )
    group = parser.add_argument_group("folders: quantize first (a model in full precision, or one with other codes)")
    group.add_argument("--format", metavar="SPEC", help="int4g64, int4g128a, int8, ...")
    group.add_argument("--method", help="as in fewbit quantize (default auto)")
    group.add_argument("--effort", type=int, choices=range(4), metavar="N", help="0 to 3 (default 1)")
    group.add_argument("--calibration", metavar="FILE|DATASET|self", help="text to calibrate on")
    group.add_argument("--windows", type=count, metavar="N", help="windows of calibration text")
    group.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--for",
        dest="engine",
        choices=("vllm", "transformers"),
        default="vllm",
        help="folders: what this engine would refuse is refused before it is written (default %(default)s)",
    )
    parser.add_argument("--verify", action="store_true", help="load the export in its engines and compare with fewbit")
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="PATH",
        help="an interpreter that has an engine, such as VENV/bin/python; may be given several times",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    from fewbit import model_card, store
    from fewbit.exports import export
    from fewbit.source import open_source
    from fewbit.verification import verify

    chosen = ("method", "effort", "calibration", "windows", "device")
    options = {name: getattr(args, name) for name in chosen if getattr(args, name) is not None}
    with progress() as report:
        summary = export(
            args.model,
            args.output,
            to=args.to,
            type=args.type,
            format=args.format,
            head=args.head,
            engine=args.engine,
            progress=report,
            note=note,
            **options,
        )
        facts = open_source(summary.path).checkpoint.facts()
        model_card.write(summary, facts)
        found = None
        if args.verify:
            path = Path(summary.path)
            found = verify(path, args.to, args.python, lambda text: report(0, 1, text), store.locate(args.model))
            model_card.write(summary, facts, found)
    if args.json:
        print_json(summary.to_dict() | {"verification": found.to_dict() if found else None})
    else:
        write(describe(summary))
        if found:
            _print(found)
    return 1 if found and found.failed else 0


def describe(summary: Summary) -> str:
    """The summary in a few lines."""
    specs = ", ".join(f"{count} {spec.removeprefix('gguf:')}" for spec, count in summary.specs.items())
    exact = "every weight has the value it has in the source" if summary.exact else "weights are rounded"
    lines = [
        f"{summary.path}: {summary.to}, {summary.format}, in {summary.seconds:.1f} s",
        f"  {megabytes(summary.weight_bytes)} ({megabytes(summary.source_bytes)} in the source); tensors: {specs}",
        f"  {exact}" + "".join(f"\n  {text}" for text in summary.notes),
    ]
    return "\n".join(lines) + "\n"


def _print(found: Verification) -> None:
    write("\n")
    columns = [Column("engine", right=False), Column("version", right=False)]
    columns += [Column("KL"), Column("largest gap"), Column("same choice"), Column("", right=False)]
    print_table(columns, [_row(check) for check in found.checks])
    if found.source_kl is not None:
        write(f"\nmean KL of the export from its source on these {found.tokens} tokens: {found.source_kl:.2g}\n")


def _row(check: Check) -> list[str]:
    if check.install is not None:
        return [check.engine, "absent", "", "", "", f"not tried: {check.install}"]
    if check.refused is not None:
        return [check.engine, "", "", "", "", f"does not load such: {check.refused}"]
    if check.kl is None or check.gap is None or check.same is None:
        return [check.engine, check.version, "", "", "", f"failed: {check.error}"]
    said = "agrees" if check.agrees else "does not agree"
    if check.twin_kl is not None and check.twin_gap is not None:
        said += f"; float32 twin: KL {max(check.twin_kl, 0):.1g}, gap {check.twin_gap:.3f}"
    if check.tokens_differ:
        said += f"; its tokenizer cuts {len(check.tokens_differ)} of the texts otherwise"
    kl = f"{max(check.kl, 0):.2g}"
    return [check.engine, check.version, kl, f"{check.gap:.3f}", f"{100 * check.same:.1f} %", said]
