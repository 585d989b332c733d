"""What lies beside the weights of a folder, as Hugging Face tools expect it: config.json and the tokenizer's files."""

from __future__ import annotations

from typing import Any

from fewbit.checkpoint._writer import Writer
from fewbit.source import Source
from fewbit.tokenizer import Tokenizer


def write(writer: Writer, source: Source, quantization: dict[str, Any] | None) -> None:
    """The files of `source`'s config and tokenizer; `quantization` is config.json's `quantization_config`."""
    config = {k: v for k, v in source.config.items() if k not in ("quantization_config", "torch_dtype")}
    config["dtype"] = str(source.dtype).removeprefix("torch.")
    if quantization:
        config["quantization_config"] = quantization
    data = source.checkpoint.tokenizer()
    if data.bos_token_id is not None:
        config.setdefault("bos_token_id", data.bos_token_id)
    ends = list(data.eos_token_ids)
    if ends:
        config.setdefault("eos_token_id", ends[0])
        writer.text("generation_config.json", {"eos_token_id": ends[0] if len(ends) == 1 else ends})
    writer.text("config.json", config)
    writer.text("tokenizer.json", data.json)
    tokens = Tokenizer(data).inner
    ids = {"bos_token": data.bos_token_id, "eos_token": ends[0] if ends else None}
    named = {key: tokens.id_to_token(i) for key, i in ids.items() if i is not None}
    writer.text(
        "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": data.add_bos, **named},
    )
    if data.chat_template is not None:
        writer.text("chat_template.jinja", data.chat_template)
