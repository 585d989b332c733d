"""What produces the inputs of a block's linears, and how its channels are divided without changing what is computed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewbit.blocks import FloatBlock
from fewbit.methods import Feed, Stats
from fewbit.source import FLOATS, Source

Spec = Callable[[str], str]


def feeds_of(source: Source, block: FloatBlock, stats: list[Stats], spec: Spec) -> list[Feed]:
    """A feed for each group of linears that share an input, where the architecture says what produces that.

    `spec` tells how a tensor will be stored. All experts read one norm: they are one feed, with the router behind it.
    """
    producers = source.module.feeds(source.args, block.index)
    alone: list[Feed] = []
    shared: dict[str, list[int]] = {}
    for i, linear in enumerate(block.linears):
        name = linear.names[0].removeprefix(block.prefix)
        producer = producers.get(name)
        if producer is None:
            continue
        norm = f"{block.prefix}{producer}.weight"
        if norm in block.vectors:
            shared.setdefault(norm, []).append(i)
        elif "hessian" in stats[i]:
            channel = source.module.producers(source.args, name).to(block.device)
            alone.append(_row_feed(block, i, stats[i], f"{block.prefix}{producer}", channel, spec))
    return [_norm_feed(block, norm, members, stats, spec) for norm, members in shared.items()] + alone


def _norm_feed(block: FloatBlock, norm: str, members: list[int], stats: list[Stats], spec: Spec) -> Feed:
    linears = [block.linears[i].weight for i in members]
    divide = _norm_divider(block.vectors[norm], FLOATS[spec(norm)], block.offsets.get(norm, 0.0))
    if ".experts." not in block.kinds[members[0]]:
        return Feed(linears, stats[members[0]], _as_they_are, divide)
    seen = [stats[i] for i in members if "hessian" in stats[i]]
    total = sum(float(found["tokens"]) for found in seen)
    mean: Stats = {}
    for found in seen:
        part = found["hessian"] * (found["tokens"] / total)
        mean["hessian"] = mean["hessian"] + part if mean else part
    # matrices among the vectors: the router, which reads the same norm
    routers = {name: v for name, v in block.vectors.items() if v.dim() == 2}

    def divide_all(s: Tensor) -> Tensor:
        applied = divide(s)
        for name, router in routers.items():
            router.copy_((router * applied).to(FLOATS[spec(name)]))
        for found in seen:
            for key in ("hessian", "cross"):
                if key in found:
                    found[key] = found[key] / (applied[:, None] * applied)
        return applied

    return Feed(linears, mean, _as_they_are, divide_all)


def _row_feed(block: FloatBlock, i: int, stats: Stats, producer: str, channel: Tensor, spec: Spec) -> Feed:
    rows = _rows_of(block, producer)
    bias = f"{producer}.bias"
    stored = FLOATS[spec(bias)] if bias in block.vectors else torch.float32
    return Feed([block.linears[i].weight], stats, _sharer(channel, len(rows[0])), _rows_divider(rows, channel, stored))


def _as_they_are(s: Tensor) -> Tensor:
    """Each channel of a norm has a factor of its own."""
    return s


def _norm_divider(norm: Tensor, stored: torch.dtype, offset: float) -> Callable[[Tensor], Tensor]:
    def divide(s: Tensor) -> Tensor:
        # what the stored norm loses by rounding, the linears make good
        smaller = (norm / s - offset).to(stored).float() + offset
        kept = torch.where((smaller == 0) | ~smaller.isfinite(), norm, smaller)
        applied = torch.where(kept == 0, torch.ones_like(norm), norm / kept)
        norm.copy_(kept)
        return applied

    return divide


def _rows_of(block: FloatBlock, name: str) -> list[Tensor]:
    """The rows of a matrix within its stack, and of its bias where it has one; views, changed in place."""
    for linear in block.linears:
        if name in linear.names:
            at = linear.names.index(name)
            first = sum(linear.splits[:at])
            rows = slice(first, first + linear.splits[at])
            found = [linear.weight[rows]]
            if linear.bias is not None:
                found.append(linear.bias[rows])
                if f"{name}.bias" in block.vectors:
                    found.append(block.vectors[f"{name}.bias"])
            return found
    raise ValueError(f"{name} is no linear of block {block.index}")


def _sharer(channel: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    def share(s: Tensor) -> Tensor:
        # channels that one row feeds get their geometric mean
        total = torch.zeros(rows, device=s.device).index_add_(0, channel, s.log())
        count = torch.zeros_like(total).index_add_(0, channel, torch.ones_like(s))
        return (total / count.clamp(min=1)).exp()[channel]

    return share


def _rows_divider(rows: list[Tensor], channel: Tensor, stored: torch.dtype) -> Callable[[Tensor], Tensor]:
    def divide(s: Tensor) -> Tensor:
        by_row = torch.ones(len(rows[0]), device=s.device)
        by_row[channel] = s
        weight, *biases = rows
        weight /= by_row[:, None]
        for bias in biases:
            # what runs here is what will be stored
            bias.copy_((bias / by_row).to(stored))
        return s

    return divide
