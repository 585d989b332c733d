"""Speed beside PyTorch on the same machine, threads and model, in one run.

    python benchmarks/speed.py [MODEL] [--threads 2] [--rounds 7]

Decode: fewbit's int4g32 and int8 against the same model unquantized in PyTorch bf16, run two ways (transformers, and
fewbit's own model with torch's bf16 products and torch operations); the faster of the two is the baseline. Rounds are
interleaved and medians compared. Then the times of a cold start. Only the ratio does not depend on the machine's hour.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _marks import Mark, finish

import fewbit
from fewbit import kernels
from fewbit.kernels.dense import Dense
from fewbit.kernels.ops import Ops
from fewbit.kernels.reference import Reference
from fewbit.runtime.engine import LanguageModel
from fewbit.runtime.speed import time_once

PROMPT, NEW = 32, 64


class TorchDense(Dense):
    """Torch's products and torch's operations only."""

    ops = Ops()


def bf16_folder(model: str, out: Path) -> Path:
    """The model's weights expanded to bf16, as a Hugging Face folder."""
    fewbit.quantize(model, out, format="bf16", head="bf16", method="rtn")
    return out


def torch_model(folder: Path) -> LanguageModel:
    """fewbit's model on torch alone."""
    available = kernels.available
    kernels.available = lambda exact=False, device="cpu": [TorchDense(), Reference()]  # noqa: ARG005
    try:
        return fewbit.load(folder, device="cpu")
    finally:
        kernels.available = available


def transformers_runner(folder: Path) -> Callable[[], float]:
    """Decode tokens a second of transformers' generate in bf16."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ids = torch.randint(1000, 2000, (1, PROMPT))
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def run() -> float:
        times = []
        for new in (1, NEW + 1):
            start = time.perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, **options)
            times.append(time.perf_counter() - start)
        return NEW / (times[1] - times[0])

    return run


def runner(model: LanguageModel) -> Callable[[], float]:
    """Decode tokens a second of a loaded model."""
    return lambda: NEW / time_once(model, PROMPT, NEW)[1]


def cold(command: list[str], rounds: int) -> float:
    """Median seconds of a command from process start to its first byte of output."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            assert process.stdout.read(1)
            times.append(time.perf_counter() - start)
            process.kill()
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    kernels.set_threads(args.threads)
    scratch = Path(tempfile.mkdtemp())
    cli = [str(Path(sys.executable).with_name("fewbit"))]
    try:
        start = time.perf_counter()
        subprocess.run(
            [*cli, "quantize", args.model, "-o", scratch / "int4", "--format", "int4g32", "--method", "rtn"], check=True
        )
        quantize_seconds = time.perf_counter() - start
        fewbit.quantize(args.model, scratch / "int8", format="int8", method="rtn")
        dense = bf16_folder(args.model, scratch / "bf16")
        runs = {
            "transformers bf16": transformers_runner(dense),
            "torch bf16": runner(torch_model(dense)),
            "int8": runner(fewbit.load(scratch / "int8", device="cpu")),
            "int4g32": runner(fewbit.load(scratch / "int4", device="cpu")),
        }
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for i in range(args.rounds + 1):
            for name, run in runs.items():
                rate = run()
                if i:
                    rates[name].append(rate)
        median = {name: statistics.median(r) for name, r in rates.items()}
        for name, rate in median.items():
            print(f"{name:18} {rate:8.1f} tokens/s")
        help_seconds = cold([*cli, "--help"], args.rounds)
        first_seconds = cold([*cli, "run", str(scratch / "int4"), "Name a colour."], args.rounds)
    finally:
        shutil.rmtree(scratch)
    baseline = max(median["transformers bf16"], median["torch bf16"])
    marks = [
        Mark("int4 decode over PyTorch bf16", median["int4g32"] / baseline, 2.0, at_least=True),
        Mark("seconds to quantize to int4g32 (round to nearest), process start included", quantize_seconds, 30),
        Mark("seconds to `fewbit --help`", help_seconds, 0.35),
        Mark("seconds to the first token, cold process", first_seconds, 3.0),
    ]
    finish("speed", marks, {"decode": median, "rounds": rates, "threads": args.threads})


if __name__ == "__main__":
    main()
