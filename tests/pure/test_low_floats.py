"""Models published in 8- and 4-bit numbers: FP8 with scales of every kind, MXFP4, int8 as it lies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewbit
from fewbit.checkpoint import open_checkpoint
from fewbit.errors import FewbitError
from fewbit.formats import parse
from fewbit.source import open_source
from tests.conftest import CONFIG, random_weights, write_folder

E4M3 = torch.float8_e4m3fn
LINEAR = "model.layers.0.mlp.up_proj.weight"


def e4m3(byte: int) -> float:
    """OCP 8-bit floating point, section 5.2: sign, 4 bits of exponent with bias 7, 3 bits; all ones is NaN."""
    sign, exponent, rest = -1 if byte >> 7 else 1, byte >> 3 & 15, byte & 7
    if exponent == 15 and rest == 7:
        return float("nan")
    return sign * (rest / 8 * 2.0**-6 if not exponent else (1 + rest / 8) * 2.0 ** (exponent - 7))


def e2m1(code: int) -> float:
    """OCP Microscaling Formats, section 5.3.3: sign, 2 bits of exponent with bias 1, 1 bit."""
    sign, exponent, rest = -1 if code >> 3 else 1, code >> 1 & 3, code & 1
    return sign * (rest / 2 if not exponent else (1 + rest / 2) * 2.0 ** (exponent - 1))


def made(w: Tensor, scale: str, block: tuple[int, int] = (128, 128)) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix in FP8 with a scale of a kind: numbers, scales as they are stored, what the two mean by a loop."""
    n, k = w.shape
    rows, columns = {"tensor": (n, k), "channel": (1, k), "group": (1, 32), "block": block}[scale]
    stored = torch.rand(-(-n // rows), -(-k // columns), generator=torch.Generator().manual_seed(n)) * 0.01 + 0.001
    codes = torch.randint(0, 256, (n, k), generator=torch.Generator().manual_seed(k), dtype=torch.uint8)
    codes[codes & 127 == 127] = 0
    table = torch.tensor([e4m3(b) for b in range(256)])
    meant = torch.empty(n, k)
    for i in range(n):
        for j in range(0, k, 8):
            meant[i, j : j + 8] = table[codes[i, j : j + 8].int()] * stored[i // rows, j // columns]
    return codes.view(E4M3), stored, meant


def folder(
    path: Path, said: dict[str, Any], change: Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]
) -> dict[str, Tensor]:
    """A tiny Llama whose linears `change` stores; gives what its weights mean."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 160, "intermediate_size": 192, "head_dim": 32}
    config = CONFIG | sizes
    weights, stored = random_weights(config), {}
    for name, w in list(weights.items()):
        if "_proj" in name:
            parts, weights[name] = change(name, w.float())
            stored |= parts
        else:
            stored[name] = w
    write_folder(path, stored, **sizes, quantization_config=said)
    return weights


def same(path: Path, weights: dict[str, Tensor], spec: str) -> None:
    source = open_source(path)
    for w in source.weights:
        if "_proj" in w.name:
            assert source.spec(w.name) == spec
            q = source.read(w.name)
            assert torch.equal(parse(q.spec).dequantize(q), weights[w.name]), w.name
            some = source.read(w.name, (5, 29))
            assert torch.equal(parse(q.spec).dequantize(some), weights[w.name][5:29]), w.name
            order = torch.tensor([3, 0, 8])
            assert torch.equal(parse(q.spec).dequantize(parse(q.spec).take(q, order)), weights[w.name][order])


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}


@pytest.mark.parametrize(
    ("kind", "said", "spec"),
    [
        ("block", {"weight_block_size": [128, 64]}, "fp8g64"),
        ("block", {"weight_block_size": [64, 32]}, "fp8g32"),
        ("tensor", {}, "fp8"),
        ("channel", {}, "fp8"),
    ],
)
def test_fp8_is_number_times_scale(tmp_path: Path, kind: str, said: dict[str, Any], spec: str) -> None:
    block = tuple(said.get("weight_block_size", (1, 1)))

    def change(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scale, meant = made(w, kind, block)
        ending = "weight_scale_inv" if kind == "block" else "weight_scale"
        stem = name.removesuffix("weight")
        scale = scale.reshape(()) if kind == "tensor" else scale
        return {name: codes, f"{stem}{ending}": scale, f"{stem}input_scale": torch.ones(1)}, meant

    weights = folder(tmp_path / "m", FP8 | said, change)
    same(tmp_path / "m", weights, spec)


def ct_said(kind: str, bits: int = 8, **weights: Any) -> dict[str, Any]:
    """As llm-compressor writes it, activations rounded too."""
    scheme = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": "channel", "dynamic": False} | weights
    inputs = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": f"{kind}-quantized", "quantization_status": "compressed",
        "kv_cache_scheme": None, "ignore": ["lm_head"], "config_groups": {"group_0": group},
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["tensor", "channel", "group", "block"])
def test_float_quantized(tmp_path: Path, kind: str) -> None:
    def change(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scale, meant = made(w, kind, (64, 32))
        return {name: codes, f"{name}_scale": scale.bfloat16().float()}, meant

    more = {"strategy": kind} | ({"block_structure": [64, 32]} if kind == "block" else {})
    weights = folder(tmp_path / "m", ct_said("float", **more), change)
    # the scales were rounded
    for name, w in load_file(tmp_path / "m" / "model.safetensors").items():
        if name.endswith("_scale"):
            stem = name.removesuffix("_scale")
            n, k = weights[stem].shape
            rows, columns = {"tensor": (n, k), "channel": (1, k), "group": (1, 32), "block": (64, 32)}[kind]
            spread = w.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
            codes = load_file(tmp_path / "m" / "model.safetensors")[stem]
            weights[stem] = codes.float() * spread
    same(tmp_path / "m", weights, "fp8" if kind in ("tensor", "channel") else "fp8g32")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("kind", ["channel", "group"])
def test_int_quantized_is_kept_as_integers(tmp_path: Path, kind: str, asymmetric: bool, bits: int) -> None:
    def change(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        random = torch.Generator().manual_seed(len(name))
        half, span = 1 << (bits - 1), w.shape[1] if kind == "channel" else 32
        codes = torch.randint(-half, half, w.shape, generator=random)
        scale = torch.rand(len(w), w.shape[1] // span, generator=random) * 0.01 + 0.001
        zero = torch.randint(-half, half, scale.shape, generator=random) if asymmetric else torch.zeros_like(scale)
        meant = (codes - zero.repeat_interleave(span, 1)) * scale.repeat_interleave(span, 1)
        parts = {name: codes.to(torch.int8), f"{name}_scale": scale}
        return parts | ({f"{name}_zero_point": zero.to(torch.int8)} if asymmetric else {}), meant

    weights = folder(tmp_path / "m", ct_said("int", bits, strategy=kind, symmetric=not asymmetric), change)
    if bits != 8:
        config = json.loads((tmp_path / "m" / "config.json").read_text())
        config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    same(tmp_path / "m", weights, f"int{bits}{'g32' if kind == 'group' else ''}{'a' if asymmetric else ''}")


def mxfp4(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers two a byte [..., in / 2], exponents [..., in / 32], and what they mean by a loop."""
    random = torch.Generator().manual_seed(shape[-1])
    *outer, k = shape
    packed = torch.randint(0, 256, (*outer, k // 2), generator=random, dtype=torch.uint8)
    scale = torch.randint(110, 130, (*outer, k // 32), generator=random, dtype=torch.uint8)
    rows, exponents = packed.reshape(-1, k // 2).tolist(), scale.reshape(-1, k // 32).tolist()
    meant = [
        [e2m1(row[j // 2] >> (4 * (j % 2)) & 15) * 2.0 ** (exponent[j // 32] - 127) for j in range(k)]
        for row, exponent in zip(rows, exponents, strict=True)
    ]
    return packed, scale, torch.tensor(meant).reshape(shape)


def test_mxfp4_of_compressed_tensors(tmp_path: Path) -> None:
    def change(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        packed, scale, meant = mxfp4(tuple(w.shape))
        return {f"{name}_packed": packed, f"{name}_scale": scale}, meant

    said = ct_said("float", 4, strategy="group", group_size=32)
    said["config_groups"]["group_0"]["input_activations"] = None
    same(tmp_path / "m", folder(tmp_path / "m", said, change), "mxfp4")


def test_its_numbers_are_those_of_compressed_tensors() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    codes = torch.arange(32, dtype=torch.uint8).reshape(1, 32) % 16
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    expected = helpers.unpack_fp4_from_uint8(packed, 1, 32, torch.float32)
    one = fewbit.QTensor("mxfp4", (1, 32), {"packed": packed, "scale": torch.tensor([[127]], dtype=torch.uint8)})
    assert torch.equal(parse("mxfp4").dequantize(one), expected)


def test_experts_as_gpt_oss_has_them(tmp_path: Path) -> None:
    packed, scale, meant = mxfp4((3, 4, 64))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stored = {f"{name}_blocks": packed.unflatten(-1, (2, 16)), f"{name}_scales": scale, "x.weight": torch.ones(2)}
    path = write_folder(tmp_path / "m", stored, quantization_config={"quant_method": "mxfp4"})
    found = open_checkpoint(path)
    assert sorted(found.names()) == [name, "x.weight"]
    assert (found.spec(name), found.shape(name)) == ("mxfp4", (3, 4, 64))
    assert torch.equal(parse("mxfp4").dequantize(found.read(name)), meant)
    assert torch.equal(parse("mxfp4").dequantize(found.read(name, (1, 3))), meant[1:3])


def test_powers_of_two_to_the_ends() -> None:
    packed = torch.full((3, 16), 0x12, dtype=torch.uint8)
    scale = torch.tensor([[0], [254], [255]], dtype=torch.uint8)
    w = parse("mxfp4").dequantize(fewbit.QTensor("mxfp4", (3, 32), {"packed": packed, "scale": scale}))
    assert w[0, :2].tolist() == [2.0**-127, 2.0**-128]
    assert w[1, :2].tolist() == [2.0**127, 2.0**126]
    assert w[2].isnan().all()


def fp8_folder(path: Path) -> dict[str, Tensor]:
    def change(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        largest = w.abs().reshape(len(w), -1).amax() / 448
        codes = (w / largest).to(E4M3)
        stem = name.removesuffix("weight")
        scale = torch.full((-(-len(w) // 64), -(-w.shape[1] // 64)), float(largest))
        return {name: codes, f"{stem}weight_scale_inv": scale}, codes.float() * largest

    return folder(path, FP8 | {"weight_block_size": [64, 64]}, change)


def test_a_model_in_fp8_runs_and_is_quantized(tmp_path: Path) -> None:
    weights = fp8_folder(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    sizes = {k: config[k] for k in ("num_hidden_layers", "hidden_size", "intermediate_size", "head_dim")}
    plain = write_folder(tmp_path / "p", {k: w.float() for k, w in weights.items()}, **sizes)
    ids = list(range(3, 60))
    logits = []
    for path in (tmp_path / "m", plain):
        model = fewbit.load(path, exact=True)
        sequence, _ = model.begin(None, ids)
        logits.append(model.prefill(sequence, ids))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    fewbit.quantize(tmp_path / "m", tmp_path / "q", format="int4g32", method="rtn")
    fewbit.quantize(plain, tmp_path / "r", format="int4g32", method="rtn")
    first, second = open_source(tmp_path / "q").read(LINEAR), open_source(tmp_path / "r").read(LINEAR)
    assert torch.equal(first.parts["packed"], second.parts["packed"])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t | {LINEAR.replace("weight", "weight_scale_inv"): torch.ones(2, 2)}, "does not fit together"),
        (lambda t: {k: v for k, v in t.items() if "weight_scale_inv" not in k}, "does not fit together"),
        (lambda t: t | {LINEAR.replace("weight", "weight_scale_inv"): torch.ones(3, 3).int()}, "stored as torch.int32"),
        (lambda t: t | {LINEAR: t[LINEAR].view(torch.uint8)}, "stored as torch.uint8"),
        (lambda t: t | {LINEAR: t[LINEAR][:-1]}, "does not fit|wrong shape"),
    ],
)
def test_a_broken_model_in_fp8(tmp_path: Path, damage: Callable[[dict[str, Tensor]], Any], words: str) -> None:
    fp8_folder(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    save_file({k: v.contiguous() for k, v in damage(load_file(file)).items()}, file)
    with pytest.raises(FewbitError, match=words):
        fewbit.load(tmp_path / "m", exact=True)


@pytest.mark.parametrize("size", ["many", [128], [0, 128], [128.0, 128], [10**9, 1]])
def test_odd_block_sizes(tmp_path: Path, size: Any) -> None:
    fp8_folder(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = size
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FewbitError, match="weight_block_size"):
        open_source(tmp_path / "m")


def test_numbers_beyond_what_is_said(tmp_path: Path) -> None:
    def change(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {name: torch.full(w.shape, 9, dtype=torch.int8), f"{name}_scale": torch.ones(len(w), 1)}, w

    said = ct_said("int", 4)
    said["config_groups"]["group_0"]["input_activations"] = None
    folder(tmp_path / "m", said, change)
    with pytest.raises(FewbitError, match="numbers from 9 to 9"):
        open_source(tmp_path / "m").read(LINEAR)
