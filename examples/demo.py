"""The whole of fewbit in one run, by its Python API: quantize a real model, measure what was lost, ask it something.

Run by `make demo`. Writes out/demo/int8 and out/demo/int4g32 (a second run replaces them); exits with 1 where the
quantized model does not know the capital of France.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import fewbit
from fewbit import store
from fewbit.runtime.speed import measure_speed
from fewbit.source import Description, describe

SOURCE = "smollm2"
FORMATS = ("int8", "int4g32")
OUT = Path("out") / "demo"
TEXT = Path(__file__).with_name("text.txt")
QUESTION = "What is the capital of France?"
WINDOWS = 8


def say(text: str) -> None:
    """A line about what is being done, on standard error."""
    print(text, file=sys.stderr, flush=True)


def quantized(spec: str) -> str:
    """Quantize the source to `spec` into its own folder; returns the folder."""
    out = OUT / spec
    shutil.rmtree(out, ignore_errors=True)
    say(f"Quantizing to {spec} (round to nearest, searched scales) ...")
    # method="auto", the default, calibrates for some minutes and loses less
    summary = fewbit.quantize(SOURCE, out, format=spec, method="rtn")
    say(f"  {out}: {summary.weight_bytes / 1e6:.1f} MB in {summary.seconds:.1f} s")
    return str(out)


def row(name: str, *cells: str) -> str:
    """One line of the table."""
    return f"{name:<18}" + "".join(f"{cell:>11}" for cell in cells)


def sizes(found: Description, source: Description) -> list[str]:
    """What a model weighs, and against what."""
    return [
        f"{found.weight_bytes / 1e6:.1f}",
        f"{found.float16_bytes / found.weight_bytes:.2f}",
        f"{source.weight_bytes / found.weight_bytes:.2f}",
        f"{found.bits_per_weight:.2f}",
    ]


def print_table(models: list[str]) -> None:
    """Sizes, quality and speed of the source and of each quantized model."""
    say(f"Measuring quality against {SOURCE} in float32, {WINDOWS} windows of 512 tokens of {TEXT.name} ...")
    qualities = fewbit.evaluate(models, SOURCE, TEXT, windows=WINDOWS)
    say("Measuring speed ...")
    speeds = [measure_speed(model, prompt=64, new=48) for model in (SOURCE, *models)]
    source = describe(SOURCE)
    formats = " and ".join(spec.removeprefix("gguf:").upper() for spec in source.specs if spec.startswith("gguf:"))
    print()
    print(row("", "weights", "x smaller", "x smaller", "bits per", "mean KL", "top-1", "decode"))
    print(row("model", "MB", "than 16b", "than file", "weight", "nats", "%", "tokens/s"))
    print(row(SOURCE, *sizes(source, source), "-", "-", f"{speeds[0].decode_rate:.1f}"))
    for model, quality, speed in zip(models, qualities, speeds[1:], strict=True):
        measured = [f"{quality.mean_kl:.4f}", f"{100 * quality.top1:.1f}", f"{speed.decode_rate:.1f}"]
        print(row(model, *sizes(describe(model), source), *measured))
    print()
    print(f"{SOURCE} is a file of {formats}, quantized already: the reference is what that file says, and beside it")
    print("an int4 folder can hardly shrink. Against the same model in 16 bits it does.")
    print()


def answer(model: str) -> str:
    """Ask the question, show the answer as it comes, return it."""
    print(f"{model} is asked: {QUESTION}")
    pieces = []
    for piece in fewbit.load(model).chat(QUESTION, max_tokens=64):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)


def main() -> int:
    """The demo; 0 where the model still knows its capital."""
    store.locate(SOURCE, say)
    OUT.mkdir(parents=True, exist_ok=True)
    models = [quantized(spec) for spec in FORMATS]
    print_table(models)
    if "Paris" not in answer(models[-1]):
        say("The answer does not name Paris: quantization has broken the model.")
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except fewbit.FewbitError as error:
        say(f"error: {error}")
        sys.exit(1)
