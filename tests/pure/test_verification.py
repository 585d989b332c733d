"""Do two engines agree? The rule, the programs that run engines, and the card that tells."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit import engines, model_card
from fewbit.engines import Engine
from fewbit.errors import FewbitError
from fewbit.exports import Summary
from fewbit.verification import Check, Verification, compare

GOOD = Check("x", "1.0", activation_bits=16, kl=0.002, gap=0.05, same=0.99, limit=0.01)


def test_divergence_gap_and_choices_by_hand() -> None:
    ours = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]]).log()
    theirs = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]]).log()
    kl, gap, same = compare(ours, theirs)
    assert kl == pytest.approx((0.5 * 0.6931472 - 0.25 * 0.6931472) / 3, abs=1e-6)
    assert gap == pytest.approx(0.6931472, abs=1e-6)
    assert same == pytest.approx(2 / 3)
    assert compare(ours, ours) == (0.0, 0.0, 1.0)


def test_a_token_that_only_one_engine_allows() -> None:
    ours = torch.tensor([[0.5, 0.5, 0.0]]).log()
    theirs = torch.tensor([[0.5, 0.25, 0.25]]).log()
    assert compare(ours, theirs)[0] == pytest.approx(0.5 * 0.6931472, abs=1e-6)
    assert compare(theirs, ours)[0] == float("inf")


@pytest.mark.parametrize(
    ("changes", "agrees"),
    [
        ({}, True),
        ({"kl": 0.011}, False),
        ({"gap": 0.11}, False),
        ({"kl": None}, False),
        ({"tokens_differ": ["x"]}, False),
        ({"kl": float("nan")}, False),
        ({"limit": 1e-4}, False),
        ({"gap": 0.3, "twin_kl": 1e-6, "twin_gap": 0.0}, True),
        ({"gap": 0.3, "twin_kl": 2e-4, "twin_gap": 0.0}, False),
        ({"gap": 0.3, "twin_kl": 1e-6, "twin_gap": 0.2}, False),
        ({"kl": 0.02, "twin_kl": 1e-6, "twin_gap": 0.0}, False),
    ],
)
def test_the_rule(changes: dict[str, Any], agrees: bool) -> None:
    assert replace(GOOD, **changes).agrees is agrees


def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> Engine:
    """An engine whose program is `program`."""
    file = tmp_path / "_run_json.py"
    file.write_text("import json, sys\nimport numpy as np\njob = json.load(sys.stdin)\n" + program)
    monkeypatch.setattr(Engine, "program", file)
    return Engine("an engine", ("json",), "pip install it", ("gguf",))


JOB = {"model": "m", "sequences": [[1, 2, 3, 4], [5, 6, 7]], "starts": [2, 1], "vocabulary": 3, "texts": []}


def test_an_engine_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "np.save(job['out'], np.arange(20, dtype=np.float32).reshape(4, 5))\n"
        "print('noise'); print(json.dumps({'version': '7', 'activation_bits': 8})); print('{\"tokens\": [[1]]}')"
    )
    found = engines.run(engine(tmp_path, monkeypatch, program), sys.executable, JOB)
    assert (found.version, found.activation_bits, found.tokens) == ("7", 8, [[1]])
    # rows of padding behind the vocabulary are no tokens
    assert torch.allclose(found.logprobs, torch.tensor([[0.0, 1, 2]]).log_softmax(-1).expand(4, 3))


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("raise RuntimeError('no kernel for it')", "no kernel for it"),
        ("pass", "exit code 0"),
        ("import os; os.abort()", "exit code -6"),
        ("np.save(job['out'], np.zeros((3, 5), dtype=np.float32))", r"shape \(3, 5\), expected \(4, 3\)"),
        ("np.save(job['out'], np.zeros((4, 2), dtype=np.float32))", r"shape \(4, 2\)"),
    ],
)
def test_an_engine_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, words: str) -> None:
    with pytest.raises(FewbitError, match=words):
        engines.run(engine(tmp_path, monkeypatch, program), sys.executable, JOB)


def test_engines_are_looked_for_where_they_may_be(tmp_path: Path) -> None:
    there = Engine("there", ("json", "sys"), "", ())
    nowhere = Engine("nowhere", ("json", "no_such_package"), "", ())
    assert engines.find(there, []) == sys.executable
    assert engines.find(nowhere, [sys.executable]) is None
    with pytest.raises(FewbitError, match="can't be run"):
        engines.find(nowhere, [str(tmp_path / "python")])


def test_every_engine_has_a_program() -> None:
    assert all(e.program.is_file() for e in engines.ENGINES)
    layouts = {layout for e in engines.ENGINES for layout in e.layouts}
    assert layouts == {"gguf", "compressed-tensors", "gptq", "awq"}


SUMMARY = Summary(
    path="/x/My Model.gguf", to="gguf", format="q4_k", method="rtn", source="src|<b>", exact=False,
    weight_bytes=1234567, source_bytes=2345678, specs={"gguf:q4_k": 7}, notes=["rounded `twice`\nor so"],
)  # fmt: skip


def test_the_card_tells_what_was_found() -> None:
    checks = [
        GOOD,
        replace(GOOD, engine="y", gap=0.4, twin_kl=1e-9, twin_gap=0.0),
        Check("z", error="it | broke\n<script>"),
        Check("w", install="pip install w"),
        Check("u", refused="zero points"),
        replace(GOOD, engine="v", tokens_differ=["a", "b"]),
    ]
    card = model_card.text(
        SUMMARY, {"source": "org/base@0f3a", "calibration": {"windows": 3}}, Verification(checks, 160, 0.01)
    )
    assert "base_model: org/base\nbase_model_relation: quantized\n" in card
    assert "1,234,567 bytes (2,345,678 in the source)" in card
    assert "| x | 1.0 | 0.002 | 0.050 | 99.0 % | yes |" in card
    assert "yes (float32 twin: KL 1e-09, gap 0.000)" in card
    assert "no: it \\| broke \\<script\\>" in card
    assert "| w | not installed |" in card
    assert "| u | | | | | does not load such: zero points |" in card
    assert [c.engine for c in Verification(checks, 160).failed] == ["z", "v"]
    assert "differs on 2 texts" in card
    assert "0.01 nat, on 160 tokens" in card
    assert "llama-server -m 'My Model.gguf'" in card
    assert "ollama create my-model -f Modelfile" in card
    assert "<b>" not in card.replace("\\<b\\>", "")


def test_a_card_is_replaced_whole(tmp_path: Path) -> None:
    summary = replace(SUMMARY, path=str(tmp_path / "a.gguf"))
    first = model_card.write(summary, {})
    assert first == tmp_path / "a.md"
    assert "Nothing yet" in first.read_text()
    model_card.write(summary, {}, Verification([GOOD], 160))
    assert "| x | 1.0 |" in first.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["a.md"]
    assert json.dumps(summary.to_dict())
