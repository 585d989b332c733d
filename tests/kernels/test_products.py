"""Products of every backend, format and instruction set against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbit.formats import parse
from fewbit.kernels import cpu as cpu_module
from fewbit.kernels import dense, reference
from fewbit.qtensor import QTensor
from tests.kernels.conftest import GGML, fitting

AFFINE = [
    *(f"int{bits}g32" for bits in range(2, 9)),
    *("int2g16", "int3g16a", "int4g16", "int5g16a", "int6g16", "int7g16", "int8g16a"),
    *("int2g64a", "int3g64a", "int4g64a", "int8g64a", "int5", "int4", "int4a", "int8", "int8a", "int4g96", "int4g64"),
]
# with a table: 4 and 3 bits, groups of whole blocks and of halves
TABLED = ["gguf:iq4_xs", "gguf:nvfp4", "gguf:iq2_xxs", "gguf:iq2_xs"]
TOKENS = [1, 2, 3, 8, 16, 17, 31, 32, 33, 256]
# odd rows and columns, last groups and blocks that are cut short
SHAPES = [(1, 1), (16, 32), (17, 33), (5, 100), (63, 161), (50, 576)]


def rounded(x: Tensor) -> Tensor:
    """x as the CPU kernel sees it: int8 in blocks of 32 with scale absmax / 127, float32 arithmetic, result float64."""
    columns = x.shape[1]
    blocks = torch.nn.functional.pad(x, (0, -columns % 32)).unflatten(1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 1e-35, 127.0 / largest, 0.0)
    codes = (blocks * inverse).round()
    return (codes.double() * (largest / 127.0).double()).flatten(1)[:, :columns]


def assert_product(y: Tensor, x: Tensor, w: Tensor, bound: float = 1e-5, size: Tensor | None = None) -> None:
    """|y - x w^T| within `bound` of the sum of the products' magnitudes; float64 x and w; |w| where `size` is None."""
    assert y.dtype == torch.float32
    assert y.shape == (len(x), len(w))
    error = (y.double() - x @ w.T).abs()
    magnitude = x.abs() @ (w.abs() if size is None else size).T
    assert (error <= bound * magnitude).all(), float((error / magnitude).max())


def sizes(q: QTensor) -> Tensor:
    """What |w| is rounded from: with an offset, scale * code and the offset are summed apart and may cancel."""
    a = parse(q.spec).affine(q)
    if a is None or a.offset is None:
        return parse(q.spec).dequantize(q).double().abs()
    spread = [p.double().abs().repeat_interleave(a.span, 1)[:, : q.shape[1]] for p in (a.scale, a.offset)]
    return a.codes.double() * spread[0] + spread[1]


# bits a weight in memory: codes, then what each group or super has
BYTES = [
    *[("int4g64a", 4 + (16 + 8) / 64), ("gguf:q4_1", 4 + (16 + 16) / 32), ("int4g16", 4 + 16 / 16)],
    *[("gguf:q2_k", 2 + 16 / 16 + 32 / 256), ("gguf:q3_k", 3 + 8 / 16 + 16 / 256)],
    *[(f"gguf:q{bits}_k", bits + 16 / 32 + 32 / 256) for bits in (4, 5)],
    *[("gguf:q6_k", 6 + 8 / 16 + 16 / 256), ("gguf:iq4_xs", 4 + 8 / 32 + 16 / 256), ("gguf:iq4_nl", 4 + 16 / 32)],
    *[("gguf:mxfp4", 4 + 16 / 32), ("gguf:nvfp4", 4 + 16 / 16), ("gguf:tq1_0", 2 + 16 / 256)],
    *[(f"gguf:{name}", 3 + 8 / 32 + 32 / 256) for name in ("iq2_xxs", "iq1_s")],
    *[(f"gguf:{name}", 3 + 8 / 16 + 32 / 256) for name in ("iq2_xs", "iq2_s", "iq1_m")],
    *[("gguf:iq3_xxs", 4 + 8 / 32 + 32 / 256), ("gguf:iq3_s", 4 + 8 / 32 + 16 / 256)],
]


@pytest.mark.parametrize(("spec", "bits"), BYTES)
def test_scales_and_what_a_group_adds_take_the_bytes_they_are_stored_in(native, make_tensor, spec, bits):
    packed = native.prepare([make_tensor(spec, 128, 1024)])
    assert packed.nbytes * 8 == bits * 128 * 1024


@pytest.mark.usefixtures("nan_outputs")
@pytest.mark.parametrize("spec", AFFINE + GGML)
def test_native_product_is_that_of_rounded_activations(each_isa, make_tensor, random, spec):
    for rows, columns in SHAPES:
        # halves of blocks want whole ones
        columns = -(-columns // 32) * 32 if "g16" in spec else fitting(spec, columns)
        q = make_tensor(spec, rows, columns)
        w = parse(spec).dequantize(q).double()
        packed = each_isa.prepare([q])
        assert packed.shape == (rows, columns)
        for tokens in TOKENS if rows == 17 else [1, 9]:
            x = random(tokens, columns, seed=tokens)
            assert_product(each_isa.matmul(x, packed), rounded(x), w, 1e-6, sizes(q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", ["int4g32", "int4g32a", "int8", "int8a"])
def test_every_scale_dtype(each_isa, make_tensor, random, spec, dtype):
    q = make_tensor(spec, 37, 90, dtype)
    x = random(5, 90)
    assert_product(each_isa.matmul(x, each_isa.prepare([q])), rounded(x), parse(spec).dequantize(q).double())


def test_subnormal_and_nan_f16_scales(each_isa, make_tensor):
    q = make_tensor("int8", 16, 32, torch.float16)
    bits = [0, 1, 2, 3, 0x3FF, 0x400, 0x401, 0x7BFF, 0x3C00, 0x8001, 0x83FF, 0x8400, 0xBC00, 0x200, 0x7E00, 5]
    q.parts["scale"].copy_(torch.tensor(bits, dtype=torch.int32).to(torch.uint16).view(torch.float16)[:, None])
    packed, x = each_isa.prepare([q]), torch.ones(1, 32)
    w = parse("int8").dequantize(q)
    torch.testing.assert_close(each_isa.matmul(x, packed), x @ w.T, rtol=1e-5, atol=0, equal_nan=True)
    torch.testing.assert_close(each_isa.rows(packed, torch.arange(16)), w, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("spec", ["int4g32", "int8", "int4g64a", "int8g64a"])
def test_extreme_codes_do_not_saturate(each_isa, make_tensor, spec):
    fmt = parse(spec)
    q = make_tensor(spec, 16, 128)
    codes, params = fmt.unpack(q)
    for value in (0, 2**fmt.bits - 1):
        full = fmt.pack(torch.full_like(codes, value), params)
        for x in (torch.ones(2, 128), -torch.ones(2, 128)):
            assert_product(each_isa.matmul(x, each_isa.prepare([full])), x.double(), fmt.dequantize(full).double())


@pytest.mark.parametrize("spec", ["int4g64", "int8", "int4g64a"])
def test_rounding_activations_costs_at_most_half_a_step(each_isa, make_tensor, random, spec):
    q, x = make_tensor(spec, 40, 200), random(6, 200)
    w = parse(spec).dequantize(q).double()
    # each input is off by at most half of absmax / 127 of its block, each product by that times the weight
    largest = torch.nn.functional.pad(x, (0, 24)).unflatten(1, (-1, 32)).abs().amax(-1)
    half_step = (largest / 254).repeat_interleave(32, 1)[:, :200].double()
    error = (each_isa.matmul(x, each_isa.prepare([q])).double() - x.double() @ w.T).abs()
    assert (error <= 1.001 * half_step @ w.abs().T).all()


@pytest.mark.parametrize(
    "spec", ["int4g32", "int4g64a", "int8", "int8a", "int6g16a", "gguf:q2_k", "gguf:q4_k", *TABLED]
)
def test_a_row_does_not_depend_on_the_batch_or_the_threads(each_isa, make_tensor, random, spec):
    columns = 333 if spec in ("int4g32", "int4g64a", "int8", "int8a") else 512
    q, x = make_tensor(spec, 77, columns), random(256, columns)
    packed = each_isa.prepare([q])
    each_isa.set_threads(1)
    together = each_isa.matmul(x, packed)
    for tokens in TOKENS:
        assert torch.equal(each_isa.matmul(x[:tokens], packed), together[:tokens])
    for row in (0, 5, 100, 255):
        assert torch.equal(each_isa.matmul(x[row : row + 1], packed), together[row : row + 1])
    for threads in (2, 3, 7):
        each_isa.set_threads(threads)
        assert torch.equal(each_isa.matmul(x, packed), together)


def test_instruction_sets_agree(native, make_tensor, random):
    for spec in ("int2g32", "int3g64a", "int4g32", "int4g64a", "int5", "int6g32", "int8", "int8a", *GGML):
        columns = fitting(spec, 300) if spec in GGML else 300
        q, x = make_tensor(spec, 33, columns), random(9, columns)
        packed, results = native.prepare([q]), []
        for name, reason in native.instruction_sets().items():
            if reason is None:
                native.set_isa(name)
                results.append(native.matmul(x, packed).double())
        magnitude = rounded(x).abs() @ parse(spec).dequantize(q).double().abs().T
        for other in results[1:]:
            assert ((other - results[0]).abs() <= 2e-6 * magnitude).all()


def test_tensors_of_different_kinds_stack_into_one_product(each_isa, make_tensor, random):
    specs = ["int4g64", "int4g64", "int8", "int4g64a", "gguf:q4_k", "int3g64", "gguf:q6_k", "gguf:iq4_xs"]
    tensors = [make_tensor(spec, 5 + 7 * i, 256) for i, spec in enumerate(specs)]
    packed = each_isa.prepare(tensors)
    assert packed.splits == (5, 12, 19, 26, 33, 40, 47, 54)
    w = torch.cat([parse(q.spec).dequantize(q) for q in tensors])
    for tokens in (1, 11):
        x = random(tokens, 256)
        assert_product(each_isa.matmul(x, packed), rounded(x), w.double())
    ids = torch.randperm(len(w))
    torch.testing.assert_close(each_isa.rows(packed, ids), w[ids], rtol=1e-6, atol=1e-5)


def test_tensors_that_agree_share_a_block(native, make_tensor):
    one = native.prepare([make_tensor("int4g64", 8, 64), make_tensor("int4g64", 8, 64)])
    two = native.prepare([make_tensor("int4g64", 8, 64), make_tensor("int8g64", 8, 64)])
    # 16 rows: 512 bytes of codes for 64 columns, and a line of 64 for 16 scales of 2
    assert one.nbytes == 512 + 64
    assert two.nbytes == 512 + 64 + 1024 + 64


def test_big_tensors_are_packed_in_slices(native, make_tensor, random, monkeypatch):
    for spec in ("int4g32", "int3g32a", "gguf:q8_0", "gguf:q4_k", "gguf:iq2_xs"):
        q, x = make_tensor(spec, 70, 768), random(3, 768)
        whole = native.matmul(x, native.prepare([q]))
        monkeypatch.setattr(cpu_module, "SLICE_WEIGHTS", 768 * 9)
        assert torch.equal(native.matmul(x, native.prepare([q])), whole)
        monkeypatch.undo()


@pytest.mark.parametrize("spec", ["int4g32", "int3g64a", "int8", "int6g16", *GGML])
def test_rows_are_the_dequantized_ones(native, make_tensor, spec):
    q = make_tensor(spec, 45, fitting(spec, 160))
    packed, ids = native.prepare([q]), torch.tensor([44, 0, 17, 17, 15, 16, 31])
    # an offset is added after the product, so the last bit may differ where a format subtracts the zero point first
    torch.testing.assert_close(native.rows(packed, ids), parse(spec).dequantize(q)[ids], rtol=1e-6, atol=1e-5)
    assert native.rows(packed, torch.empty(0, dtype=torch.int64)).shape == (0, q.shape[1])
    for wrong in (-1, 45, 2**62):
        with pytest.raises(IndexError, match=r"0 \.\. 44"):
            native.rows(packed, torch.tensor([3, wrong]))


def test_strided_inputs(native, make_tensor, random):
    packed = native.prepare([make_tensor("int4g32", 20, 64)])
    x = random(10, 128)
    for view in (x[:, ::2], x[::2, :64], x[:, 64:], x[:64].t()[:64].t()[:, :64], x[:1, :64].expand(4, 64)):
        assert torch.equal(native.matmul(view, packed), native.matmul(view.clone(), packed))
    ids = torch.arange(20)[::3]
    assert torch.equal(native.rows(packed, ids), native.rows(packed, ids.clone()))
    assert native.matmul(torch.empty(0, 64), packed).shape == (0, 20)


def test_wrong_inputs_are_refused(native, make_tensor):
    packed = native.prepare([make_tensor("int4g32", 20, 64)])
    for x in (
        torch.zeros(1, 63),
        torch.zeros(64),
        torch.zeros(1, 64, dtype=torch.float64),
        torch.zeros(1, 64, device="meta"),
    ):
        with pytest.raises(ValueError, match="float32"):
            native.matmul(x, packed)
    for ids in (torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="int64"):
            native.rows(packed, ids)
    with pytest.raises(ValueError, match="equal widths"):
        native.prepare([make_tensor("int4g32", 4, 64), make_tensor("int4g32", 4, 96)])


def test_what_is_not_finite_comes_through(each_isa, make_tensor):
    packed = each_isa.prepare([make_tensor("int4g32", 16, 64)])
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(3, 64)
        x[1, 40] = bad
        y = each_isa.matmul(x, packed)
        assert y[[0, 2]].isfinite().all()
        assert not y[1].isfinite().any()
    tiny = torch.full((1, 64), 1e-40)
    assert torch.equal(each_isa.matmul(tiny, packed), torch.zeros(1, 16))
    ones, huge = (each_isa.matmul(torch.full((1, 64), v), packed) for v in (1.0, 2.0**110))
    torch.testing.assert_close(huge, ones * 2.0**110, rtol=1e-6, atol=0)


def test_refusals_are_in_words(native, make_tensor):
    assert "groups of 48" in native.refuses(make_tensor("int4g48", 4, 96))
    assert native.refuses(make_tensor("int4g48", 4, 48)) is None
    assert "groups of 16" in native.refuses(make_tensor("int4g16", 4, 100))
    assert native.refuses(make_tensor("int4g16", 4, 96)) is None
    assert "not scale times code" in native.refuses(make_tensor("bf16", 4, 64))
    assert "not one of" in dense.backend().refuses(make_tensor("int8", 4, 64))
    with pytest.raises(Exception, match="groups of 48"):
        native.prepare([make_tensor("int4g48", 4, 96)])


@pytest.mark.parametrize("spec", ["int4g64", "int8", "int3g48a", "gguf:q4_0", "bf16", "f16", "f32"])
def test_reference_is_the_dequantized_product(make_tensor, random, spec):
    backend = reference.backend()
    tensors = [make_tensor(spec, 7, 96), make_tensor(spec, 12, 96)]
    assert all(backend.refuses(q) is None for q in tensors)
    packed, w = backend.prepare(tensors), torch.cat([parse(spec).dequantize(q) for q in tensors])
    assert (packed.shape, packed.splits, packed.nbytes) == ((19, 96), (7, 12), 19 * 96 * 4)
    x = random(3, 96)
    assert_product(backend.matmul(x, packed), x.double(), w.double(), 1e-6)
    assert torch.equal(backend.rows(packed, torch.tensor([18, 0])), w[[18, 0]])


@pytest.mark.parametrize(("spec", "bound"), [("f32", 1e-6), ("f16", 2e-3), ("bf16", 2e-2)])
def test_dense_multiplies_in_the_stored_dtype(make_tensor, spec, bound):
    backend = dense.backend()
    tensors = [make_tensor(spec, 7, 96), make_tensor(spec, 12, 96)]
    assert all(backend.refuses(q) is None for q in tensors)
    packed, w = backend.prepare(tensors), torch.cat([q.parts["weight"] for q in tensors])
    assert packed.data.dtype == w.dtype
    assert packed.nbytes == w.numel() * w.element_size()
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    assert_product(backend.matmul(x, packed), x.double(), w.double(), bound)
    assert torch.equal(backend.rows(packed, torch.tensor([18, 0])), w[[18, 0]].float())


def test_dense_keeps_a_stack_of_two_dtypes_exact(make_tensor):
    tensors = [make_tensor("f16", 3, 32), make_tensor("bf16", 4, 32)]
    packed = dense.backend().prepare(tensors)
    w = torch.cat([q.parts["weight"].float() for q in tensors])
    assert torch.equal(dense.backend().rows(packed, torch.arange(7)), w)
