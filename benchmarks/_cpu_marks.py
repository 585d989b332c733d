"""What the CPU figures must hold, and the tables they are shown in. Plain functions of what benchmarks/cpu.py measured.

A part (`small`, `large`) is {"ceilings": {"read", "dots"}, "rows": {name: row}}, where a name is `fewbit int4g64`,
`llama.cpp Q4_0` or `ik_llama.cpp Q4_0` and a row has `prefill` and `decode` (tokens/s), `bytes` (read a token),
`prefill_share` and `decode_share`. The part `products` has rows[width][shape].
"""

from __future__ import annotations

import statistics
from typing import Any

from _marks import Mark

# fewbit's widths, and the types of a peer that hold as many bits
WIDTHS = {"int8": 8, "int6g64": 6, "int4g64": 4, "int4g32": 4, "int3g64": 3, "int2g64": 2}
TYPES = {8: ("Q8_0",), 6: ("Q6_K",), 4: ("Q4_0", "Q4_K"), 3: ("Q3_K",), 2: ("Q2_K",)}
LLAMA, IK = "llama.cpp", "ik_llama.cpp"
# bits -> least share of the read ceiling, least ratio to llama.cpp's decode
READ = {8: 0.85, 4: 0.85, 3: 0.75, 2: 0.65}
FASTER = {8: 1.05, 4: 1.05, 3: 1.3, 2: 1.3}
DOTS_LINEARS, DOTS_PREFILL = 0.55, 0.40
SPREAD = 1.12
LLAMA_PREFILL, IK_PREFILL = 2.0, 1.1
# M = 4 over M = 1
FOUR = {8: 1.4, 6: 1.4, 4: 1.4, 3: 1.4, 2: 1.8}
TITLES = {"large": "1.2B, random weights in Llama-3.2-1B's shape", "small": "135M, SmolLM2-135M-Instruct"}

Part = dict[str, Any]


def rounds(row: dict[str, Any], figure: str) -> list[float]:
    """The figure of every round, in order; the one there is where rounds were not kept."""
    kept = row.get("rounds")
    return kept[figure] if kept else [row[figure]]


def over(part: Part, row: dict[str, Any], engine: str, bits: int, figure: str, at_least: int) -> float | None:
    """A row's figure over that of the engine's fastest type at so many bits, among types of at least so many bytes: the
    median of the rounds' ratios, as both sides of a round meet the same machine. None where none was measured.
    """
    rows = [part["rows"].get(f"{engine} {kind}") for kind in TYPES[bits]]
    peers = [r for r in rows if r and r["bytes"] >= at_least]
    if not peers:
        return None
    peer = max(peers, key=lambda r: r[figure])
    return statistics.median(a / b for a, b in zip(rounds(row, figure), rounds(peer, figure), strict=True))


def model_marks(part: Part, small: bool) -> list[Mark]:
    """Marks of one model's figures; those against a peer that was not run are left out."""
    name = "135M" if small else "1.2B"
    found, ik, shares = [], [], []
    for spec, bits in WIDTHS.items():
        row = part["rows"].get(f"fewbit {spec}")
        if row is None:
            continue
        if not small:
            share = row["decode_share"]
            if bits in READ:
                found.append(Mark(f"{name} {spec}: decode, share of the read ceiling", share, READ[bits], True))
            share = row["prefill_share"]
            found.append(Mark(f"{name} {spec}: prefill, share of the dot ceiling", share, DOTS_PREFILL, True))
            shares.append(share)
            ik.append((spec, over(part, row, IK, bits, "prefill", 0)))
        ratio = over(part, row, LLAMA, bits, "decode", row["bytes"])
        if ratio and (small or bits in FASTER):
            bound = 1.0 if small else FASTER[bits]
            found.append(Mark(f"{name} {spec}: decode over {LLAMA}", ratio, bound, True))
        ratio = over(part, row, LLAMA, bits, "prefill", 0)
        if ratio and bits == 4 and not small:
            found.append(Mark(f"{name} {spec}: prefill over {LLAMA}", ratio, LLAMA_PREFILL, True))
    found += [Mark(f"{name} {s}: prefill over {IK}", ratio, IK_PREFILL, True) for s, ratio in ik if ratio]
    if len(shares) > 1:
        # of shares: each was held against the multiply-adds of its own moment
        found.append(Mark(f"{name}: prefill, fastest width over slowest", max(shares) / min(shares), SPREAD))
    return found


def product_marks(part: Part) -> list[Mark]:
    """Marks of single products: the worse of the shapes counts."""
    found, times = [], []
    for spec, shapes in part["rows"].items():
        four = max(s["four_over_one"] for s in shapes.values())
        found.append(Mark(f"products {spec}: M = 4 over M = 1", four, FOUR[WIDTHS[spec]]))
        share = min(s["dot_share"] for s in shapes.values())
        found.append(Mark(f"products {spec}: M = 512, share of the dot ceiling", share, DOTS_LINEARS, True))
        times.append(sum(s["microseconds"]["512"] for s in shapes.values()))
    if len(times) > 1:
        found.append(Mark("products: M = 512, slowest width over fastest", max(times) / min(times), SPREAD))
    return found


def expected() -> set[str]:
    """Names of all marks of a whole measurement, so that one that was not taken counts as missed."""
    row = {"prefill": 1.0, "decode": 1.0, "bytes": 1, "prefill_share": 1.0, "decode_share": 1.0}
    names = [f"fewbit {spec}" for spec in WIDTHS]
    names += [f"{engine} {kind}" for engine in (LLAMA, IK) for kinds in TYPES.values() for kind in kinds]
    part = {"rows": dict.fromkeys(names, row)}
    shape = {"s": {"four_over_one": 1.0, "dot_share": 1.0, "microseconds": {"512": 1.0}}}
    products = {"rows": dict.fromkeys(WIDTHS, shape)}
    return {m.name for m in (*model_marks(part, False), *model_marks(part, True), *product_marks(products))}


def marks(results: dict[str, Any], whole: bool) -> list[Mark]:
    """All marks of what was measured; of the whole, what is not there is a mark missed."""
    found = product_marks(results["products"]) if "products" in results else []
    for part in ("large", "small"):
        if part in results:
            found += model_marks(results[part], part == "small")
    missing = sorted(expected() - {m.name for m in found}) if whole else []
    return found + [Mark(f"{name} (not measured, or no peer of as many bytes)", 0, 1, True) for name in missing]


def tables(results: dict[str, Any]) -> str:
    """Everything that was measured, as Markdown."""
    lines = [f"{machine}\n" for machine in [results.get("machine")] if machine]
    for part, title in TITLES.items():
        if part in results:
            lines += [f"{title}. {_ceilings(results[part])}\n", _model_table(results[part]), ""]
    if "products" in results:
        what = "Products alone, microseconds of a matrix [out x in] times M tokens; the matrix comes from memory."
        lines += [f"{what} {_ceilings(results['products'])}\n", _product_table(results["products"]), ""]
    return "\n".join(lines).rstrip()


def _ceilings(part: Part) -> str:
    c = part["ceilings"]
    return f"Ceilings of this run: {c['read'] / 1e9:.1f} GB/s read, {c['dots'] / 1e9:.0f} G multiply-adds/s."


def _model_table(part: Part) -> str:
    heads = ["weights", "engine", "MB a token", "prefill, tokens/s", "of dots", "decode, tokens/s", "of reading"]
    lines = []
    for bits in TYPES:
        names = [f"fewbit {spec}" for spec, b in WIDTHS.items() if b == bits]
        names += [f"{engine} {kind}" for kind in TYPES[bits] for engine in (LLAMA, IK)]
        for name in names:
            if row := part["rows"].get(name):
                engine, _, weights = name.partition(" ")
                speeds = [f"{row['prefill']:.1f}", f"{100 * row['prefill_share']:.0f} %"]
                speeds += [f"{row['decode']:.1f}", f"{100 * row['decode_share']:.0f} %"]
                engine = f"**{engine}**" if engine == "fewbit" else engine
                lines.append([weights, engine, f"{row['bytes'] / 1e6:.0f}", *speeds])
    return _markdown([heads, *lines])


def _product_table(part: Part) -> str:
    tokens = list(next(iter(next(iter(part["rows"].values())).values()))["microseconds"])
    heads = [
        "weights",
        "matrix",
        *(f"M = {t}" for t in tokens),
        "of reading, M = 1",
        "of dots, M = 512",
        "M = 4 / M = 1",
    ]
    lines = []
    for spec, shapes in part["rows"].items():
        for shape, f in shapes.items():
            times = [f"{f['microseconds'][t]:.0f}" for t in tokens]
            shares = [f"{100 * f['read_share']:.0f} %", f"{100 * f['dot_share']:.0f} %", f"{f['four_over_one']:.2f}"]
            lines.append([spec, shape, *times, *shares])
    return _markdown([heads, *lines])


def _markdown(lines: list[list[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
