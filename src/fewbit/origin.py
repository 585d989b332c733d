"""How a model says it was quantized: method, format and bits in its own words, whoever wrote it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fewbit.checkpoint._foreign import read_settings
from fewbit.config_values import shown
from fewbit.source import Source

# general.file_type of a GGUF file (llama_ftype in llama.h)
GGUF_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4",
}  # fmt: skip
# settings that say how codes lie, under the name they are shown by
DETAILS = {
    "group_size": "group", "q_group_size": "group", "desc_act": "act-order", "sym": "symmetric",
    "symmetric": "symmetric", "zero_point": "zero point", "strategy": "strategy", "actorder": "act-order",
}  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """Method, format and bits as the model's own files give them; "-" for what they do not say."""

    method: str
    format: str
    bits: str

    def to_dict(self) -> dict[str, str]:
        """Plain values for JSON."""
        return asdict(self)


def origin(source: Source) -> Origin:
    """What an opened model says of itself. Nothing is checked against the tensors: `describe` counts those."""
    if source.checkpoint.naming == "gguf":
        return _of_gguf(source.checkpoint.config)
    settings = read_settings(source.path)
    facts = source.checkpoint.facts()
    if "method" in facts:
        return Origin(f"fewbit {_text(facts['method'])}", _text(facts.get("format", "-")), of_settings(settings).bits)
    if not settings:
        kinds = sorted({source.spec(w.name) for w in source.weights if len(w.shape) > 1})
        return Origin("none", ", ".join(kinds), "-")
    return of_settings(settings)


def of_settings(settings: dict[str, Any]) -> Origin:
    """What a `quantization_config` says, of GPTQ, AWQ, AutoRound, compressed-tensors or any other tool."""
    method = _text(settings.get("quant_method", "-"))
    groups = settings.get("config_groups")
    if isinstance(groups, dict):
        return _of_groups(method, settings, groups)
    layout = settings.get("checkpoint_format") or settings.get("packing_format") or settings.get("version")
    said = [] if layout is None else [_text(layout)]
    return Origin(method, ", ".join(said + _details(settings)) or "-", _bits(settings))


def _of_gguf(metadata: dict[str, Any]) -> Origin:
    kind = metadata.get("general.file_type")
    named = GGUF_TYPES.get(kind, f"file type {shown(kind)}") if isinstance(kind, int) else "-"
    importance = "quantize.imatrix.file" in metadata or "quantize.imatrix.dataset" in metadata
    return Origin("gguf, importance matrix" if importance else "gguf", named, "-")


def _of_groups(method: str, settings: dict[str, Any], groups: dict[str, Any]) -> Origin:
    """compressed-tensors: one scheme a group of layers."""
    weights = [g["weights"] for g in groups.values() if isinstance(g, dict) and isinstance(g.get("weights"), dict)]
    schemes = dict.fromkeys(", ".join(_details(w)) for w in weights)
    named = "; ".join(s for s in [_text(settings.get("format", "-")), *schemes] if s)
    bits = ", ".join(dict.fromkeys(_bits(w) for w in weights))
    return Origin(method, named, bits or "-")


def _details(settings: dict[str, Any]) -> list[str]:
    found = {}
    for key, name in DETAILS.items():
        if isinstance(settings.get(key), bool | int | str):
            found[name] = _text(settings[key])
    return [f"{name} {value}" for name, value in found.items()]


def _bits(settings: dict[str, Any]) -> str:
    found = next((settings[key] for key in ("bits", "num_bits", "w_bit") if key in settings), None)
    return _text(found) if isinstance(found, int | str) else "-"


def _text(value: Any) -> str:
    """A value of a file of unknown origin, as text of at most a line; text stays without quotes."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value[:80] if isinstance(value, str) else shown(value)
