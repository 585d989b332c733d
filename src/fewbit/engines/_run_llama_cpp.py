"""Runs token sequences through llama.cpp (package llama-cpp-python). A program of its own: fewbit need not be there.

Standard input is the job as JSON; see `fewbit.engines`.
"""

from __future__ import annotations

import json
import sys

import llama_cpp
import numpy as np


def main() -> None:
    job = json.load(sys.stdin)
    longest = max(len(ids) for ids in job["sequences"])
    # keys and values in float32: what is compared is the weights
    model = llama_cpp.Llama(
        job["model"], n_ctx=longest + 8, n_batch=longest + 8, n_threads=job["threads"], n_threads_batch=job["threads"],
        logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False,
    )  # fmt: skip
    rows = []
    for ids, start in zip(job["sequences"], job["starts"], strict=True):
        model.reset()
        model.eval(ids)
        rows.append(np.array(model.scores[start - 1 : len(ids) - 1], dtype=np.float32))
    np.save(job["out"], np.concatenate(rows))
    kind = model.metadata.get("general.file_type")
    # F32, F16 and BF16 have activations of their own type, all others of 8 bits
    bits = {"0": 32, "1": 16, "32": 16}.get(str(kind), 8)
    print(json.dumps({"version": llama_cpp.__version__, "activation_bits": bits}))
    text = [model.tokenize(text.encode(), add_bos=False, special=True) for text in job["texts"]]
    print(json.dumps({"tokens": text}))


main()
