"""Which device a model runs on, and what it takes there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from fewbit import kernels
from fewbit.errors import FewbitError
from fewbit.formats import parse
from fewbit.formats.integer import IntegerFormat
from fewbit.kernels.ops import heads_apart
from fewbit.models import WeightInfo
from fewbit.source import Source

CPU = torch.device("cpu")
# older cards lack the asynchronous copies and bf16 products that the kernels use
LEAST_CAPABILITY = (8, 0)
# tokens of a prompt that run at once: a card needs many to be kept busy
PREFILL_CHUNK, CARD_CHUNK = 256, 2048
# what torch's and the products' own buffers and recorded steps take at most, beside what is counted below
MARGIN = 512 << 20
_DRIVER = Path("/dev/nvidia0")


@dataclass(frozen=True)
class Card:
    """One NVIDIA card, as seen now; bytes."""

    index: int
    name: str
    free: int
    total: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """Bytes that a loaded model takes on its device."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.workspace

    def __str__(self) -> str:
        parts = (("weights", self.weights), ("cache", self.cache), ("workspace", self.workspace))
        return f"It takes {_gib(self.total)}: {', '.join(f'{name} {_gib(count)}' for name, count in parts)}"


@dataclass(frozen=True)
class Placement:
    """Where a model goes; `note` says in a sentence why not on a card that is there."""

    device: torch.device
    plan: Plan
    note: str | None = None


def cards() -> list[Card]:
    """The cards that torch can use."""
    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        try:
            free, total = torch.cuda.mem_get_info(i)
        except RuntimeError:
            # full, broken, or another process's alone
            continue
        # what torch holds and nobody uses is free as well
        free += torch.cuda.memory_reserved(i) - torch.cuda.memory_allocated(i)
        found.append(Card(i, torch.cuda.get_device_name(i), free, total, torch.cuda.get_device_capability(i)))
    return found


def plan(source: Source, context: int, exact: bool, cached: torch.dtype, on_card: bool = True) -> Plan:
    """What the model takes with a cache of `context` tokens in the type `cached`, from headers alone."""
    a, dtype = source.args, source.dtype
    stored = {w.name: parse(source.spec(w.name)).nbytes(w.shape, dtype) for w in source.weights}
    counts = {w.name: torch.Size(w.shape).numel() for w in source.weights}
    # the reference keeps float32, as norms are everywhere
    widened = _dequantized(source) if on_card and not exact else set()
    kept = {
        w.name: 4 * counts[w.name] if exact or len(w.shape) == 1 or w.name in widened else stored[w.name]
        for w in source.weights
    }
    head = cached.itemsize * heads_apart(a.head_dim, cached, "cuda" if on_card else "cpu")
    cache = 2 * a.num_hidden_layers * context * a.num_key_value_heads * head
    tokens = min(context, CARD_CHUNK if on_card else PREFILL_CHUNK)
    attention = (2 * a.num_attention_heads + 2 * a.num_key_value_heads) * a.head_dim
    # one layer's keys and values, read back for a prompt as halves or floats
    expanded = (
        0 if cached.is_floating_point else 2 * context * a.num_key_value_heads * a.head_dim * (2 if on_card else 4)
    )
    # residual, its norm and what is added; then the widest of what attention and the gated product hold at once
    widest = max(2 * attention, 3 * a.intermediate_size, 3 * a.experts_used * a.hidden_size)
    activations = 4 * tokens * (3 * a.hidden_size + widest)
    # a matrix is unpacked while it is laid out, or dequantized beside its place
    laid_out = max(counts[w.name] * (5 if w.name in widened else 2) for w in source.weights)
    workspace = activations + expanded + laid_out + 16 * 4 * a.vocab_size + (MARGIN if on_card else 0)
    return Plan(sum(kept.values()), cache, workspace)


def _dequantized(source: Source) -> set[str]:
    """Matrices that a card's kernels refuse, so that the reference keeps them there in float32, with those that may be
    stacked with one: neighbours of the same width.
    """

    def stack(w: WeightInfo) -> tuple[str, int]:
        return w.name.removesuffix(".weight").rpartition(".")[0], w.shape[-1]

    refused = {stack(w) for w in source.weights if _refused(source, w)}
    return {w.name for w in source.weights if len(w.shape) == 2 and stack(w) in refused}


def _refused(source: Source, w: WeightInfo) -> bool:
    fmt = parse(source.spec(w.name))
    if not isinstance(fmt, IntegerFormat) or len(w.shape) != 2:
        return False
    return kernels.refuses_groups("cuda", fmt.span(w.shape[1]), w.shape[1]) or source.scattered(w.name)


def place(
    device: str, source: Source, context: int, exact: bool = False, cached: torch.dtype = torch.float16
) -> Placement:
    """`auto`, `cpu`, `cuda` or `cuda:N` -> where the model goes; `auto` takes a card it fits, or says why not.

    FewbitError where the name is none of these, the card is not there, too small or can't be used, or none of several
    is named.
    """
    if device == "auto":
        return _automatic(source, context, exact, cached)
    if device == "cpu":
        return Placement(CPU, plan(source, context, exact, cached, on_card=False))
    named = re.fullmatch(r"cuda(?::(\d{1,3}))?", device)
    if not named:
        raise FewbitError(f"{device!r} is not a device.", "Devices: auto, cpu, cuda, cuda:N.", "Give one of these.")
    card = _named(int(named[1]) if named[1] else None)
    if reason := _unusable(card):
        raise FewbitError(f"The card cuda:{card.index} can't be used.", f"{reason}.", "Run with --device cpu.")
    wanted = plan(source, context, exact, cached)
    if wanted.total > card.free:
        raise too_large(wanted, card)
    return Placement(torch.device("cuda", card.index), wanted, _slower(exact))


def _automatic(source: Source, context: int, exact: bool, cached: torch.dtype) -> Placement:
    on_cpu = plan(source, context, exact, cached, on_card=False)
    if not _sees_cards():
        built = torch.version.cuda is not None
        note = "torch sees no CUDA card" if built else "this torch was built without CUDA"
        return Placement(CPU, on_cpu, f"There is a card, but {note}: the CPU is used." if _DRIVER.exists() else None)
    if reason := kernels.missing("cuda"):
        return Placement(CPU, on_cpu, f"The CPU is used, not a card. {reason}.")
    found = cards()
    if not found:
        return Placement(CPU, on_cpu, "The CPU is used: no card said how much of its memory is free.")
    card = max(found, key=lambda c: (c.capability >= LEAST_CAPABILITY, c.free))
    wanted = plan(source, context, exact, cached)
    reason = _unusable(card)
    if not reason and wanted.total > card.free:
        reason = f"{wanted}; {_gib(card.free)} of {card.name} are free"
    if reason:
        return Placement(CPU, on_cpu, f"The CPU is used, not the card cuda:{card.index}. {reason}.")
    several = f"One of {len(found)} cards is used, cuda:{card.index}: a model is not spread over several."
    notes = [several] if len(found) > 1 else []
    return Placement(torch.device("cuda", card.index), wanted, " ".join(filter(None, (*notes, _slower(exact)))) or None)


def _sees_cards() -> bool:
    return torch.cuda.is_available()


def _named(index: int | None) -> Card:
    found = cards()
    if not found:
        raise FewbitError(
            "There is no card to run on.",
            "torch sees no CUDA card" + ("" if torch.version.cuda else "; it was built without CUDA") + ".",
            "Run with --device cpu, or install a torch with CUDA and the card's driver.",
        )
    names = ", ".join(f"cuda:{c.index} ({c.name})" for c in found)
    if index is None:
        if len(found) > 1:
            raise FewbitError(
                "There are several cards, and a model is not spread over them.",
                f"{names}.",
                "Name one: --device cuda:N.",
            )
        return found[0]
    if index >= len(found):
        raise FewbitError(f"There is no card cuda:{index}.", f"Cards: {names}.", "Name one of these.")
    return found[index]


def _unusable(card: Card) -> str | None:
    if card.capability < LEAST_CAPABILITY:
        have, need = (".".join(map(str, c)) for c in (card.capability, LEAST_CAPABILITY))
        return f"{card.name} has compute capability {have}; the kernels need {need}"
    return kernels.missing("cuda")


def _slower(exact: bool) -> str | None:
    return None if exact else kernels.slower("cuda")


class CardMemoryError(FewbitError):
    """A card's memory ran out in spite of the plan."""


def too_large(wanted: Plan, card: Card) -> FewbitError:
    """The model does not fit what is free."""
    return FewbitError(
        f"The model does not fit the card cuda:{card.index}.",
        f"{wanted}; {_gib(card.free)} of {_gib(card.total)} are free on {card.name}.",
        "Take fewer bits or a smaller --context, close what else uses the card, or run with --device cpu.",
    )


def out_of_memory(wanted: Plan, device: torch.device, said: str) -> FewbitError:
    """The card's memory ran out in spite of the plan; `said` are torch's words."""
    free, total = torch.cuda.mem_get_info(device)
    first = said.split(". ")[0].strip().rstrip(".")
    return CardMemoryError(
        "The card has no memory left.",
        f"{wanted}; {_gib(free)} of {_gib(total)} are free now. {first}.",
        "Take fewer bits or a smaller --context, close what else uses the card, or run with --device cpu.",
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
