"""Checkpoints of random weights on disk: one in the shape of Llama-3.2-1B, and packed ones of any known shape."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from fewbit.checkpoint._safetensors import ShardWriter
from fewbit.checkpoint._writer import Planned, quantization_config
from fewbit.models.llama import args, weights
from fewbit.random_models import random_model
from fewbit.shapes import SHAPES

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
SHARDS = 4


def write_random(folder: Path) -> int:
    """A checkpoint of random weights; returns how many there are. The folder is whole or not there."""
    whole, folder = folder, folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    _write_tokenizer(folder)
    infos = weights(args(CONFIG))
    table, count = {}, 0
    for i in range(SHARDS):
        members = infos[i::SHARDS]
        file = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        with ShardWriter(folder / file, {w.name: (torch.bfloat16, w.shape) for w in members}, {}) as writer:
            for w in members:
                for rows in torch.empty(w.shape, device="meta").split(8192):
                    writer.write(w.name, torch.randn(rows.shape).mul_(0.02).bfloat16())
                count += torch.Size(w.shape).numel()
        table |= dict.fromkeys((w.name for w in members), file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    folder.rename(whole)
    return count


def write_packed(folder: Path, shape: str, formats: str, device: torch.device) -> int:
    """The model of `random_model(shape, formats)` as fewbit writes it, made on `device`; returns the bytes of its
    weight files, which are on the disk by then.
    """
    source = random_model(shape, formats)
    source.checkpoint.device = device  # type: ignore[attr-defined]
    planned = [Planned(w.name, source.spec(w.name), w.shape) for w in source.weights]
    folder.mkdir(parents=True)
    matrices = {w.name for w in source.weights if len(w.shape) == 2}
    said = {"quantization_config": quantization_config(planned, matrices)} if "int" in formats else {}
    (folder / "config.json").write_text(json.dumps(SHAPES[shape] | said))
    _write_tokenizer(folder)
    specs = {p.name: p.spec for p in planned if p.spec.startswith("int")}
    table, total = {}, 0
    for i in range(SHARDS):
        # neighbours lie together, as in published models
        members = planned[i * len(planned) // SHARDS : (i + 1) * len(planned) // SHARDS]
        file = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        stored = {name: where for p in members for name, where in p.stored(torch.bfloat16).items()}
        with ShardWriter(folder / file, stored, {"fewbit": json.dumps({"specs": specs})}) as writer:
            for p in members:
                q = source.read(p.name)
                for name, part in zip(p.stored(torch.bfloat16), q.parts.values(), strict=False):
                    writer.write(name, part.cpu())
                if f"{p.name}_shape" in stored:
                    writer.write(f"{p.name}_shape", torch.tensor(p.shape))
        table |= dict.fromkeys(stored, file)
        total += (folder / file).stat().st_size
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return total


def _write_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
