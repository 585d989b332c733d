"""Runs token sequences through vLLM. A program of its own: fewbit need not be there.

Standard input is the job as JSON; see `fewbit.engines`. The last line of standard output is the answer.
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np

# one process: what fails then says why here
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def main() -> None:
    import vllm

    job = json.load(sys.stdin)
    longest = max(len(ids) for ids in job["sequences"])
    # its kernels take no float32; f16 rounds activations less than bf16 does
    model = vllm.LLM(
        job["model"], dtype="float16", enforce_eager=True, max_model_len=longest + 8, max_num_seqs=1, max_logprobs=-1,
        max_num_batched_tokens=longest + 8, enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip
    asked = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, detokenize=False, flat_logprobs=True)
    rows = []
    for ids, start in zip(job["sequences"], job["starts"], strict=True):
        (found,) = model.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)
        flat = found.prompt_logprobs
        for position in range(start, len(ids)):
            begin, end = flat.start_indices[position], flat.end_indices[position]
            row = np.full(job["vocabulary"], -np.inf, dtype=np.float32)
            row[np.array(flat.token_ids[begin:end])] = flat.logprobs[begin:end]
            rows.append(row)
    np.save(job["out"], np.stack(rows))
    print(json.dumps({"version": vllm.__version__, "activation_bits": 16}))


if __name__ == "__main__":
    main()
