"""`fewbit bench`: how fast a model reads and writes on this machine."""

from __future__ import annotations

import argparse

from fewbit.cli._parser import Parser, count
from fewbit.cli._terminal import Column, print_json, print_table, progress

HELP = "measure prompt and decode tokens/s, load time, peak memory"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="alias, folder or .gguf file")
    parser.add_argument("--prompt", type=count, default=512, metavar="N", help="prompt tokens (default %(default)s)")
    parser.add_argument("--new", type=count, default=64, metavar="N", help="tokens to decode (default %(default)s)")
    parser.add_argument("--threads", type=count, metavar="N", help="default: the machine's cores")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    from fewbit.runtime.speed import measure_speed

    with progress() as report:
        speed = measure_speed(args.model, prompt=args.prompt, new=args.new, threads=args.threads, progress=report)
    if args.json:
        print_json(speed.to_dict())
        return 0
    backends = ", ".join(f"{name} ({times})" for name, times in speed.backends.items())
    rows = [
        ["model", speed.model],
        ["load", f"{speed.load_seconds:.2f} s"],
        ["prompt", f"{speed.prompt_rate:.1f} tokens/s ({speed.prompt_tokens} tokens)"],
        ["decode", f"{speed.decode_rate:.1f} tokens/s ({speed.new_tokens} tokens)"],
        ["weights", f"{speed.weight_bytes / 1e6:.1f} MB, read at {speed.read_rate:.2f} GB/s while decoding"],
        ["peak memory", f"{speed.peak_memory / 2**20:.0f} MiB above imports"],
        ["threads", str(speed.threads)],
        ["backends", backends],
    ]
    print_table([Column("", right=False), Column("", right=False)], rows)
    return 0
