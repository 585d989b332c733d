"""Loading a random model from files onto a card: GB/s, and the host memory it takes meanwhile.

    python benchmarks/gpu_load.py [--shape llama-3.1-8b] [--formats int4g128] [--scratch DIR] [--runs 3] [--cold]

Beside `cat FILES > /dev/null`, and a plain loop that reads into two pinned buffers in turn and copies them to the card.
Memory: the most that the process held in anonymous memory while it loaded (the ring of pinned buffers is part of it),
beside what torch's allocator has pinned, above what stays when the model is loaded. --cold drops the files from the
page cache before each reading, where the system heeds that.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _marks import Mark, finish
from _random_model import write_packed

from fewbit import load
from fewbit.memory import PeakMemory, anonymous_bytes

MOST_HOST_BYTES = 1e9
BUFFER = 16 << 20


def forget(files: list[Path]) -> None:
    """Ask the system to drop the files from its page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def cat(files: list[Path]) -> float:
    start = time.perf_counter()
    with Path("/dev/null").open("wb") as nowhere:
        subprocess.run(["cat", *map(str, files)], stdout=nowhere, check=True)
    return time.perf_counter() - start


def plain_loop(files: list[Path], device: torch.device) -> float:
    """Read and copy, with two buffers."""
    buffers = [torch.empty(BUFFER, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    done = [torch.cuda.Event() for _ in buffers]
    there = torch.empty(BUFFER, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    start, turn = time.perf_counter(), 0
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while True:
                done[turn].synchronize()
                if not (count := opened.readinto(memoryview(buffers[turn].numpy()))):
                    break
                there[:count].copy_(buffers[turn][:count], non_blocking=True)
                done[turn].record()
                turn = 1 - turn
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def loaded(folder: Path) -> dict[str, Any]:
    """Seconds and bytes of one load."""
    with PeakMemory() as memory:
        start = time.perf_counter()
        model = load(folder, context=1024, device="cuda:0")
        model.synchronize()
        seconds = time.perf_counter() - start
    pinned = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0)
    above = memory.before + memory.peak - anonymous_bytes()
    card = torch.cuda.max_memory_allocated()
    return {"seconds": seconds, "above": above, "pinned": pinned, "card": card, "plan": model.plan.total}


def run(folder: Path, runs: int, cold: bool, answer: Any) -> None:
    """In a process of its own, so that nothing else counts."""
    files, device = sorted(folder.glob("*.safetensors")), torch.device("cuda", 0)
    total = sum(f.stat().st_size for f in files)
    torch.zeros(1, device=device)
    found: list[dict[str, Any]] = []
    for i in range(runs + 1):
        figures: dict[str, Any] = {}
        for name, call in {
            "fewbit": lambda: loaded(folder), "cat": lambda: cat(files), "loop": lambda: plain_loop(files, device)
        }.items():  # fmt: skip
            if cold:
                forget(files)
            came = call()
            figures |= came if isinstance(came, dict) else {f"{name}_seconds": came}
            torch.cuda.empty_cache()
        rates = {name: total / figures[s] / 1e9 for name, s in
                 (("fewbit", "seconds"), ("cat", "cat_seconds"), ("loop", "loop_seconds"))}  # fmt: skip
        host = (figures["above"] + figures["pinned"]) / 1e9
        print(f"{'first' if i == 0 else 'run'}: " + ", ".join(f"{n} {r:.2f} GB/s" for n, r in rates.items()), end="")
        print(f"; {figures['seconds']:.2f} s, {host:.2f} GB of host memory above what stays", flush=True)
        found.append(figures | rates | {"host_gb": host})
    answer.put(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--formats", default="int4g128")
    parser.add_argument("--scratch", type=Path, help="where to put the model (default: the temporary folder)")
    parser.add_argument("--runs", type=int, default=3, help="after a first one, which warms up")
    parser.add_argument("--cold", action="store_true")
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=args.scratch))
    spawn = multiprocessing.get_context("spawn")
    try:
        start = time.perf_counter()
        size = write_packed(scratch / "model", args.shape, args.formats, torch.device("cuda", 0))
        print(f"{args.shape} {args.formats}: {size / 1e9:.2f} GB written in {time.perf_counter() - start:.0f} s")
        torch.cuda.empty_cache()
        answer = spawn.Queue()
        worker = spawn.Process(target=run, args=(scratch / "model", args.runs, args.cold, answer))
        worker.start()
        found = answer.get()
        worker.join()
    finally:
        shutil.rmtree(scratch)
    warm = found[1:]
    figures = {name: statistics.median(f[name] for f in warm) for name in ("fewbit", "cat", "loop", "seconds")}
    figures |= {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "bytes": size, "runs": found}
    marks = [
        Mark(
            "bytes of host memory while loading, above what stays",
            1e9 * max(f["host_gb"] for f in warm),
            MOST_HOST_BYTES,
        )
    ]
    print(f"fewbit {figures['fewbit']:.2f} GB/s, cat {figures['cat']:.2f}, a plain loop {figures['loop']:.2f}")
    finish("gpu_load", marks, figures)


if __name__ == "__main__":
    main()
