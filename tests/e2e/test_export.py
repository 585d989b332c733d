"""Exports from end to end on tiny models: the same weights, the files beside them, the command line, the check."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fewbit
from fewbit.checkpoint import open_checkpoint
from fewbit.cli import main
from fewbit.errors import FewbitError
from fewbit.formats import parse
from fewbit.runtime.cache import Sequence
from fewbit.source import open_source
from fewbit.verification import verify
from tests.conftest import write_folder
from tests.models.test_export_gguf import with_merges
from tests.pure.test_foreign_folders import LINEAR, foreign_folder, gptq_parts, gptq_said

IDS = torch.randint(256, (40,), generator=torch.Generator().manual_seed(3)).tolist()
PEERS = Path(__file__).parents[2] / "benchmarks" / "_peer_folders.py"
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 32}


def logits(path: Path) -> Tensor:
    model = fewbit.load(path, exact=True)
    return model.forward([(Sequence(), IDS)], wanted=list(range(len(IDS))))


def values(path: Path) -> dict[str, Tensor]:
    source = open_source(path)
    return {w.name: parse(source.spec(w.name)).dequantize(source.read(w.name)) for w in source.weights}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return with_merges(write_folder(tmp_path / "m", **WIDE))


def rounded(folder: Path, spec: str, head: str = "16bit") -> Path:
    out = folder.parent / f"q-{spec}-{head}"
    fewbit.quantize(folder, out, format=spec, head=head, method="rtn")
    return out


@pytest.mark.parametrize(
    ("to", "spec"),
    [
        ("gptq", "int4g64"), ("gptq", "int8"), ("awq", "int4g64"), ("awq", "int4g32a"),
        ("compressed-tensors", "int4g64"), ("compressed-tensors", "int8g64"), ("compressed-tensors", "int4g128a"),
    ],
)  # fmt: skip
def test_a_quantized_folder_is_spelled_anew_without_loss(folder: Path, to: str, spec: str) -> None:
    source, out = rounded(folder, spec), folder.parent / "out"
    summary = fewbit.export(source, out, to=to)
    assert summary.exact
    assert summary.notes == []
    assert (summary.format, summary.method) == (spec, "rtn")
    before, after = values(source), values(out)
    assert all(torch.equal(before[name], after[name]) for name in before)
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == to
    # the benchmarks' reader of other tools' folders knows nothing of fewbit
    spec_of = importlib.util.spec_from_file_location("_peer_folders", PEERS)
    assert spec_of is not None
    assert spec_of.loader is not None
    peers = importlib.util.module_from_spec(spec_of)
    spec_of.loader.exec_module(peers)
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    parts = {part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx") if to == "gptq"}
    if to == "gptq":
        theirs = peers.gptq_weight(parts, said["bits"], 1)
    elif to == "awq":
        theirs = peers.awq_weight({part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")})
    else:
        packed = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
        theirs = peers.packed_weight(packed, int(spec[3]))
    assert torch.equal(theirs, before[f"{name}.weight"])


def test_an_embedding_in_few_bits_is_told(folder: Path) -> None:
    summary = fewbit.export(rounded(folder, "int4g64", "int8"), folder.parent / "out", to="gptq")
    assert not summary.exact
    assert summary.notes == ["model.embed_tokens.weight was int8 and is rounded to bf16"]


def test_a_full_precision_model_is_quantized_first(folder: Path) -> None:
    for to, spec in (("awq", "int4g64a"), ("compressed-tensors", "int4g64"), ("gptq", "int8")):
        out = folder.parent / to
        summary = fewbit.export(folder, out, to=to, format=spec if to == "gptq" else None, method="rtn")
        assert (summary.format, summary.method, summary.exact) == (spec, "rtn", False)
        expected = values(rounded(folder, spec))
        assert all(torch.equal(w, expected[name]) for name, w in values(out).items())
    left = [p.name for p in folder.parent.iterdir() if p.name.startswith(".")]
    assert left == []


def test_what_is_refused_leaves_nothing(folder: Path) -> None:
    out = folder.parent / "out"
    with pytest.raises(FewbitError, match="vLLM"):
        fewbit.export(folder, out, to="gptq", format="int3g64", method="rtn")
    with pytest.raises(FewbitError, match="no use for method"):
        fewbit.export(rounded(folder, "int4g64"), out, to="gptq", method="gptq")
    with pytest.raises(FewbitError, match="no use for format"):
        fewbit.export(folder, out, to="gguf", format="int4g64")
    with pytest.raises(FewbitError, match="no use for head"):
        fewbit.export(folder, out, to="awq", head="int8")
    with pytest.raises(FewbitError, match=r"no export to 'gguff'.*\n.*awq, compressed-tensors, gguf, gptq"):
        fewbit.export(folder, out, to="gguff")
    with pytest.raises(FewbitError, match="no GGUF type 'q4'"):
        fewbit.export(folder, out, to="gguf", type="q4")
    assert not out.exists()
    out.mkdir()
    for to in ("gptq", "compressed-tensors", "gguf"):
        with pytest.raises(FewbitError, match="exists already"):
            fewbit.export(folder, out, to=to, **({} if to == "gguf" else {"method": "rtn"}))


def test_scattered_groups_go_where_they_can_be_told(tmp_path: Path) -> None:
    source = foreign_folder(tmp_path / "m", gptq_said(desc_act=True), gptq_parts, shuffled=True)
    with_merges(source.path)
    for to in ("awq", "compressed-tensors"):
        with pytest.raises(FewbitError, match=r"scattered columns.*\n.*--to gptq"):
            fewbit.export(source.path, tmp_path / "out", to=to)
    assert fewbit.export(source.path, tmp_path / "g", to="gptq").exact
    assert json.loads((tmp_path / "g" / "config.json").read_text())["quantization_config"]["desc_act"] is True
    assert torch.equal(values(tmp_path / "g")[f"{LINEAR}.weight"], source.weights[f"{LINEAR}.weight"])
    summary = fewbit.export(source.path, tmp_path / "m.gguf", to="gguf", type="q8_0")
    assert any("rounded twice: int4g32 to q8_0" in text for text in summary.notes)


TYPES = {
    "f32": ("f32", 0.0), "bf16": ("bf16", 0.0), "f16": ("f16", 1e-3), "q8_0": ("gguf:q8_0", 0.01),
    "q5_1": ("gguf:q5_1", 0.07), "q5_0": ("gguf:q5_0", 0.08), "q4_1": ("gguf:q4_1", 0.13), "q4_0": ("gguf:q4_0", 0.15),
    "q6_k": ("gguf:q6_k", 0.04), "q5_k": ("gguf:q5_k", 0.07), "q4_k": ("gguf:q4_k", 0.13),
}  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_a_gguf_file_of_every_type(folder: Path, name: str) -> None:
    out = folder.parent / "m.gguf"
    notes: list[str] = []
    summary = fewbit.export(folder, out, to="gguf", type=name, note=notes.append)
    spec, most = TYPES[name]
    stored = open_checkpoint(out)
    down = "blk.0.ffn_down.weight"
    assert stored.spec(down) == spec
    assert stored.spec("blk.0.attn_norm.weight") == "f32"
    before, after = values(folder), values(out)
    for key, w in before.items():
        assert float((after[key] - w).norm() / w.norm()) <= most, key
    assert summary.exact is (most == 0)
    # 128 columns are no block of 256
    falls = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
    if name in falls:
        assert stored.spec("blk.0.attn_q.weight") == f"gguf:{falls[name]}"
        assert any(f"of 128 columns, no whole blocks of {name}, are {falls[name]}" in note for note in notes)
    else:
        assert not any(f"blocks of {name}," in note for note in notes)
    assert fewbit.load(out).tokenizer.encode("hello the") == fewbit.load(folder).tokenizer.encode("hello the")


def test_transformers_reads_the_file(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = folder.parent / "m.gguf"
    fewbit.export(folder, out, to="gguf", type="q8_0")
    theirs = AutoModelForCausalLM.from_pretrained(out.parent, gguf_file=out.name, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = theirs(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(logits(out), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("spec", "head", "type_", "exact"),
    [
        ("int4g64", "int8", "q4_0", True), ("int4g64a", "int8", "q4_1", False), ("int5g32", "16bit", "q5_0", False),
        ("int8", "int8", "q8_0", True), ("int4g16", "int8", "q4_k", False),
    ],
)  # fmt: skip
def test_codes_are_kept_and_rounding_twice_is_told(folder: Path, spec: str, head: str, type_: str, exact: bool) -> None:
    source, out = rounded(folder, spec, head), folder.parent / "m.gguf"
    summary = fewbit.export(source, out, to="gguf")
    assert summary.format == type_
    assert summary.exact is exact
    told = " ".join(summary.notes)
    assert ("codes are kept" in told) is (spec == "int4g64a")
    assert ("rounded twice: int4g16 to" in told) is (spec == "int4g16")
    before, after = values(source), values(out)
    if exact:
        assert all(torch.equal(before[name], after[name]) for name in before)
    name = "model.layers.0.mlp.down_proj.weight"
    assert float((after[name] - before[name]).norm() / before[name].norm()) <= (0.13 if spec == "int4g16" else 1e-3)


def test_a_gguf_file_is_exported_again(folder: Path) -> None:
    fewbit.export(folder, first := folder.parent / "a.gguf", to="gguf", type="q4_0", head="q8_0")
    second = fewbit.export(first, folder.parent / "b.gguf", to="gguf")
    assert (second.format, second.exact) == ("q4_0", True)
    first_bytes, second_bytes = open_checkpoint(first), open_checkpoint(folder.parent / "b.gguf")
    for name in first_bytes.names():
        pairs = zip(first_bytes.read(name).parts.values(), second_bytes.read(name).parts.values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def cli(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, Any, str]:
    code = main(["export", *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder.parent / "x.gguf"
    code, said, _ = cli(str(folder), "-o", str(out), "--to", "gguf", "--type", "q4_k", "--json", capsys=capsys)
    assert code == 0
    found = json.loads(said)
    assert found["specs"]["gguf:q4_k"] == 1
    assert found["verification"] is None
    card = (folder.parent / "x.md").read_text()
    for line in ("llama-server -m x.gguf", "ollama create x -f Modelfile", "fewbit run x.gguf", "Nothing yet"):
        assert line in card
    code, said, _ = cli(str(rounded(folder, "int4g64")), "-o", str(folder.parent / "g"), "--to", "gptq", capsys=capsys)
    assert code == 0
    assert "every weight has the value it has in the source" in said
    assert "vllm serve ./g" in (folder.parent / "g" / "README.md").read_text()
    assert cli(str(folder), "-o", "y", "--to", "exl3", capsys=capsys)[0] == 2
    code, _, complaint = cli(str(folder), "-o", str(folder.parent / "z"), "--to", "awq", "--format", "int8",
                             "--method", "rtn", capsys=capsys)  # fmt: skip
    assert code == 1
    assert "vLLM 0.32 would not load this awq folder" in complaint


def _asymmetric(folder: Path) -> bool:
    return bool(fewbit.export(rounded(folder, "int4g64a"), folder.parent / "a", to="compressed-tensors").exact)


def test_transformers_agrees_and_the_card_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The engine that the test environment has, in a process of its own; vLLM it has not."""
    source, out = rounded(folder, "int4g64"), folder.parent / "ct"
    code, said, _ = cli(str(source), "-o", str(out), "--to", "compressed-tensors", "--verify", "--json", capsys=capsys)
    assert code == 0
    checks = {c["engine"]: c for c in json.loads(said)["verification"]["checks"]}
    assert checks["transformers"]["agrees"] is True
    assert checks["transformers"]["kl"] <= 1e-4
    assert checks["vLLM"]["install"].startswith("pip install vllm")
    assert json.loads(said)["verification"]["source_kl"] <= 1e-6
    found = verify(folder.parent / "a", "compressed-tensors") if _asymmetric(folder) else None
    assert found is not None
    assert "zero points are not supported" in str(found.checks[1].refused)
    assert found.failed == []
    card = (out / "README.md").read_text()
    assert "| vLLM | not installed |" in card
    assert f"| transformers | {checks['transformers']['version']} |" in card
