"""Runs token sequences through GPTQModel, by its kernels in PyTorch. A program of its own: fewbit need not be there.

Standard input is the job as JSON; see `fewbit.engines`. The last line of standard output is the answer.
"""

from __future__ import annotations

import json
import sys

import gptqmodel
import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    backend = BACKEND.AWQ_TORCH if job["layout"] == "awq" and hasattr(BACKEND, "AWQ_TORCH") else BACKEND.TORCH
    # its kernels take no float32
    model = GPTQModel.load(job["model"], device="cpu", backend=backend, dtype=torch.float16).model.eval()
    rows = []
    for ids, start in zip(job["sequences"], job["starts"], strict=True):
        with torch.inference_mode():
            rows.append(model(torch.tensor([ids])).logits[0, start - 1 : -1].float().numpy())
    np.save(job["out"], np.concatenate(rows))
    print(json.dumps({"version": gptqmodel.__version__, "activation_bits": 16}))


if __name__ == "__main__":
    main()
