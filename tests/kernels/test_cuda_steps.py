"""The operations around the products on a card, against their definitions; sources compile for every kind of card."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fewbit.kernels import _nvrtc
from fewbit.kernels._cuda_attention import BITS, Attention, blocks
from fewbit.kernels._cuda_choice import Chooser
from fewbit.kernels._cuda_ops import CudaOps, CudaStack
from fewbit.kernels.cuda import Cuda, Halves
from fewbit.kernels.ops import INT4, Batch, Layer, Ops, Stack, cached, empty_cache, spread, uncached

PAGE = 256
ARCHITECTURES = (80, 86, 89, 90, 120)


@pytest.fixture
def card() -> torch.device:
    """The first card."""
    if reason := _nvrtc.missing():
        pytest.skip(reason)
    return torch.device("cuda", 0)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("source", "defines"),
    [
        ("steps.cu", {}),
        ("choose.cu", {}),
        *(("attend.cu", {"WIDTH": 64, "CACHE": bits}) for bits in BITS.values()),
        ("append.cu", {"WIDTH": 64, "CACHE": 4}),
    ],
)
def test_sources_compile(source: str, defines: dict[str, object], arch: int) -> None:
    if reason := _nvrtc.lacking():
        pytest.skip(reason)
    assert len(_nvrtc.compiled(source, defines, arch)) > 1000


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, of the whole."""
    difference = found.double().cpu() - expected.double().cpu()
    return float(difference.norm() / expected.double().norm())


@pytest.mark.parametrize(("tokens", "n"), [(1, 64), (3, 576), (1, 4096), (17, 8192), (2, 16384)])
def test_norm_adds_where_the_residual_lies(
    card: torch.device, random: Callable[..., Tensor], tokens: int, n: int
) -> None:
    x, delta, weight = random(tokens, n).to(card), random(tokens, n, seed=1).to(card), random(n, seed=2).to(card)
    whole = x.double() + delta.double()
    expected = F.rms_norm(whole, (n,), weight.double(), 1e-5)
    ops = CudaOps(card)
    plain = ops.rms_norm(whole.float(), weight, 1e-5)
    assert error(plain, expected) < 1e-6
    found = ops.add_norm(x, delta, weight, 1e-5)
    assert error(found, expected) < 1e-6
    assert error(x, whole) < 1e-6


@pytest.mark.parametrize(("tokens", "n"), [(1, 160), (5, 1536), (300, 28672)])
def test_gated(card: torch.device, random: Callable[..., Tensor], tokens: int, n: int) -> None:
    x = random(tokens, 2 * n).clamp(-50, 50).to(card)
    expected = F.silu(x[:, :n].double()) * x[:, n:].double()
    assert error(CudaOps(card).gated(x, "silu"), expected) < 1e-6


def unpacked(x: Halves) -> Tensor:
    """Halves as float32 [T, columns]; what lies behind the last column must be zero."""
    flat = x.values.float().transpose(0, 1).flatten(1)
    assert not flat[:, x.columns :].any()
    found = flat[:, : x.columns]
    return found if x.scales is None else found * x.scales[:, None]


@pytest.mark.parametrize(("tokens", "n"), [(1, 64), (3, 576), (2, 8192), (5, 16384)])
@pytest.mark.parametrize("size", [1e-7, 1.0, 3e5])
def test_a_norm_as_halves(
    card: torch.device, random: Callable[..., Tensor], tokens: int, n: int, size: float, nan_outputs: None
) -> None:
    x, weight = random(tokens, n).to(card), random(n, seed=2).to(card) * size
    ops = CudaOps(card)
    found = unpacked(ops.norm_halves(x, weight, 1e-5))
    assert error(found, F.rms_norm(x.double(), (n,), weight.double(), 1e-5)) < 1e-3
    # tokens are scaled as the backend's own are
    theirs = unpacked(Cuda().halve(ops.rms_norm(x, weight, 1e-5)))
    assert error(found, theirs) < 1e-4


def test_blocks_of_query_heads() -> None:
    assert [blocks(*heads) for heads in ((64, 8), (9, 3), (32, 32), (28, 4), (96, 8), (22, 2))] == [8, 3, 32, 4, 16, 4]


HEADS = [
    (64, 8, 128),
    (9, 3, 64),
    (4, 2, 16),
    (8, 8, 128),
    (14, 2, 64),
    (8, 1, 256),
    (16, 1, 128),
    (40, 8, 32),
    (22, 2, 64),
]


def a_layer(heads: int, kv: int, width: int, device: torch.device, d: int = 64) -> Layer:
    g = torch.Generator().manual_seed(heads)

    def product(rows: int, columns: int) -> Callable[[Tensor], Tensor]:
        weight = (torch.randn(rows, columns, generator=g) * columns**-0.5).to(device)
        return lambda x: F.linear(x, weight)

    rows = (heads + 2 * kv) * width
    norms = ((1 + 0.1 * torch.randn(d, generator=g)).to(device) for _ in range(2))
    products = product(rows, d), product(d, heads * width), product(256, d), product(d, 128)
    return Layer(*norms, 1e-5, *products, heads, kv, width, "silu")


def angles(positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
    turned = positions[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    return turned.cos(), turned.sin()


def a_batch(have: list[int], new: list[int], pages: list[list[int]]) -> tuple[Tensor, Batch]:
    """Positions and places of `new` tokens behind `have` of each sequence."""
    positions = [p for h, n in zip(have, new, strict=True) for p in range(h, h + n)]
    places = [(s, p) for s, (h, n) in enumerate(zip(have, new, strict=True)) for p in range(h, h + n)]
    slots = [pages[s][p // PAGE] * PAGE + p % PAGE for s, p in places]
    starts = torch.tensor([0, *new]).cumsum(0)
    lengths = torch.tensor(have) + torch.tensor(new)
    return torch.tensor(positions), Batch(torch.tensor(slots), torch.tensor(pages), lengths, starts, PAGE)


def moved(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(t.to(device) for t in (batch.slots, batch.pages, batch.lengths, batch.starts)), PAGE)


# a code that falls to the other side of a half is a whole step away
TOLERANCES = {torch.float16: 2e-3, torch.int8: 5e-3, INT4: 3e-2}


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize(("heads", "kv", "width"), HEADS)
def test_a_prompt_and_steps_are_the_definition(
    card: torch.device, random: Callable[..., Tensor], heads: int, kv: int, width: int, dtype: torch.dtype
) -> None:
    here, there = a_layer(heads, kv, width, torch.device("cpu")), a_layer(heads, kv, width, card)
    defined, stack = Stack(Ops(), [here, here]), CudaOps(card).stack([there, there])
    assert isinstance(stack, CudaStack)
    # the second sequence's pages are no neighbours
    pages = [[0, 1, 2, 3], [6, 4, 5, 7]]
    for s in (defined, stack):
        s.allocate(8 * PAGE, dtype)
        for cache in s.caches:
            for part in cache:
                part.copy_(cached(torch.full((*part.shape[:2], width), torch.nan), dtype))
    have = [0, 0]
    for new in ([5, 300], [1, 1], [60, 200], [1, 1], [1, 1], [190, 3], [1, 1], [500, 1], [1, 1]):
        positions, batch = a_batch(have, new, pages)
        x = random(len(positions), 64, seed=sum(have)).clamp(-30, 30)
        cos, sin = angles(positions, width)
        expected = defined(x, cos, sin, batch)
        found = stack(x.to(card), cos.to(card), sin.to(card), moved(batch, card))
        assert error(found, expected) < TOLERANCES[dtype], (have, new)
        have = [h + n for h, n in zip(have, new, strict=True)]
    for a, b in zip(defined.caches, stack.caches, strict=True):
        for one, other in zip(a, b, strict=True):
            held, theirs = uncached(one, torch.float32), uncached(other.cpu(), torch.float32)
            written = ~held.isnan()
            assert torch.equal(written, ~theirs.isnan())
            assert error(theirs[written], held[written]) < TOLERANCES[dtype]


@pytest.mark.parametrize(("heads", "kv", "width"), HEADS)
@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("lengths", [[1, 63, 64, 65, 0, 2049], [5000], [130] * 17])
def test_attention_of_one_token_is_the_definition_and_knows_no_neighbours(
    card: torch.device, heads: int, kv: int, width: int, lengths: list[int], dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(len(lengths))
    most = -(-max(lengths) // PAGE)
    pages = torch.randperm(len(lengths) * most, generator=g).view(len(lengths), most)
    places = [max(n - 1, 0) for n in lengths]
    slots = torch.tensor([int(pages[s, p // PAGE]) * PAGE + p % PAGE for s, p in enumerate(places)])
    batch = Batch(slots, pages, torch.tensor(lengths), torch.arange(len(lengths) + 1), PAGE)
    cos, sin = angles(torch.tensor(places), width)
    rows = pages.numel() * PAGE
    caches = tuple(cached(torch.randn(rows, kv, width, generator=g) * 2, dtype) for _ in range(2))
    qkv = torch.randn(len(lengths), (heads + 2 * kv) * width, generator=g) * 2
    layer, attention = a_layer(heads, kv, width, card), Attention(card, heads, width)

    def there(cache: Tensor) -> Tensor:
        return empty_cache(rows, kv, width, dtype, card).copy_(cache)

    def run(which: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
        cache, b = tuple(there(c) for c in caches), batch
        part = Batch(b.slots[which], b.pages[which], b.lengths[which], torch.arange(len(b.slots[which]) + 1), PAGE)
        tables = (t[which].contiguous().to(card) for t in (qkv, cos, sin))
        y = attention.one(layer, *tables, cache, moved(part, card))  # type: ignore[arg-type]
        return y.cpu(), tuple(c.cpu() for c in cache)

    found, written = run(slice(None))
    # in float64, over the caches as they are
    q, k, v = qkv.double().unflatten(1, (-1, width)).split((heads, kv, kv), dim=1)
    expected_caches = tuple(c.clone() for c in caches)
    present = torch.tensor(lengths) > 0
    q = Ops().rotate_append(q, k, v, cos.double(), sin.double(), slots, *(c.clone() for c in caches))
    Ops().rotate_append(*(t[present] for t in (q, k, v, cos.double(), sin.double(), slots)), *expected_caches)
    for s, length in enumerate(lengths):
        if not length:
            assert not found[s].any()
            continue
        used = pages[s].repeat_interleave(PAGE) * PAGE + torch.arange(most * PAGE) % PAGE
        held = (uncached(c[used[:length]], torch.float64) for c in expected_caches)
        kk, vv = (x.repeat_interleave(heads // kv, dim=1) for x in held)
        p = (torch.einsum("hd,lhd->hl", q[s], kk) * width**-0.5).softmax(-1)
        expected = torch.einsum("hl,lhd->hd", p, vv)
        expected = (spread(expected) if dtype is INT4 else expected).flatten()
        # over one row nothing is averaged, and its codes may be a step off
        assert error(found[s], expected) < (2e-3 if length > 1 else TOLERANCES[dtype]), length
        alone, _ = run(slice(s, s + 1))
        assert torch.equal(alone[0], found[s])
    for one, other in zip(expected_caches, written, strict=True):
        assert error(uncached(other, torch.float64), uncached(one, torch.float64)) < 1e-3
        assert (one != other).sum() <= 0.01 * len(lengths) * kv * width + 2
    again, _ = run(slice(None))
    assert torch.equal(again, found)
    # as the products take it
    halves = torch.full((-(-heads * width // 128) * 4, len(lengths), 32), torch.nan, dtype=torch.float16, device=card)
    cache = tuple(there(c) for c in caches)
    tables = (t.to(card) for t in (qkv, cos, sin))
    attention.one(layer, *tables, cache, moved(batch, card), halves)  # type: ignore[arg-type]
    assert torch.equal(unpacked(Halves(halves, None, heads * width)).cpu(), found.half().float())


def test_other_layers_run_by_the_definitions(card: torch.device) -> None:
    assert type(CudaOps(card).stack([a_layer(4, 2, 24, card)])) is Stack
    assert type(CudaOps(card).stack([])) is Stack


def test_the_likeliest_is_the_first_of_equals(card: torch.device, random: Callable[..., Tensor]) -> None:
    choose = Chooser(card)
    for vocab in (1, 5, 320, 128256):
        logits = random(3, vocab).to(card)
        logits[1] = -1.0
        logits[2, vocab // 2 :] = 1e30
        expected = [int(logits[0].argmax()), 0, vocab // 2]
        assert choose(logits, 0.0, 0, 1.0, 0.0, [0.0] * 3).tokens() == expected
    logits[0, 7], logits[1, 128255] = float("nan"), float("inf")
    broken = choose(logits, 0.0, 0, 1.0, 0.0, [0.0] * 3)
    assert broken.tokens() == [-1, -1, vocab // 2]
    assert broken.ids.tolist() == [0, 0, vocab // 2]
    assert choose(logits, 1.0, 5, 0.9, 0.0, [0.5] * 3).tokens()[:2] == [-1, -1]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 1.0, 0.0), (0.7, 5, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.2), (0.9, 12, 0.9, 0.05)],
)
def test_draws_follow_the_probabilities_that_pass(
    card: torch.device, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    from fewbit.runtime.sampler import Sampling, candidates

    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    values, ids = candidates((logits / temperature).numpy(), sampling)
    expected = torch.zeros(40, dtype=torch.float64)
    expected[torch.from_numpy(ids)] = torch.from_numpy(values).double().softmax(0)
    count = 4000
    points = ((torch.arange(count) + 0.5) / count).tolist()
    chosen: list[int] = []
    for start in range(0, count, 1000):
        some = points[start : start + 1000]
        rows = logits.to(card).expand(len(some), -1)
        chosen += Chooser(card)(rows, temperature, top_k, top_p, min_p, some).tokens()
    found = torch.bincount(torch.tensor(chosen), minlength=40).double() / count
    # evenly spread points fall into each token's share but for one at either end
    assert (found - expected).abs().max() <= 1.5 / count + 1e-4
