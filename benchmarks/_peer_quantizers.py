"""Quantize a model's body with another project's quantizer, as its own documentation says, its defaults kept.

    python benchmarks/_peer_quantizers.py ROW MODEL_FOLDER TOKENS.npy OUT_FOLDER

`benchmarks/peers.py` runs this in a process of its own, under the interpreter that has the row's peer: what a peer
changes in torch or transformers can't reach the measuring, and the peers, whose pins clash, need no common environment.
TOKENS.npy holds the calibration windows, int64 [windows, tokens]. OUT_FOLDER receives what the peer saves, and a
`peer.json` that names version and settings and says how many seconds quantizing took (loading and saving are not in
it, but for AutoRound, whose one call does both).
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

GROUP = 64
SPELLING = re.compile(r"(?P<method>[a-z-]+)-int(?P<bits>[2348])(?P<asymmetric>a?)")


class Row(NamedTuple):
    """One row of the table: a method of METHODS, the width, and whether the grid is symmetric."""

    name: str
    method: str
    bits: int
    symmetric: bool

    @classmethod
    def parse(cls, name: str) -> Row:
        """`gptqmodel-actorder-int3` and the like; a trailing `a` is asymmetric. ValueError for any other spelling."""
        match = SPELLING.fullmatch(name)
        if match is None or match["method"] not in METHODS:
            raise ValueError(f"unknown row {name!r}: METHOD-int{{2,3,4,8}}[a] with METHOD one of {', '.join(METHODS)}")
        return cls(name, match["method"], int(match["bits"]), not match["asymmetric"])

    @property
    def package(self) -> str:
        """The distribution that does the work."""
        return METHODS[self.method][0]


def autoround(row: Row, model: Path, tokens: np.ndarray, out: Path, **settings: Any) -> float:
    """AutoRound's one call; batches of 8 windows, as its own loader makes them."""
    import torch
    from auto_round import AutoRound

    batches = list(torch.from_numpy(tokens).split(8))
    scheme = {"scheme": f"W{row.bits}A16", "group_size": GROUP, "sym": row.symmetric}
    samples = {"dataset": batches, "nsamples": len(tokens), "seqlen": tokens.shape[1]}
    quantizer = AutoRound(str(model), **scheme, **samples, **settings)
    start = time.perf_counter()
    quantizer.quantize_and_save(str(out), format="auto_round")
    return time.perf_counter() - start


def compressor(row: Row, model: Path, tokens: np.ndarray, out: Path, **settings: Any) -> float:
    """llm-compressor's oneshot with the recipe of its guides: GPTQ alone, or AWQ's scales before round-to-nearest."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = QuantizationArgs(num_bits=row.bits, strategy="group", group_size=GROUP, symmetric=row.symmetric)
    scheme = {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}}
    body = {**scheme, "ignore": ["lm_head"]}
    recipe: Any = GPTQModifier(**body) if row.method.endswith("gptq") else [AWQModifier(), QuantizationModifier(**body)]
    # llm-compressor moves each block to the accelerator itself
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    rows = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in tokens.tolist()]
    sizes = {"num_calibration_samples": len(tokens), "max_seq_length": tokens.shape[1]}
    tokenizer = AutoTokenizer.from_pretrained(model)
    start = time.perf_counter()
    oneshot(model=network, processor=tokenizer, dataset=Dataset.from_list(rows), recipe=recipe, **sizes, **settings)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    network.save_pretrained(out, save_compressed=True)
    return seconds


def gptqmodel(row: Row, model: Path, tokens: np.ndarray, out: Path, **settings: Any) -> float:
    """GPTQModel's load, quantize, save."""
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=row.bits, group_size=GROUP, sym=row.symmetric, **settings)
    network = GPTQModel.load(str(model), config)
    rows = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in tokens.tolist()]
    start = time.perf_counter()
    network.quantize(rows, batch_size=1)
    seconds = time.perf_counter() - start
    network.save(str(out))
    return seconds


# method: distribution, function, what is set beside width, group and symmetry
METHODS: dict[str, tuple[str, Callable[..., float], dict[str, Any]]] = {
    "autoround": ("auto-round", autoround, {}),
    "autoround-rtn": ("auto-round", autoround, {"iters": 0}),
    "llmcompressor-gptq": ("llmcompressor", compressor, {}),
    "llmcompressor-awq": ("llmcompressor", compressor, {}),
    "gptqmodel": ("gptqmodel", gptqmodel, {}),
    "gptqmodel-actorder": ("gptqmodel", gptqmodel, {"desc_act": True}),
}


def main() -> None:
    name, model, tokens, out = sys.argv[1:]
    row = Row.parse(name)
    package, function, settings = METHODS[row.method]
    seconds = function(row, Path(model), np.load(tokens), Path(out), **settings)
    found = {"package": package, "version": version(package), "settings": settings, "seconds": round(seconds, 2)}
    (Path(out) / "peer.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
