"""The README of an export: what it is, how to run it in each engine, and what was verified."""

from __future__ import annotations

import json
import os
import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

import fewbit
from fewbit.exports import Summary
from fewbit.verification import Check, Verification

EXPLAINED = """\
Each engine, teacher-forced on fewbit's greedy answers to 5 prompts (32 tokens each), against fewbit's float32 run of
the same weights. A choice's gap is how far it lies below fewbit's top, in nats. Of an engine that rounds activations to
8 bits the mean KL counts, and a twin of the file in float32 is held to a KL of 1e-4 and a gap of 0.1.
"""
WORDS = {"gguf": "GGUF", "compressed-tensors": "compressed-tensors", "gptq": "GPTQ", "awq": "AWQ"}


def place(summary: Summary) -> Path:
    """README.md of a folder; beside a file the same name with .md."""
    path = Path(summary.path)
    return path / "README.md" if path.is_dir() else path.with_suffix(".md")


def write(summary: Summary, facts: dict[str, Any], verification: Verification | None = None) -> Path:
    """Write the card, or write it anew; it is whole or not there."""
    target = place(summary)
    handle, beside = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text(summary, facts, verification))
    Path(beside).chmod(0o644)
    Path(beside).replace(target)
    return target


def text(summary: Summary, facts: dict[str, Any], verification: Verification | None = None) -> str:
    """The card as Markdown; `facts` are what the weights' files say of how they were quantized."""
    name = Path(summary.path).name
    base = _plain(facts.get("source") or summary.source)
    parts = [
        _front_matter(summary, base),
        f"# {_plain(name)}\n\n{base} in {WORDS[summary.to]}, written by fewbit {fewbit.__version__}.\n",
        _table(summary, base, facts, verification),
        "## How to run it\n\n" + "\n\n".join(_commands(summary)) + "\n",
        _verified(verification),
    ]
    return "\n".join(parts)


def _front_matter(summary: Summary, base: str) -> str:
    """What the hub reads; a base model only where the name is a hub id."""
    lines = ["---"]
    # a model of the hub may be named with its commit
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@\w+)?", base):
        lines += [f"base_model: {base.partition('@')[0]}", "base_model_relation: quantized"]
    if summary.to != "gguf":
        lines.append("library_name: transformers")
    lines += ["pipeline_tag: text-generation", "tags:", "- fewbit", f"- {summary.to}", "---", ""]
    return "\n".join(lines)


def _table(summary: Summary, base: str, facts: dict[str, Any], verification: Verification | None) -> str:
    values = "as in the source" if summary.exact else "; ".join(summary.notes) or "rounded from the source"
    if summary.exact and summary.notes:
        values += f" ({'; '.join(summary.notes)})"
    rows = [
        ("base model", base),
        ("format", f"{summary.format}: " + ", ".join(f"{count} tensors {s}" for s, count in summary.specs.items())),
        ("method", _plain(summary.method)),
        ("values", _plain(values)),
        ("weights", f"{summary.weight_bytes:,} bytes ({summary.source_bytes:,} in the source)"),
    ]
    calibration = facts.get("calibration")
    if isinstance(calibration, dict):
        rows.append(("calibration", _plain(json.dumps(calibration, ensure_ascii=False)[:300])))
    if verification is not None and verification.source_kl is not None:
        count = verification.tokens
        rows.append(("mean KL from the source", f"{verification.source_kl:.2g} nat, on {count} tokens of 5 answers"))
    return "| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in rows)


def _commands(summary: Summary) -> list[str]:
    """One block for each engine."""
    name = shlex.quote(Path(summary.path).name)
    label = re.sub(r"[^a-z0-9.-]+", "-", Path(summary.path).stem.lower()).strip("-.") or "model"
    found = [_block("fewbit", f"fewbit run {name}")]
    if summary.to == "gguf":
        return [
            *found,
            _block("llama.cpp", f"llama-cli -m {name}\nllama-server -m {name}"),
            _block("Ollama", f"echo FROM ./{name} > Modelfile\nollama create {label} -f Modelfile\nollama run {label}"),
        ]
    found.append(_block("vLLM", f"vllm serve ./{name}"))
    found.append(_block("SGLang", f"python -m sglang.launch_server --model-path ./{name}"))
    needs = {"compressed-tensors": "compressed-tensors"}.get(summary.to, "gptqmodel optimum")
    program = (
        "from transformers import pipeline\n"
        f'chat = pipeline("text-generation", model="./{Path(summary.path).name}")\n'
        'print(chat([{"role": "user", "content": "Why is the sky blue?"}])[0]["generated_text"][-1])'
    )
    return [*found, f"transformers (`pip install transformers accelerate {needs}`)\n\n```python\n{program}\n```"]


def _block(engine: str, command: str) -> str:
    return f"{engine}\n\n```\n{command}\n```"


def _verified(verification: Verification | None) -> str:
    head = "## What was verified\n\n"
    if verification is None:
        return head + "Nothing yet: `fewbit export ... --verify` loads an export in its engines and compares.\n"
    lines = [
        EXPLAINED,
        "| engine | version | mean KL | largest gap | same choice | agrees |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_line(check) for check in verification.checks]
    return head + "\n".join(lines) + "\n"


def _line(check: Check) -> str:
    if check.install is not None:
        return f"| {check.engine} | not installed | | | | not tried |"
    if check.refused is not None:
        return f"| {check.engine} | | | | | does not load such: {_plain(check.refused)} |"
    if check.kl is None or check.gap is None or check.same is None:
        return f"| {check.engine} | {_plain(check.version)} | | | | no: {_plain(check.error or '')} |"
    verdict = "yes" if check.agrees else "no"
    if check.twin_kl is not None and check.twin_gap is not None:
        verdict += f" (float32 twin: KL {max(check.twin_kl, 0.0):.1g}, gap {check.twin_gap:.3f})"
    if check.tokens_differ:
        verdict += f", its tokenizer differs on {len(check.tokens_differ)} texts"
    # a divergence is not negative, but its sum in floating point can be
    kl = max(check.kl, 0.0)
    figures = f"{kl:.2g} | {check.gap:.3f} | {100 * check.same:.1f} %"
    return f"| {check.engine} | {_plain(check.version)} | {figures} | {verdict} |"


def _plain(text: Any) -> str:
    """Text of unknown origin as one line of Markdown that can't break a table or begin a tag."""
    line = " ".join(str(text).split())
    return re.sub(r"([|<>`\\])", r"\\\1", line)
