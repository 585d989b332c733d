"""Quantize, write, read back, run: on tiny random models, and with everything that can go wrong."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewbit
from fewbit.checkpoint import _safetensors, _writer
from fewbit.errors import FewbitError
from fewbit.formats import parse
from fewbit.methods import Target, rtn
from fewbit.quantizer import Summary
from fewbit.runtime.cache import Sequence
from fewbit.source import describe, open_source
from tests.conftest import CONFIG, random_weights, write_folder

IDS = torch.randint(256, (40,), generator=torch.Generator().manual_seed(3)).tolist()


def exact_logits(path: Path) -> torch.Tensor:
    model = fewbit.load(path, exact=True)
    return model.forward([(Sequence(), IDS)], wanted=list(range(len(IDS))))


def rounded(model: Path, out: str | Path, **options: Any) -> Summary:
    """Quantized by round to nearest: what the walk does to tensors and files, without calibration."""
    return fewbit.quantize(model, out, **{"method": "rtn"} | options)


def kept(out: Path) -> list[str]:
    """The committed units of an unfinished output."""
    found: list[str] = json.loads((out.parent / f".{out.name}.partial" / "journal.json").read_text())["done"]
    return found


def nothing_left(out: Path) -> bool:
    return not out.exists() and not [p for p in out.parent.iterdir() if p.name.startswith(f".{out.name}")]


@pytest.mark.parametrize("spec", ["int8", "int4g32", "int4g64", "int4g64a", "int3g32", "int6g50a", "int4", "int2g16"])
@pytest.mark.parametrize("head", ["int8", "16bit", "int6g32"])
def test_the_folder_holds_exactly_the_rounded_weights(tiny_folder: Path, tmp_path: Path, spec: str, head: str) -> None:
    summary = rounded(tiny_folder, tmp_path / "q", format=spec, head=head)
    source, written = open_source(tiny_folder), open_source(tmp_path / "q")
    for w in source.weights:
        stored = written.read(w.name)
        expected = parse(source.spec(w.name)).dequantize(source.read(w.name))
        wanted = spec if w.role == "linear" else head if w.role == "embedding" and head != "16bit" else "bf16"
        assert stored.spec == wanted
        if w.role in ("linear", "embedding") and wanted != "bf16":
            q = rtn.quantize(expected, parse(wanted), {}, Target(torch.bfloat16))
            expected = parse(wanted).dequantize(q)
        assert torch.equal(parse(wanted).dequantize(stored), expected)
    assert summary.weight_bytes == (tmp_path / "q" / "model.safetensors").stat().st_size
    assert describe(tmp_path / "q").facts["format"] == spec


def test_bits_per_weight_count_scales_and_zero_points(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", hidden_size=128, intermediate_size=256, tie_word_embeddings=False)
    # int4: 4 + 16/64 for the scale, + 4/64 for the zero point
    for spec, bits in (("int4g64", 4.25), ("int4g64a", 4.3125)):
        summary = rounded(folder, tmp_path / spec, format=spec, head=spec)
        assert summary.bits_per_weight == pytest.approx(bits)


@pytest.mark.parametrize("spec", ["int4g32", "int4g32a", "int8", "int8g32", "int4"])
def test_transformers_loads_the_folder_and_agrees(tmp_path: Path, spec: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write_folder(tmp_path / "m", intermediate_size=128)
    out = tmp_path / "q"
    rounded(folder, out, format=spec, head="16bit")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    if spec.endswith("a"):
        # transformers 5.23 does not load asymmetric int4; the library's own unpacking is the foreign reader then
        _agrees_with_the_library(out)
        return
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(exact_logits(out), expected, rtol=2e-3, atol=2e-3)
    text = "How many?  3 — três"
    assert AutoTokenizer.from_pretrained(out)(text)["input_ids"] == fewbit.load(out).tokenizer.encode(text)


def _agrees_with_the_library(out: Path) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    stored, ours = load_file(out / "model.safetensors"), open_source(out)
    for w in ours.weights:
        if w.role != "linear":
            continue
        shape = torch.Size(w.shape)
        groups = stored[f"{w.name}_scale"].shape[1]
        codes = unpack_from_int32(stored[f"{w.name}_packed"], 4, shape).float()
        zero = unpack_from_int32(
            stored[f"{w.name}_zero_point"], 4, torch.Size((shape[0], groups)), packed_dim=0
        ).float()
        span = shape[1] // groups
        scale = stored[f"{w.name}_scale"].float().repeat_interleave(span, 1)
        expected = (codes - zero.repeat_interleave(span, 1)) * scale
        assert torch.equal(parse("int4g32a").dequantize(ours.read(w.name)), expected)


def test_what_compressed_tensors_cannot_say_is_spelled_as_fewbit(tiny_folder: Path, tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [
        {"format": "int4g32"},
        {"format": "int3g32", "head": "16bit"},
        {"format": "int4g48", "head": "16bit"},
    ]
    for i, options in enumerate(cases):
        rounded(tiny_folder, tmp_path / str(i), **options)
        config = json.loads((tmp_path / str(i) / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "fewbit"


def test_shards_are_split_indexed_and_read(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rounded(tiny_folder, tmp_path / "one", format="int4g32")
    monkeypatch.setattr(_writer, "SHARD_BYTES", 20_000)
    rounded(tiny_folder, tmp_path / "many", format="int4g32")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert whole.path.endswith("one")
    assert torch.equal(exact_logits(tmp_path / "one"), exact_logits(tmp_path / "many"))
    files[1].unlink()
    with pytest.raises(FewbitError, match="missing"):
        open_source(tmp_path / "many")


def test_a_quantized_model_can_be_quantized_again(tiny_folder: Path, tmp_path: Path) -> None:
    rounded(tiny_folder, tmp_path / "a", format="int8")
    rounded(tmp_path / "a", tmp_path / "b", format="int4g32")
    assert exact_logits(tmp_path / "b").isfinite().all()


def test_plain_minmax_scales_are_worse_and_kept_available(tiny_folder: Path, tmp_path: Path) -> None:
    reference = exact_logits(tiny_folder).log_softmax(-1)
    kl = {}
    for scales in ("search", "minmax"):
        rounded(tiny_folder, tmp_path / scales, format="int3g32", scales=scales)
        q = exact_logits(tmp_path / scales).log_softmax(-1)
        kl[scales] = float((reference.exp() * (reference - q)).sum(-1).mean())
    assert kl["search"] < kl["minmax"]


def test_peak_memory_is_about_a_block_not_the_model(tmp_path: Path) -> None:
    # 36 blocks in four shards, 300 MB of bf16; the same walk holds a 1.2B model under 1.5 GB
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "head_dim": 64}
    config = sizes | {"num_hidden_layers": 36, "vocab_size": 8192}
    folder = write_folder(tmp_path / "big", **config)
    weights = load_file(folder / "model.safetensors")
    total = sum(w.nbytes for w in weights.values())
    assert total > 250e6
    (folder / "model.safetensors").unlink()
    table = {}
    for i in range(4):
        names = sorted(weights)[i::4]
        save_file({n: weights[n] for n in names}, folder / f"model-{i}.safetensors")
        table |= dict.fromkeys(names, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    del weights
    # in a process of its own: what the test's has freed would be used again and not be counted
    command = [sys.executable, "-c", PEAK, str(folder), str(tmp_path / "q")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 0.5 * total


PEAK = """
import sys
from fewbit.memory import PeakMemory
from fewbit.quantizer import quantize
with PeakMemory() as memory:
    quantize(sys.argv[1], sys.argv[2], format="int4g64", method="rtn")
print(memory.peak)
"""


def test_nan_is_named_and_finished_units_are_kept(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        weights = random_weights(CONFIG)
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        folder = write_folder(tmp_path / f"m{value}", weights)
        out = tmp_path / f"q{value}"
        with pytest.raises(FewbitError, match=r"layers\.1\.mlp\.up_proj.*NaN") as caught:
            rounded(folder, out)
        assert "[3, 5]" in caught.value.facts
        assert caught.value.__notes__ == ["2 of 4 units are kept"]
        assert kept(out) == ["embedding", "block 0"]
        assert not out.exists()


def test_what_a_narrower_type_cannot_hold_is_named(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
    folder = write_folder(tmp_path / "m", weights)
    with pytest.raises(FewbitError, match=r"layers\.1\.mlp\.up_proj.*infinity as f16"):
        rounded(folder, tmp_path / "q", format="f16")
    assert kept(tmp_path / "q") == ["embedding", "block 0"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_sixteen_bits_are_sixteen_whatever_the_source(tmp_path: Path, dtype: str) -> None:
    weights = random_weights(CONFIG, getattr(torch, dtype))
    folder = write_folder(tmp_path / "m", weights, dtype=dtype)
    rounded(folder, tmp_path / "q", format="int4g32", head="16bit")
    written = open_source(tmp_path / "q")
    wide = torch.float16 if dtype == "float16" else torch.bfloat16
    assert written.read("model.embed_tokens.weight").parts["weight"].dtype == wide
    assert written.read("model.layers.0.mlp.up_proj.weight").parts["scale"].dtype == wide
    # norms are small and stay as they are
    norm = written.read("model.norm.weight").parts["weight"]
    assert torch.equal(norm, weights["model.norm.weight"])
    assert norm.dtype == getattr(torch, dtype)


def test_a_full_disk_is_said_before_and_during(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "q"
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
        with pytest.raises(FewbitError, match="disk is too full"):
            rounded(tiny_folder, out)
    assert nothing_left(out)
    written = 0
    original = _safetensors.ShardWriter.write

    def failing(self: _safetensors.ShardWriter, name: str, piece: torch.Tensor) -> None:
        nonlocal written
        written += 1
        if written == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, name, piece)

    monkeypatch.setattr(_safetensors.ShardWriter, "write", failing)
    with pytest.raises(FewbitError, match="disk is full"):
        rounded(tiny_folder, out)
    assert kept(out) == ["embedding"]
    # there is space again: the same call goes on
    monkeypatch.undo()
    rounded(tiny_folder, out)
    rounded(tiny_folder, tmp_path / "whole")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_an_existing_output_is_kept(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(FewbitError, match="exists already"):
        rounded(tiny_folder, out)
    assert [p.name for p in out.iterdir()] == ["mine"]
    with pytest.raises(FewbitError, match="does not exist"):
        rounded(tiny_folder, tmp_path / "no" / "such" / "q")


def test_two_writers_of_one_output_do_not_meet(tiny_folder: Path, tmp_path: Path) -> None:
    out, refused = tmp_path / "q", []

    def second(done: int, total: int, label: str) -> None:
        # opening the model is told before the output is made
        if not refused and (tmp_path / ".q.partial").exists():
            with pytest.raises(FewbitError, match="Another process is writing") as caught:
                rounded(tiny_folder, out, format="int8")
            refused.append(caught.value)

    rounded(tiny_folder, out, format="int4g32", progress=second)
    assert len(refused) == 1
    assert describe(out).facts["format"] == "int4g32"
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_an_output_that_another_writer_finished_first_is_kept(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"

    def faster(done: int, total: int, label: str) -> None:
        if done == total and total > 1 and not out.exists():
            rounded(tiny_folder, tmp_path / "other", format="int8")
            (tmp_path / "other").rename(out)

    with pytest.raises(FewbitError, match="exists already"):
        rounded(tiny_folder, out, format="int4g32", progress=faster)
    assert describe(out).facts["format"] == "int8"


def test_a_link_in_the_way_is_not_followed(tiny_folder: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "mine").write_text("x")
    (tmp_path / "q").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FewbitError, match="exists already"):
        rounded(tiny_folder, tmp_path / "q")
    (tmp_path / ".q.partial").symlink_to(victim)
    rounded(tiny_folder, tmp_path / "q2")
    assert (victim / "mine").read_text() == "x"


@pytest.mark.parametrize("name", [".", "", "/"])
def test_an_output_without_a_name_is_an_error(tiny_folder: Path, name: str) -> None:
    with pytest.raises(FewbitError, match="exists already"):
        rounded(tiny_folder, name)


def test_an_interrupt_keeps_what_was_committed(tiny_folder: Path, tmp_path: Path) -> None:
    for i, (share, units) in enumerate([(0.0, []), (0.5, ["embedding"])]):
        out = tmp_path / f"q{i}"

        def stop(done: int, total: int, label: str, share: float = share) -> None:
            if done > share * total:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            rounded(tiny_folder, out, progress=stop)
        assert not out.exists()
        assert nothing_left(out) if not units else kept(out) == units
    assert threading.active_count() < 20


@pytest.mark.parametrize("spec", ["int9", "gguf:q4_0", "nonsense"])
def test_formats_that_cannot_be_written_are_refused(tiny_folder: Path, tmp_path: Path, spec: str) -> None:
    with pytest.raises(FewbitError):
        rounded(tiny_folder, tmp_path / "q", format=spec)
    assert nothing_left(tmp_path / "q")


def test_unknown_methods_and_scales_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FewbitError, match="methods"):
        rounded(tiny_folder, tmp_path / "q", method="gtpq")
    with pytest.raises(FewbitError, match="scales"):
        rounded(tiny_folder, tmp_path / "q", scales="best")
