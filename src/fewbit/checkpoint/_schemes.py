"""Which packed integer format a compressed-tensors config gives a module: its groups, their targets and their schemes.

A group's targets are module names, patterns (`re:…`, matched from the beginning) and class names. Across all groups a
name goes before a pattern and a pattern before a class; of several patterns that match, the first in alphabetical
order counts, and of several groups with one target the last, as in compressed-tensors 0.20.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

import regex

from fewbit.checkpoint._foreign import unreadable
from fewbit.config_values import shown
from fewbit.errors import FewbitError

MAX_GROUPS = 64
# patterns are compiled, and matched against every packed tensor's name; module names are only looked up
MAX_PATTERNS, MAX_NAMES = 64, 100_000
MAX_PATTERN = 512
# what a pattern may unroll to: a compiler writes a repeated part as often as it must match, and nesting multiplies
MAX_STEPS = 2000
# for all matches of a folder together
PATTERN_SECONDS = 5.0

# a pattern cut into what its size depends on; what may follow `(?` leaves no way to comment, to recurse, or to let
# blanks stand before a repeat
_TOKEN = re.compile(
    r"(?P<atom>\\.|\[\^?\]?(?:\\.|[^\]\\])*\])"
    r"|(?P<open>\((?:\?(?:[:=!]|<[=!]|P<\w+>|i:))?(?!\?))"
    r"|(?P<flag>\(\?i\))"
    r"|(?P<close>\))"
    r"|(?P<repeat>[*+?]|\{(?P<least>\d*)(?P<range>,(?P<most>\d*))?\})"
    r"|(?P<plain>[^(){}\[\]\\])",
    re.DOTALL,
)


@dataclass(frozen=True)
class Scheme:
    """What a group says of its weights: `spec`, None where fewbit does not know the scheme; `said` is for errors.

    bits and block (rows and columns that share a scale) are for matrices that lie as whole 8-bit numbers.
    """

    spec: str | None
    said: str
    bits: int = 8
    block: tuple[int, int] | None = None


class Schemes:
    """The schemes of a config's groups, found by module name.

    Raises FewbitError where config_groups is broken, has patterns too large to be compiled safely, or where the folder
    means something else than its codes say (what it does to activations, to the cache, or by transforms).
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        if settings.get("quant_method") == "compressed-tensors":
            _check_meaning(settings)
        self._by_target: dict[str, Scheme] = {}
        for label, group in _groups(settings).items():
            targets, scheme = _group(label, group)
            self._by_target |= dict.fromkeys(targets, scheme)
        patterns = sorted(t for t in self._by_target if t.startswith("re:"))
        if len(patterns) > MAX_PATTERNS or len(self._by_target) > MAX_NAMES:
            wanted = f"at most {MAX_PATTERNS} patterns and {MAX_NAMES:,} names"
            raise _odd_group("targets", patterns or list(self._by_target), wanted)
        self._patterns = [(target, _compiled(target)) for target in patterns]
        self._left = PATTERN_SECONDS

    def find(self, name: str) -> Scheme | None:
        """The scheme of the matrix `name`; None where no group is for it."""
        module = name.removesuffix(".weight")
        if not module.startswith("re:") and module in self._by_target:
            return self._by_target[module]
        # no class is written beside a matrix
        kind = "Embedding" if "embed" in module.rpartition(".")[2] else "Linear"
        return self._by_pattern(module) or self._by_target.get(kind)

    def _by_pattern(self, module: str) -> Scheme | None:
        if len(module) > MAX_PATTERN:
            return None
        for target, pattern in self._patterns:
            start = time.monotonic()
            try:
                if self._left <= 0:
                    raise TimeoutError("matching it took too long")
                found = pattern.match(module, timeout=self._left)
            except (TimeoutError, RecursionError, MemoryError) as error:
                raise _bad_pattern(target, str(error) or type(error).__name__) from error
            self._left -= time.monotonic() - start
            if found is not None:
                return self._by_target[target]
        return None


def _check_meaning(settings: dict[str, Any]) -> None:
    """What would make the model another one than codes, zero points and scales say."""
    transforms = settings.get("transform_config")
    if transforms and transforms != {"config_groups": {}}:
        raise unreadable(f"transform_config is set: {shown(transforms)}")
    if settings.get("kv_cache_scheme") is not None:
        raise unreadable(f"kv_cache_scheme is set: {shown(settings['kv_cache_scheme'])}")
    for label, group in _groups(settings).items():
        for key in ("input_activations", "output_activations"):
            if isinstance(group, dict) and group.get(key) is not None and not _eight_bits(group, key):
                raise unreadable(f"{key} of {label[:80]} is set: {shown(group[key])}")


def _eight_bits(group: dict[str, Any], key: str) -> bool:
    """Whether a group's inputs are rounded to 8 bits as its weights are: for speed, and the weights mean the same."""
    sides = [group.get("weights"), group.get(key)]
    return key == "input_activations" and all(isinstance(s, dict) and s.get("num_bits") == 8 for s in sides)


def _groups(settings: dict[str, Any]) -> dict[str, Any]:
    found = settings.get("config_groups")
    if found is None:
        return {}
    if not isinstance(found, dict) or len(found) > MAX_GROUPS:
        raise _odd_group("config_groups", found, f"an object of at most {MAX_GROUPS} groups")
    return found


def _group(label: str, group: Any) -> tuple[list[str], Scheme]:
    """Targets and scheme of a group, checked; FewbitError names what is odd about it."""
    if not isinstance(group, dict):
        raise _odd_group(label, group, "an object")
    targets, weights = group.get("targets") or [], group.get("weights") or {}
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise _odd_group(f"{label}.targets", targets, "a list of names")
    if not isinstance(weights, dict):
        raise _odd_group(f"{label}.weights", weights, "an object")
    keys = ("type", "num_bits", "strategy", "group_size")
    said = ", ".join(f"{key} {shown(weights.get(key))}" for key in keys)
    bits = weights.get("num_bits")
    bits = bits if isinstance(bits, int) and 2 <= bits <= 8 else 8
    return targets, Scheme(_spec(weights), f"{label[:80]} says {said}", bits, _block(label, weights))


def _block(label: str, weights: dict[str, Any]) -> tuple[int, int] | None:
    """`block_structure`: a list of two, or a word such as 128x128."""
    found = weights.get("block_structure")
    if found is None:
        return None
    if isinstance(found, str) and re.fullmatch(r"\d{1,6}x\d{1,6}", found):
        found = [int(n) for n in found.split("x")]
    if not isinstance(found, list) or len(found) != 2 or not all(isinstance(n, int) and 0 < n < 10**7 for n in found):
        raise _odd_group(f"{label}.block_structure", found, "rows and columns")
    return int(found[0]), int(found[1])


def _spec(w: dict[str, Any]) -> str | None:
    """The format of an integer scheme of 2 to 8 bits, for groups or channels; None for any other."""
    bits, size, strategy = w.get("num_bits"), w.get("group_size"), w.get("strategy")
    if w.get("type") != "int" or isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        return None
    ending = "" if w.get("symmetric") else "a"
    if strategy == "channel":
        return f"int{bits}{ending}" if size is None or size == -1 else None
    if strategy != "group" or isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 10**7:
        return None
    return f"int{bits}g{size}{ending}"


def _compiled(target: str) -> regex.Pattern[str]:
    source = target.removeprefix("re:")
    if len(source) > MAX_PATTERN:
        raise _bad_pattern(target, f"it has {len(source):,} characters; {MAX_PATTERN} are read")
    steps = _steps(source)
    if steps is None or steps > MAX_STEPS:
        raise _bad_pattern(target, "it has parts that targets never need" if steps is None else "it repeats too often")
    try:
        # not `re`: the pattern comes with the file, and some take exponential time
        return regex.compile(source)
    except (regex.error, RecursionError, MemoryError, OverflowError) as error:
        raise _bad_pattern(target, str(error) or type(error).__name__) from error


def _steps(pattern: str) -> int | None:
    """Single characters and classes in a pattern when every repeat is written out; None where it is not understood."""
    # sizes of the groups around this place, the innermost last, and of what stands just before
    totals, last, at = [0], 0, 0
    while at < len(pattern):
        token = _TOKEN.match(pattern, at)
        if token is None:
            return None
        at = token.end()
        if token["open"]:
            totals.append(0)
            last = 0
        elif token["close"]:
            if len(totals) == 1:
                return None
            last = totals.pop() + 1
            totals[-1] += last
        elif token["repeat"]:
            times = _times(token)
            totals[-1] += last * (times - 1)
            last *= times
        elif not token["flag"]:
            last = 1
            totals[-1] += last
    return totals[0] if len(totals) == 1 else None


def _times(token: re.Match[str]) -> int:
    """How often a repeat writes out what it repeats: as often as it may, or must and once more where it may forever."""
    if token["repeat"] in "*+?":
        return 2 if token["repeat"] == "+" else 1
    least = int(token["least"] or 0)
    if token["range"] is None:
        return max(least, 1)
    return max(int(token["most"]), least, 1) if token["most"] else least + 1


def _bad_pattern(target: str, reason: str) -> FewbitError:
    return FewbitError(
        "A pattern in config.json's quantization_config can't be read.",
        f"{shown(target)}: {reason}.",
        "Write the modules' names, or a plain pattern such as 're:.*self_attn.*', into targets.",
    )


def _odd_group(label: str, found: Any, wanted: str) -> FewbitError:
    return FewbitError(
        "The quantization_config of config.json is broken.",
        f"{label[:80]}: found {shown(found)} where {wanted} belongs.",
        "Download or copy config.json again.",
    )
