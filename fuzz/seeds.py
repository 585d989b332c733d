"""The first corpus, written by other libraries: small files with everything a reader knows.

    python fuzz/seeds.py FOLDER

Fuzzing goes further from valid files than from noise. The kept corpus began with these.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from safetensors.torch import save
from targets import CONFIGS, metadata_text

from fewbit.checkpoint._gguf_file import SPECS

TOKENIZERS: dict[str, dict[str, Any]] = {
    "bpe": {"model": "gpt2", "pre": "qwen2", "tokens": ["a", "b", "ab", "<x>"], "merges": ["a b"]},
    "spm": {"model": "llama", "tokens": ["<unk>", "\u2581", "a", "\u2581a", "<0x0A>"], "scores": [0.0, -1, -2, -3, -4]},
    "t5": {"model": "t5", "tokens": ["<pad>", "</s>", "<unk>", "\u2581", "a"], "scores": [0.0, 0, 0, -1, -2]},
    "gemma4": {"model": "gemma4", "tokens": ["a", "\n", "\u2581", "\u2581a"], "merges": ["\u2581 a"]},
}
TYPES = {"bpe": [1, 1, 1, 3], "spm": [2, 1, 1, 1, 6], "t5": [3, 3, 2, 1, 1], "gemma4": [1, 1, 1, 4]}


def gguf_file(name: str, path: Path) -> None:
    """A tokenizer, all kinds of metadata and a tensor of every type."""
    writer = GGUFWriter(path, "llama")
    for key, value in {"b": True, "i": -3, "f": 0.5, "s": "text"}.items():
        getattr(writer, {bool: "add_bool", int: "add_int32", float: "add_float32", str: "add_string"}[type(value)])(
            f"k.{key}", value
        )
    writer.add_array("k.a", [1, 2, 3])
    data = TOKENIZERS[name]
    writer.add_tokenizer_model(data["model"])
    for key, value in data.items():
        if key == "pre":
            writer.add_tokenizer_pre(value)
        elif key != "model":
            writer.add_array(f"tokenizer.ggml.{key}", [float(v) for v in value] if key == "scores" else value)
    writer.add_token_types(TYPES[name])
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    if name == "t5":
        # a trie without a word
        writer.add_array("tokenizer.ggml.precompiled_charsmap", list((2048).to_bytes(4, "little") + bytes(2050)))
    rng = np.random.default_rng(0)
    kinds = [GGMLQuantizationType(number) for number in SPECS]
    for kind in kinds[:: 1 if name == "bpe" else 7]:
        _, size = GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (2, size), dtype=np.uint8)
        writer.add_tensor(kind.name, blocks, raw_shape=(2, size), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def safetensors_file(number: int) -> bytes:
    """Tensors of the layout that goes with a config."""
    parts: dict[str, torch.Tensor] = {"norm.weight": torch.ones(8), "x.bias": torch.ones(8, dtype=torch.float16)}
    ints, half = torch.int32, torch.float16
    method = CONFIGS[number].get("quant_method")
    if method in ("compressed-tensors", "fewbit"):
        parts |= {"x.weight_packed": torch.ones(8, 8, dtype=ints), "x.weight_scale": torch.ones(8, 2, dtype=half)}
        parts |= {"x.weight_shape": torch.tensor([8, 64])}
    elif method == "gptq":
        parts |= {"x.qweight": torch.ones(8, 8, dtype=ints), "x.qzeros": torch.ones(2, 1, dtype=ints)}
        parts |= {"x.scales": torch.ones(2, 8, dtype=half), "x.g_idx": torch.arange(64, dtype=ints) // 32}
    elif method == "awq":
        parts |= {"x.qweight": torch.ones(64, 1, dtype=ints), "x.qzeros": torch.ones(2, 1, dtype=ints)}
        parts |= {"x.scales": torch.ones(2, 8, dtype=half)}
    else:
        parts |= {"x.weight": torch.ones(4, 8, dtype=torch.bfloat16)}
    facts = {"fewbit": json.dumps({"specs": {"x.weight": "int4g32"}})}
    return bytes([number]) + save(parts, metadata=facts if method == "fewbit" else None)


def main() -> None:
    out = Path(sys.argv[1])
    for target in ("gguf", "metadata", "safetensors"):
        (out / target).mkdir(parents=True, exist_ok=True)
    for name in TOKENIZERS:
        with tempfile.TemporaryDirectory() as folder:
            gguf_file(name, Path(folder) / "x.gguf")
            (out / "gguf" / name).write_bytes((Path(folder) / "x.gguf").read_bytes())
        said = {**TOKENIZERS[name], "token_type": TYPES[name], "eos_token_id": 1, "add_space_prefix": True}
        (out / "metadata" / name).write_bytes(metadata_text(said))
    for number, config in enumerate(CONFIGS):
        (out / "safetensors" / str(config.get("quant_method", "plain"))).write_bytes(safetensors_file(number))


if __name__ == "__main__":
    main()
