"""GGUF files beside llama.cpp, each engine running the very same file, in one run.

    python benchmarks/gguf_speed.py FILE.gguf ... --llama-bench PATH [--threads 2] [--rounds 5] [--prompt 512]

Rounds are interleaved: a file with fewbit and then with llama.cpp. What counts is the median of the rounds' ratios, as
both sides of a round meet the same machine. Prints a row for each file, exits non-zero where fewbit decodes slower.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from _llama_bench import Peer
from _marks import Mark, finish

import fewbit
from fewbit.runtime.engine import LanguageModel
from fewbit.runtime.speed import read_bytes, time_once

NEW = 64
Rates = dict[str, float]


def fewbit_round(model: LanguageModel, prompt: int) -> Rates:
    """Tokens a second of a prompt, and of decoding from an empty cache as llama-bench does."""
    prefill = prompt / time_once(model, prompt, 1)[0]
    return {"prefill": prefill, "decode": NEW / time_once(model, 1, NEW)[1]}


def measured(file: Path, peer: Peer, args: argparse.Namespace) -> dict[str, float]:
    """Medians of the rates and of their ratios."""
    model = fewbit.load(file, threads=args.threads, device="cpu")
    fewbit_round(model, args.prompt)
    ours, theirs = [], []
    for _ in range(args.rounds):
        ours.append(fewbit_round(model, args.prompt))
        theirs.append(peer.run(file, args.threads, args.prompt, NEW))
    found = {"bytes": float(read_bytes(model)), "file": theirs[0]["bytes"]}
    for what in ("prefill", "decode"):
        found[what] = statistics.median(o[what] for o in ours)
        found[f"{what} peer"] = statistics.median(t[what] for t in theirs)
        found[f"{what} ratio"] = statistics.median(o[what] / t[what] for o, t in zip(ours, theirs, strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.gguf")
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--llama-options", default="", help="further options of llama-bench")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens (default %(default)s)")
    args = parser.parse_args()
    peer = Peer("llama.cpp", args.llama_bench, tuple(args.llama_options.split()))
    marks, figures = [], {}
    print(f"{'file':32}{'MB read':>9}{'in file':>9}{'prefill':>17}{'':>7}{'decode':>15}", flush=True)
    for file in args.files:
        found = measured(file, peer, args)
        columns = [f"{file.name:32}{found['bytes'] / 1e6:9.1f}{found['file'] / 1e6:9.1f}"]
        for what in ("prefill", "decode"):
            rates = f"{found[what]:.1f}/{found[f'{what} peer']:.1f}"
            columns.append(f"{rates:>17}{found[f'{what} ratio']:6.2f}x")
        print(" ".join(columns), flush=True)
        marks.append(Mark(f"{file.name}: decode beside llama.cpp", found["decode ratio"], 1.0, at_least=True))
        figures[file.name] = found
    finish("gguf_speed", marks, figures)


if __name__ == "__main__":
    main()
