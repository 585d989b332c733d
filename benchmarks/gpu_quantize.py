"""Seconds that a card takes to calibrate and quantize one block of a known shape, random weights and hidden states.

    python benchmarks/gpu_quantize.py [--shapes llama-2-70b llama-3.1-8b] [--format int4g128] [--windows 128]
                                      [--length 2048] [--device cuda:0] [--cap 22]

What the walk does for a block: statistics of every linear's input over all windows, GPTQ, and the quantized block run
over the windows for the next one. Writing the file is left out. A block over one window warms up.
Marks: 22 s for a block of 70B's shape (80 of them in half an hour), 4 s for one of 8B's; exit 1 below.
Memory is the most that torch held on the card, and what the walk counts on. --cap takes all but so many GiB of the card
away from torch's allocator; hidden states lie on the card where the walk would put them there, else in pinned memory.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from typing import Any

import torch
from _marks import Mark, finish

from fewbit.blocks import FloatBlock, fast_product
from fewbit.calibrated import BlockSolver
from fewbit.memory import card_free
from fewbit.methods import Target, gptq
from fewbit.passes import collect, propagate
from fewbit.preflight import CARD_BYTES, needed
from fewbit.random_models import random_model
from fewbit.scratch import pin
from fewbit.source import Source

SECONDS = {"llama-2-70b": 22.0, "llama-3.1-8b": 4.0}


def one_block(source: Source, spec: str, hidden: torch.Tensor, device: torch.device) -> dict[str, float]:
    """Seconds of each part, for block 0."""
    product, marks = fast_product(source, device), [time.perf_counter()]

    def lap() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        marks.append(time.perf_counter())

    block = FloatBlock(source, 0, hidden.shape[1], device, product=product)
    lap()
    stats = collect(block, hidden, None)
    lap()
    solver = BlockSolver(source, [gptq], Target(torch.bfloat16), lambda name: "bf16" if "norm" in name else spec)
    with torch.no_grad():
        solver.solve(block, stats, hidden, None, lambda *_: None)
    lap()
    propagate(block, hidden)
    lap()
    names = ("weights", "statistics", "codes", "next inputs")
    parts = {name: after - before for name, before, after in zip(names, marks, marks[1:], strict=False)}
    return parts | {"seconds": marks[-1] - marks[0]}


def measured(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One shape's figures."""
    source = random_model(name, "bf16")
    source.checkpoint.device = device  # type: ignore[attr-defined]
    width = source.args.hidden_size
    random = torch.Generator(device).manual_seed(0)
    for windows in (1, args.windows):
        shape = (windows, args.length, width)
        work, state = needed(source, shape, with_goals=False)
        work += CARD_BYTES
        stays = device.type == "cuda" and work + state <= card_free(device)
        hidden = torch.empty(shape, device=device if stays else "cpu")
        for part in hidden:
            part.copy_(torch.randn(shape[1:], device=device, generator=random))
        with ExitStack() as held:
            if not stays:
                held.callback(pin(hidden, device))
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            figures = one_block(source, args.format, hidden, device)
    figures["counted on, GB"] = (work + (state if stays else 0)) / 1e9
    if device.type == "cuda":
        figures["on the card, GB"] = torch.cuda.max_memory_allocated(device) / 1e9
        figures["reserved, GB"] = torch.cuda.max_memory_reserved(device) / 1e9
    return figures | {"hidden states on the card": stays}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SECONDS))
    parser.add_argument("--format", default="int4g128")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--cap", type=float, help="GiB of the card that torch may take")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.cap:
        torch.cuda.set_per_process_memory_fraction(args.cap * 2**30 / torch.cuda.mem_get_info(device)[1], device)
    results, marks = {}, []
    for name in args.shapes:
        results[name] = measured(name, args, device)
        print(name, {k: round(v, 2) for k, v in results[name].items()}, flush=True)
        if name in SECONDS:
            marks.append(Mark(f"seconds for a block of {name}, {args.format}", results[name]["seconds"], SECONDS[name]))
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    finish("gpu_quantize", marks, {"card": card, "torch": torch.__version__, "blocks": results})


if __name__ == "__main__":
    main()
