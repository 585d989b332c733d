"""Opening a random int4g64 model of Llama-3.2-1B's shape whose packed weights are in the cache.

    python benchmarks/load.py [--scratch DIR] [--runs 3]

Seconds of `fewbit.load` (imports are over by then), and the most memory held above imports, beside what the model's
file and the cache of keys and values take. Memory counts anonymous and mapped pages alike: mapped weights are held too,
if by all processes together. Needs about 5 GB of disk. The first load, which packs, is told but has no mark.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from _marks import Mark, finish
from memory import write_random

from fewbit import load, quantize
from fewbit.memory import PeakMemory

CONTEXT = 1024
STEPS = 8


class PeakHeld:
    """Most bytes of all resident pages, files' pages included, above the start (VmRSS)."""

    def __enter__(self) -> PeakHeld:
        self.before = self.highest = resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.005):
            self.highest = max(self.highest, resident())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.highest = max(self.highest, resident())


def resident() -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def measure(folder: Path, answer: Any) -> None:
    """In a process of its own: open, then run a prompt over the whole context, so that the cache is held as well."""
    import fewbit.runtime.engine  # noqa: F401

    with PeakHeld() as held, PeakMemory() as anonymous:
        start = time.perf_counter()
        model = load(folder, context=CONTEXT)
        seconds = time.perf_counter() - start
        prompt = [i % 200 for i in range(CONTEXT - STEPS)]
        for _ in model.generate(prompt, max_tokens=STEPS):
            pass
    caches = [b.attention for b in model.model.blocks]
    kv = sum(t.nbytes for a in caches for t in (a.k_cache, a.v_cache))
    held_bytes = held.highest - held.before
    answer.put(
        {"seconds": seconds, "held": held_bytes, "anonymous": anonymous.peak, "kv": kv, "note": model.prepared_note}
    )


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
                f"{'warm' if i else 'first'}: {found['seconds']:.2f} s; {found['held'] / 1e9:.3f} GB held, "
                f"{found['anonymous'] / 1e9:.3f} GB of it anonymous, {found['kv'] / 1e9:.3f} GB keys and values"
            )
        size = sum(f.stat().st_size for f in (scratch / "model").glob("*.safetensors"))
    finally:
        shutil.rmtree(scratch)
    warm = runs[1:]
    seconds = statistics.median(r["seconds"] for r in warm)
    share = max((r["held"] - r["kv"]) / size for r in warm)
    marks = [
        Mark("seconds to open 1.2 billion weights at int4g64, packed weights in the cache", seconds, 1.0),
        Mark("memory held above imports, without keys and values, over the file's size", share, 1.15),
    ]
    finish("load", marks, {"file_bytes": size, "runs": runs})


if __name__ == "__main__":
    main()
