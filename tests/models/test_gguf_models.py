"""Llama from a GGUF file and from a Hugging Face folder with the same weights: the same logits.

The files are made by the `gguf` package; what a converter does on the way (row order of q and k, Llama 3.1's rotary
factors) is written here from its definition.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, RopeScalingType, quants
from tokenizers import pre_tokenizers
from torch import Tensor

import fewbit
from fewbit.errors import FewbitError
from fewbit.fetching import Fetcher
from fewbit.runtime.cache import Sequence
from fewbit.source import open_source
from tests.conftest import CONFIG, random_weights, write_folder

IDS = torch.randint(256, (40,), generator=torch.Generator().manual_seed(3)).tolist()
# Hugging Face name -> GGUF name, in a converter's words
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem, _, part = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, block, stem = stem.split(".", 3)
        return f"blk.{block}.{NAMES[stem]}.{part}"
    return f"{NAMES[stem]}.{part}"


def theirs(w: Tensor, heads: int) -> Tensor:
    """Rows of q or k as ggml's rope wants them: rotated pairs side by side, row i and i + width / 2 of each head."""
    width = len(w) // heads
    rows = [h * width + i + half for h in range(heads) for i in range(width // 2) for half in (0, width // 2)]
    return w[rows]


def ours(w: Tensor, heads: int) -> Tensor:
    """The inverse: of each head the even rows, then the odd ones."""
    width = len(w) // heads
    rows = [h * width + i for h in range(heads) for i in (*range(0, width, 2), *range(1, width, 2))]
    return w[rows]


def rotated_heads(name: str, config: dict[str, Any]) -> int | None:
    if ".q_proj." in name:
        return int(config["num_attention_heads"])
    return int(config["num_key_value_heads"]) if ".k_proj." in name else None


def llama3_factors(rope: dict[str, Any], width: int) -> np.ndarray:
    """Divisors of the rotary frequencies (Llama 3.1 reference code, `apply_scaling`)."""
    factors = []
    context = rope["original_max_position_embeddings"]
    for i in range(0, width, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / width)
        if wavelength < context / rope["high_freq_factor"]:
            factors.append(1.0)
        elif wavelength > context / rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            smooth = (context / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def add_tokenizer(writer: GGUFWriter, size: int) -> None:
    """The byte tokenizer of conftest with one merge, filled up to the size of the vocabulary."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_start|>", "<|im_end|>", "he"]
    kinds = [1] * 256 + [3, 3, 1] + [5] * (size - 259)
    tokens += [f"[PAD{i}]" for i in range(259, size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)


def write_gguf(
    path: Path, kind: Kind, config: dict[str, Any], weights: dict[str, Tensor], factors: np.ndarray | None = None
) -> dict[str, Tensor]:
    """A GGUF file of these weights; returns them as the file holds them, in float32 and Hugging Face's row order."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(config["head_dim"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    add_tokenizer(writer, config["vocab_size"])
    held = {}
    for name, w in weights.items():
        heads = rotated_heads(name, config)
        stored = (w if heads is None else theirs(w, heads)).float().numpy()
        # vectors stay in float32, as in every converter
        as_kind = kind if w.dim() == 2 else Kind.F32
        data = quants.quantize(stored, as_kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=as_kind)
        back = torch.from_numpy(quants.dequantize(data, as_kind).astype(np.float32)).reshape(w.shape)
        held[name] = (back if heads is None else ours(back, heads)).contiguous()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def pair(
    tmp_path: Path, kind: Kind, factors: np.ndarray | None = None, **changes: Any
) -> tuple[Path, Path, dict[str, Any]]:
    """A GGUF file and the folder with its weights in float32, and the config of both."""
    config = CONFIG | {"max_position_embeddings": 128, "dtype": "float32"} | changes
    file = tmp_path / "tiny.gguf"
    held = write_gguf(file, kind, config, random_weights(config, torch.float32), factors)
    return file, write_folder(tmp_path / "folder", held, **config), config


def logits(model: str | Path, exact: bool = True) -> Tensor:
    loaded = fewbit.load(model, exact=exact)
    return loaded.forward([(Sequence(), list(IDS))], wanted=list(range(len(IDS))))


def mean_kl(reference: Tensor, other: Tensor) -> float:
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def llama3(factor: float, theta: float = 500000.0) -> dict[str, Any]:
    return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip


BIASED = {"attention_bias": True, "mlp_bias": True}
UNTIED = {"tie_word_embeddings": False}
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}
CASES: dict[str, tuple[Kind, dict[str, Any]]] = {
    "f32": (Kind.F32, {}),
    "f16": (Kind.F16, {}),
    "bf16": (Kind.BF16, {}),
    "q8_0": (Kind.Q8_0, {}),
    "q4_0": (Kind.Q4_0, {}),
    "q4_1": (Kind.Q4_1, {}),
    "f16 untied": (Kind.F16, UNTIED),
    "q8_0 untied": (Kind.Q8_0, UNTIED),
    "q4_0 untied, biases": (Kind.Q4_0, UNTIED | BIASED),
    "q4_1 biases": (Kind.Q4_1, BIASED),
    "f32 attention biases": (Kind.F32, {"attention_bias": True}),
    "f32 wide heads, one key-value head": (Kind.F32, {"head_dim": 32, "num_key_value_heads": 1}),
    "f32 linear": (Kind.F32, LINEAR),
    "q8_0 linear": (Kind.Q8_0, LINEAR),
    "f32 llama3 by 8": (Kind.F32, {"rope_parameters": llama3(8.0)}),
    "f32 llama3 by 32": (Kind.F32, {"rope_parameters": llama3(32.0)}),
    "q4_0 llama3 by 8": (Kind.Q4_0, {"rope_parameters": llama3(8.0, 10000.0), "head_dim": 32}),
}
WITH_TRANSFORMERS = {
    "f32",
    "f32 attention biases",
    "f32 linear",
    "f32 llama3 by 8",
    "f32 llama3 by 32",
    "q4_0 untied, biases",
}


def made(tmp_path: Path, case: str) -> tuple[Path, Path, dict[str, Any]]:
    kind, changes = CASES[case]
    rope = changes.get("rope_parameters", {})
    stretched = rope.get("rope_type") == "llama3"
    factors = llama3_factors(rope, changes.get("head_dim", CONFIG["head_dim"])) if stretched else None
    return pair(tmp_path, kind, factors, **changes)


@pytest.mark.parametrize("case", CASES)
def test_a_file_and_a_folder_give_the_same_logits(tmp_path: Path, case: str) -> None:
    file, folder, _ = made(tmp_path, case)
    source = open_source(file)
    names = [w.name for w in source.weights]
    with Fetcher(source, names, torch.device("cpu")) as fetcher:
        for q, fetched in ((source.read(name), fetcher.read(name)) for name in names):
            assert all(torch.equal(q.parts[part], fetched.parts[part]) for part in q.parts)
    from_file = logits(file)
    torch.testing.assert_close(from_file, logits(folder), rtol=1e-6, atol=1e-6)
    assert mean_kl(from_file, logits(file, exact=False)) < 0.02
    if case in WITH_TRANSFORMERS:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.inference_mode():
            expected = model(torch.tensor([IDS])).logits[0]
        torch.testing.assert_close(from_file, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["f32 llama3 by 8", "f32 llama3 by 32", "f32 linear", "q4_0 untied, biases"])
def test_the_metadata_says_what_the_folder_does(tmp_path: Path, case: str) -> None:
    file, _, config = made(tmp_path, case)
    found = fewbit.load(file, context=16).source.config
    unknown = {"bos_token_id", "eos_token_id", "dtype"}
    got = {key: found[key] for key in config if key not in unknown}
    assert got["rms_norm_eps"] == pytest.approx(config["rms_norm_eps"])
    assert got | {"rms_norm_eps": config["rms_norm_eps"]} == {k: v for k, v in config.items() if k not in unknown}


@pytest.mark.parametrize("factors", [[1, 1, 1, 2, 3, 4, 5, 6], [1, 2], [1.0] * 7 + [float("nan")]])
def test_rotary_factors_that_fit_no_known_scaling_are_an_error(tmp_path: Path, factors: list[float]) -> None:
    file, _, _ = pair(tmp_path, Kind.F32, np.array(factors, dtype=np.float32))
    with pytest.raises(FewbitError, match="rotary frequencies"):
        fewbit.load(file)


@pytest.mark.parametrize(("case", "format"), [("q8_0 untied", "int8g32"), ("f32 llama3 by 32", "int8g32")])
def test_quantizing_a_file_keeps_its_model(tmp_path: Path, case: str, format: str) -> None:  # noqa: A002
    file, _, config = made(tmp_path, case)
    fewbit.quantize(file, tmp_path / "out", format=format, head="int8", scales="minmax", method="rtn")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in config.keys() - {"dtype", "rms_norm_eps", "bos_token_id", "eos_token_id"}:
        assert written[key] == config[key], key
    assert written["rms_norm_eps"] == pytest.approx(config["rms_norm_eps"])
    assert (written["bos_token_id"], written["eos_token_id"]) == (256, 257)
    model, original = (fewbit.load(path, exact=True) for path in (tmp_path / "out", file))
    assert model.source.args == original.source.args
    assert model.tokenizer.encode("he said <|im_end|>") == original.tokenizer.encode("he said <|im_end|>")
    assert 0 < mean_kl(logits(file), logits(tmp_path / "out")) < 0.02


def test_the_permutation_is_the_converters() -> None:
    # conversion's formula, for one head of width 6: reshape to halves, swap, flatten
    w = torch.arange(12.0)[:, None]
    expected = w.reshape(2, 2, 3, 1).swapaxes(1, 2).reshape(12, 1)
    assert torch.equal(theirs(w, 2), expected)
    assert torch.equal(ours(theirs(w, 2), 2), w)
    assert gguf.GGML_QUANT_SIZES[Kind.Q4_1] == (32, 20)
