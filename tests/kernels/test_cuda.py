"""Products on a card against float64, for every kind of weights; skipped where there is no card."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbit.formats import parse
from fewbit.kernels import cuda as cuda_module

SPECS = ["int2g32", "int3g64", "int4g128", "int5g64", "int6g32", "int7g96", "int8", "int2g128a", "int3g32a", "int4a"]
SPECS += ["int4g64", "int4g64a", "int8a", "int8g256", "gguf:q4_0", "gguf:q4_1", "gguf:q8_0"]
TOKENS = [1, 2, 3, 8, 9, 16, 17, 33, 70, 129, 256, 1100]
SHAPES = [[(33, 192)], [(50, 576)], [(17, 96), (40, 96), (7, 96)], [(48, 1408), (48, 1408)]]


# float32 sums of some thousand products, and weights rounded to halves
FUSED, DENSE = 1e-5, 6e-4


@pytest.fixture
def card(monkeypatch) -> cuda_module.Cuda:
    """The backend of this machine's card."""
    # cuBLAS wants it where torch is told to be deterministic, as nan_outputs does
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    backend = cuda_module.backend()
    if backend is None:
        pytest.skip("there is no CUDA card from sm_80 on, or nothing to compile with")
    return backend


def halved(x: Tensor) -> Tensor:
    """x as the kernels see it: halves, of tokens beyond 2^-8 .. 2^15 scaled by a power of two; float64."""
    exponent = x.double().abs().amax(1, keepdim=True).clamp_min(1e-300).log2().floor()
    by = torch.where((exponent < -8) | (exponent > 14), (exponent - 14).clamp_min(-126).exp2(), 1.0)
    return (x.double() / by).half().double() * by


def assert_product(y: Tensor, x: Tensor, w: Tensor, size: Tensor, bound: float) -> None:
    """|y - x w^T| within `bound` of the sum of the products' magnitudes, where |w| is `size`."""
    error = (y.cpu().double() - x @ w.T).abs()
    magnitude = x.abs() @ size.T
    assert y.dtype == torch.float32
    assert (error <= bound * magnitude + 1e-37).all(), float((error / magnitude).max())


def assert_gated(y: Tensor, x: Tensor, w: Tensor, size: Tensor, bound: float) -> None:
    """silu(gate) * up of the two halves of w: either product may be off as above, and silu is no steeper than 1.1."""
    gate, up = (x @ w.T).chunk(2, 1)
    gate_error, up_error = (bound * (x.abs() @ size.T)).chunk(2, 1)
    silu = torch.nn.functional.silu(gate)
    bound = 1.1 * gate_error * (up.abs() + up_error) + silu.abs() * up_error + 1e-5 * (silu * up).abs()
    assert ((y.cpu().double() - silu * up).abs() <= bound + 1e-37).all()


def stacked(make_tensor, spec: str, shapes: list[tuple[int, int]]) -> tuple[list, Tensor, Tensor]:
    """Stored tensors, their weights in float64, and the magnitudes of what those are rounded from."""
    stored = [make_tensor(spec, *shape) for shape in shapes]
    sizes = []
    for q in stored:
        a = parse(spec).affine(q)
        spread = a.scale.double().abs().repeat_interleave(a.span, 1)[:, : q.shape[1]]
        offset = 0 if a.offset is None else a.offset.double().abs().repeat_interleave(a.span, 1)[:, : q.shape[1]]
        sizes.append(a.codes.double() * spread + offset + spread * 2 ** (a.bits - 1))
    return stored, torch.cat([parse(spec).dequantize(q).double() for q in stored]), torch.cat(sizes)


@pytest.mark.usefixtures("nan_outputs")
@pytest.mark.parametrize("spec", SPECS)
def test_products_rows_and_gates(card, make_tensor, random, spec):
    for shapes in SHAPES:
        stored, w, size = stacked(make_tensor, spec, shapes)
        packed = card.prepare(stored)
        assert packed.shape == tuple(w.shape)
        ids = torch.randint(0, len(w), (9,))
        torch.testing.assert_close(card.rows(packed, ids).double(), w[ids], rtol=1e-5, atol=1e-5 * float(w.abs().max()))
        for tokens in TOKENS if shapes is SHAPES[0] or shapes is SHAPES[3] else [1, 9, 40, 256]:
            x = random(tokens, w.shape[1], seed=tokens)
            y = card.matmul(x.cuda(), packed)
            # beyond, weights are rounded to halves
            bound = FUSED if tokens <= card.exact_tokens(packed) else DENSE
            assert_product(y, halved(x), w, size, bound)
            if tokens > card.fused_tokens(packed):
                continue
            halves, add = card.halve(x.cuda()), torch.randn_like(y)
            near = 1e-6 * float(y.abs().max())
            torch.testing.assert_close(card.multiply(halves, packed, add), y + add, rtol=1e-5, atol=near)
            assert card.can_gate(packed) == (len(shapes) == 2)
            if len(shapes) == 2:
                assert_gated(card.gated(halves, packed), halved(x), w, size, bound)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_large_matrices_are_cut_in_every_way(card, make_tensor, bits):
    for rows, columns in ((14368, 512), (8192, 512), (4608, 512), (2048, 8192)):
        stored = make_tensor(f"int{bits}g128", rows, columns)
        packed, w = card.prepare([stored]), parse(stored.spec).dequantize(stored).double().cuda()
        for tokens in (1, 8, 13, 16, 31, 64, 100, 300):
            x = torch.randn(tokens, columns)
            exact = halved(x).cuda() @ w.T
            error = (card.matmul(x.cuda(), packed).double() - exact).norm() / exact.norm()
            assert error < (1e-5 if tokens <= card.exact_tokens(packed) else 4e-4), (rows, columns, tokens)


@pytest.mark.parametrize("magnitude", [1e-12, 1e-3, 7e4, 1e9, 1e30])
def test_activations_of_any_magnitude(card, make_tensor, magnitude):
    stored, w, size = stacked(make_tensor, "int4g64", [(40, 512)])
    packed = card.prepare(stored)
    for tokens in (3, 300, 1100):
        x = torch.randn(tokens, 512)
        x[1] *= magnitude
        bound = FUSED if tokens <= card.exact_tokens(packed) else DENSE
        assert_product(card.matmul(x.cuda(), packed), halved(x), w, size, bound)


def test_infinities_and_nans_stay_with_their_token(card, make_tensor):
    packed = card.prepare([make_tensor("int4g64", 40, 512)])
    for tokens in (3, 300, 1100):
        x = torch.randn(tokens, 512, device="cuda")
        clean = card.matmul(x, packed)
        x[1, 7] = torch.nan
        y = card.matmul(x, packed)
        assert y[1].isnan().all()
        assert torch.equal(y[::2], clean[::2])


def test_zero_and_strided_activations(card, make_tensor):
    stored, w, size = stacked(make_tensor, "int3g64", [(40, 512)])
    packed = card.prepare(stored)
    for tokens in (3, 300, 1100):
        wide = torch.randn(tokens, 1030, device="cuda")
        for x in (wide[:, 1:513], wide[:, ::2][:, :512], wide[:, :512].t().contiguous().t()):
            bound = FUSED if tokens <= card.exact_tokens(packed) else DENSE
            assert_product(card.matmul(x, packed), halved(x.cpu()), w, size, bound)
        assert not card.matmul(torch.zeros(tokens, 512, device="cuda"), packed).any()
    assert card.matmul(torch.empty(0, 512, device="cuda"), packed).shape == (0, 40)


@pytest.mark.parametrize("tokens", [2, 8, 12, 16, 40])
def test_a_token_does_not_depend_on_those_beside_it(card, make_tensor, tokens):
    packed = card.prepare([make_tensor("int4g64a", 64, 1408)])
    x, other = torch.randn(tokens, 1408, device="cuda"), torch.randn(tokens, 1408, device="cuda")
    other[1] = x[1]
    assert torch.equal(card.matmul(x, packed)[1], card.matmul(other, packed)[1])
    assert torch.equal(card.matmul(x, packed), card.matmul(x, packed))


def test_products_in_a_cuda_graph(card, make_tensor):
    packed = card.prepare([make_tensor("int4g64", 64, 1408)])
    x = torch.randn(4, 1408, device="cuda")
    card.matmul(x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = card.matmul(x, packed)
        z = card.multiply(card.halve(x), packed, add=y)
    x.copy_(torch.randn_like(x))
    graph.replay()
    expected = card.matmul(x, packed)
    assert torch.equal(y, expected)
    torch.testing.assert_close(z, 2 * expected)


def test_wrong_arguments_are_refused(card, make_tensor):
    packed = card.prepare([make_tensor("int4g64", 64, 256)])
    for x in (torch.randn(2, 255).cuda(), torch.randn(2, 256).half().cuda(), torch.randn(256).cuda()):
        with pytest.raises(ValueError, match="x must be float32"):
            card.matmul(x, packed)
    halves = card.halve(torch.randn(2, 128).cuda())
    with pytest.raises(ValueError, match="columns"):
        card.multiply(halves, packed)
    with pytest.raises(ValueError, match="two matrices"):
        card.gated(card.halve(torch.randn(2, 256).cuda()), packed)
    with pytest.raises(ValueError, match="out must be"):
        card.multiply(card.halve(torch.randn(2, 256).cuda()), packed, out=torch.empty(2, 63).cuda())
    assert card.rows(packed, torch.tensor([64, -1, 0]))[:2].isnan().all()
