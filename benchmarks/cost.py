"""Time and memory of GPTQ at int4g64 beside GPTQModel's, on the same machine, model and tokens, one after the other.

    python benchmarks/cost.py MODEL_FOLDER CALIBRATION --python INTERPRETER [--windows 128]

INTERPRETER has GPTQModel 7.7.0 installed (see benchmarks/peers.py). Counted are the seconds of quantizing: without
imports, loading and saving for the peer (its kernels compiled beforehand); with all of its work, files included, for
fewbit. Memory is anonymous memory above imports. Both use all cores; with another load on the machine the ratio is
worthless.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from _chain import windows
from _marks import Mark, finish

from fewbit import quantize
from fewbit.memory import PeakMemory

QUANTIZER = Path(__file__).with_name("_peer_quantizers.py")
# with two cores its worker pool does not start: it must be told that there are more
COUNT_CORES = "import os, runpy, sys; os.cpu_count = lambda: max(4, len(os.sched_getaffinity(0))); sys.argv.pop(0); "
RUN = "runpy.run_path(sys.argv[0], run_name='__main__')"


def ours(model: Path, out: Path, calibration: Path, count: int, answer: multiprocessing.queues.Queue) -> None:  # type: ignore[type-arg]
    """In a process of its own, so that nothing else counts."""
    with PeakMemory() as memory:
        summary = quantize(model, out, method="gptq", head="16bit", calibration=str(calibration), windows=count)
    answer.put((summary.seconds, memory.peak))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--python", required=True)
    parser.add_argument("--windows", type=int, default=128)
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp())
    spawn = multiprocessing.get_context("spawn")
    try:
        answer = spawn.Queue()
        worker = spawn.Process(target=ours, args=(args.model, scratch / "o", args.calibration, args.windows, answer))
        worker.start()
        seconds, peak = answer.get()
        worker.join()
        print(f"fewbit: {seconds:.0f} s, peak {peak / 1e9:.2f} GB", flush=True)
        np.save(scratch / "tokens.npy", windows(args.model, args.calibration, args.windows).numpy())
        (scratch / "peer").mkdir()
        command = [args.python, "-c", COUNT_CORES + RUN, str(QUANTIZER), "gptqmodel-int4", str(args.model)]
        command += [str(scratch / "tokens.npy"), str(scratch / "peer")]
        subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=scratch)
        peer = json.loads((scratch / "peer" / "peer.json").read_text())
        print(f"{peer['package']} {peer['version']}: {peer['seconds']:.0f} s", flush=True)
    finally:
        shutil.rmtree(scratch)
    marks = [
        Mark("GPTQ's time over GPTQModel's", seconds / peer["seconds"], 0.5),
        Mark("peak anonymous memory in GB", peak / 1e9, 1.5),
    ]
    finish("cost", marks, {"seconds": seconds, "peak_bytes": peak, "peer": peer})


if __name__ == "__main__":
    main()
