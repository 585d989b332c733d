"""What engines take of each layout, so that what they would refuse is refused before anything is written.

Facts of vLLM 0.32 (`compressed_tensors_wNa16.py`, `auto_gptq.py`, `auto_awq.py`, `marlin_utils.py`; its kernels fuse q,
k and v, and gate and up), transformers 5.23 with compressed-tensors 0.20, and GPTQModel 7.7, through which transformers
reads GPTQ and AWQ. SGLang reads these layouts with vLLM's kernels, and is held to the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from fewbit.checkpoint._writer import Planned
from fewbit.errors import FewbitError
from fewbit.formats.integer import IntegerFormat

ENGINES = ("vllm", "transformers")
# linears that an engine multiplies as one
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
FAST_GROUPS = (None, 128, 64, 32)


@dataclass(frozen=True)
class Limits:
    """What an engine takes of a layout.

    bits, asymmetric   widths with the middle code as zero, and with zero points
    groups             columns that may share a scale (None: the whole row); empty: any
    fused              linears that are multiplied as one must have one format
    multiple           of which inputs and outputs must be multiples
    mixed              linears may differ in their format
    """

    engine: str
    bits: tuple[int, ...]
    asymmetric: tuple[int, ...] = ()
    groups: tuple[int | None, ...] = ()
    fused: bool = False
    multiple: tuple[int, int] = (1, 1)
    mixed: bool = True


VLLM, GPTQMODEL = "vLLM 0.32", "transformers with GPTQModel 7.7"
LIMITS: Mapping[tuple[str, str], Limits] = {
    ("compressed-tensors", "vllm"): Limits(VLLM, (4, 8), (4,), FAST_GROUPS, fused=True, multiple=(32, 32)),
    ("compressed-tensors", "transformers"): Limits("transformers 5.23", (4, 8)),
    ("gptq", "vllm"): Limits(VLLM, (4, 8), (), FAST_GROUPS, fused=True, multiple=(32, 32), mixed=False),
    ("gptq", "transformers"): Limits(GPTQMODEL, (2, 3, 4, 8), (2, 3, 4, 8), multiple=(32, 32), mixed=False),
    # a symmetric matrix has the zero point 8 everywhere
    ("awq", "vllm"): Limits(VLLM, (4,), (4,), FAST_GROUPS, fused=True, multiple=(32, 32), mixed=False),
    ("awq", "transformers"): Limits(GPTQMODEL, (4,), (4,), multiple=(32, 32), mixed=False),
}


def check(layout: str, engine: str, linears: Sequence[Planned]) -> None:
    """FewbitError where `engine` would refuse these quantized linears, with the nearest format that works."""
    limits = LIMITS[layout, engine]
    wrong = _wrong(limits, linears)
    if wrong is None:
        return
    facts, fmt = wrong
    nearest = _nearest(limits, fmt, [t.shape for t in linears])
    way = f"quantize the full-precision model with --format {nearest}" if nearest else "export to GGUF"
    steps = [f"The nearest that works: {way}"]
    others = [e for e in ENGINES if e != engine and not _wrong(LIMITS[layout, e], linears)]
    if others:
        steps.append(f"for {LIMITS[layout, others[0]].engine} alone, --for {others[0]}")
    raise FewbitError(f"{limits.engine} would not load this {layout} folder.", f"{facts}.", f"{'; '.join(steps)}.")


def refusal(layout: str, engine: str, linears: Sequence[Planned]) -> str | None:
    """Why `engine` would not load these linears, in words; None where it does."""
    wrong = _wrong(LIMITS[layout, engine], linears)
    return None if wrong is None else wrong[0]


def _wrong(limits: Limits, linears: Sequence[Planned]) -> tuple[str, object] | None:
    """What an engine refuses of these linears, and the format it refuses; None where it loads them."""
    for t in linears:
        if reason := _reason(limits, t.format, t.shape):
            return f"{t.name} is {t.spec}: {reason}", t.format
    specs = sorted({t.spec for t in linears})
    if len(specs) > 1 and not limits.mixed:
        return f"The linears have {len(specs)} formats ({', '.join(specs)}), and such folders say one", linears[
            0
        ].format
    if limits.fused and (unequal := _unequal(linears)):
        first, other = unequal
        facts = f"{first.name} is {first.spec} and {other.name} is {other.spec}; the engine multiplies them as one"
        return facts, first.format
    return None


def _reason(limits: Limits, fmt: object, shape: tuple[int, ...]) -> str | None:
    """Why the engine refuses a matrix; None where it does not."""
    if not isinstance(fmt, IntegerFormat):
        return "no format of integers"
    widths = limits.asymmetric if fmt.asymmetric else limits.bits
    if fmt.bits not in widths:
        if not widths:
            return "zero points are not supported"
        kind = "with zero points" if fmt.asymmetric else "without zero points"
        return f"{fmt.bits} bits {kind} are not supported, {', '.join(map(str, widths))} are"
    if limits.groups and fmt.group not in limits.groups:
        groups = ", ".join(str(g) for g in limits.groups if g)
        return f"groups of {fmt.group} are not supported, {groups} and whole rows are"
    rows, columns = shape
    if fmt.group and columns % fmt.group:
        return f"groups of {fmt.group} do not divide its {columns:,} inputs"
    for count, multiple, what in ((columns, limits.multiple[0], "inputs"), (rows, limits.multiple[1], "outputs")):
        if count % multiple:
            return f"its {count:,} {what} are no multiple of {multiple}"
    return None


def _nearest(limits: Limits, fmt: object, shapes: Sequence[tuple[int, ...]]) -> str | None:
    """The format closest to `fmt` that the engine takes for matrices of all these shapes."""
    wanted = fmt if isinstance(fmt, IntegerFormat) else IntegerFormat(4, 64)
    # more bits rather than fewer; the same kind of zero point; the next smaller group
    bits = sorted(set(limits.bits + limits.asymmetric), key=lambda b: (b < wanted.bits, abs(b - wanted.bits)))
    width = min(columns for _, columns in shapes)
    groups = sorted(limits.groups or (wanted.group, *FAST_GROUPS, 16), key=lambda g: _away(g, wanted.group, width))
    for b, asymmetric, group in product(bits, (wanted.asymmetric, not wanted.asymmetric), groups):
        found = IntegerFormat(b, group, asymmetric)
        if not any(_reason(limits, found, shape) for shape in shapes):
            return found.spec
    return None


def _away(group: int | None, wanted: int | None, width: int) -> tuple[bool, int]:
    """How far a group's size lies from the wanted one: larger ones come after all that are smaller."""
    size, goal = group or width, wanted or width
    return size > goal, abs(size - goal)


def _unequal(linears: Sequence[Planned]) -> tuple[Planned, Planned] | None:
    """Two linears of different formats that are multiplied as one; None where there are none."""
    by_name = {t.name: t for t in linears}
    for t in linears:
        module, _, layer = t.name.removesuffix(".weight").rpartition(".")
        for family in FUSED:
            if layer in family:
                for other in family:
                    found = by_name.get(f"{module}.{other}.weight")
                    if found is not None and found.spec != t.spec:
                        return t, found
    return None
