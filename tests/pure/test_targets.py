"""Targets of a compressed-tensors config: which scheme a module has, and patterns that would take a reader's memory."""

from __future__ import annotations

import time
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit.checkpoint import _schemes
from fewbit.checkpoint._schemes import Schemes
from fewbit.errors import FewbitError
from fewbit.source import open_source
from tests.pure.test_foreign_folders import LINEAR, Made, ct_parts, ct_said, foreign_folder, make


def schemes(*targets: str) -> Schemes:
    weights = {"type": "int", "num_bits": 4, "strategy": "channel", "symmetric": True}
    return Schemes({"config_groups": {"a": {"targets": list(targets), "weights": weights}}})


def test_patterns_match_from_the_beginning_and_take_no_long_time() -> None:
    found = schemes(r"re:model\.layers\.\d+\.mlp\.(gate|up)_proj$", "re:mlp")
    assert found.find("model.layers.3.mlp.up_proj.weight") is not None
    assert found.find("model.layers.3.mlp.down_proj.weight") is None
    start = time.process_time()
    slow = schemes("re:(?:a|aa|aaa)+$")
    with pytest.raises(FewbitError, match="pattern"):
        slow.find("a" * 200 + "b")
    assert time.process_time() - start < 10


def test_all_matches_of_a_folder_share_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_schemes, "PATTERN_SECONDS", 0.5)
    # about 0.1 s each: 200 names would take 20 s with a deadline of their own
    found = schemes("re:(?:a|aa)+$")
    start = time.monotonic()
    with pytest.raises(FewbitError, match="pattern"):
        [found.find("a" * 24 + "b") for _ in range(200)]
    assert time.monotonic() - start < 5
    found = schemes("re:(?:a|aa)+$")
    # one alone is not too much
    assert found.find("a" * 24 + "b") is None


def nested(repeat: str, depth: int) -> str:
    return "(?:" * depth + "a" + f"){repeat}" * depth


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(?:(?:(?:(?:(?:ab?){99}){99}){99}){99}){99}", "repeats too often"),
        (nested("{1,99}", 40), "repeats too often"),
        (nested("{2}", 30), "repeats too often"),
        (nested("{3,}", 20), "repeats too often"),
        (nested("+", 100), "repeats too often"),
        (nested("++", 40), "repeats too often"),
        ("(?:a{50}b{50}c?){50}", "repeats too often"),
        ("a{99999999999999999999}", "repeats too often"),
        ("[(]{5000}", "repeats too often"),
        (r"\({5000}", "repeats too often"),
        ("a" * 513, "has 513 characters"),
        # 40 groups that end after 512 characters
        ("a" * 505 + nested("{1,99}", 40), "characters"),
        # blanks and comments that would hide what a repeat belongs to, recursion, and repeats of other kinds
        ("(?x)(?:(?:a{30}) {30}) {30}", "never need"),
        ("(?:(?:a{30})(?#){30})(?#){30}", "never need"),
        ("(?:a(?R)?)", "never need"),
        ("(?:a){e<=99}", "never need"),
        ("(?V1)[[a]--[b]]", "never need"),
        ("a)", "never need"),
        ("((a)", "never need"),
    ],
)
def test_patterns_that_grow_are_refused_before_they_are_compiled(
    monkeypatch: pytest.MonkeyPatch, pattern: str, words: str
) -> None:
    # compiled, some of them take gigabytes: no test waits for that
    monkeypatch.setattr(_schemes.regex, "compile", lambda *_: pytest.fail("it was compiled"))
    with pytest.raises(FewbitError, match=words) as caught:
        schemes(f"re:{pattern}")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("pattern", "steps"),
    [
        ("", 0), ("abc", 3), (r"a\.b", 3), ("[]abc]x", 2), (r"[^]\]{9}]{3}", 3), ("a?b*", 2), ("ab+", 3), ("a{3}", 3),
        ("a{2,5}?", 5), ("a{2,}", 3), ("a{,7}", 7), ("a{0}", 1), ("(ab){3}c", 10), ("(?:(?:ab){2}c){3}", 24),
        (r".*layers\.(?:1|2|3)\.mlp\.(?:gate|up)_proj$", 33), ("(?!x)(?P<n>y)(?<=z)(?i:w)", 8), ("(?i)a", 1),
    ],
)  # fmt: skip
def test_the_size_of_a_pattern_by_hand(pattern: str, steps: int) -> None:
    assert _schemes._steps(pattern) == steps


def test_every_pattern_is_compiled_once_and_they_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, real = [], _schemes.regex.compile
    monkeypatch.setattr(_schemes.regex, "compile", lambda source: compiled.append(source) or real(source))
    found = schemes("re:a", "re:b", "re:a", "Linear", *[f"m.{i}" for i in range(5000)])
    for i in range(100):
        found.find(f"b.{i}.weight")
    assert compiled == ["a", "b"]
    with pytest.raises(FewbitError, match="64 patterns"):
        schemes(*[f"re:{i}" for i in range(65)])


def test_a_pattern_that_runs_out_of_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(_schemes.regex, "compile", fails)
    with pytest.raises(FewbitError, match="MemoryError"):
        schemes("re:a")
    monkeypatch.setattr(_schemes.regex, "compile", lambda _: SimpleNamespace(match=fails))
    with pytest.raises(FewbitError, match="MemoryError"):
        schemes("re:a").find("a")


def group(bits: int, *targets: str, **more: Any) -> dict[str, Any]:
    weights = {"type": "int", "num_bits": bits, "strategy": "channel", "symmetric": True}
    return {"targets": list(targets), "weights": weights | more}


DOWN, UP = "model.layers.3.mlp.down_proj", "model.layers.3.mlp.up_proj"


@pytest.mark.parametrize(
    ("targets", "bits"),
    [
        # bits of a group -> its targets, in the order of the file; which of them the matrix of 3.mlp.down_proj has
        ({4: ["Linear"], 8: ["re:.*down_proj"]}, 8),
        ({8: ["re:.*down_proj"], 4: ["Linear"]}, 8),
        ({4: ["Linear"], 8: ["re:.*up_proj"]}, 4),
        ({4: ["re:.*proj"], 8: [DOWN]}, 8),
        ({8: [DOWN], 4: ["re:.*proj"], 2: ["Linear"]}, 8),
        ({4: ["re:.*proj"], 8: [UP]}, 4),
        ({4: ["re:model.*"], 8: ["re:.*down_proj"]}, 8),
        ({4: ["Linear"], 8: ["Linear"]}, 8),
        ({4: ["Embedding"]}, None),
        ({4: ["mlp.down_proj", "re:down_proj"]}, None),
        ({}, None),
    ],
)
def test_a_name_goes_before_a_pattern_and_a_pattern_before_a_class(
    targets: dict[int, list[str]], bits: int | None
) -> None:
    said = {str(i): group(bits, *names) for i, (bits, names) in enumerate(targets.items())}
    found = Schemes({"config_groups": said}).find(f"{DOWN}.weight")
    assert (found and found.spec) == (None if bits is None else f"int{bits}")


def test_the_order_is_that_of_the_library() -> None:
    """The same random groups, resolved by compressed-tensors itself."""
    match = pytest.importorskip("compressed_tensors.utils.match")
    random = Random(1)
    model = torch.nn.ModuleDict({"down": torch.nn.Linear(1, 1), "up": torch.nn.Linear(1, 1)})
    model["embed_tokens"] = torch.nn.Embedding(1, 1)
    choices = ["Linear", "Embedding", "down", "up", "re:.*", "re:d", "re:.*own$", "re:up", "re:.*e", "other", "re:wn"]
    seen = set()
    for _ in range(300):
        groups = {bits: random.sample(choices, random.randint(1, 4)) for bits in random.sample(range(2, 9), 3)}
        said = {str(bits): group(bits, *targets) for bits, targets in groups.items()}
        ours = Schemes({"config_groups": said})
        by_target = {target: bits for bits, targets in groups.items() for target in targets}
        for name, module in model.items():
            theirs = next(iter(match.match_targets(name, module, by_target)), None)
            found = ours.find(f"{name}.weight")
            assert (found and found.spec) == (theirs and f"int{by_target[theirs]}"), (groups, name)
            seen.add((name, theirs))
    assert len(seen) > 12


@pytest.mark.parametrize("bits", range(2, 9))
def test_schemes_of_2_to_8_bits_are_known(bits: int) -> None:
    said = {"config_groups": {"a": group(bits, "Linear", strategy="group", group_size=32, symmetric=False)}}
    found = Schemes(said).find("x.weight")
    assert found is not None
    assert found.spec == f"int{bits}g32a"


@pytest.mark.parametrize(
    "odd",
    [
        {"num_bits": 1}, {"num_bits": 9}, {"num_bits": 4.0}, {"num_bits": True}, {"num_bits": None}, {"type": "float"},
        {"strategy": "block"}, {"strategy": "tensor_group", "group_size": 16}, {"strategy": "group"},
        {"strategy": "group", "group_size": -1}, {"group_size": 32},
    ],
)  # fmt: skip
def test_a_scheme_that_is_not_known_is_not_no_scheme(odd: dict[str, Any]) -> None:
    found = Schemes({"config_groups": {"a": group(4, "Linear", **odd)}}).find("x.weight")
    assert found is not None
    assert found.spec is None
    assert all(f"{key} {value!r}" in found.said for key, value in odd.items())


MEANT = {
    "transforms": ({"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, "transform_config is set"),
    "cache": ({"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "kv_cache_scheme is set"),
    "inputs": ({"config_groups": {"g": {"input_activations": {"num_bits": 8}}}}, "input_activations of g is set"),
    "outputs": ({"config_groups": {"g": {"output_activations": {}}}}, "output_activations of g is set"),
}


@pytest.mark.parametrize(("said", "words"), MEANT.values(), ids=MEANT.keys())
def test_a_folder_that_means_more_than_its_codes_is_refused(said: dict[str, Any], words: str) -> None:
    with pytest.raises(FewbitError, match="can't read") as caught:
        Schemes({"quant_method": "compressed-tensors"} | said)
    assert words in caught.value.facts
    # fewbit's own folders never say so
    Schemes({"quant_method": "fewbit"} | said)


@pytest.mark.parametrize(
    "said", [{"transform_config": {}}, {"transform_config": {"config_groups": {}}}, {"transform_config": None}]
)
def test_nothing_said_is_nothing_meant(said: dict[str, Any]) -> None:
    group_0 = group(4, "Linear") | {"input_activations": None, "output_activations": None}
    settings = {"quant_method": "compressed-tensors", "kv_cache_scheme": None, "config_groups": {"g": group_0}} | said
    assert Schemes(settings).find("x.weight") is not None


def test_a_mixed_folder_is_resolved_by_name_then_pattern_then_class(tmp_path: Path) -> None:
    sizes = iter([(4, 32)] * 6 + [(8, 16)])

    def mixed(m: Made, bits: int) -> dict[str, Tensor]:
        bits, group = next(sizes)
        found = make(m.codes.shape[1], m.codes.shape[0], bits, group, True)
        m.weight = found.weight
        return ct_parts(found, bits)

    said = ct_said(4, True, 32, None)
    other = ct_said(8, True, 16, None)["config_groups"]["group_0"] | {"targets": ["re:.*down_proj$"]}
    said["config_groups"]["group_1"] = other
    folder = foreign_folder(tmp_path / "m", said, mixed)
    source = open_source(folder.path)
    found = {w.name: source.spec(w.name) for w in source.weights if "_proj" in w.name}
    assert found.pop(f"{LINEAR}.weight") == "int8g16"
    assert set(found.values()) == {"int4g32"}
    for name in [*found, f"{LINEAR}.weight"]:
        assert torch.equal(folder.read(name), folder.weights[name]), name
