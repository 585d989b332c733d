"""Exports' layouts byte by byte: what GPTQModel's own packing wrote, and what other engines refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fewbit.checkpoint._writer import Planned, quantization_config
from fewbit.errors import FewbitError
from fewbit.exports import _limits, awq, gptq
from fewbit.exports._ggml_mapping import keeps_codes, mapped
from fewbit.formats import parse
from fewbit.qtensor import QTensor

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "gptqmodel.safetensors")


def golden(spec: str) -> QTensor:
    """The matrix 32 x 64 that GPTQModel was given, in fewbit's own terms."""
    bits, name = int(spec[3]), f"gptq.{spec.replace('g32', '')}"
    params = {"scale": GOLDEN[f"{name}.scale"]}
    if spec.endswith("a"):
        params["zero"] = GOLDEN[f"{name}.zeros"]
    else:
        assert bool((GOLDEN[f"{name}.zeros"] == 1 << (bits - 1)).all())
    return parse(spec).pack(GOLDEN[f"{name}.codes"], params)


def same_bytes(planned: Planned, q: QTensor, name: str, parts: tuple[str, ...]) -> None:
    found, stored = planned.spelled(q), planned.stored(torch.bfloat16)
    assert set(found) == set(stored) == {f"x.{part}" for part in parts}
    for part in parts:
        t = found[f"x.{part}"]
        assert torch.equal(t, GOLDEN[f"{name}.{part}"]), part
        assert (t.dtype, tuple(t.shape)) == stored[f"x.{part}"]


@pytest.mark.parametrize("ending", ["g32", "g32a"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_what_gptqmodel_packs(bits: int, ending: str) -> None:
    spec = f"int{bits}{ending}"
    name = f"gptq.{spec.replace('g32', '')}"
    same_bytes(gptq.Packed("x.weight", spec, (32, 64)), golden(spec), name, ("qweight", "qzeros", "scales", "g_idx"))


@pytest.mark.parametrize("spec", ["int4g32", "int4g32a"])
def test_awq_is_what_gptqmodel_packs(spec: str) -> None:
    """A symmetric matrix is told with the zero point 8 everywhere."""
    name = f"awq.{spec.replace('g32', '')}"
    same_bytes(awq.Packed("x.weight", spec, (32, 64)), golden(spec), name, ("qweight", "qzeros", "scales"))


def test_a_zero_point_of_0_has_no_place_in_gptq() -> None:
    q = golden("int4g32a")
    zeros = GOLDEN["gptq.int4a.zeros"].clone()
    zeros[3, 1] = 0
    q = parse("int4g32a").pack(GOLDEN["gptq.int4a.codes"], {"scale": q.parts["scale"], "zero": zeros})
    with pytest.raises(FewbitError, match=r"1 zero points of 0.*\n.*awq or compressed-tensors"):
        gptq.Packed("x.weight", "int4g32a", (32, 64)).spelled(q)
    awq.Packed("x.weight", "int4g32a", (32, 64)).spelled(q)


def test_scales_beyond_f16_are_an_error() -> None:
    q = golden("int4g32")
    q = QTensor(q.spec, q.shape, q.parts | {"scale": torch.full((32, 2), 1e5)})
    for kind in (gptq.Packed, awq.Packed):
        with pytest.raises(FewbitError, match="up to 100000"):
            kind("x.weight", "int4g32", (32, 64)).spelled(q)


def block(spec: str, shapes: dict[str, tuple[int, int]] | None = None, **changes: str) -> list[Planned]:
    """The linears of one layer of SmolLM2's sizes."""
    sizes = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
    sizes |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)} | (shapes or {})
    return [Planned(f"l.{n}_proj.weight", changes.get(n, spec), shape) for n, shape in sizes.items()]


REFUSED: dict[str, tuple[str, str, list[Planned], str, str]] = {
    "576 % 128": ("compressed-tensors", "vllm", block("int4g128"), "do not divide its 576 inputs", "int4g64"),
    "three bits": ("compressed-tensors", "vllm", block("int3g64"), "3 bits without zero points", "int4g64"),
    "three bits, gptq": ("gptq", "vllm", block("int3g64"), "3 bits", "int4g64; for transformers with GPTQModel"),
    "a group of 48": ("gptq", "vllm", block("int4g48"), "groups of 48 are not supported", "int4g32"),
    "zero points in gptq": ("gptq", "vllm", block("int4g64a"), "zero points are not supported", "int4g64;"),
    "zero points of 8 bits": ("compressed-tensors", "vllm", block("int8g64a"), "8 bits with zero points", "int8g64"),
    "zero points, transformers": ("compressed-tensors", "transformers", block("int4g64a"), "zero points", "int4g64"),
    "awq of 8 bits": ("awq", "vllm", block("int8"), "8 bits", "--format int4"),
    "awq, width 3": ("awq", "transformers", block("int3g64a"), "3 bits", "int4g64a"),
    "q and k": ("compressed-tensors", "vllm", block("int4g64", k="int8"), "multiplies them as one", "int4g64; for tr"),
    "gate and up": ("compressed-tensors", "vllm", block("int4g64", up="int4g32"), "gate_proj.*up_proj", "int4g64"),
    "mixed gptq": ("gptq", "transformers", block("int4g64", down="int8"), "have 2 formats", "int4g64"),
    "outputs": ("awq", "transformers", block("int4g64", {"o": (580, 576)}), "580 outputs are no multiple", "GGUF"),
    "no integers": ("awq", "vllm", block("bf16"), "no format of integers", "int4g64"),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "engine", "linears", "facts", "way"), REFUSED.values(), ids=REFUSED.keys())
def test_what_an_engine_refuses_is_refused_with_what_works(
    layout: str, engine: str, linears: list[Planned], facts: str, way: str
) -> None:
    with pytest.raises(FewbitError, match=facts) as caught:
        _limits.check(layout, engine, linears)
    assert _limits.LIMITS[layout, engine].engine in caught.value.what
    assert way in caught.value.next_step
    if "--format" in way or "int" in way:
        spec = caught.value.next_step.partition("--format ")[2].partition(";")[0].rstrip(".")
        _limits.check(layout, engine, [Planned(t.name, spec, t.shape) for t in linears])


@pytest.mark.parametrize(
    ("layout", "engine", "linears"),
    [
        ("compressed-tensors", "vllm", block("int4g64a")),
        ("compressed-tensors", "vllm", block("int4g64", down="int8")),
        ("compressed-tensors", "transformers", block("int4g64", k="int8")),
        ("gptq", "transformers", block("int3g32a")),
        ("awq", "vllm", block("int4g64")),
    ],
)
def test_what_engines_take(layout: str, engine: str, linears: list[Planned]) -> None:
    _limits.check(layout, engine, linears)


def test_several_schemes_have_a_group_each() -> None:
    linears = block("int4g64", down="int8")
    said = quantization_config(linears, {t.name for t in linears})
    assert said is not None
    assert said["quant_method"] == "compressed-tensors"
    groups = said["config_groups"]
    assert groups["group_0"]["targets"] == ["Linear"]
    assert groups["group_0"]["weights"]["num_bits"] == 4
    assert groups["group_1"]["targets"] == ["l.down_proj"]
    assert groups["group_1"]["weights"]["strategy"] == "channel"


SAYABLE = [
    ("int4g32", "q4_0"), ("int4g64", "q4_0"), ("int3g128", "q4_0"), ("int2", "q4_0"), ("int5g32", "q5_0"),
    ("int4g64a", "q5_0"), ("int8", "q8_0"), ("int8g32", "q8_0"), ("int6g64", "q8_0"), ("int7a", "q8_0"),
    ("int4g32a", "q4_1"), ("int4g64", "q4_1"), ("int5g96a", "q5_1"), ("gguf:q4_0", "q5_0"), ("gguf:q5_0", "q8_0"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "name"), SAYABLE)
def test_codes_are_kept_where_a_block_can_say_them(spec: str, name: str) -> None:
    w = torch.randn(32, 192, generator=torch.Generator().manual_seed(1)) * 0.05
    fmt: Any = parse(spec)
    params = fmt.fit(w, None, torch.bfloat16)
    q = fmt.pack(fmt.round(w, params), params)
    assert keeps_codes(spec, f"gguf:{name}", 192)
    found = mapped(q, f"gguf:{name}")
    expected, got = fmt.dequantize(q), parse(f"gguf:{name}").dequantize(found.q)
    if name.endswith("0"):
        # scales of bf16 are exact in f16 at this size
        assert found.changed == 0
        assert torch.equal(got, expected)
    else:
        # minima are products of a scale and a zero point
        assert torch.allclose(got, expected, rtol=0, atol=2.0**-11 * 0.2)
        assert (found.changed == 0) is torch.equal(got, expected)


@pytest.mark.parametrize(
    ("spec", "name", "columns"),
    [
        ("int4g16", "q4_0", 192), ("int5", "q4_0", 192), ("int4g48", "q4_0", 192), ("int8a", "q8_0", 192),
        ("int4g64a", "q4_0", 192), ("int4g32", "q4_0", 144), ("int4g32", "q4_k", 256), ("gguf:q4_1", "q5_1", 192),
        ("gguf:q6_k", "q8_0", 256), ("int5g32a", "q4_1", 192), ("bf16", "q8_0", 192),
    ],
)  # fmt: skip
def test_what_a_block_cannot_say(spec: str, name: str, columns: int) -> None:
    assert not keeps_codes(spec, f"gguf:{name}", columns)


def test_minima_that_fit_are_exact_and_counted() -> None:
    """Scales that are powers of two times small zero points: products of few bits."""
    codes = torch.randint(0, 16, (32, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    zero = torch.randint(0, 16, (32, 2), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    fine = parse("int4g32a").pack(codes, {"scale": torch.full((32, 2), 2.0**-6), "zero": zero})
    assert mapped(fine, "gguf:q4_1").changed == 0
    odd = parse("int4g32a").pack(codes, {"scale": torch.full((32, 2), 257 / 2**14), "zero": zero | 1})
    found = mapped(odd, "gguf:q4_1")
    # 257 x 9 and more has 12 bits: no f16
    assert found.changed == int(((zero | 1) >= 9).sum())
    assert found.halves == 128
