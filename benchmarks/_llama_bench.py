"""llama.cpp and ik_llama.cpp: GGUF files of any folder's weights for them to run, and their own speed measurements.

The files have no vocabulary: speed does not depend on it, and llama-bench makes its prompts of random ids.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch

from fewbit.models import llama
from fewbit.source import open_source

# of embedding and head in every file, as fewbit's are int8
HEAD = "q8_0"


def write_gguf(folder: Path, out: Path) -> Path:
    """The model of a Hugging Face folder (bf16, of the Llama kind) as a bf16 GGUF file."""
    source = open_source(folder)
    a = source.args
    theirs = {canonical: name for name, canonical in llama.GGUF.items()}
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_context_length(a.max_position_embeddings)
    writer.add_embedding_length(a.hidden_size)
    writer.add_block_count(a.num_hidden_layers)
    writer.add_feed_forward_length(a.intermediate_size)
    writer.add_head_count(a.num_attention_heads)
    writer.add_head_count_kv(a.num_key_value_heads)
    writer.add_layer_norm_rms_eps(a.rms_norm_eps)
    writer.add_rope_dimension_count(a.head_dim)
    writer.add_rope_freq_base(a.rope.theta)
    writer.add_vocab_size(a.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for info in source.weights:
        weight = source.read(info.name).parts["weight"]
        block = "" if info.block is None else str(info.block)
        name = theirs[info.name.replace(f".{block}.", ".{}.", 1) if block else info.name].format(block)
        # llama.cpp rotates neighbours where the folder's rows are in halves
        if (rows := llama.gguf_rows(info.name, a)) is not None:
            weight = weight[rows.argsort()]
        if weight.dim() == 1:
            writer.add_tensor(name, weight.float().numpy())
        else:
            bits = weight.bfloat16().contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return partial.rename(out)


def quantized(quantizer: Path, source: Path, kind: str, out: Path) -> Path:
    """Every linear as `kind` (Q4_0, Q3_K ...; rows that a K-type does not divide get llama.cpp's own substitute)."""
    partial = out.with_suffix(".partial")
    heads = ["--token-embedding-type", HEAD, "--output-tensor-type", HEAD]
    subprocess.run([quantizer, "--pure", *heads, source, partial, kind], check=True, capture_output=True)
    return partial.rename(out)


def quantizer_beside(*benches: Path | None) -> Path | None:
    """The llama-quantize built together with one of the llama-bench given."""
    beside = (bench.with_name("llama-quantize") for bench in benches if bench)
    return next((tool for tool in beside if tool.exists()), None)


@dataclass(frozen=True)
class Peer:
    """One engine's llama-bench with the options it is run with."""

    name: str
    bench: Path
    options: tuple[str, ...]

    def run(self, file: Path, threads: int, prompt: int, new: int) -> dict[str, float]:
        """One round: tokens/s of a prompt and of decoding from an empty cache, bytes of the weights."""
        sizes = ["-t", str(threads), "-p", str(prompt), "-n", str(new), "-r", "1", "-o", "json"]
        command = [self.bench, "-m", file, *sizes, *self.options]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return rates(done.stdout) | {"bytes": tensor_bytes(file)}


def tensor_bytes(file: Path) -> int:
    """Bytes of all tensors; what a token reads where embedding and head are one (ik_llama.cpp counts it twice)."""
    return sum(int(t.n_bytes) for t in gguf.GGUFReader(file).tensors)


def rates(printed: str) -> dict[str, float]:
    """What llama-bench's JSON says: `prefill` and `decode` tokens/s."""
    found: list[dict[str, Any]] = json.JSONDecoder().raw_decode(printed[printed.index("[") :])[0]
    prefill = next(f for f in found if not f["n_gen"])
    decode = next(f for f in found if not f["n_prompt"])
    return {"prefill": prefill["avg_ts"], "decode": decode["avg_ts"]}
