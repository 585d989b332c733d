"""fewbit beside transformers in float32 on a real model: the same tokens, the same predictions.

    python benchmarks/agreement.py MODEL [--text TEXT --tokens N --tokenizer tokenizer.json]

MODEL is a folder or a GGUF file. 5 prompts x 32 greedy tokens, teacher-forced: every choice within 0.1 nat of the
other's top and mean KL at most 1e-4. With --text, the tokenizer's ids are compared with those of a tokenizer.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from _marks import Mark, finish
from tokenizers import Tokenizer

import fewbit
from fewbit.store import locate

sys.path.insert(0, str(Path(__file__).parent.parent))


def main() -> None:
    from transformers import AutoModelForCausalLM

    from tests.e2e.test_real_model import agree

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--tokens", type=int)
    args = parser.parse_args()
    path = locate(args.model)
    where = {"pretrained_model_name_or_path": path}
    if path.is_file():
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    theirs = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    model = fewbit.load(path, exact=True, device="cpu")
    kl, gap = agree(model, theirs)
    marks = [Mark("mean KL against transformers", kl, 1e-4), Mark("largest gap of a choice, nats", gap, 0.1)]
    if args.text:
        text = args.text.read_text(encoding="utf-8")
        ids = model.tokenizer.encode(text, bos=False)
        print(f"{len(ids):,} tokens")
        if args.tokens:
            marks.append(Mark("tokens more or fewer than expected", abs(len(ids) - args.tokens), 0))
        if args.tokenizer:
            expected = Tokenizer.from_file(str(args.tokenizer)).encode(text, add_special_tokens=False).ids
            marks.append(Mark("tokens that differ from tokenizer.json's", float(ids != expected), 0))
    finish(f"agreement-{path.stem}", marks, {"model": args.model})


if __name__ == "__main__":
    main()
