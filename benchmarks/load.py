"""Opening a random int4g64 model of Llama-3.2-1B's shape whose packed weights are in the cache.

    python benchmarks/load.py [--scratch DIR] [--runs 3]

Seconds of `fewbit.load` (imports are over by then), and the memory it takes with a short answer: the peak of anonymous
memory above imports, and the whole mapped file, though all processes share it. Keys and values are few and part of it.
Needs about 5 GB of disk. The first load, which packs, and a prompt of 512 tokens are told but have no mark.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from _marks import Mark, finish
from memory import write_random

from fewbit import load, quantize
from fewbit.memory import PeakMemory
from fewbit.runtime.engine import LanguageModel
from fewbit.store import prepared_bytes

SHORT, LONG, STEPS = 16, 512, 8


def measure(folder: Path, answer: Any) -> None:
    """In a process of its own, so that nothing else counts."""
    with PeakMemory() as short:
        start = time.perf_counter()
        model = load(folder, context=1024, device="cpu")
        seconds = time.perf_counter() - start
        answered(model, SHORT)
    with PeakMemory() as long:
        answered(model, LONG)
    figures = {"seconds": seconds, "anonymous": short.peak, "mapped": prepared_bytes(), "prompt": long.peak}
    answer.put(figures | {"note": model.prepared_note})


def answered(model: LanguageModel, tokens: int) -> None:
    for _ in model.generate([i % 200 for i in range(tokens)], max_tokens=STEPS):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, help="where to put the models (default: the temporary folder)")
    parser.add_argument("--runs", type=int, default=3, help="loads from the warm cache; the median counts")
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=args.scratch))
    os.environ["XDG_CACHE_HOME"], os.environ["XDG_DATA_HOME"] = str(scratch / "cache"), str(scratch / "data")
    spawn = multiprocessing.get_context("spawn")
    runs = []
    try:
        write_random(scratch / "float")
        quantize(scratch / "float", scratch / "model", format="int4g64", head="int8", method="rtn")
        shutil.rmtree(scratch / "float")
        for i in range(1 + args.runs):
            answer = spawn.Queue()
            worker = spawn.Process(target=measure, args=(scratch / "model", answer))
            worker.start()
            found = answer.get()
            worker.join()
            runs.append(found)
            print(
                f"{'warm' if i else 'first'}: {found['seconds']:.2f} s; {found['mapped'] / 1e9:.3f} GB mapped, "
                f"{found['anonymous'] / 1e9:.3f} GB anonymous; {found['prompt'] / 1e9:.3f} GB more for {LONG} tokens"
            )
        size = sum(f.stat().st_size for f in (scratch / "model").glob("*.safetensors"))
    finally:
        shutil.rmtree(scratch)
    warm = runs[1:]
    seconds = statistics.median(r["seconds"] for r in warm)
    share = max(r["anonymous"] + r["mapped"] for r in warm) / size
    marks = [
        Mark("seconds to open 1.2 billion weights at int4g64, packed weights in the cache", seconds, 1.0),
        Mark("memory held above imports over the file's size", share, 1.15),
    ]
    finish("load", marks, {"file_bytes": size, "runs": runs})


if __name__ == "__main__":
    main()
