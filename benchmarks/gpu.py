"""Whole models on one NVIDIA card, with random weights of true shapes, against what the card gives in the same run.

    python benchmarks/gpu.py [--only NAME,NAME] [--rounds 3] [--agreement MODEL] [--json]

decode    tokens/s after a short prompt; its share: bytes of weights a token reads times tokens a second, over the rate
          at which cuBLAS reads f16 weights for one token (llama.cpp's rows in the marks were held against that; a plain
          read kernel's rate stands beside it)
prefill   2048 tokens, against the same layers in f16 through cuBLAS, times the number of layers
memory    in use on the card after the runs, by everything; `llama-2-70b int2g64` runs with the allocator capped, so
          that everything together stays within 24 GiB
Exits with 1 below a mark.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _marks import Mark, finish
from torch.nn import functional as F

import fewbit
from fewbit.kernels import ceilings, ops_on
from fewbit.kernels.ops import Batch, Layer
from fewbit.random_models import random_model
from fewbit.runtime.cache import Sequence
from fewbit.runtime.engine import LanguageModel, checked_context
from fewbit.runtime.placement import place
from fewbit.runtime.sampler import Sampler, Sampling
from fewbit.runtime.speed import read_bytes

PROMPT, SHORT, NEW = 2048, 64, 64
# llama.cpp's shares of the same ceiling on one H100 (0c1e570, an earlier run): Q4_0, Q4_0, Q2_K
LLAMA_Q2_SHARE = 0.37
CARD = 24 << 30


@dataclass(frozen=True)
class Case:
    """What is run, and its marks: least share, most bytes on the card."""

    shape: str
    formats: str
    share: float | None = None
    prefill: float | None = None
    memory: float | None = None
    capped: bool = False

    @property
    def name(self) -> str:
        """As --only takes it."""
        return f"{self.shape} {self.formats.split(',')[0]}{'+' if ',' in self.formats else ''}"


CASES = [
    Case("llama-3.1-8b", "int4g128", share=0.62, prefill=0.8),
    Case("llama-2-70b", "int4g128", share=0.80, prefill=0.8, memory=40e9),
    # 22.7 GB a token, as Q2_K reads
    Case("llama-2-70b", "int2g64,down_proj=int3g64,o_proj=int3g64", share=1.7 * LLAMA_Q2_SHARE),
    Case("llama-2-70b", "int2g64", memory=float(CARD), capped=True),
]


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Median of some calls, after one to warm up."""
    found = []
    for i in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found += [time.perf_counter() - start] if i else []
    return statistics.median(found)


def half_read_rate() -> float:
    """Bytes a second that cuBLAS reads of f16 weights for one token; four matrices in turn, beyond any cache."""
    weights = [torch.randn(28672, 8192, dtype=torch.float16, device="cuda") for _ in range(4)]
    x = torch.randn(1, 8192, dtype=torch.float16, device="cuda")

    def all_of_them() -> None:
        for _ in range(5):
            for w in weights:
                F.linear(x, w)

    return 20 * weights[0].numel() * 2 / seconds(all_of_them, 5)


def half_layer_seconds(model: LanguageModel, tokens: int, rounds: int) -> float:
    """One layer of the same shape in f16 through cuBLAS, everything else as fewbit runs it."""
    like: Layer = model.model.stack.layers[0]

    def product(rows: int, columns: int) -> Callable[[torch.Tensor], torch.Tensor]:
        w = torch.randn(rows, columns, dtype=torch.float16, device="cuda") * columns**-0.5
        return lambda x: F.linear(x.half(), w).float()

    linears = (like.qkv, like.o, like.gate_up, like.down)
    layer = Layer(
        like.attention_norm,
        like.mlp_norm,
        like.eps,
        *(product(*linear.packed.shape) for linear in linears),  # type: ignore[attr-defined]
        like.heads,
        like.kv_heads,
        like.width,
        like.activation,
    )
    stack = ops_on(model.device).stack([layer, layer])
    stack.allocate(tokens, torch.float16)
    numbers = torch.arange(tokens, device="cuda")
    batch = Batch(
        numbers,
        torch.arange(-(-tokens // 256), device="cuda")[None],
        torch.tensor([tokens], device="cuda"),
        torch.tensor([0, tokens], device="cuda"),
        256,
    )
    x = torch.randn(tokens, like.attention_norm.shape[0], device="cuda")
    cos, sin = model.model.rope(numbers)
    return seconds(lambda: stack(x, cos, sin, batch), rounds) / 2


def decode_rate(model: LanguageModel, ids: list[int]) -> float:
    """Tokens a second of greedy steps behind `ids`."""
    sequence = Sequence()
    logits = model.prefill(sequence, ids)
    clocks = [time.perf_counter() for _ in model.tokens(sequence, logits, Sampler(Sampling()), [], NEW + 9, None)]
    model.allocator.truncate(sequence, 0)
    return NEW / (clocks[-1] - clocks[8])


def prefill_seconds(model: LanguageModel, ids: list[int], rounds: int) -> float:
    sequence = Sequence()

    def once() -> None:
        model.prefill(sequence, ids)
        model.allocator.truncate(sequence, 0)

    return seconds(once, rounds)


def run(case: Case, ceiling: float, rounds: int) -> dict[str, Any]:
    """Figures of one model; it is gone afterwards."""
    context = torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
    if case.capped:
        torch.cuda.set_per_process_memory_fraction((CARD - context) / torch.cuda.mem_get_info()[1])
    source = random_model(case.shape, case.formats)
    placement = place("cuda:0", source, checked_context(source, 4096))
    source.checkpoint.device = placement.device  # type: ignore[attr-defined]
    start = time.perf_counter()
    model = LanguageModel(source, False, 4096, placement=placement)
    model.synchronize()
    loaded = time.perf_counter() - start
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(source.args.vocab_size, (PROMPT,), generator=g).tolist()
    rates = [decode_rate(model, ids[:SHORT]) for _ in range(rounds)]
    rate, per_token = statistics.median(rates), read_bytes(model)
    took = prefill_seconds(model, ids, rounds)
    found: dict[str, Any] = {
        "load_seconds": loaded,
        "plan_bytes": placement.plan.total,
        "decode": rate,
        "decode_rates": rates,
        "read_bytes": per_token,
        "decode_share": rate * per_token / ceiling,
        "prefill": PROMPT / took,
        "card_bytes": model.card_memory(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "context_bytes": context,
    }
    if case.prefill:
        layers = len(model.model.stack.layers)
        half = half_layer_seconds(model, PROMPT, rounds)
        found |= {"half_seconds": half * layers, "prefill_ratio": half * layers / took}
    return found


PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea,",
    "Water boils at a hundred degrees because",
    "Die drei wichtigsten Städte in Deutschland sind",
]


def agreement(model: str) -> dict[str, float]:
    """5 prompts x 32 greedy tokens of the CPU's exact run, teacher-forced on the card: mean KL(CPU || card) in nats,
    and the largest gap by which a choice of the card lies below the CPU's top.
    """
    here, there = fewbit.load(model, exact=True, device="cpu"), fewbit.load(model, device="cuda:0")
    kl, gap = [], 0.0
    for prompt in PROMPTS:
        one, other = Sequence(), Sequence()
        ids = here.tokenizer.encode(prompt)
        for _ in range(32):
            p, q = (m.forward([(s, ids)])[0].cpu().double().log_softmax(0) for m, s in ((here, one), (there, other)))
            kl.append(float((p.exp() * (p - q)).sum()))
            gap = max(gap, float(p.max() - p[q.argmax()]))
            ids = [int(p.argmax())]
    return {"kl": statistics.mean(kl), "gap": gap}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=", ".join(case.name for case in CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="all figures of a model, in its line")
    parser.add_argument("--agreement", metavar="MODEL", help="a real model to run here and on the CPU as well")
    args = parser.parse_args()
    only = [name for name in args.only.split(",") if name]
    machine = ceilings(torch.device("cuda", 0))
    assert machine is not None, "nothing can be compiled for a card here"
    plain, half = machine.measure(), half_read_rate()
    gc.collect()
    torch.cuda.empty_cache()
    figures: dict[str, Any] = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "plain_read": plain.read_rate,
        "half_read": half,
        "half_multiply_adds": plain.dot_rate,
    }
    print(f"{figures['card']}, torch {torch.__version__}: plain read {plain.read_rate / 1e9:.0f} GB/s, ", end="")
    print(f"f16 product {half / 1e9:.0f} GB/s, {2 * plain.dot_rate / 1e12:.0f} TFLOP/s f16", flush=True)
    marks: list[Mark] = []
    for case in CASES:
        if only and case.name not in only:
            continue
        found = figures[case.name] = run(case, half, args.rounds)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_per_process_memory_fraction(1.0)
        print(f"{case.name}: {json.dumps(found)}" if args.json else line(case, found), flush=True)
        if case.share:
            marks.append(Mark(f"{case.name} decode share", found["decode_share"], case.share, at_least=True))
        if case.prefill:
            marks.append(Mark(f"{case.name} prefill over f16", found["prefill_ratio"], case.prefill, at_least=True))
        if case.memory:
            marks.append(Mark(f"{case.name} bytes on the card", found["card_bytes"], case.memory))
    if args.agreement:
        found = figures["agreement"] = agreement(args.agreement)
        marks += [Mark("mean KL to the CPU", found["kl"], 0.01), Mark("largest gap of a choice", found["gap"], 0.1)]
    finish("gpu", marks, figures)


def line(case: Case, found: dict[str, Any]) -> str:
    """One line for people."""
    text = f"{case.name}: decode {found['decode']:.1f} tokens/s, {100 * found['decode_share']:.0f} % of reading "
    text += f"{found['read_bytes'] / 1e9:.2f} GB; prefill {found['prefill']:.0f} tokens/s"
    if "prefill_ratio" in found:
        text += f", {found['prefill_ratio']:.2f} of f16"
    return f"{text}; {found['card_bytes'] / 2**30:.1f} GiB in use; loaded in {found['load_seconds']:.0f} s"


if __name__ == "__main__":
    main()
