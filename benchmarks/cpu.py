"""CPU kernels beside the machine's ceilings and the peers, in one run: writes the tables of docs/benchmarks.md.

    python benchmarks/cpu.py MODEL_FOLDER --llama-bench PATH --ik-bench PATH [--threads 2] [--rounds 5] [--scratch DIR]
    python benchmarks/cpu.py --products [--widths int4g64 ...]      single products only, about a minute
    python benchmarks/cpu.py --table                                measures nothing: writes tables, judges the marks

MODEL_FOLDER is the 135M model (bf16); beside it runs a random model of Llama-3.2-1B's shape. Everything is quantized by
rounding to nearest with int8 (peers: Q8_0) embedding and head. Rounds are interleaved: each engine and width once, with
the ceilings measured before every run of fewbit's; medians are shown. Both sides prefill 512 tokens and decode 64 from
an empty cache. The peers' files are made by the llama-quantize that lies beside a llama-bench. With --scratch, models
are kept there for the next run (some 15 GB). The figures of a run that was not whole are shown, but written nowhere.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _cpu_marks import IK, LLAMA, TYPES, WIDTHS, marks, tables
from _cpu_products import measure_products
from _llama_bench import Peer, quantized, quantizer_beside, write_gguf
from _marks import finish
from _random_model import write_random

import fewbit
from fewbit import kernels
from fewbit.kernels._ceilings import Ceilings
from fewbit.kernels.cpu import Cpu, backend
from fewbit.runtime.engine import LanguageModel
from fewbit.runtime.speed import multiply_adds, read_bytes, time_once

PROMPT, NEW = 512, 64
MEASURED = Path(__file__).parent / "measured" / "cpu.json"
DOCS = Path(__file__).parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- cpu: begin -->", "<!-- cpu: end -->"

# tokens/s and bytes of one round
Round = dict[str, float]


def made(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`, made where it is not there yet."""
    if not path.exists():
        print(f"making {path.name}", flush=True)
        make(path)
    return path


def quantized_folder(model: Path, out: Path, spec: str) -> Path:
    """fewbit's folder of one width."""
    options: dict[str, Any] = {"head": "int8", "method": "rtn", "scales": "minmax"}
    return made(out, lambda path: fewbit.quantize(model, path, format=spec, **options))


def peer_files(model: Path, scratch: Path, name: str, bits: set[int], quantizer: Path | None) -> dict[str, Path]:
    """The peers' files by type, of all types of so many bits; none without a quantizer."""
    if quantizer is None:
        return {}
    files = {kind: scratch / f"{name}-{kind}.gguf" for b in sorted(bits) for kind in TYPES[b]}
    if not all(f.exists() for f in files.values()):
        whole = made(scratch / f"{name}-bf16.gguf", lambda path: write_gguf(model, path))
        for kind, file in files.items():
            made(file, lambda path, kind=kind: quantized(quantizer, whole, kind, path))
        whole.unlink()
    return files


def fewbit_round(model: LanguageModel, ceilings: Ceilings) -> Round:
    """Ceilings, then a prompt, then decoding from an empty cache, as llama-bench does."""
    ceiling = ceilings.measure()
    prefill = PROMPT / time_once(model, PROMPT, 1)[0]
    decode = NEW / time_once(model, 1, NEW)[1]
    return {
        "prefill": prefill,
        "decode": decode,
        "bytes": read_bytes(model),
        "read_ceiling": ceiling.read_rate,
        "dot_ceiling": ceiling.dot_rate,
        "prefill_share": prefill * multiply_adds(model, PROMPT) / PROMPT / ceiling.dot_rate,
        "decode_share": decode * read_bytes(model) / ceiling.read_rate,
    }


def measure_model(
    models: dict[str, LanguageModel], files: dict[str, Path], peers: list[Peer], args: argparse.Namespace, cpu: Cpu
) -> dict[str, Any]:
    """Medians of everything on one model."""
    ceilings = Ceilings(cpu)
    runs: dict[str, Callable[[], Round]] = {}
    for spec, bits in WIDTHS.items():
        if spec not in models:
            continue
        runs[f"fewbit {spec}"] = lambda model=models[spec]: fewbit_round(model, ceilings)
        for kind in TYPES[bits]:
            for peer in peers:
                runs[f"{peer.name} {kind}"] = lambda p=peer, f=files[kind]: p.run(f, args.threads, PROMPT, NEW)
    rounds: dict[str, list[Round]] = {name: [] for name in runs}
    for i in range(args.rounds + 1):
        for name, run in runs.items():
            # llama-bench warms up by itself
            if i or name.startswith("fewbit"):
                found = run()
                if i:
                    rounds[name].append(found)
                print(f"{i}/{args.rounds} {name:20} {found['prefill']:8.1f} {found['decode']:8.1f}", flush=True)
    rows: dict[str, Any] = {
        name: {key: statistics.median(r[key] for r in found) for key in found[0]}
        | {"rounds": {key: [round(r[key], 2) for r in found] for key in ("prefill", "decode")}}
        for name, found in rounds.items()
    }
    ours = [row for row in rows.values() if "read_ceiling" in row]
    read = statistics.median(row["read_ceiling"] for row in ours)
    dots = statistics.median(row["dot_ceiling"] for row in ours)
    per_token = multiply_adds(next(iter(models.values())), PROMPT) / PROMPT
    for row in rows.values():
        row.setdefault("prefill_share", row["prefill"] * per_token / dots)
        row.setdefault("decode_share", row["decode"] * row["bytes"] / read)
    return {"ceilings": {"read": read, "dots": dots}, "rows": rows}


def measure_models(args: argparse.Namespace, cpu: Cpu, scratch: Path, results: dict[str, Any]) -> None:
    """Both models, one after the other; results are saved after each."""
    peers = [
        Peer(name, bench, tuple(options.split()))
        for name, bench, options in (
            (LLAMA, args.llama_bench, args.llama_options),
            (IK, args.ik_bench, args.ik_options),
        )
        if bench
    ]
    quantizer = quantizer_beside(args.llama_bench, args.ik_bench)
    for part in args.parts:
        model = args.model if part == "small" else made(scratch / "random-1b", write_random)
        folders = {spec: quantized_folder(model, scratch / f"{part}-{spec}", spec) for spec in args.widths}
        files = peer_files(model, scratch, part, {WIDTHS[w] for w in args.widths}, quantizer if peers else None)
        models = {spec: fewbit.load(folder, threads=args.threads, device="cpu") for spec, folder in folders.items()}
        results[part] = measure_model(models, files, peers, args, cpu)
        save(args, results)


def save(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Keep what a whole run has found so far."""
    if is_whole(args):
        MEASURED.write_text(json.dumps(results, indent=1) + "\n")


def is_whole(args: argparse.Namespace) -> bool:
    """Whether everything is measured that the documents show."""
    everything = set(args.parts) == {"small", "large"} and set(args.widths) == set(WIDTHS)
    return everything and not args.products and bool(args.llama_bench and args.ik_bench)


def machine(cpu: Cpu) -> str:
    """A sentence on where the figures come from."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = names[0] if names else platform.machine()
    return f"{model}, {cpu.threads} threads, {cpu.isa}; fewbit {fewbit.__version__}, torch {torch.__version__}."


def write_tables(results: dict[str, Any]) -> None:
    """Put the tables between their marks in the documents."""
    page = DOCS.read_text()
    before, _, rest = page.partition(BEGIN)
    DOCS.write_text(f"{before}{BEGIN}\n{tables(results)}\n{END}{rest.partition(END)[2]}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="folder of the 135M model in bf16")
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's llama-bench")
    parser.add_argument("--llama-options", default="", help="further options of its llama-bench")
    parser.add_argument("--ik-bench", type=Path, help="ik_llama.cpp's llama-bench")
    parser.add_argument("--ik-options", default="-rtr 1", help="its options (default: %(default)s, repacks at loading)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="where models are kept (default: a temporary folder)")
    parser.add_argument("--widths", nargs="*", choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--parts", nargs="*", choices=["small", "large"], default=["large", "small"])
    parser.add_argument("--products", action="store_true", help="single products only")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.table and not args.products:
        if "small" in args.parts and args.model is None:
            parser.error("the 135M model's folder is missing (or give --parts large, --products or --table)")
        if (args.llama_bench or args.ik_bench) and not quantizer_beside(args.llama_bench, args.ik_bench):
            parser.error("there is no llama-quantize beside the llama-bench given: build that target as well")
    return args


def main() -> None:
    args = parsed()
    torch.set_grad_enabled(False)
    if args.table:
        results = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
        write_tables(results)
        finish("cpu-marks", marks(results, True), results)
    cpu = backend()
    assert cpu, "fewbit._cpu is not built"
    kernels.set_threads(args.threads)
    results = {"machine": machine(cpu)}
    results["products"] = measure_products(cpu, Ceilings(cpu), args.widths, 2 * args.rounds + 1)
    save(args, results)
    if not args.products:
        scratch = args.scratch or Path(tempfile.mkdtemp())
        scratch.mkdir(parents=True, exist_ok=True)
        try:
            measure_models(args, cpu, scratch, results)
        finally:
            if args.scratch is None:
                shutil.rmtree(scratch)
    print(tables(results))
    if is_whole(args):
        write_tables(results)
    finish("cpu", marks(results, is_whole(args)), results)


if __name__ == "__main__":
    main()
