"""Runs token sequences through transformers, in float32. A program of its own: fewbit need not be there.

Standard input is the job as JSON; see `fewbit.engines`. The last line of standard output is the answer.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    model.train(False)
    rows = []
    for ids, start in zip(job["sequences"], job["starts"], strict=True):
        with torch.inference_mode():
            rows.append(model(torch.tensor([ids])).logits[0, start - 1 : -1].float().numpy())
    np.save(job["out"], np.concatenate(rows))
    print(json.dumps({"version": transformers.__version__, "activation_bits": 32}))


main()
