"""A checkpoint of random weights in the shape of Llama-3.2-1B: what memory and speed are measured on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from fewbit.checkpoint._safetensors import ShardWriter
from fewbit.models.llama import args, weights

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
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
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
