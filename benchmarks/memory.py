"""Peak memory of quantizing a random model of Llama-3.2-1B's shape (1.24 billion weights, four shards, bf16).

    python benchmarks/memory.py [--scratch DIR]

Round to nearest, and GPTQ on 32 windows of 512 tokens (a quarter of an hour on two cores). Counts anonymous memory
above imports; the files are mapped. Needs about 4 GB of disk.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path

from _marks import Mark, finish
from _random_model import write_random

from fewbit import quantize
from fewbit.memory import PeakMemory

WINDOWS = 32
# format, method, most GB
RUNS = (("int4g64", "rtn", 1.5), ("int8", "rtn", 1.5), ("int4g64", "gptq", 4.0))


def measure(
    folder: Path, out: Path, spec: str, method: str, answer: multiprocessing.queues.Queue[tuple[int, float]]
) -> None:
    """In a process of its own, so that nothing else counts."""
    start = time.perf_counter()
    with PeakMemory() as memory:
        quantize(folder, out, format=spec, method=method, windows=WINDOWS)
    answer.put((memory.peak, time.perf_counter() - start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, help="where to put the random model (default: the temporary folder)")
    parser.add_argument("--only", help="runs of this method")
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=args.scratch))
    spawn = multiprocessing.get_context("spawn")
    figures, marks = {}, []
    try:
        count = write_random(scratch / "model")
        for spec, method, most in RUNS:
            if args.only not in (None, method):
                continue
            answer = spawn.Queue()
            out = scratch / f"{spec}-{method}"
            worker = spawn.Process(target=measure, args=(scratch / "model", out, spec, method, answer))
            worker.start()
            peak, seconds = answer.get()
            worker.join()
            figures[f"{spec} {method}"] = {"weights": count, "peak_bytes": peak, "seconds": seconds}
            print(f"{spec} by {method}: {count / 1e9:.2f} billion weights in {seconds:.0f} s, peak {peak / 1e9:.3f} GB")
            marks.append(Mark(f"peak anonymous memory in GB, {spec} by {method}", peak / 1e9, most))
    finally:
        shutil.rmtree(scratch)
    finish("memory", marks, figures)


if __name__ == "__main__":
    main()
