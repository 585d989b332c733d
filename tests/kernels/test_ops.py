"""The native overrides of the operations around the products, against their definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewbit.kernels._cpu_ops import CpuOps
from fewbit.kernels.ops import INT4, Batch, Ops, cached, cached_width, rotate, spread, uncached

DEFINITION = Ops()
CACHES = [torch.float32, torch.float16, torch.int8, INT4]


@pytest.fixture
def no_fallback(monkeypatch):
    """The definitions fail, so a result is the native one."""

    def fail(*args: object) -> Tensor:
        raise AssertionError("fell back to the definition")

    for name in ("rms_norm", "gated", "rotate_append", "attend"):
        monkeypatch.setattr(Ops, name, fail)


# taken before the fixture replaces them
RMS_NORM, GATED, ROTATE, ATTEND = Ops.rms_norm, Ops.gated, Ops.rotate_append, Ops.attend


@pytest.mark.usefixtures("nan_outputs", "no_fallback")
@pytest.mark.parametrize("n", [1, 3, 8, 16, 17, 31, 33, 100, 576, 2048])
def test_norm_and_gate(each_isa, random, n):
    ops, weight = each_isa.ops, random(n, seed=1)
    for tokens in (1, 2, 3, 17, 256):
        x = random(tokens, n) * torch.tensor([1e-4, 1.0, 1e4])[torch.arange(tokens) % 3, None]
        torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), RMS_NORM(ops, x, weight, 1e-5), rtol=1e-5, atol=1e-7)
        gate_up = random(tokens, 2 * n, seed=2)
        for activation in ("silu", "gelu_tanh"):
            # torch's own GELU in float32 loses what is far below zero
            expected = GATED(ops, gate_up.double(), activation)
            torch.testing.assert_close(ops.gated(gate_up, activation).double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("no_fallback")
def test_gate_over_the_whole_range(each_isa):
    gate = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([-1e5, 1e30, 0.0, -0.0, 1e-40])])
    gate_up = torch.cat([gate, torch.ones_like(gate)])[None]
    y, expected = each_isa.ops.gated(gate_up, "silu"), gate.double() * torch.sigmoid(gate.double())
    # beyond -87 the exponential is held, which is nothing beside 1
    torch.testing.assert_close(y[0].double(), expected, rtol=1e-6, atol=1e-30)
    bad = torch.tensor([[float("nan"), 1.0, 1.0, 1.0]])
    assert each_isa.ops.gated(bad, "silu").isnan().tolist() == [[True, False]]


def heads_of(qkv: Tensor, heads: int, kv: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The strided views of a fused product that attention gets."""
    q, k, v = qkv.unflatten(1, (heads + 2 * kv, width)).split((heads, kv, kv), dim=1)
    return q, k, v


@pytest.mark.usefixtures("nan_outputs", "no_fallback")
@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize(
    ("heads", "kv", "width"), [(9, 3, 64), (4, 4, 32), (2, 1, 6), (1, 1, 2), (2, 1, 80), (1, 1, 256)]
)
def test_rotate_append(each_isa, random, dtype, heads, kv, width):
    ops = each_isa.ops
    for tokens in (1, 3, 70):
        q, k, v = heads_of(random(tokens, (heads + 2 * kv) * width), heads, kv, width)
        angle = random(tokens, width // 2, seed=3)
        slots = torch.randperm(100)[:tokens]
        caches = [torch.full((100, kv, cached_width(width, dtype)), 7.0).to(dtype) for _ in range(4)]
        mine = ops.rotate_append(q, k, v, angle.cos(), angle.sin(), slots, caches[0], caches[1])
        theirs = ROTATE(ops, q, k, v, angle.cos(), angle.sin(), slots, caches[2], caches[3])
        assert torch.equal(mine, theirs)
        assert torch.equal(caches[0], caches[2])
        assert torch.equal(caches[1], caches[3])


@pytest.mark.usefixtures("no_fallback")
def test_every_value_is_rounded_to_f16_as_torch_does_and_held_in_its_range(native):
    edges = [
        0.0,
        5.9e-8,
        2.9e-8,
        2.99e-8,
        6.1e-5,
        6.0976e-5,
        65504.0,
        65519.9,
        65520.0,
        1e6,
        float("inf"),
        float("nan"),
    ]
    g = torch.Generator().manual_seed(5)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=g).to(torch.int32)
    v = torch.cat([torch.tensor(edges), -torch.tensor(edges), bits.view(torch.float32), torch.randn(4072, generator=g)])
    halves = torch.arange(0x7C00, dtype=torch.int32).to(torch.uint16).view(torch.float16).float()
    between = (halves[:-1] + halves[1:]) / 2
    v = torch.cat([v, between])[: (len(v) + len(between)) // 16 * 16].reshape(-1, 1, 16)
    k_cache, v_cache = (torch.zeros(len(v), 1, 16, dtype=torch.float16) for _ in range(2))
    still = torch.ones(len(v), 8)
    native.ops.rotate_append(v, v, v, still, still * 0, torch.arange(len(v)), k_cache, v_cache)
    torch.testing.assert_close(v_cache, v.clamp(-65504, 65504).half(), rtol=0, atol=0, equal_nan=True)
    theirs = [torch.zeros_like(k_cache) for _ in range(2)]
    ROTATE(native.ops, v, v, v, still, still * 0, torch.arange(len(v)), *theirs)
    for mine, other in zip((k_cache, v_cache), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("where", ["native", "definition"])
@pytest.mark.parametrize("dtype", CACHES[1:])
def test_keys_and_values_beyond_f16_leave_attention_finite(native, where, dtype):
    ops = native.ops if where == "native" else DEFINITION
    q, k, v = heads_of(torch.full((2, 3 * 16), 3e5), 1, 1, 16)
    q, k = q / 3e5, torch.where(torch.arange(16) % 2 == 0, k, -k)
    shape = (8, 1, cached_width(16, dtype))
    still, caches = torch.ones(2, 8), [torch.zeros(shape, dtype=dtype) for _ in range(2)]
    rotated = ops.rotate_append(q, k, v, still, still * 0, torch.arange(2), *caches)
    batch = Batch(torch.arange(2), torch.tensor([[0]]), torch.tensor([2]), torch.tensor([0, 2]), 8)
    # in 4 bits values are held after they were turned: all of a head's 3e5 lie in one number then
    held = torch.full((2, 1, 16), 65504.0 / (4 if dtype is INT4 else 1))
    found = uncached(caches[1][:2], torch.float32)
    found = spread(found) if dtype is INT4 else found
    # an int8 head's scale has the 8 bits of bfloat16
    torch.testing.assert_close(found, held, rtol=0.004 * (dtype in (torch.int8, INT4)), atol=0)
    torch.testing.assert_close(ops.attend(rotated, *caches, batch, 0.25), held[:, 0], rtol=0.004, atol=0)


@pytest.mark.parametrize("where", ["native", "definition"])
@pytest.mark.parametrize("width", [2, 6, 48, 64, 80, 256])
def test_int8_is_within_half_a_step_of_keys_times_a_hadamard_matrix(native, random, where, width):
    ops = native.ops if where == "native" else DEFINITION
    q, k, v = (random(40, 2, width, seed=i) for i in range(3))
    # an outlier in one channel, as keys have them; heads of zeros; heads that float16 could not scale
    k[:, :, 0] *= 100
    k[3], v[3], v[4] = 0, 0, v[4] * 1e-9
    angle = random(40, width // 2, seed=4)
    k_cache, v_cache = (torch.zeros(40, 2, width + 2, dtype=torch.int8) for _ in range(2))
    turned = ops.rotate_append(q, k, v, angle.cos(), angle.sin(), torch.arange(40), k_cache, v_cache)
    # by its definition: the sign is the parity of the bits that two indices share
    block = next(2**i for i in range(9, -1, -1) if width % 2**i == 0)
    signs = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]).double()
    hadamard = torch.block_diag(*[signs / block**0.5] * (width // block))
    expected = [rotate(x, angle.cos(), angle.sin()).double() @ hadamard for x in (q, k)]
    torch.testing.assert_close(turned.double(), expected[0], rtol=1e-5, atol=1e-5 * float(q.abs().max()))
    for cache, x in ((k_cache, expected[1]), (v_cache, v.double())):
        largest = x.abs().amax(-1, keepdim=True)
        assert ((uncached(cache, torch.float64) - x).abs() <= 0.502 * largest / 127).all()
        assert not cache[3].any()
    assert (v_cache[4, :, :-2].abs().amax(-1) >= 126).all()


@pytest.mark.parametrize("where", ["native", "definition"])
@pytest.mark.parametrize("width", [2, 6, 32, 48, 80, 256])
def test_int4_is_within_half_a_step_of_its_group_and_attends_to_what_it_holds(native, random, where, width):
    ops = native.ops if where == "native" else DEFINITION
    k, v = (random(40, 2, width, seed=i).clamp(-1e3, 1e3) for i in range(2))
    # zeros, one number everywhere, and what float16 can't tell from nothing
    k[3], v[3], v[4], v[5] = 0, 0, 7.5, v[5] * 1e-9
    still = torch.ones(40, width // 2)
    k_cache, v_cache = (torch.zeros(40, 2, cached_width(width, INT4), dtype=INT4) for _ in range(2))
    q = ops.rotate_append(k, k, v, still, still * 0, torch.arange(40), k_cache, v_cache)
    torch.testing.assert_close(q, spread(k), rtol=1e-6, atol=1e-6 * float(k.abs().max()))
    for cache, x in ((k_cache, spread(k)), (v_cache, spread(v))):
        found = uncached(cache, torch.float32)
        for held, group in zip(found.split(32, -1), x.split(32, -1), strict=True):
            step = (group.amax(-1, keepdim=True) - group.amin(-1, keepdim=True)) / 15
            # scale and least number are halves: 2^-11 of them, 15 times and once
            rounding = 2e-3 * group.abs().amax(-1, keepdim=True) + 2e-7
            assert ((held - group).abs() <= 0.501 * step + rounding).all()
        assert not found[3].any()
    # by hand: low half first, then the groups' scale and least number
    numbers = v_cache[0, 0, width // 2 :].clone().view(torch.float16).float().view(-1, 2)
    codes = [int(b) >> s & 15 for b in v_cache[0, 0, : width // 2] for s in (0, 4)]
    by_hand = [c * float(numbers[i // 32, 0]) + float(numbers[i // 32, 1]) for i, c in enumerate(codes)]
    found = uncached(v_cache[0, 0], torch.float64)
    torch.testing.assert_close(found, torch.tensor(by_hand).double(), rtol=1e-6, atol=1e-6)
    # one row alone: attention gives it back, turned back
    batch = Batch(torch.arange(1), torch.tensor([[0]]), torch.tensor([1]), torch.tensor([0, 1]), 8)
    alone = ops.attend(q[:1].contiguous(), k_cache, v_cache, batch, 0.25).view(2, width)
    torch.testing.assert_close(alone, spread(uncached(v_cache[0], torch.float32)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["native", "definition"])
def test_a_number_that_is_nan_makes_its_int4_groups_nan(native, where):
    ops = native.ops if where == "native" else DEFINITION
    x = torch.ones(2, 1, 96)
    # blocks of 32 are turned: the others stay numbers
    x[1, 0, 40] = float("nan")
    still, caches = torch.ones(2, 48), [torch.zeros(2, 1, cached_width(96, INT4), dtype=INT4) for _ in range(2)]
    ops.rotate_append(x, x, x, still, still * 0, torch.arange(2), *caches)
    for cache in caches:
        broken = uncached(cache, torch.float32).isnan()
        assert not broken[0].any()
        assert broken[1, 0, 32:64].all()
        if cache is caches[1]:
            assert not broken[1, 0, :32].any()
            assert not broken[1, 0, 64:].any()


def test_a_number_that_is_nan_makes_its_int8_head_nan(native):
    x = torch.ones(2, 1, 16)
    x[1, 0, 5] = float("nan")
    still, caches = torch.ones(2, 8), [torch.zeros(2, 1, 18, dtype=torch.int8) for _ in range(2)]
    for ops in (native.ops, DEFINITION):
        ops.rotate_append(x, x, x, still, still * 0, torch.arange(2), *caches)
        for cache in caches:
            assert uncached(cache, torch.float32).isnan().all(-1).tolist() == [[False], [True]]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch_of(lengths: list[int], fresh: list[int], page_size: int, rows: int) -> Batch:
    """Sequences on random pages of a cache of `rows` rows."""
    most = max(-(-n // page_size) for n in lengths) + 1
    order = torch.randperm(rows // page_size, generator=torch.Generator().manual_seed(sum(lengths)))
    pages = torch.full((len(lengths), most), -7, dtype=torch.int64)
    taken = 0
    for i, n in enumerate(lengths):
        used = -(-n // page_size)
        pages[i, :used] = order[taken : taken + used]
        taken += used
    starts = torch.tensor([0, *torch.tensor(fresh).cumsum(0).tolist()])
    return Batch(torch.empty(0, dtype=torch.int64), pages, torch.tensor(lengths), starts, page_size)


ATTENTION = [
    # lengths, new tokens, page size
    ([1], [1], 4),
    ([5, 1, 37], [1, 1, 1], 4),
    ([33, 16, 8], [3, 16, 8], 16),
    ([256, 257, 700], [1, 2, 16], 32),
    ([513], [2], 1000),
    ([300, 9], [0, 9], 1),
    ([40, 290], [40, 33], 8),
    ([530], [530], 50),
]


@pytest.mark.usefixtures("nan_outputs")
@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize(("heads", "kv", "width"), [(9, 3, 64), (4, 4, 16), (8, 1, 128)])
@pytest.mark.parametrize(("lengths", "fresh", "page_size"), ATTENTION)
def test_attention_on_the_paged_cache(each_isa, lengths, fresh, page_size, dtype, heads, kv, width):
    rows, ops = 4000, each_isa.ops
    batch = batch_of(lengths, fresh, page_size, rows)
    q = normal(sum(fresh), heads, width, seed=1)
    # what no sequence owns is NaN: nobody may look at it
    k_cache, v_cache = (cached(torch.full((rows, kv, width), float("nan")), dtype) for _ in range(2))
    for i, n in enumerate(lengths):
        at = batch.pages[i, torch.arange(n) // page_size] * page_size + torch.arange(n) % page_size
        k_cache[at] = cached(normal(n, kv, width, seed=2 + i), dtype)
        v_cache[at] = cached(normal(n, kv, width, seed=20 + i), dtype)
    mine = ops.attend(q, k_cache, v_cache, batch, 0.2)
    exact = ATTEND(ops, q.double(), k_cache, v_cache, batch, 0.2)
    size = ATTEND(ops, q.double(), uncached(k_cache, torch.float64), uncached(v_cache, torch.float64).abs(), batch, 0.2)
    if dtype is INT4:
        # what is turned back is a sum over its head
        size = size.unflatten(-1, (heads, width)).norm(dim=-1, keepdim=True).expand(-1, -1, width).flatten(1)
    # the scores' own rounding, a few 1e-7 of their magnitude (a few units), becomes a relative error of the weights
    assert ((mine.double() - exact).abs() <= 1e-5 * size).all()
    for threads in (1, 3):
        each_isa.set_threads(threads)
        assert torch.equal(ops.attend(q, k_cache, v_cache, batch, 0.2), mine)


# window, cap of scores
VIEWS = [(1, 0.0), (7, 0.0), (64, 0.0), (255, 1.5), (256, 0.0), (300, 0.0), (0, 0.7)]


@pytest.mark.usefixtures("nan_outputs")
@pytest.mark.parametrize(("window", "cap"), VIEWS)
def test_attention_of_windows_and_held_scores(each_isa, window, cap):
    rows, heads, kv, width, ops = 4000, 6, 2, 32, each_isa.ops
    for lengths, fresh, page_size in ATTENTION:
        batch = batch_of(lengths, fresh, page_size, rows)
        q = normal(sum(fresh), heads, width, seed=1)
        k_cache, v_cache = (torch.full((rows, kv, width), float("nan")) for _ in range(2))
        for i, n in enumerate(lengths):
            at = batch.pages[i, torch.arange(n) // page_size] * page_size + torch.arange(n) % page_size
            k_cache[at], v_cache[at] = normal(n, kv, width, seed=2 + i), normal(n, kv, width, seed=20 + i)
        mine = ops.attend(q, k_cache, v_cache, batch, 0.4, window, cap)
        exact = _seen_by_a_loop(q, k_cache, v_cache, batch, 0.4, window, cap)
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-5)
        definition = ATTEND(ops, q.double(), k_cache.double(), v_cache.double(), batch, 0.4, window, cap)
        torch.testing.assert_close(definition, exact, rtol=1e-9, atol=1e-9)


def _seen_by_a_loop(q, k_cache, v_cache, batch, scale, window, cap):
    """Token by token and head by head, in double."""
    out = torch.empty(len(q), q.shape[1], q.shape[2], dtype=torch.float64)
    for s, length in enumerate(batch.lengths.tolist()):
        first, last = batch.starts[s].item(), batch.starts[s + 1].item()
        for t in range(first, last):
            end = length - (last - t) + 1
            p = torch.arange(max(0, end - window) if window else 0, end)
            at = batch.pages[s, p // batch.page_size] * batch.page_size + p % batch.page_size
            for h in range(q.shape[1]):
                kv = h * k_cache.shape[1] // q.shape[1]
                scores = k_cache[at, kv].double() @ q[t, h].double() * scale
                if cap:
                    scores = cap * (scores / cap).tanh()
                out[t, h] = scores.softmax(0) @ v_cache[at, kv].double()
    return out.flatten(1)


@pytest.mark.usefixtures("no_fallback", "nan_outputs")
@pytest.mark.parametrize("view", [(0, 0.0), (37, 2.0), (130, 0.0)])
@pytest.mark.parametrize("dtype", CACHES)
def test_a_prompt_attends_the_same_whole_and_in_any_pieces(each_isa, random, dtype, view):
    rows, n, page = 900, 300, 16
    k_cache, v_cache = (cached(random(rows, 2, 32, seed=s), dtype) for s in (1, 2))
    q, pages = random(n, 6, 32, seed=3), torch.randperm(56, generator=torch.Generator().manual_seed(4))[None]

    def attended(first: int, last: int) -> Tensor:
        starts = torch.tensor([0, last - first])
        batch = Batch(torch.empty(0, dtype=torch.int64), pages, torch.tensor([last]), starts, page)
        return each_isa.ops.attend(q[first:last].contiguous(), k_cache, v_cache, batch, 0.1, *view)

    whole = attended(0, n)
    for step in (1, 3, 17, 128):
        pieces = [attended(i, min(n, i + step)) for i in range(0, n, step)]
        assert torch.equal(torch.cat(pieces), whole)


def test_attention_of_a_prompt_needs_no_memory_that_grows_with_it(native):
    """4000 new tokens: the results of all chunks at once would be some 70 MB."""
    from fewbit.memory import PeakMemory

    rows = 4096
    cache = torch.zeros(rows, 2, 32, dtype=torch.float16)
    batch = Batch(torch.empty(0, dtype=torch.int64), torch.tensor([[0]]), torch.tensor([4000]),
                  torch.tensor([0, 4000]), rows)  # fmt: skip
    q, few = torch.zeros(4000, 16, 32), torch.zeros(4000, 16 * 32)
    native.ops.attend(q[:16].contiguous(), cache, cache, replace(batch, starts=torch.tensor([0, 16])), 0.1)
    with PeakMemory() as memory:
        native.ops.attend(q, cache, cache, batch, 0.1)
    assert memory.peak < few.nbytes + (12 << 20)


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("dtype", CACHES)
def test_one_token_attends_the_same_alone_and_in_a_batch(native, random, dtype):
    k_cache, v_cache = (cached(random(600, 2, 32, seed=i), dtype) for i in (1, 2))
    batch = batch_of([280, 300], [1, 1], 4, 600)
    q = random(2, 4, 32, seed=3)
    both = native.ops.attend(q, k_cache, v_cache, batch, 0.1)
    for i in range(2):
        alone = Batch(batch.slots, batch.pages[i : i + 1], batch.lengths[i : i + 1], torch.tensor([0, 1]), 4)
        assert torch.equal(native.ops.attend(q[i : i + 1], k_cache, v_cache, alone, 0.1), both[i : i + 1])


def test_what_the_native_code_does_not_take_goes_to_the_definition(native, random):
    ops = native.ops
    assert isinstance(ops, CpuOps)
    x = random(4, 20)
    assert torch.equal(ops.rms_norm(x.t(), x[:, 0].clone(), 1e-5), DEFINITION.rms_norm(x.t(), x[:, 0].clone(), 1e-5))
    assert torch.equal(ops.gated(x.double(), "gelu_tanh"), DEFINITION.gated(x.double(), "gelu_tanh"))
    with pytest.raises(ValueError, match="unknown gated"):
        ops.gated(x, "relu")
    batch = batch_of([40], [20], 8, 64)
    for width, dtype in ((20, torch.float32), (32, torch.bfloat16)):
        q, cache = random(20, 4, width), random(64, 2, width).to(dtype)
        expected = DEFINITION.attend(q, cache, cache, batch, 0.1)
        assert torch.equal(ops.attend(q, cache, cache, batch, 0.1), expected)
    q, k, v = heads_of(random(3, 4 * 16), 2, 1, 16)
    caches = [torch.zeros(9, 1, 16, dtype=torch.bfloat16) for _ in range(4)]
    angle, slots = random(3, 8), torch.tensor([8, 0, 3])
    mine = ops.rotate_append(q, k, v, angle.cos(), angle.sin(), slots, caches[0], caches[1])
    assert torch.equal(mine, DEFINITION.rotate_append(q, k, v, angle.cos(), angle.sin(), slots, caches[2], caches[3]))
    assert torch.equal(caches[0], caches[2])


@pytest.mark.parametrize("dtype", CACHES)
def test_indices_that_leave_the_cache_are_refused(native, random, dtype):
    ops, cache = native.ops, torch.zeros(64, 1, cached_width(16, dtype), dtype=dtype)
    q, k, v = heads_of(random(2, 3 * 16), 1, 1, 16)
    half = torch.zeros(2, 8)
    for slots in ([0, 64], [-1, 0], [2**60, 1]):
        with pytest.raises(IndexError, match="slots"):
            ops.rotate_append(q, k, v, half, half, torch.tensor(slots), cache, cache)
    assert not cache.any()
    pages = torch.tensor([[0, 7]])
    wrong = [
        (torch.tensor([[0, 8]]), [10], [0, 2]),
        (torch.tensor([[-1, 1]]), [10], [0, 2]),
        (torch.tensor([[2**60, 1]]), [10], [0, 2]),
        (pages, [17], [0, 2]),
        (pages, [1], [0, 2]),
        (pages, [10], [0, 1]),
        (pages, [10], [1, 2]),
    ]
    # a page longer than the whole cache
    short = Batch(torch.empty(0), torch.tensor([[0]]), torch.tensor([65]), torch.tensor([0, 2]), 100)
    with pytest.raises(IndexError, match="leaves the cache"):
        ops.attend(q.contiguous(), cache, cache, short, 1.0)
    for table, lengths, starts in wrong:
        batch = Batch(torch.empty(0), table, torch.tensor(lengths), torch.tensor(starts), 8)
        with pytest.raises(IndexError, match="leaves the cache"):
            ops.attend(q.contiguous(), cache, cache, batch, 1.0)
