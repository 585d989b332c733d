"""Caches in 16 bits, int8 and int4: what they hold, what they cost, and who refuses them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fewbit
from fewbit.cli import main
from fewbit.errors import FewbitError
from fewbit.kernels.ops import Stack
from fewbit.runtime.cache import Sequence
from fewbit.runtime.engine import CACHES, LanguageModel

IDS = torch.randint(256, (70,), generator=torch.Generator().manual_seed(3)).tolist()


def predictions(model: LanguageModel, chunk: int) -> torch.Tensor:
    sequence, found = Sequence(), []
    for i in range(0, len(IDS), chunk):
        new = IDS[i : i + chunk]
        found.append(model.forward([(sequence, new)], wanted=list(range(len(new)))))
    model.allocator.truncate(sequence, 0)
    return torch.cat(found).log_softmax(-1)


def cache_bytes(model: LanguageModel) -> int:
    return sum(rows.nbytes for layer in model.model.stack.caches for rows in layer)


@pytest.fixture
def packed(tiny_folder: Path, tmp_path: Path) -> Path:
    fewbit.quantize(tiny_folder, tmp_path / "q", format="int8g32", head="int8g32", method="rtn")
    return tmp_path / "q"


def test_what_a_head_takes(packed: Path) -> None:
    models = {name: fewbit.load(packed, context=512, cache=name) for name in CACHES}
    a = models["int8"].source.args
    heads = 2 * 512 * a.num_hidden_layers * a.num_key_value_heads
    assert {name: cache_bytes(m) for name, m in models.items()} == {
        "16bit": heads * 2 * a.head_dim,
        "int8": heads * (a.head_dim + 2),
        # half a byte a number; a scale and a least number for each group of 32, the last one shorter
        "int4": heads * (a.head_dim // 2 + 4 * -(-a.head_dim // 32)),
    }
    assert cache_bytes(fewbit.load(packed, context=512)) == cache_bytes(models["16bit"])
    assert cache_bytes(fewbit.load(packed, context=512, exact=True)) == 2 * cache_bytes(models["16bit"])


@pytest.mark.parametrize(("name", "mean", "most"), [("int8", 2e-3, 2e-2), ("int4", 0.1, 1.0)])
def test_predictions_are_nearly_the_same_and_the_same_in_every_cut_of_a_prompt(
    packed: Path, name: str, mean: float, most: float
) -> None:
    expected, model = predictions(fewbit.load(packed), 70), fewbit.load(packed, cache=name)
    whole = predictions(model, 70)
    kl = (expected.exp() * (expected - whole)).sum(-1)
    assert 0 < kl.mean() < mean
    assert kl.max() < most
    for chunk in (33, 16, 2, 1):
        assert torch.equal(predictions(model, chunk), whole), chunk


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_layers_and_operations_have_the_same_bits(packed: Path, name: str) -> None:
    model, plain = (fewbit.load(packed, cache=name) for _ in range(2))
    plain.model.stack = Stack(plain.model.stack.ops, plain.model.stack.layers)
    plain.model.allocate(1024, CACHES[name])
    found = predictions(model, 5)
    assert torch.equal(found, predictions(plain, 5))
    assert torch.equal(found, predictions(model, 1))


def test_exact_runs_and_other_names_are_refused(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in CACHES:
        with pytest.raises(FewbitError, match="exact run") as found:
            fewbit.load(packed, exact=True, cache=name)
        assert "float32" in found.value.facts
    with pytest.raises(FewbitError, match="no such cache") as found:
        fewbit.load(packed, cache="int2")
    assert "16bit, int8, int4" in found.value.facts
    with pytest.raises(FewbitError, match="exact run"):
        # refused before the text, which is not there, is read
        fewbit.evaluate(packed, packed, tmp_path / "none", exact=True, kv_cache="int8")
    assert main(["run", str(packed), "hello", "--exact", "--cache", "int8"]) == 1
    assert "float32" in capsys.readouterr().err
    assert main(["run", str(packed), "hello", "--cache", "8bit"]) == 2


def test_verbs_run_with_it_and_say_so(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    used: list[torch.dtype] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stack, "allocate", _noting(used))
        assert main(["run", str(packed), "hello", "--max-tokens", "3", "--cache", "int8"]) == 0
        assert torch.int8 in used
        used.clear()
        text = tmp_path / "t.txt"
        text.write_text("a few words and then some more, again and again; " * 100)
        argv = ["eval", str(packed), "--against", str(packed), "--text", str(text), "--windows", "1", "--no-cache"]
        capsys.readouterr()
        assert main([*argv, "--cache", "int8", "--json"]) == 0
        # the reference keeps its float32
        assert {torch.float32, torch.int8} <= set(used)
        assert torch.float16 not in used
        for options, name in (([], "16bit"), (["--cache", "int8"], "int8")):
            used.clear()
            capsys.readouterr()
            argv = ["bench", str(packed), "--prompt", "4", "--tokens", "2", "--rounds", "1", "--json"]
            assert main([*argv, *options]) == 0
            assert json.loads(capsys.readouterr().out)["cache"] == name
            assert used == [CACHES[name]]


def _noting(used: list[torch.dtype]) -> Callable[[Stack, int, torch.dtype], None]:
    allocate = Stack.allocate

    def noted(self: Stack, rows: int, dtype: torch.dtype) -> None:
        if rows:
            used.append(dtype)
        allocate(self, rows, dtype)

    return noted
