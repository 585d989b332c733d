"""The calibrated walk from a model to a folder: what methods are given, what is written, what the user is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from torch import Tensor

import fewbit
from fewbit import calibrated, preflight, walk
from fewbit.calibration import collect as collect_windows
from fewbit.checkpoint import open_checkpoint
from fewbit.cli import main
from fewbit.errors import FewbitError
from fewbit.formats import parse
from fewbit.lookup import find
from fewbit.methods import awq, gptq, rtn, tuned
from fewbit.runtime.cache import Sequence
from fewbit.source import describe, open_source
from fewbit.tokenizer import Tokenizer
from tests.conftest import CONFIG, random_weights, write_folder
from tests.models.test_blocks import seen_by, transformers_model
from tests.models.test_gguf_models import pair

SMALL: dict[str, Any] = {"format": "int4g32", "windows": 8, "length": 32, "device": "cpu"}
IDS = torch.randint(256, (40,), generator=torch.Generator().manual_seed(3)).tolist()
# the stacks of a block, and the name that stands for each
STACKS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def recipe(method: str) -> dict[str, Any]:
    """The small settings, less those a method without calibration has no use for."""
    return {k: v for k, v in SMALL.items() if method != "rtn" or k != "windows"} | {"method": method}


def float_folder(tmp_path: Path, **changes: Any) -> Path:
    config = CONFIG | {"dtype": "float32"} | changes
    return write_folder(tmp_path / "m", random_weights(config, torch.float32), **config)


def windows_of(folder: Path) -> Tensor:
    tokenizer = Tokenizer(open_checkpoint(folder).tokenizer())
    return collect_windows(None, tokenizer, SMALL["windows"], SMALL["length"]).windows


def logits(path: Path, texts: Seq[list[int]] = (IDS,)) -> Tensor:
    model = fewbit.load(path, exact=True)
    found = []
    for ids in texts:
        sequence = Sequence()
        found.append(model.forward([(sequence, ids)], wanted=list(range(len(ids)))))
        model.allocator.truncate(sequence, 0)
    return torch.cat(found)


def lost(reference: Tensor, found: Tensor) -> float:
    """Mean KL divergence."""
    p, q = reference.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """What GPTQ was called with: weights, and copies of its statistics. Matrices are multiplied in float32."""
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    quantize = gptq.quantize

    def kept(w: Tensor, fmt: Any, stats: dict[str, Tensor], target: Any) -> Any:
        found.append((w.clone(), {name: t.clone() for name, t in stats.items()}))
        return quantize(w, fmt, stats, target)

    monkeypatch.setattr(gptq, "quantize", kept)
    for module in (walk, preflight):
        monkeypatch.setattr(module, "fast_product", lambda *_: torch.float32)
    return found


def test_a_stack_is_solved_once_and_as_it_was(calls: list[tuple[Tensor, dict[str, Tensor]]], tmp_path: Path) -> None:
    folder = float_folder(tmp_path)
    fewbit.quantize(folder, tmp_path / "q", method="gptq", **SMALL)
    weights = load_file(folder / "model.safetensors")
    members = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    # the preflight tries one; q, k, v and gate, up go together
    assert len(calls) == 1 + 2 * len(STACKS)
    for i, (w, _) in enumerate(calls[1:]):
        names = members[i % 4]
        part = "self_attn" if i % 4 < 2 else "mlp"
        expected = torch.cat([weights[f"model.layers.{i // 4}.{part}.{n}.weight"] for n in names])
        assert torch.equal(w, expected)


@pytest.mark.parametrize(
    ("prefix", "drift"), [("quantized", 0), ("quantized", 0.25), ("quantized", 1), ("original", 0)]
)
def test_methods_are_given_what_hooks_on_transformers_see(
    calls: list[tuple[Tensor, dict[str, Tensor]]], tmp_path: Path, prefix: str, drift: float
) -> None:
    folder = float_folder(tmp_path)
    out = tmp_path / "q"
    fewbit.quantize(folder, out, method="gptq", prefix=prefix, drift=drift, weighting="even", head="int4g32", **SMALL)
    windows = windows_of(folder)
    model = transformers_model(folder)
    original = seen_by(model, windows)
    # the prefix of block 1 is the embedding and block 0, as they lie in the output
    written = open_checkpoint(out)
    held = model.state_dict()
    for w in open_source(folder).weights:
        if w.role == "embedding" or w.block == 0:
            held[w.name].copy_(parse(written.spec(w.name)).dequantize(written.read(w.name)))
    quantized = seen_by(model, windows)
    for stack, (_, stats) in zip(STACKS, calls[5:], strict=True):
        name = f"model.layers.1.{stack}"
        x = (quantized if prefix == "quantized" else original)[name].double()
        y = original[name].double()
        torch.testing.assert_close(stats["hessian"], (x.t() @ x / len(x)).float(), rtol=1e-3, atol=1e-5)
        assert ("cross" in stats) == (drift > 0)
        if drift:
            share = drift * (y.t() @ x) + (1 - drift) * (x.t() @ x)
            torch.testing.assert_close(stats["cross"], (share / len(x)).float(), rtol=1e-3, atol=1e-5)
        # the two prefixes are told apart
        other = (original if prefix == "quantized" else quantized)[name].double()
        assert not torch.allclose(stats["hessian"], (other.t() @ other / len(x)).float(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"method": "gptq"}, {"method": "gptq", "drift": 0.25}, {"method": "tuned"}], ids=str
)
def test_offload_changes_no_byte_and_leaves_nothing(
    tiny_folder: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned, "STEPS", (3, 3, 3, 3))
    mapped: list[str] = []
    from_file = torch.from_file

    def kept(name: str, **settings: Any) -> Tensor:
        mapped.append(name)
        found: Tensor = from_file(name, **settings)
        return found

    monkeypatch.setattr(torch, "from_file", kept)
    fewbit.quantize(tiny_folder, tmp_path / "memory", **SMALL | options)
    # what a few windows gave blocks, on the way to the loss, always lies on disk
    assert [Path(name).name for name in mapped] == ["states.bin"]
    mapped.clear()
    fewbit.quantize(tiny_folder, tmp_path / "disk", offload=True, **SMALL | options)
    # activations, and those of the full-precision model where they are wanted
    assert len(mapped) == 2 if options == {"method": "gptq"} else 3
    files = [{p.name: p.read_bytes() for p in (tmp_path / where).iterdir()} for where in ("memory", "disk")]
    assert files[0] == files[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "memory", "tiny"]


METHODS = ["rtn", "gptq", "awq", "awq+gptq", "tuned"]
FORMATS = ["int2g32", "int3g64a", "int4g32", "int4g64a", "int5", "int6g48", "int8", "int8a"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", FORMATS)
def test_every_method_with_every_format_beats_rounding(
    tiny_folder: Path, tmp_path: Path, method: str, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned, "STEPS", (3, 3, 3, 3))
    out, log = tmp_path / "q", tmp_path / "log.jsonl"
    options = recipe(method) | {"format": spec, "head": "16bit"}
    summary = fewbit.quantize(tiny_folder, out, log=log, **options)
    assert (summary.method, summary.format) == (method, spec)
    source, written = open_source(tiny_folder), open_source(out)
    linears = [w for w in source.weights if w.role == "linear"]
    for w in linears:
        assert written.spec(w.name) == spec
    facts = describe(out).facts
    assert (facts["method"], facts["format"]) == (method, spec)
    if method == "rtn":
        assert log.read_text() == ""
        return
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {f"model.layers.{line['block']}.{line['name']}.weight" for line in lines} == {w.name for w in linears}
    assert len(lines) == len(linears)
    mine, plain = (sum(line[key] for line in lines) for key in ("error", "rtn_error"))
    # random weights have no channels that stand out: factors alone bring little
    assert mine < (1.02 if method == "awq" else 0.7) * plain
    if method != "awq":
        assert sum(line["error"] <= line["rtn_error"] for line in lines) > 0.9 * len(lines), lines
    # and so does the model as a whole, on the text it was calibrated for
    fewbit.quantize(tiny_folder, tmp_path / "rtn", method="rtn", format=spec, head="16bit")
    text = windows_of(tiny_folder).tolist()
    reference = logits(tiny_folder, text)
    rounded = lost(reference, logits(tmp_path / "rtn", text))
    assert lost(reference, logits(out, text)) < (1.2 if method == "awq" else 0.6) * rounded


def test_errors_in_the_log_are_those_of_the_files(
    calls: list[tuple[Tensor, dict[str, Tensor]]], tmp_path: Path
) -> None:
    folder, out, log = float_folder(tmp_path), tmp_path / "q", tmp_path / "log.jsonl"
    fewbit.quantize(folder, out, method="gptq", log=log, **SMALL)
    source, written = open_source(folder), open_source(out)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    stack_of = {"k_proj": 0, "q_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
    for line in lines:
        name = f"model.layers.{line['block']}.{line['name']}.weight"
        h = calls[1 + 4 * line["block"] + stack_of[line["name"].split(".")[1]]][1]["hessian"].double()
        w = source.read(name).parts["weight"].double()
        found = parse(line["spec"]).dequantize(written.read(name)).double()
        plain_q = rtn.quantize(w.float(), parse(line["spec"]), {}, fewbit.methods.Target(torch.bfloat16))
        plain = parse(line["spec"]).dequantize(plain_q).double()

        def cost(e: Tensor, h: Tensor = h) -> float:
            some = e[:: -(-len(e) // calibrated.COMPARED_ROWS)]
            return float(torch.trace(some @ h @ some.t()))

        assert line["error"] == pytest.approx(cost(found - w) / cost(w), rel=1e-3)
        assert line["rtn_error"] == pytest.approx(cost(plain - w) / cost(w), rel=1e-3)
        assert line["seconds"] >= 0


@pytest.mark.parametrize("method", ["gptq", "awq+gptq", "tuned"])
@pytest.mark.parametrize(
    "changes",
    [{"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": False}, {"num_key_value_heads": 1}],
    ids=["biases", "untied", "one key-value head"],
)
def test_other_shapes_of_models(
    tmp_path: Path, method: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned, "STEPS", (3, 3, 3, 3))
    weights = random_weights(CONFIG | changes)
    for name, w in weights.items():
        # loud enough that one left out of a rewrite is heard
        if name.endswith(".bias"):
            w *= 20
    folder = write_folder(tmp_path / "m", weights, **changes)
    out = tmp_path / "q"
    fewbit.quantize(folder, out, **SMALL | {"method": method, "format": "int8g32", "head": "int8"})
    assert lost(logits(folder), logits(out)) < 2e-3
    source, written = open_source(folder), open_source(out)
    assert {w.name for w in written.weights} == {w.name for w in source.weights}
    for w in source.weights:
        if w.role == "head":
            assert written.spec(w.name) == "int8"


def test_awq_folds_its_factors_into_norms_and_rows(tmp_path: Path) -> None:
    # a few loud channels, which plain rounding at three bits drowns
    config = CONFIG | {"attention_bias": True, "mlp_bias": True}
    weights = random_weights(config)
    for name, w in weights.items():
        if name.endswith("layernorm.weight"):
            w[::16] *= 12
    folder = write_folder(tmp_path / "m", weights, **config)
    options = SMALL | {"format": "int8g32", "head": "16bit"}
    fewbit.quantize(folder, tmp_path / "q", **options | {"method": "awq"})
    before, after = open_source(folder), open_source(tmp_path / "q")
    moved = 0
    for i in range(2):
        prefix = f"model.layers.{i}."
        for norm, linear in (("input_layernorm", "self_attn.q_proj"), ("post_attention_layernorm", "mlp.gate_proj")):
            n = [s.read(f"{prefix}{norm}.weight").parts["weight"].float() for s in (before, after)]
            q = after.read(f"{prefix}{linear}.weight")
            w = before.read(f"{prefix}{linear}.weight").parts["weight"].float()
            moved += not torch.equal(n[0], n[1])
            # what the norm lost, the matrix's columns gained
            found = parse(q.spec).dequantize(q) * (n[1] / n[0])
            assert float((found - w).norm() / w.norm()) < 0.02
    assert moved > 0
    assert lost(logits(folder), logits(tmp_path / "q")) < 2e-3


def test_a_gguf_file_is_calibrated_like_its_folder(tmp_path: Path) -> None:
    file, folder, _ = pair(tmp_path, Kind.F32)
    # the file's tokenizer has one token more, "he": a text without it is the same to both
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i * i} small boats, {i % 7} of which may not float; " for i in range(30)))
    options = SMALL | {"method": "awq+gptq", "calibration": str(text)}
    fewbit.quantize(file, tmp_path / "a", **options)
    fewbit.quantize(folder, tmp_path / "b", **options)
    names = {w.name for w in open_source(folder).weights}
    a, b = open_source(tmp_path / "a"), open_source(tmp_path / "b")
    for name in names:
        ours, theirs = a.read(name), b.read(name)
        assert ours.spec == theirs.spec
        for part, data in ours.parts.items():
            assert torch.equal(data, theirs.parts[part]), (name, part)


def test_a_quantized_file_can_be_calibrated_again(tmp_path: Path) -> None:
    file, _, _ = pair(tmp_path, Kind.Q8_0, hidden_size=64, intermediate_size=160)
    found = []
    for method in ("rtn", "gptq"):
        fewbit.quantize(file, tmp_path / method, **recipe(method))
        texts = windows_of(file).tolist()
        found.append(lost(logits(file, texts), logits(tmp_path / method, texts)))
    assert found[1] < 0.8 * found[0], found


@pytest.mark.parametrize("method", ["awq+gptq", "tuned"])
def test_transformers_loads_what_was_calibrated(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(tuned, "STEPS", (5, 5, 5, 5))
    folder = write_folder(tmp_path / "m", intermediate_size=128)
    out = tmp_path / "q"
    fewbit.quantize(folder, out, **SMALL | {"method": method, "format": "int4g64", "head": "16bit"})
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(logits(out), expected, rtol=2e-3, atol=2e-3)
    facts = describe(out).facts
    assert facts["method"] == method
    assert facts["calibration"]["windows"] == 8
    assert facts["calibration"]["name"] == "default"


@pytest.mark.parametrize("method", METHODS)
def test_progress_reaches_its_total(
    tiny_folder: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned, "STEPS", (3, 3, 3, 3))
    told: list[tuple[int, int, str]] = []
    options = recipe(method) | {"progress": lambda *p: told.append(p)}
    fewbit.quantize(tiny_folder, tmp_path / "q", **options)
    source = open_source(tiny_folder)
    weights = sum(torch.Size(w.shape).numel() for w in source.weights)
    if method != "rtn":
        # blocks run twice: for what tokens matter, and to be quantized
        weights += sum(torch.Size(w.shape).numel() for w in source.weights if w.block is not None)
    walked = [(done, total) for done, total, _ in told if total == weights]
    assert walked[-1] == (weights, weights)
    assert [done for done, _ in walked] == sorted(done for done, _ in walked)
    assert all(done <= total for done, total, _ in told)
    # a live line of each matrix against round to nearest
    lines = [text for _, _, text in told if "of round to nearest's" in text]
    assert len(lines) == (0 if method == "rtn" else 14)


def test_the_preflight_says_what_it_will_take(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--method", "gptq", "--format", "int4g32", "--windows", "8", "--length", "32", "--device", "cpu"]
    assert main(["quantize", str(tiny_folder), "-o", str(tmp_path / "q"), *options]) == 0
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "GB on disk" in text]
    assert line.startswith("about ")
    assert "GiB of memory" in line
    assert "GPU" not in line


@pytest.mark.parametrize(
    ("spec", "effort", "method"),
    [("int4g32", 0, "rtn"), ("int4g32", 1, "gptq"), ("int8", 3, "gptq"), ("f32", 1, "rtn")],
)
def test_auto_stands_for_a_method(
    tiny_folder: Path, tmp_path: Path, spec: str, effort: int, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = recipe(method) | {"format": spec, "effort": effort, "method": "auto"}
    summary = fewbit.quantize(tiny_folder, tmp_path / "q", **options)
    assert summary.method == method
    assert describe(tmp_path / "q").facts["method"] == method


def test_every_name_that_auto_gives_is_a_method() -> None:
    from fewbit.methods.auto import chosen

    for bits in range(2, 9):
        for effort in range(4):
            for name in chosen(bits, effort).split("+"):
                assert hasattr(find("fewbit.methods", name), "NEEDS")


@pytest.mark.parametrize(
    ("spec", "method", "share"),
    [
        ("int3g32", "gptq", 0.25),
        ("int2g32", "awq+gptq", 0.25),
        ("int3g32", "tuned", 0.25),
        ("int2g32", "tuned", 0),
        ("int4g32", "gptq", 0),
    ],
)
def test_a_share_of_the_drift_is_made_good_where_that_helps(
    tiny_folder: Path, tmp_path: Path, spec: str, method: str, share: float
) -> None:
    written = {}
    for drift in (None, 0.25, 0):
        out = tmp_path / str(drift)
        fewbit.quantize(tiny_folder, out, **recipe(method) | {"format": spec, "drift": drift})
        assert describe(out).facts["drift"] == (share if drift is None else drift)
        (file,) = out.glob("*.safetensors")
        written[drift] = load_file(file)["model.layers.1.mlp.down_proj.weight_packed"]
    assert torch.equal(written[None], written[share])
    assert not torch.equal(written[0.25], written[0])


def test_awq_knows_no_drift(tiny_folder: Path, tmp_path: Path) -> None:
    options = recipe("awq") | {"format": "int3g32"}
    with pytest.raises(FewbitError, match="awq has no use for drift"):
        fewbit.quantize(tiny_folder, tmp_path / "q", **options, drift=0.25)
    fewbit.quantize(tiny_folder, tmp_path / "q", **options)
    assert describe(tmp_path / "q").facts["drift"] == 0


def test_effort_is_worth_its_time(tiny_folder: Path, tmp_path: Path) -> None:
    def total(effort: int) -> float:
        log = tmp_path / f"{effort}.jsonl"
        options = SMALL | {"method": "gptq", "format": "int3g32", "effort": effort, "log": log}
        fewbit.quantize(tiny_folder, tmp_path / str(effort), **options)
        first = [json.loads(line) for line in log.read_text().splitlines()][:7]
        return sum(line["error"] for line in first)

    # the first block, whose inputs are the same
    assert total(2) < total(0)


def test_no_method_sees_the_formats_or_the_walk() -> None:
    modules: list[ModuleType] = [rtn, gptq, awq, tuned]
    seen: Callable[[ModuleType], str] = lambda m: Path(str(m.__file__)).read_text(encoding="utf-8")  # noqa: E731
    for module in modules:
        assert "formats.integer" not in seen(module)
        assert "fewbit.walk" not in seen(module)
