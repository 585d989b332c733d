"""Peak memory of quantizing a random model of Llama-3.2-1B's shape (1.24 billion weights, four shards, bf16).

    python benchmarks/memory.py [--scratch DIR]

Round to nearest, and GPTQ on 32 windows of 512 tokens (a quarter of an hour on two cores). Counts anonymous memory
above imports; the files are mapped. Needs about 4 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path

import torch
from _marks import Mark, finish
from tokenizers import Tokenizer, models, pre_tokenizers

from fewbit import quantize
from fewbit.checkpoint._safetensors import ShardWriter
from fewbit.memory import PeakMemory
from fewbit.models.llama import Args, weights

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
SHARDS = 4
WINDOWS = 32
# format, method, most GB
RUNS = (("int4g64", "rtn", 1.5), ("int8", "rtn", 1.5), ("int4g64", "gptq", 4.0))


def write_random(folder: Path) -> int:
    """A checkpoint of random weights; returns how many there are."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    infos = weights(Args.from_config(CONFIG))
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
    return count


def measure(
    folder: Path, out: Path, spec: str, method: str, answer: multiprocessing.queues.Queue[tuple[int, float]]
) -> None:
    """In a process of its own, so that nothing else counts."""
    start = time.perf_counter()
    with PeakMemory() as memory:
        quantize(folder, out, format=spec, method=method, windows=WINDOWS)
    answer.put((memory.peak, time.perf_counter() - start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, help="where to put the random model (default: the temporary folder)")
    parser.add_argument("--only", help="runs of this method")
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=args.scratch))
    spawn = multiprocessing.get_context("spawn")
    figures, marks = {}, []
    try:
        count = write_random(scratch / "model")
        for spec, method, most in RUNS:
            if args.only not in (None, method):
                continue
            answer = spawn.Queue()
            out = scratch / f"{spec}-{method}"
            worker = spawn.Process(target=measure, args=(scratch / "model", out, spec, method, answer))
            worker.start()
            peak, seconds = answer.get()
            worker.join()
            figures[f"{spec} {method}"] = {"weights": count, "peak_bytes": peak, "seconds": seconds}
            print(f"{spec} by {method}: {count / 1e9:.2f} billion weights in {seconds:.0f} s, peak {peak / 1e9:.3f} GB")
            marks.append(Mark(f"peak anonymous memory in GB, {spec} by {method}", peak / 1e9, most))
    finally:
        shutil.rmtree(scratch)
    finish("memory", marks, figures)


if __name__ == "__main__":
    main()
