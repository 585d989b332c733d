"""GGUF files of every architecture llama.cpp knows give the logits of the folder they were made of.

Names come from the `gguf` package's own tables; what a converter does to numbers (rows of q and k, norms plus one,
experts in one tensor) is written here from its definition.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, RopeScalingType, quants
from torch import Tensor

import fewbit
from fewbit.errors import FewbitError
from fewbit.models import GGUF_ARCHITECTURES, find_gguf_model
from fewbit.runtime.cache import Sequence
from fewbit.source import open_source
from tests.conftest import random_weights, write_folder
from tests.models.decoders import MODELS, config_of
from tests.models.test_gguf_models import add_tokenizer, theirs

IDS = torch.randint(256, (24,), generator=torch.Generator().manual_seed(3)).tolist()
ARCHITECTURES = {model: model for model in MODELS if model != "mistral"}
ARCHITECTURES |= {ours: theirs for theirs, ours in GGUF_ARCHITECTURES.items()} | {"mixtral": "llama"}
# converters that put the two halves of a head of q and k side by side
INTERLEAVED = {"llama", "mixtral", "smollm3"}
FACTORS = {"short_factor": [1 + i / 8 for i in range(6)], "long_factor": [2 + i / 2 for i in range(6)]}
CASES: dict[str, tuple[str, dict[str, Any], Kind]] = {model: (model, {}, Kind.F32) for model in ARCHITECTURES} | {
    "qwen2 yarn": (
        "qwen2",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0, "beta_fast": 16.0,
                             "original_max_position_embeddings": 32}},
        Kind.F32,
    ),
    "gemma3 stretched": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
         "num_hidden_layers": 7},
        Kind.F32,
    ),
    "phi3 longrope": (
        "phi3",
        {"head_dim": None, "max_position_embeddings": 1024, "original_max_position_embeddings": 16, "sliding_window": 8,
         "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, **FACTORS}},
        Kind.F32,
    ),
    "experts in q8_0": ("qwen3_moe", {"moe_intermediate_size": 64}, Kind.Q8_0),
    "mixtral in q4_0": ("mixtral", {"tie_word_embeddings": False}, Kind.Q4_0),
    "smollm3 biased": ("smollm3", {"attention_bias": True, "mlp_bias": True}, Kind.F32),
}  # fmt: skip


def metadata(writer: GGUFWriter, model: str, config: dict[str, Any]) -> None:
    """What llama.cpp's converter of the model writes."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    turned = int(head * rope.get("partial_rotary_factor", 1))
    if model not in ("gemma2", "gemma3_text"):
        writer.add_rope_dimension_count(turned)
    if model != "phi3":
        writer.add_key_length(head)
        writer.add_value_length(head)
    if "rope_theta" in rope:
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    if model == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.get("original_max_position_embeddings", 4096))
    if model in ("gemma2", "gemma3_text", "phi3"):
        writer.add_sliding_window(config.get("sliding_window") or 0)
    if model == "gemma2":
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    if "num_experts_per_tok" in config:
        writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config.get("moe_intermediate_size", config["intermediate_size"]))


def stored(model: str, config: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names a converter looks up, in its rows, its norms and its stacks."""
    found: dict[str, Tensor] = {}
    stacks: dict[str, list[Tensor]] = {}
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, w in weights.items():
        layer = name.rpartition(".")[0].rpartition(".")[2]
        if model in INTERLEAVED and layer in heads:
            w = theirs(w, heads[layer])
        if model.startswith("gemma") and name.endswith("norm.weight"):
            w = w + 1
        if ".experts." in name:
            block, which = name.split(".")[2], name.split(".")[-2]
            # the names under which Mixtral's and Qwen's converters stack
            merged = f"layers.{block}.feed_forward.experts.{which}"
            if which.endswith("_proj"):
                merged = f"model.layers.{block}.mlp.experts.{which}"
            stacks.setdefault(f"{merged}.weight", []).append(w)
            continue
        found[name] = w
    return found | {name: torch.stack(parts) for name, parts in stacks.items()}


def write(path: Path, model: str, config: dict[str, Any], weights: dict[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    """A GGUF file; returns the weights as it holds them."""
    architecture = ARCHITECTURES[model]
    writer = GGUFWriter(path, architecture)
    metadata(writer, model, config)
    add_tokenizer(writer, config["vocab_size"])
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    rope = config.get("rope_parameters") or {}
    for which in ("long", "short"):
        if f"{which}_factor" in rope:
            writer.add_tensor(f"rope_factors_{which}.weight", torch.tensor(rope[f"{which}_factor"]).numpy())
    if "long_factor" in rope:
        stretch = config["max_position_embeddings"] / config["original_max_position_embeddings"]
        strength = math.sqrt(1 + math.log(stretch) / math.log(config["original_max_position_embeddings"]))
        writer.add_rope_scaling_attn_factors(strength)
    rounded: dict[str, Tensor] = {}
    if kind != Kind.F32:
        for name, w in weights.items():
            matrix = w.dim() == 2 and not name.endswith("gate.weight")
            back = quants.dequantize(quants.quantize(w.float().numpy(), kind), kind) if matrix else w.float().numpy()
            rounded[name] = torch.from_numpy(back).reshape(w.shape).clone()
    for name, w in stored(model, config, weights).items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        as_kind = kind if w.dim() > 1 and not name.endswith("gate.weight") else Kind.F32
        writer.add_tensor(target, quants.quantize(w.float().numpy(), as_kind), raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rounded or weights


def logits(model: Path, exact: bool = True) -> Tensor:
    loaded = fewbit.load(model, exact=exact, context=len(IDS))
    return loaded.forward([(Sequence(), list(IDS))], wanted=list(range(len(IDS))))


@pytest.mark.parametrize("case", CASES)
def test_a_file_and_a_folder_give_the_same_logits(tmp_path: Path, case: str) -> None:
    model, changes, kind = CASES[case]
    config = config_of(model, {"num_hidden_layers": 4} | changes)
    if model.startswith("gemma"):
        # what llama.cpp knows of it without being told
        config["query_pre_attn_scalar"] = config["head_dim"]
    if model.startswith("gemma3"):
        config.setdefault("rope_parameters", None)
    held = write(tmp_path / "m.gguf", model, config, random_weights(config, torch.float32), kind)
    folder = write_folder(tmp_path / "folder", held, **config)
    file, plain = open_source(tmp_path / "m.gguf"), open_source(folder)
    assert [w.name for w in file.weights] == [w.name for w in plain.weights]
    torch.testing.assert_close(logits(tmp_path / "m.gguf"), logits(folder), rtol=1e-4, atol=1e-4)
    if kind != Kind.F32:
        # the packed kernels take experts out of their stack too
        p, q = (logits(tmp_path / "m.gguf", exact=e).log_softmax(-1) for e in (True, False))
        assert float((p.exp() * (p - q)).sum(-1).mean()) < 0.05


def test_a_slice_of_an_expert_is_its_rows(tmp_path: Path) -> None:
    config = config_of("qwen3_moe", {"num_hidden_layers": 1})
    weights = random_weights(config, torch.float32)
    write(tmp_path / "m.gguf", "qwen3_moe", config, weights, Kind.F32)
    source = open_source(tmp_path / "m.gguf")
    name = "model.layers.0.mlp.experts.4.down_proj.weight"
    q = source.read(name, (3, 9))
    assert q.shape == (6, 32)
    assert torch.equal(q.parts["weight"], weights[name][3:9])
    assert source.read(name).shape == (64, 32)


def test_quantizing_a_file_of_norms_plus_one_takes_it_off_again(tmp_path: Path) -> None:
    config = config_of("gemma2", {"num_hidden_layers": 2, "query_pre_attn_scalar": 16})
    weights = random_weights(config, torch.float32)
    write(tmp_path / "m.gguf", "gemma2", config, weights, Kind.F32)
    fewbit.quantize(tmp_path / "m.gguf", tmp_path / "q", format="int8g32", head="16bit", method="rtn")
    name = "model.layers.1.post_feedforward_layernorm.weight"
    found = open_source(tmp_path / "q").read(name).parts["weight"]
    torch.testing.assert_close(found, weights[name], rtol=0, atol=1e-6)
    p, q = (logits(tmp_path / m).log_softmax(-1) for m in ("m.gguf", "q"))
    assert 0 < float((p.exp() * (p - q)).sum(-1).mean()) < 0.02


def test_a_file_of_an_architecture_without_files_is_refused() -> None:
    with pytest.raises(FewbitError, match="'mistral'"):
        find_gguf_model({"general.architecture": "mistral"})
    with pytest.raises(FewbitError, match=re.escape("'rwkv7' is not supported")):
        find_gguf_model({"general.architecture": "rwkv7"})
    assert find_gguf_model({"general.architecture": "llama", "llama.expert_count": 8}).__name__.endswith("mixtral")
    assert find_gguf_model({"general.architecture": "llama", "llama.expert_count": 0}).__name__.endswith("llama")
