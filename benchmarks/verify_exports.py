"""Every export of a model in the engine it is for: it loads, and predicts what fewbit does.

    python benchmarks/verify_exports.py MODEL [--python VENV/bin/python ...] [--only gguf gptq ...] [--work DIR]

MODEL is an alias or a path, best in full precision. Exported are GGUF files of every type, and folders of
compressed-tensors, GPTQ and AWQ of one rounded to nearest, each verified in every engine found. `make verify`
makes the environments. The marks: no engine that is there disagrees, and each layout was run by one at least.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from _marks import Mark, finish

import fewbit
from fewbit.verification import Check, Verification, verify

TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q4_k", "q5_1", "q5_0", "q4_1", "q4_0")
FOLDERS = (
    ("compressed-tensors", "int4g64"), ("compressed-tensors", "int4g64a"), ("gptq", "int4g64"), ("awq", "int4g64a"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--python", action="append", default=[])
    parser.add_argument("--only", nargs="*", default=["gguf", "compressed-tensors", "gptq", "awq"])
    parser.add_argument("--types", nargs="*", default=TYPES)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    ran: dict[str, int] = dict.fromkeys(args.only, 0)
    failed = 0
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        jobs = [("gguf", name) for name in args.types] + list(FOLDERS)
        for to, kind in jobs:
            if to not in args.only:
                continue
            out = Path(work) / f"{to}-{kind}{'.gguf' if to == 'gguf' else ''}"
            summary = _export(args.model, out, to, kind, Path(work))
            found = verify(out, to, args.python)
            _tell(to, kind, summary.weight_bytes, found)
            ran[to] += sum(c.ran for c in found.checks)
            failed += len(found.failed)
    marks = [Mark("engines that disagree or fail", failed, 0)]
    marks += [Mark(f"{to}: layouts that no engine ran", float(not count), 0) for to, count in ran.items()]
    finish("verify-exports", marks, {"model": args.model})


def _export(model: str, out: Path, to: str, kind: str, work: Path) -> fewbit.exports.Summary:
    if to == "gguf":
        return fewbit.export(model, out, to=to, type=kind)
    quantized = work / kind
    if not quantized.exists():
        fewbit.quantize(model, quantized, format=kind, head="16bit", method="rtn")
    return fewbit.export(quantized, out, to=to)


def _tell(to: str, kind: str, size: int, found: Verification) -> None:
    for check in found.checks:
        print(f"{to:<19}{kind:<10}{size / 1e6:>7.1f} MB  {_line(check)}", flush=True)


def _line(check: Check) -> str:
    if check.kl is None or check.gap is None or check.same is None:
        return f"{check.engine}: {check.install or check.refused or check.error}"
    twin = "" if check.twin_kl is None else f"  float32 twin: KL {max(check.twin_kl, 0):.0e} gap {check.twin_gap:.3f}"
    verdict = "agrees" if check.agrees else "DISAGREES"
    kl = f"{max(check.kl, 0):.1e}"
    name = f"{check.engine} {check.version}"
    return f"{name:<20} KL {kl}  gap {check.gap:.3f}  same {100 * check.same:.1f} %{twin}  {verdict}"


if __name__ == "__main__":
    main()
