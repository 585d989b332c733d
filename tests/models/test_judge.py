"""Written models, judged a block at a time, beside the runtime that loads them whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fewbit
from fewbit.judge import judge
from fewbit.runtime.cache import Sequence
from fewbit.runtime.engine import LanguageModel
from fewbit.source import open_source
from tests.models.test_blocks import CPU, LENGTH, WINDOWS, written


def predictions(model: LanguageModel) -> torch.Tensor:
    """log-probabilities of the later half of each window [n, length / 2, vocab]."""
    wanted = list(range(LENGTH // 2, LENGTH))
    found = []
    for window in WINDOWS:
        sequence = Sequence()
        found.append(model.forward([(sequence, window.tolist())], wanted=wanted).double().log_softmax(-1))
        model.allocator.truncate(sequence, 0)
    return torch.stack(found)


def test_verdicts_are_the_runtimes(tmp_path: Path) -> None:
    folder = written(tmp_path, tie_word_embeddings=False)
    outs = [tmp_path / spec for spec in ("int3g32", "int8")]
    for out in outs:
        fewbit.quantize(folder, out, format=out.name, method="rtn", head="int4g32")
    candidates = [open_source(out) for out in outs]
    found = judge(open_source(folder), candidates, WINDOWS, CPU, torch.float32, lambda *_: None)
    p = predictions(fewbit.load(folder, exact=True))
    for out, verdict in zip(outs, found, strict=True):
        q = predictions(fewbit.load(out, exact=True))
        by_window = (p.exp() * (p - q)).sum(-1).mean(-1)
        assert verdict.kl == pytest.approx(float(by_window.mean()), rel=1e-3)
        assert verdict.error == pytest.approx(float(by_window.std() / len(WINDOWS) ** 0.5), rel=1e-2)
    assert found[0].kl > 2 * found[1].kl


def test_a_model_is_no_distance_from_itself(tmp_path: Path) -> None:
    source = open_source(written(tmp_path))
    (found,) = judge(source, [source], WINDOWS, CPU, torch.float32, lambda *_: None)
    assert found.kl < 1e-7
