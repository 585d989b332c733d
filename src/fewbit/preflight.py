"""Before the first block: its largest layer tried once. Too little memory is an error now, not after an hour."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from fewbit.blocks import fast_product, load_block
from fewbit.errors import FewbitError
from fewbit.formats import parse
from fewbit.memory import card_free
from fewbit.methods import Target
from fewbit.passes import BATCH_TOKENS, collect, propagate
from fewbit.sensitivity import LOGITS, PROBES
from fewbit.source import FLOATS, Source

GIB = 2**30
# copies of a Hessian beside itself while its linears are solved: two ordered, damped, factored or inverted, and strips
HESSIAN_COPIES = 2.25
# float32 copies of stacked matrices that are being solved: in order, their scales, what is fitted, what comes of it
SOLVED_COPIES = 6
# of a block's weights where gradients pass through it: themselves, and in the type they are multiplied in
BACKWARD_COPIES = 2
# what libraries and recorded loops keep on a card
CARD_BYTES = 512 << 20
# when tuning: levels, gradients, two moments, weights and what autograd keeps of them
TUNED_COPIES, TUNED_WIDE_COPIES = 14, 12
# activations of one batch that are alive at once, in units of the widest layer's
WIDE_COPIES = 6
# of one slice of logits: themselves, their softmax, its running sum, casts
LOGIT_COPIES = 5


@dataclass(frozen=True)
class Preflight:
    """What the walk will take. Bytes of host and device memory, seconds for all blocks that are left."""

    memory: int
    device_memory: int
    seconds: float

    def __str__(self) -> str:
        device = f", {self.device_memory / GIB:.2f} GiB on the GPU" if self.device_memory else ""
        return f"about {self.memory / GIB:.2f} GiB of memory{device}, {_duration(self.seconds)}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def needed(
    source: Source,
    shape: tuple[int, int, int],
    with_goals: bool,
    with_drift: bool = False,
    tuned: int = 0,
    weighted: bool = False,
) -> tuple[int, int]:
    """(bytes of one block's work, bytes of hidden states [n, length, d]); `tuned`: windows of a tuning step."""
    groups = _groups(source)
    sizes = [sum(out * columns for out, columns in group) for group in groups]
    weights, widths = sum(sizes), [group[0][1] for group in groups]
    widest = max(max(shape) for group in groups for shape in group)
    tokens = max(BATCH_TOKENS, shape[1])
    # those that are not solved yet; a drift's correlation is another matrix of the Hessian's size
    left = [(2 if with_drift else 1) * sum(width**2 for width in widths[i:]) for i in range(len(widths))]
    solving = max(
        kept + HESSIAN_COPIES * width**2 + SOLVED_COPIES * size
        for kept, width, size in zip(left, widths, sizes, strict=True)
    )
    running = left[0] + max(widths) ** 2 // 4 + max(sizes) // 2 + WIDE_COPIES * tokens * widest
    work = weights + max(solving, running)
    if tuned:
        work = max(work, TUNED_COPIES * weights + TUNED_WIDE_COPIES * tuned * shape[1] * widest)
    if weighted:
        head = source.args.vocab_size * source.args.hidden_size
        back = BACKWARD_COPIES * weights + TUNED_WIDE_COPIES * tokens * widest
        work = max(work, back, head // 2 + LOGIT_COPIES * LOGITS)
    return int(4 * work), 4 * torch.Size(shape).numel() * (2 if with_goals else 1)


def _groups(source: Source) -> list[list[tuple[int, int]]]:
    """Shapes of the linears of the largest block (that has experts, where some do), those of one input together."""
    sizes: dict[int, int] = {}
    for w in source.weights:
        if w.role == "linear" and w.block is not None:
            sizes[w.block] = sizes.get(w.block, 0) + torch.Size(w.shape).numel()
    block = max(sizes, key=lambda b: sizes[b])
    prefix, found = source.module.BLOCK.format(block), list[list[tuple[int, int]]]()
    first = source.module.feeds(source.args, block)
    for w in source.weights:
        if w.role == "linear" and w.block == block:
            alike = bool(found) and found[-1][0][1] == w.shape[1]
            if not alike or w.name.removeprefix(prefix).removesuffix(".weight") in first:
                found.append([])
            found[-1].append((w.shape[0], w.shape[1]))
    return found


def check(
    source: Source,
    hidden: Tensor,
    blocks: int,
    with_goals: bool,
    with_drift: bool,
    weighted: bool,
    modules: list[ModuleType],
    target: Target,
    device: torch.device,
    spec: Callable[[str], str],
    offload: bool,
) -> Preflight:
    """Runs one batch through the first block and quantizes its largest layer. FewbitError where memory is short."""
    n, length, width = hidden.shape
    work, state = needed(
        source, (n, length, width), with_goals, with_drift, getattr(modules[-1], "WINDOWS", 0), weighted
    )
    state = 0 if offload else state
    on_gpu = device.type == "cuda"
    resident = state if hidden.device.type == "cuda" else 0
    on_card = resident + work + CARD_BYTES if on_gpu else 0
    found = Preflight(state - resident + (0 if on_gpu else work), on_card, 0.0)
    _enough(found, device, resident)
    few = hidden[: max(1, BATCH_TOKENS // hidden.shape[1])].clone()
    start = time.perf_counter()
    block = load_block(source, 0, hidden.shape[1], device, fast_product(source, device))
    loading = time.perf_counter() - start
    start = time.perf_counter()
    stats = collect(block, few, None)
    propagate(block, few)
    running = (time.perf_counter() - start) * (1.5 if with_goals else 1.0) * len(hidden) / len(few)
    # an expert that no token of this batch came to has no statistics
    seen = [i for i, found in enumerate(stats) if "hessian" in found]
    place = max(seen, key=lambda i: block.linears[i].weight.shape[1] * block.linears[i].weight.numel())
    linear = block.linears[place]
    fmt = parse(spec(f"{linear.names[0]}.weight"))
    start = time.perf_counter()
    if fmt.spec not in FLOATS:
        modules[-1].quantize(linear.weight, fmt, dict(stats[place]), target)
    solving = time.perf_counter() - start
    cost = [x.weight.numel() * x.weight.shape[1] for x in block.linears]
    seconds = (loading * 2 + running + solving * sum(cost) / cost[place]) * blocks
    if weighted:
        # forward, forward again and backward, where the walk runs twice forward; the head like so much of a block
        head = source.args.vocab_size * source.args.hidden_size / sum(x.weight.numel() for x in block.linears)
        seconds += 1.5 * running * (source.args.num_hidden_layers + head) * min(PROBES, len(hidden)) / len(hidden)
    if hasattr(modules[-1], "STEPS"):
        # a step runs its windows forward and twice as long backward
        seconds += modules[-1].STEPS[target.effort] * modules[-1].WINDOWS / len(hidden) * 3 * running * blocks
    return Preflight(found.memory, found.device_memory, seconds)


def _enough(found: Preflight, device: torch.device, resident: int) -> None:
    free = _available_memory()
    if free is not None and found.memory > free:
        raise FewbitError(
            "There is not enough memory to calibrate.",
            f"About {found.memory / GIB:.2f} GiB are needed, {free / GIB:.2f} GiB are free.",
            "Use --offload, fewer or shorter windows (--windows 32), --method rtn, or close other programs.",
        )
    if device.type == "cuda":
        # hidden states that lie there already are part of what is needed
        card = card_free(device) + resident
        if found.device_memory > card:
            raise FewbitError(
                "A block does not fit the GPU.",
                f"About {found.device_memory / GIB:.2f} GiB are needed, {card / GIB:.2f} GiB are free on {device}.",
                "Use --device cpu, or close other programs that use the card.",
            )


def _available_memory() -> int | None:
    """MemAvailable in bytes; None where the system does not tell (anything but Linux)."""
    table = Path("/proc/meminfo")
    if not table.exists():
        return None
    for line in table.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
