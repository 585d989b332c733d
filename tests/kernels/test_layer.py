"""Whole layers in one native call, against the same layers operation by operation on the same backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit.kernels._cpu_ops import NativeStack
from fewbit.kernels.cpu import Cpu
from fewbit.kernels.ops import INT4, Batch, Experts, Layer, Stack, no_product
from fewbit.kernels.ops import cached as as_cached
from fewbit.kernels.reference import backend as reference
from fewbit.layers import Linear

D, INNER, HEADS, KV, WIDTH = 96, 160, 6, 2, 16
PAGE, PAGES = 16, 64
CACHES = [torch.float32, torch.float16, torch.int8, INT4]
ROWS = PAGE * PAGES
SPECS = ("int4g32", "int8g32a", "gguf:q4_1")

MakeLayers = Callable[..., list[Layer]]
# what layers of other decoders have besides
OTHERS: list[dict[str, Any]] = [
    {"qkv_bias": True},
    {"q_norm": WIDTH, "k_norm": WIDTH, "window": 40},
    {"attention_after": D, "mlp_after": D, "scale": 0.02, "soft_cap": 2.0, "window": 7, "activation": "gelu_tanh"},
    {"attention_after": D, "mlp_after": D, "attention_norm": None, "mlp_norm": None, "q_norm": HEADS * WIDTH,
     "k_norm": KV * WIDTH, "rotation": 1, "down_bias": True, "o_bias": True, "gate_up_bias": True},
]  # fmt: skip


@pytest.fixture
def make_layers(make_tensor: Callable[..., Any]) -> MakeLayers:
    """make_layers(backend, count): small layers, every one of another format; scales keep activations in range."""

    def make(backend: Any, count: int = 3) -> list[Layer]:
        found = []
        for i in range(count):
            g = torch.Generator().manual_seed(i)

            def linear(*rows: int, columns: int, spec: str = SPECS[i % 3]) -> Linear:
                return Linear(backend, backend.prepare([make_tensor(spec, r, columns) for r in rows]))

            found.append(
                Layer(
                    attention_norm=torch.randn(D, generator=g),
                    mlp_norm=torch.randn(D, generator=g) / 8,
                    eps=1e-5,
                    qkv=linear(HEADS * WIDTH, KV * WIDTH, KV * WIDTH, columns=D),
                    o=linear(D, columns=HEADS * WIDTH),
                    gate_up=linear(INNER, INNER, columns=D),
                    down=linear(D, columns=INNER),
                    heads=HEADS,
                    kv_heads=KV,
                    width=WIDTH,
                    activation="silu",
                )
            )
        return found

    return make


def other(layer: Layer, parts: dict[str, Any]) -> Layer:
    """The layer with `parts`: norms of so many random numbers, biases of its products, and what is no tensor."""
    random, changes = torch.Generator().manual_seed(9), {}
    for name, part in parts.items():
        if name.endswith("_bias"):
            product: Any = getattr(layer, name.removesuffix("_bias"))
            bias = torch.randn(product.packed.shape[0], generator=random) / 4
            changes[name.removesuffix("_bias")] = Linear(product.backend, product.packed, bias)
        elif "norm" in name or name.endswith("_after"):
            changes[name] = None if part is None else 1 + torch.randn(part, generator=random) / 4
        else:
            changes[name] = part
    return replace(layer, **changes)


def tables(lengths: Sequence[int], fresh: Sequence[int]) -> tuple[Batch, Tensor, Tensor]:
    """A step of sequences on scattered pages, each in its half of the cache; cos and sin of the tokens' positions."""
    pages = torch.stack([torch.randperm(PAGES // 2, generator=torch.Generator().manual_seed(n)) for n in lengths])
    pages += torch.arange(len(lengths))[:, None] % 2 * (PAGES // 2)
    positions = [torch.arange(n - new, n) for n, new in zip(lengths, fresh, strict=True)]
    slots = torch.cat([pages[i, p // PAGE] * PAGE + p % PAGE for i, p in enumerate(positions)])
    starts = torch.tensor([0, *fresh]).cumsum(0)
    angle = torch.cat(positions).float()[:, None] / 100 ** torch.linspace(0, 1, WIDTH // 2)
    return Batch(slots, pages, torch.tensor(lengths), starts, PAGE), angle.cos(), angle.sin()


def filled(stack: Stack, dtype: torch.dtype) -> Stack:
    """The stack with caches full of the same random rows every time."""
    stack.allocate(ROWS, dtype)
    for i, cache in enumerate(stack.caches):
        for j, rows in enumerate(cache):
            x = torch.randn(ROWS, KV, WIDTH, generator=torch.Generator().manual_seed(10 * i + j))
            rows.copy_(as_cached(x, dtype))
    return stack


def cached(stack: Stack) -> Tensor:
    return torch.stack([torch.stack(cache) for cache in stack.caches])


def hidden(tokens: int) -> Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(77))


def native_stack(backend: Cpu, layers: list[Layer], dtype: torch.dtype) -> Stack:
    stack = filled(backend.ops.stack(layers), dtype)
    assert isinstance(stack, NativeStack)
    return stack


@pytest.fixture
def no_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer fails, so a result is that of the one call."""

    def fail(*args: object) -> Tensor:
        raise AssertionError("fell back to the definition")

    monkeypatch.setattr(NativeStack, "_one_by_one", fail)


@pytest.mark.usefixtures("nan_outputs", "no_layers")
@pytest.mark.parametrize("dtype", CACHES)
def test_one_call_is_what_the_operations_are_to_the_bit(
    each_isa: Cpu, make_layers: MakeLayers, dtype: torch.dtype
) -> None:
    layers = make_layers(each_isa)
    mine, theirs = native_stack(each_isa, layers, dtype), filled(Stack(each_isa.ops, layers), dtype)
    for tokens in (*range(1, 9), 17, 70):
        for lengths, fresh in (([290], [tokens]), ([37, 300], [tokens // 3, tokens - tokens // 3])):
            batch, cos, sin = tables(lengths, fresh)
            x = hidden(tokens)
            y, expected = mine(x, cos, sin, batch), theirs(x, cos, sin, batch)
            assert torch.equal(y, expected)
            assert y.isfinite().all()
            assert torch.equal(x, hidden(tokens))
            assert torch.equal(cached(mine), cached(theirs))


@pytest.mark.usefixtures("nan_outputs", "no_layers")
def test_layers_of_other_decoders_are_what_the_operations_are_to_the_bit(
    each_isa: Cpu, make_layers: MakeLayers
) -> None:
    plain = make_layers(each_isa, len(OTHERS))
    layers = [other(layer, parts) for layer, parts in zip(plain, OTHERS, strict=True)]
    mine, theirs = native_stack(each_isa, layers, torch.float16), filled(Stack(each_isa.ops, layers), torch.float16)
    for tokens in (1, 3, 20):
        batch, cos, sin = tables([37, 300], [tokens // 3, tokens - tokens // 3])
        # a second rotation, the other way
        angles = torch.stack((cos, cos)), torch.stack((sin, -sin))
        y, expected = mine(hidden(tokens), *angles, batch), theirs(hidden(tokens), *angles, batch)
        assert torch.equal(y, expected)
        assert torch.equal(cached(mine), cached(theirs))
        assert y.isfinite().all()
    # each part is seen
    for layer, simple, parts in zip(layers, plain, OTHERS, strict=True):
        whole = native_stack(each_isa, [layer], torch.float16)(hidden(tokens), *angles, batch)
        for name in parts:
            # a norm of q alone is refused, and so is a layer without any norm
            pairs = {"q_norm": "k_norm", "k_norm": "q_norm", "attention_after": "attention_norm"}
            names = {name.removesuffix("_bias"), pairs.get(name, name.removesuffix("_bias"))}
            without = replace(layer, **{n: getattr(simple, n) for n in names})
            changed = native_stack(each_isa, [without], torch.float16)(hidden(tokens), *angles, batch)
            assert not torch.equal(changed, whole), name


@pytest.mark.usefixtures("no_layers")
@pytest.mark.parametrize("dtype", CACHES[1:])
def test_threads_do_not_change_a_bit(native: Cpu, make_layers: MakeLayers, dtype: torch.dtype) -> None:
    layers, found = make_layers(native), []
    batch, cos, sin = tables([300, 260], [7, 9])
    for threads in (1, 2, 3):
        native.set_threads(threads)
        stack = native_stack(native, layers, dtype)
        found.append((stack(hidden(16), cos, sin, batch), cached(stack)))
    for y, rows in found[1:]:
        assert torch.equal(y, found[0][0])
        assert torch.equal(rows, found[0][1])


@pytest.mark.usefixtures("no_layers")
@pytest.mark.parametrize("dtype", CACHES[1:])
def test_a_prompt_in_pieces_is_the_whole_prompt_to_the_bit(
    native: Cpu, make_layers: MakeLayers, dtype: torch.dtype
) -> None:
    layers, x = make_layers(native), hidden(16)
    whole, pieces = (native_stack(native, layers, dtype) for _ in range(2))
    batch, cos, sin = tables([270], [16])
    y, begin = whole(x, cos, sin, batch), 0
    for count in (1, 5, 2, 8):
        end = begin + count
        length, starts = batch.lengths - 16 + end, torch.tensor([0, count])
        part = replace(batch, slots=batch.slots[begin:end], lengths=length, starts=starts)
        assert torch.equal(pieces(x[begin:end], cos[begin:end], sin[begin:end], part), y[begin:end])
        begin = end
    assert torch.equal(cached(pieces), cached(whole))


@pytest.mark.usefixtures("no_layers")
@pytest.mark.parametrize("dtype", CACHES[1:])
def test_a_token_is_the_same_alone_and_among_others(each_isa: Cpu, make_layers: MakeLayers, dtype: torch.dtype) -> None:
    layers, x = make_layers(each_isa), hidden(11)
    together = native_stack(each_isa, layers, dtype)
    batch, cos, sin = tables([262, 41], [8, 3])
    y = together(x, cos, sin, batch)
    alone = native_stack(each_isa, layers, dtype)
    for t in range(11):
        # its own sequence, with only the tokens up to it
        s, i = (0, t) if t < 8 else (1, t - 8)
        length = batch.lengths[s : s + 1] - (7, 2)[s] + i
        one = Batch(batch.slots[t : t + 1], batch.pages[s : s + 1], length, torch.tensor([0, 1]), PAGE)
        assert torch.equal(alone(x[t : t + 1], cos[t : t + 1], sin[t : t + 1], one), y[t : t + 1])
    assert torch.equal(cached(alone), cached(together))


@pytest.mark.parametrize("dtype", CACHES[1:])
def test_what_leaves_the_cache_is_refused_before_anything_is_written(
    native: Cpu, make_layers: MakeLayers, dtype: torch.dtype
) -> None:
    stack = native_stack(native, make_layers(native), dtype)
    before = cached(stack)
    good, cos, sin = tables([40, 30], [1, 2])
    outside = good.pages.clone()
    outside[1, 1] = PAGES
    wrong = {
        "slots": [replace(good, slots=torch.tensor(s)) for s in ([0, 1, ROWS], [-1, 0, 1], [0, 2**60, 1])],
        "leaves the cache": [
            replace(good, pages=outside),
            replace(good, pages=-1 - outside),
            replace(good, lengths=torch.tensor([40, 1 + PAGE * PAGES // 2])),
            replace(good, lengths=torch.tensor([40, 1])),
            replace(good, starts=torch.tensor([0, 1, 2])),
        ],
    }
    for message, batches in wrong.items():
        for batch in batches:
            with pytest.raises(IndexError, match=message):
                stack(hidden(3), cos, sin, batch)
            assert torch.equal(cached(stack), before)
    unallocated = native.ops.stack(stack.layers)
    with pytest.raises(IndexError):
        unallocated(hidden(3), cos, sin, good)
    with pytest.raises(ValueError, match="float16"):
        unallocated.allocate(8, torch.bfloat16)


def test_what_the_native_code_does_not_take_runs_by_the_definition(native: Cpu, make_layers: MakeLayers) -> None:
    layers = make_layers(native)
    mine, theirs = (filled(s, torch.float32) for s in (native.ops.stack(layers), Stack(native.ops, layers)))
    # more new tokens than the paged attention takes, no tokens at all, and rows that are not contiguous
    batch, cos, sin = tables([40], [20])
    assert torch.equal(mine(hidden(20), cos, sin, batch), theirs(hidden(20), cos, sin, batch))
    batch, cos, sin = tables([40, 30], [1, 2])
    apart = torch.cat([hidden(3), hidden(3)], dim=1)[:, :D]
    assert torch.equal(mine(apart, cos, sin, batch), theirs(apart, cos, sin, batch))
    slow, first = make_layers(reference(), 1)[0], layers[0]
    biased = Linear(native, first.o.packed, torch.zeros(D, dtype=torch.float64))  # type: ignore[attr-defined]
    odd = {
        "another backend's product": replace(first, down=slow.down),
        "a bias in another type": replace(first, o=biased),
        "an activation": replace(first, activation="relu"),
        "a part of a head turned": replace(first, turned=8),
        "a norm of half a head": replace(first, q_norm=torch.ones(WIDTH // 2)),
        "norms of heads and of all": replace(first, q_norm=torch.ones(WIDTH), k_norm=torch.ones(KV * WIDTH)),
        "experts": replace(
            first,
            gate_up=no_product,
            down=no_product,
            experts=Experts(torch.ones(1, D), [first.gate_up], [first.down], 1, True),
        ),
        "a norm in another type": replace(first, mlp_norm=first.mlp_norm.double()),
        "narrow heads": replace(first, heads=12, kv_heads=4, width=8),
        "shapes that do not fit": replace(first, heads=4, kv_heads=3),
    }
    for what, layer in odd.items():
        assert type(native.ops.stack([first, layer])) is Stack, what
    assert type(native.ops.stack([])) is Stack
