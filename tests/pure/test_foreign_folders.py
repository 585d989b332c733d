"""Folders of other tools: GPTQ, AWQ and AutoRound, packed here bit by bit from their formats' definitions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewbit
from fewbit.cli import main
from fewbit.fetching import Fetcher
from fewbit.formats import parse
from fewbit.kernels import available
from fewbit.source import open_source
from tests.conftest import CONFIG, random_weights, write_folder

AWQ_SLOTS = [0, 2, 4, 6, 1, 3, 5, 7]
LINEAR = "model.layers.0.mlp.down_proj"


def stream(codes: list[int], bits: int) -> list[int]:
    """Codes as one number, the first lowest, cut into signed 32-bit words."""
    whole = sum(code << (bits * i) for i, code in enumerate(codes))
    words = [(whole >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]
    return [w - (1 << 32) if w >> 31 else w for w in words]


def down(codes: Tensor, bits: int) -> Tensor:
    """[K, N] -> [K * bits / 32, N], packed down the columns."""
    return torch.tensor([stream(column, bits) for column in codes.t().tolist()], dtype=torch.int32).t().contiguous()


def across(codes: Tensor, bits: int) -> Tensor:
    """[n, N] -> [n, N * bits / 32], packed along the rows."""
    return torch.tensor([stream(row, bits) for row in codes.tolist()], dtype=torch.int32)


def awq_across(codes: Tensor, bits: int) -> Tensor:
    """The same with every eight codes in AWQ's order."""
    shuffled = [[row[8 * (i // 8) + AWQ_SLOTS[i % 8]] for i in range(len(row))] for row in codes.tolist()]
    return across(torch.tensor(shuffled), bits)


@dataclass
class Made:
    """A random quantized matrix in the format's own terms, and its weights float32 [N, K] by a loop."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    order: Tensor
    weight: Tensor = field(init=False)

    def __post_init__(self) -> None:
        zeros, scales = self.zeros.tolist(), self.scales.tolist()
        columns = [
            [(code - zeros[g][j]) * scales[g][j] for j, code in enumerate(row)]
            for row, g in zip(self.codes.tolist(), self.order.tolist(), strict=True)
        ]
        self.weight = torch.tensor(columns).t().contiguous()


def make(n: int, k: int, bits: int, group: int, symmetric: bool, shuffled: bool = False, seed: int = 0) -> Made:
    random = torch.Generator().manual_seed(seed)
    span = group if group > 0 else k
    groups = -(-k // span)
    order = torch.arange(k) // span
    if shuffled:
        order = order[torch.randperm(k, generator=random)]
    # version 1 stores zero points less one, and most writers can't say 0
    zeros = torch.randint(1, 2**bits, (groups, n), generator=random)
    if symmetric:
        zeros = torch.full((groups, n), 2 ** (bits - 1))
    scales = (torch.rand(groups, n, generator=random) * 0.02 + 0.001) * (32 / 2**bits)
    return Made(torch.randint(0, 2**bits, (k, n), generator=random), zeros, scales.half(), order.int())


def gptq_parts(m: Made, bits: int, less_one: bool = True, g_idx: bool = True) -> dict[str, Tensor]:
    parts = {"qweight": down(m.codes, bits), "qzeros": across(m.zeros - int(less_one), bits), "scales": m.scales}
    return parts | ({"g_idx": m.order} if g_idx else {})


def awq_parts(m: Made, bits: int) -> dict[str, Tensor]:
    return {"qweight": awq_across(m.codes, bits), "qzeros": awq_across(m.zeros, bits), "scales": m.scales}


Parts = Callable[[Made, int], dict[str, Tensor]]


@dataclass
class Folder:
    """A tiny Llama whose linears another tool is said to have quantized, and what its weights are."""

    path: Path
    weights: dict[str, Tensor]

    def read(self, name: str) -> Tensor:
        q = open_source(self.path).read(name)
        return parse(q.spec).dequantize(q)


def foreign_folder(
    path: Path, said: dict[str, Any], parts: Parts, bits: int = 4, group: int = 32, symmetric: bool = True,
    shuffled: bool = False, beside: str | None = None,
) -> Folder:  # fmt: skip
    config = CONFIG | {"num_hidden_layers": 1, "dtype": "float16"}
    weights = random_weights(config, torch.float16)
    stored: dict[str, Tensor] = {}
    for i, (name, w) in enumerate(list(weights.items())):
        if "_proj" not in name:
            stored[name] = w
            continue
        m = make(*w.shape, bits, group, symmetric, shuffled, seed=i)
        stem = name.removesuffix(".weight")
        stored |= {f"{stem}.{part}": t for part, t in parts(m, bits).items()}
        weights[name] = m.weight
    changes = {} if beside else {"quantization_config": said}
    write_folder(path, stored, num_hidden_layers=1, dtype="float16", **changes)
    if beside:
        (path / beside).write_text(json.dumps(said))
    return Folder(path, weights)


def gptq_said(bits: int = 4, group: int = 32, sym: bool = True, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": False} | more


def awq_said(group: int = 32, **more: Any) -> dict[str, Any]:
    said = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return said | {"modules_to_not_convert": None} | more


def auto_said(packing: str | None, bits: int = 4, sym: bool = True, **more: Any) -> dict[str, Any]:
    said = {"quant_method": "auto-round", "bits": bits, "group_size": 32, "sym": sym, "data_type": "int"}
    return said | ({"packing_format": packing} if packing else {}) | more


def v2_parts(m: Made, bits: int) -> dict[str, Tensor]:
    return gptq_parts(m, bits, less_one=False)


def bare_parts(m: Made, bits: int) -> dict[str, Tensor]:
    return gptq_parts(m, bits, g_idx=False)


def bare_v2_parts(m: Made, bits: int) -> dict[str, Tensor]:
    return gptq_parts(m, bits, less_one=False, g_idx=False)


def same_weights(folder: Folder, spec: str) -> None:
    source = open_source(folder.path)
    for w in source.weights:
        if "_proj" in w.name:
            q = source.read(w.name)
            assert source.spec(w.name) == q.spec == spec
            assert source.scattered(w.name) == ("g_idx" in q.parts)
            # brought by threads, what is stored makes the same tensor
            with Fetcher(source, [w.name], torch.device("cpu")) as fetcher:
                fetched = fetcher.read(w.name)
            assert (fetched.spec, fetched.shape) == (q.spec, q.shape)
            assert set(fetched.parts) == set(q.parts)
            assert all(torch.equal(fetched.parts[part], q.parts[part]) for part in q.parts)
            assert torch.equal(folder.read(w.name), folder.weights[w.name]), w.name


@pytest.mark.parametrize("shuffled", [False, True], ids=["", "order"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_means_code_zero_point_scale(tmp_path: Path, bits: int, symmetric: bool, shuffled: bool) -> None:
    said = gptq_said(bits, sym=symmetric, desc_act=shuffled)
    folder = foreign_folder(tmp_path / "v1", said, gptq_parts, bits, 32, symmetric, shuffled)
    same_weights(folder, f"int{bits}g32{'' if symmetric else 'a'}")
    said |= {"checkpoint_format": "gptq_v2"}
    folder = foreign_folder(tmp_path / "v2", said, v2_parts, bits, 32, symmetric, shuffled)
    same_weights(folder, f"int{bits}g32{'' if symmetric else 'a'}")


@pytest.mark.parametrize("group", [-1, 16, 128])
def test_gptq_groups_of_any_size(tmp_path: Path, group: int) -> None:
    # 160 inputs of one matrix make a whole group of 128 and a short one
    folder = foreign_folder(tmp_path / "m", gptq_said(3, group, False), gptq_parts, 3, group, False)
    same_weights(folder, "int3a" if group < 0 else f"int3g{group}a")


def test_three_bits_run_across_words_as_the_format_says() -> None:
    """32 codes in three words: ten, two bits of the 11th; one bit, ten, one of the 22nd; two bits, ten."""
    codes = [(i * 5 + 3) % 8 for i in range(32)]
    words = [0, 0, 0]
    for i in range(10):
        words[0] |= codes[i] << (3 * i)
        words[1] |= codes[11 + i] << (3 * i + 1)
        words[2] |= codes[22 + i] << (3 * i + 2)
    words[0] |= (codes[10] << 30) & 0xFFFFFFFF
    words[1] |= codes[10] >> 2 | (codes[21] << 31) & 0xFFFFFFFF
    words[2] |= codes[21] >> 1
    assert stream(codes, 3) == [w - (1 << 32) if w >> 31 else w for w in words]


@pytest.mark.parametrize(
    ("name", "method"), [("quantize_config.json", None), ("quantize_config.json", "gptq"), ("quant_config.json", None)]
)
def test_settings_beside_the_config(tmp_path: Path, name: str, method: str | None) -> None:
    said = (
        {"bits": 4, "group_size": 32, "sym": True} if name.startswith("quantize") else {"w_bit": 4, "q_group_size": 32}
    )
    said |= {"quant_method": method} if method else {}
    parts, spec = (gptq_parts, "int4g32") if name.startswith("quantize") else (awq_parts, "int4g32a")
    same_weights(foreign_folder(tmp_path / "m", said, parts, beside=name), spec)


@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("zero_point", [True, False])
def test_awq_means_code_zero_point_scale(tmp_path: Path, group: int, zero_point: bool) -> None:
    said = awq_said(group, zero_point=zero_point)
    folder = foreign_folder(tmp_path / "m", said, awq_parts, 4, group, not zero_point)
    same_weights(folder, f"int4{'g32' if group > 0 else ''}{'a' if zero_point else ''}")


SPELLINGS: dict[str, tuple[dict[str, Any], Parts, int, bool]] = {
    "as gptq": (auto_said("auto_round:auto_gptq"), bare_parts, 4, True),
    "as gptq, 5 bits": (auto_said("auto_round:auto_gptq", 5), bare_parts, 5, True),
    "as gptq, old": (auto_said(None, backend="auto_round:gptq:exllamav2"), gptq_parts, 4, True),
    "nothing said": (auto_said(None, quant_method="intel/auto-round"), gptq_parts, 4, True),
    "own": (auto_said("auto_round", sym=False), bare_v2_parts, 4, False),
    "own, 3 bits": (auto_said("auto_round:exllamav2", 3, sym=False), bare_v2_parts, 3, False),
    "gptqmodel": (auto_said("auto_round:gptqmodel", sym=False), v2_parts, 4, False),
    "as awq": (auto_said("auto_round:auto_awq", sym=False, zero_point=True), awq_parts, 4, False),
    "as awq, symmetric": (auto_said("auto_round:auto_awq", zero_point=False), awq_parts, 4, True),
    "as awq, 6 bits": (auto_said("auto_round:auto_awq", 6, sym=False), awq_parts, 6, False),
}


@pytest.mark.parametrize(("said", "parts", "bits", "symmetric"), SPELLINGS.values(), ids=SPELLINGS.keys())
def test_auto_round_spells_it_in_ten_ways(
    tmp_path: Path, said: dict[str, Any], parts: Parts, bits: int, symmetric: bool
) -> None:
    folder = foreign_folder(tmp_path / "m", said, parts, bits, 32, symmetric)
    same_weights(folder, f"int{bits}g32{'' if symmetric else 'a'}")


def ct_said(bits: int, symmetric: bool, group: int, actorder: str | None) -> dict[str, Any]:
    """quantization_config as llm-compressor writes it."""
    weights = {"actorder": actorder, "block_structure": None, "dynamic": False, "num_bits": bits, "observer": "minmax"}
    weights |= {"group_size": group if group > 0 else None, "strategy": "group" if group > 0 else "channel"}
    weights |= {"observer_kwargs": {}, "symmetric": symmetric, "type": "int", "scale_dtype": None, "zp_dtype": None}
    scheme = {"format": "pack-quantized", "input_activations": None, "output_activations": None}
    said = {"config_groups": {"group_0": scheme | {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    said |= {"format": "pack-quantized", "kv_cache_scheme": None, "quantization_status": "compressed"}
    return said | {
        "quant_method": "compressed-tensors",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.12",
    }


def ct_parts(m: Made, bits: int) -> dict[str, Tensor]:
    k, n = m.codes.shape
    found = {"weight_packed": across(m.codes.t(), bits), "weight_scale": m.scales.t().contiguous()}
    found |= {"weight_shape": torch.tensor([n, k])}
    symmetric = bool((m.zeros == 2 ** (bits - 1)).all())
    return found | ({} if symmetric else {"weight_zero_point": down(m.zeros.t(), bits)})


@pytest.mark.parametrize("actorder", [None, "weight", "static"])
@pytest.mark.parametrize(
    ("bits", "symmetric", "group"),
    [
        (4, True, 32), (4, False, 32), (8, True, -1), (8, False, 16), (2, True, 32), (3, False, 32), (5, True, 16),
        (6, False, -1), (7, True, 32),
    ],
)  # fmt: skip
def test_what_llm_compressor_writes(
    tmp_path: Path, bits: int, symmetric: bool, group: int, actorder: str | None
) -> None:
    said = ct_said(bits, symmetric, group, actorder)
    folder = foreign_folder(tmp_path / "m", said, ct_parts, bits, group, symmetric)
    same_weights(folder, f"int{bits}{f'g{group}' if group > 0 else ''}{'' if symmetric else 'a'}")


@pytest.mark.parametrize("bits", range(2, 9))
def test_its_words_are_those_of_compressed_tensors(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    m = make(40, 96, bits, 32, symmetric=False)
    shifted = (m.codes.t() - 2 ** (bits - 1)).to(torch.int8).contiguous()
    assert torch.equal(ct_parts(m, bits)["weight_packed"], helpers.pack_to_int32(shifted, bits))
    shifted = (m.zeros.t() - 2 ** (bits - 1)).to(torch.int8).contiguous()
    assert torch.equal(ct_parts(m, bits)["weight_zero_point"], helpers.pack_to_int32(shifted, bits, packed_dim=0))


def ct_ordered(m: Made, bits: int) -> dict[str, Tensor]:
    return ct_parts(m, bits) | {"weight_g_idx": m.order}


def ct_unset(m: Made, bits: int) -> dict[str, Tensor]:
    return ct_parts(m, bits) | {"weight_g_idx": torch.full_like(m.order, -1)}


@pytest.mark.parametrize("actorder", ["group", "dynamic"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_llm_compressor_wrote_with_activation_order(tmp_path: Path, symmetric: bool, actorder: str) -> None:
    said, spec = ct_said(4, symmetric, 32, actorder), f"int4g32{'' if symmetric else 'a'}"
    same_weights(foreign_folder(tmp_path / "m", said, ct_ordered, 4, 32, symmetric, shuffled=True), spec)
    same_weights(foreign_folder(tmp_path / "u", said, ct_unset, 4, 32, symmetric), spec)


def test_layers_may_differ_from_the_settings(tmp_path: Path) -> None:
    """`dynamic` and `extra_config` override bits and groups of single layers."""
    sizes = iter([(8, 16), (4, 32), (2, 16), (4, -1)] * 2)

    def mixed(m: Made, bits: int) -> dict[str, Tensor]:
        bits, group = next(sizes)
        found = make(m.codes.shape[1], m.codes.shape[0], bits, group, True)
        m.weight = found.weight
        return gptq_parts(found, bits)

    folder = foreign_folder(tmp_path / "m", gptq_said(dynamic={"+:.*": {"bits": 8}}), mixed)
    source = open_source(folder.path)
    names = [w.name for w in source.weights if "_proj" in w.name]
    assert {"int8g16", "int4g32", "int2g16", "int4"} <= {source.spec(name) for name in names}
    for name in names:
        assert torch.equal(folder.read(name), folder.weights[name]), name


def test_a_broken_promise_of_symmetry_is_noticed(tmp_path: Path) -> None:
    folder = foreign_folder(tmp_path / "m", gptq_said(sym=True), gptq_parts, 4, 32, symmetric=False)
    same_weights(folder, "int4g32a")


def test_a_zero_point_of_0_borrows_from_its_neighbours(tmp_path: Path) -> None:
    """What GPTQModel writes into version 1: one subtracted from every field of a word at once."""

    def borrowing(m: Made, bits: int) -> dict[str, Tensor]:
        m.zeros[:, 1::3] = 0
        m.__post_init__()
        whole = across(m.zeros, bits)
        return gptq_parts(m, bits) | {"qzeros": whole - {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]}

    for bits in (2, 4, 8):
        said = gptq_said(bits, sym=False)
        folder = foreign_folder(tmp_path / str(bits), said, borrowing, bits, 32, symmetric=False)
        same_weights(folder, f"int{bits}g32a")


def test_rows_are_a_slice_of_the_whole(tmp_path: Path) -> None:
    for name, said, parts in [("g", gptq_said(sym=False), gptq_parts), ("a", awq_said(), awq_parts)]:
        folder = foreign_folder(tmp_path / name, said, parts, symmetric=False, shuffled=name == "g")
        q = open_source(folder.path).read(f"{LINEAR}.weight", (5, 23))
        assert q.shape == (18, 160)
        assert torch.equal(parse(q.spec).dequantize(q), folder.weights[f"{LINEAR}.weight"][5:23])


@pytest.mark.parametrize("kind", ["gptq", "gptq with order", "awq"])
def test_a_folder_runs_as_its_weights_in_full_precision(tmp_path: Path, kind: str) -> None:
    said, parts = (awq_said(), awq_parts) if kind == "awq" else (gptq_said(sym=False), gptq_parts)
    folder = foreign_folder(tmp_path / "q", said, parts, symmetric=False, shuffled="order" in kind)
    plain = write_folder(tmp_path / "f", folder.weights, num_hidden_layers=1)
    prompt = list(range(3, 60))
    logits = []
    for path in (folder.path, plain):
        model = fewbit.load(path, exact=True)
        sequence, _ = model.begin(None, prompt)
        logits.append(model.prefill(sequence, prompt))
    assert torch.allclose(logits[0], logits[1], atol=1e-5)
    assert float(logits[0].std()) > 0.1


def test_scattered_groups_run_through_the_reference_and_say_so(tmp_path: Path) -> None:
    folder = foreign_folder(tmp_path / "q", gptq_said(desc_act=True), gptq_parts, shuffled=True)
    q = open_source(folder.path).read(f"{LINEAR}.weight")
    assert parse(q.spec).affine(q) is None
    assert q.nbytes == sum(t.numel() * t.element_size() for t in q.parts.values())
    assert {b.name for b in available() if b.refuses(q) is None} == {"reference"}
    model = fewbit.load(folder.path)
    exact = fewbit.load(folder.path, exact=True)
    assert "".join(model.generate("abc", max_tokens=4)) == "".join(exact.generate("abc", max_tokens=4))
    fast = [b.name for b in available() if b.name not in ("reference", "dense")]
    assert all(any(name in note for note in model.notes) for name in fast)


def test_the_command_line_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = foreign_folder(tmp_path / "q", gptq_said(), gptq_parts)
    assert main(["show", str(folder.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["specs"]["int4g32"][0] == 7
    assert found["quantized"] is True
