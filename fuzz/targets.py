"""What the fuzzer feeds: a file of someone else's making is opened and everything in it is used.

A target takes the file's bytes. FewbitError is the only exception it swallows: whatever else comes out is a finding.
An ordinary test runs the same targets over the kept corpus.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from fewbit import formats
from fewbit.checkpoint import Checkpoint, TokenizerData, _gguf_tokenizer, gguf, open_checkpoint
from fewbit.checkpoint._gguf_file import LazyArray
from fewbit.errors import FewbitError
from fewbit.lookup import names
from fewbit.tokenizer import Tokenizer

# found by their names at first use otherwise, when nothing is watched any more
for package in ("fewbit.checkpoint", "fewbit.formats"):
    for module in names(package):
        importlib.import_module(f"{package}.{module}")
# the longest file worth trying: everything a header can say is said in less
MOST_BYTES: Final = 1 << 16
TEXT: Final = "Tabs\t 123 don't \u6f22\u5b57 <|im_start|>\n\n e\u0301 \U0001f600 </s>"
# the configs beside the weights: the first byte of a file picks one
CONFIGS: Final = [
    {},
    {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}}},
    {"quant_method": "fewbit"},
    {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False},
    {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
]


def use_gguf(data: bytes) -> None:
    """Header, metadata, every tensor in every way it is read, and the tokenizer."""
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        path = Path(folder) / "fuzzed.gguf"
        path.write_bytes(data[:MOST_BYTES])
        try:
            checkpoint = gguf.open(path)
        except FewbitError:
            return
        for value in checkpoint.config.values():
            if isinstance(value, LazyArray):
                _swallow(lambda value=value: list(value))
        _use_tensors(checkpoint)
        _swallow(lambda: _use_tokenizer(checkpoint.tokenizer()))


def use_metadata(data: bytes) -> None:
    """The tokenizer in metadata, written so that every text has a meaning: key, =, a letter for the type, value.

    Byte 30 comes between two. Small letters are one value, capitals several with commas between; of texts, byte 31.
    """
    metadata: dict[str, Any] = {}
    for line in data[:MOST_BYTES].decode("utf-8", "replace").split("\x1e"):
        key, _, value = line.partition("=")
        read = READ.get(value[:1].lower())
        if read:
            items = value[1:].split("\x1f" if value[:1] in "sS" else ",")
            metadata[f"tokenizer.ggml.{key}"] = read(items[0]) if value[:1].islower() else [read(i) for i in items]
    _swallow(lambda: _use_tokenizer(_gguf_tokenizer.convert(metadata, "fuzzed.gguf")))


def metadata_text(metadata: dict[str, Any]) -> bytes:
    """The other way round, for seeds."""
    lines = []
    for key, value in metadata.items():
        items = value if isinstance(value, list) else [value]
        letter = {str: "s", bool: "b", int: "i", float: "f"}[type(items[0])]
        said = ["1" if item is True else "" if item is False else str(item) for item in items]
        joined = ("\x1f" if letter == "s" else ",").join(said)
        lines.append(f"{key}={letter.upper() if isinstance(value, list) else letter}{joined}")
    return "\x1e".join(lines).encode()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


READ: Final[dict[str, Callable[[str], Any]]] = {
    "s": str,
    "b": bool,
    "f": _number,
    "i": lambda text: int(text) if text.removeprefix("-").isdecimal() and len(text) < 20 else 0,
}


def use_safetensors(data: bytes) -> None:
    """A folder with these weights and one of the configs."""
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        chosen = CONFIGS[data[0] % len(CONFIGS)] if data else {}
        config = {"model_type": "llama"} | ({"quantization_config": chosen} if chosen else {})
        (Path(folder) / "config.json").write_text(json.dumps(config))
        (Path(folder) / "model.safetensors").write_bytes(data[1 : 1 + MOST_BYTES])
        try:
            checkpoint = open_checkpoint(Path(folder))
            checkpoint.facts()
        except FewbitError:
            return
        _use_tensors(checkpoint)


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "gguf": use_gguf,
    "metadata": use_metadata,
    "safetensors": use_safetensors,
}


def _use_tensors(checkpoint: Checkpoint) -> None:
    for name in checkpoint.names():
        _swallow(lambda name=name: _use_tensor(checkpoint, name))


def _use_tensor(checkpoint: Checkpoint, name: str) -> None:
    spec, shape = checkpoint.spec(name), checkpoint.shape(name)
    q = checkpoint.read(name)
    fmt = formats.parse(spec)
    if q.shape != shape or fmt.accepts(shape) is not None or fmt.dequantize(q).numel() != q.numel:
        raise AssertionError(f"{name} of {spec} is {q.shape}, and was said to be {shape}")
    if len(shape) == 2:
        fmt.affine(q)
        fmt.tabled(q)
        part = checkpoint.read(name, (shape[0] - 1, shape[0]))
        last = fmt.dequantize(fmt.take(q, torch.tensor([shape[0] - 1])))
        if not torch.equal(last.nan_to_num(0.5), fmt.dequantize(part).nan_to_num(0.5)):
            raise AssertionError(f"the last row of {name} differs from the same row of the whole")


def _use_tokenizer(data: TokenizerData) -> None:
    tokenizer = Tokenizer(data)
    ids = tokenizer.encode(TEXT)
    tokenizer.decode(ids)
    for end in tokenizer.eos_ids:
        tokenizer.decode([end])


def _swallow(use: Callable[[], object]) -> None:
    try:
        use()
    except FewbitError as error:
        if not error.what or not error.facts or len(error.facts) > 4000:
            raise AssertionError(f"an error without words: {error}") from error


def _memory() -> str | None:
    """Where files cost no disk, on systems that have such a place."""
    place = Path("/dev/shm")  # noqa: S108
    return str(place) if place.is_dir() else None
