"""The measuring protocol against a slow loop, and what it says of wrong input."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

import fewbit
from fewbit.errors import FewbitError
from tests.conftest import write_folder

LETTERS = random.Random(5)
TEXT = "".join(LETTERS.choice("abcde fghij.\n") for _ in range(1300))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def test_figures_equal_a_loop_over_transformers(tiny_folder: Path, tmp_path: Path, text: Path) -> None:
    from transformers import AutoModelForCausalLM

    fewbit.quantize(tiny_folder, tmp_path / "q", format="int4g32", head="16bit")
    found = fewbit.evaluate(tmp_path / "q", tiny_folder, text, exact=True)[0]
    one, two = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (tiny_folder, tmp_path / "q"))
    ids = fewbit.load(tiny_folder).tokenizer.encode(TEXT)
    kl, agree, loss = [], [], []
    for start in (0, 512):
        window = torch.tensor([ids[start : start + 512]])
        with torch.inference_mode():
            p, q = (m(window).logits[0].double().softmax(-1) for m in (one, two))
        for i in range(256, 511):
            kl.append(float((p[i] * (p[i] / q[i]).log()).sum()))
            agree.append(float(p[i].argmax() == q[i].argmax()))
            loss.append(-math.log(q[i, ids[start + i + 1]]))
    assert found.tokens == 510
    assert found.mean_kl == pytest.approx(sum(kl) / 510, rel=2e-3)
    assert found.median_kl == pytest.approx(sorted(kl)[254] / 2 + sorted(kl)[255] / 2, rel=1e-2)
    assert found.top1 == pytest.approx(sum(agree) / 510, abs=3 / 510)
    assert found.perplexity == pytest.approx(math.exp(sum(loss) / 510), rel=1e-3)
    assert found.mean_kl_error == pytest.approx(float(torch.tensor(kl).std()) / 510**0.5, rel=1e-2)


def test_a_model_against_itself_loses_nothing(tiny_folder: Path, text: Path) -> None:
    found = fewbit.evaluate([tiny_folder, tiny_folder], tiny_folder, text, exact=True, windows=1)
    for quality in found:
        assert quality.mean_kl == 0
        assert quality.top1 == 1
        assert quality.perplexity == quality.reference_perplexity
        assert quality.tokens == 255


def test_progress_rises_to_its_total(tiny_folder: Path, text: Path) -> None:
    seen: list[tuple[int, int]] = []
    fewbit.evaluate([tiny_folder] * 3, tiny_folder, text, progress=lambda done, total, _: seen.append((done, total)))
    assert seen == [(i + 1, 6) for i in range(6)]


def test_a_context_shorter_than_a_window_is_said(tiny_folder: Path, tmp_path: Path, text: Path) -> None:
    small = write_folder(tmp_path / "small", max_position_embeddings=256)
    for pair in ((small, tiny_folder), (tiny_folder, small)):
        with pytest.raises(FewbitError, match="too small to measure"):
            fewbit.evaluate(*pair, text)


def test_a_bos_takes_the_place_of_the_first_token(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    from fewbit.calibration import windows

    model = fewbit.load(tiny_folder)
    plain = windows(TEXT, model.tokenizer, 512, 2)
    model.tokenizer.add_bos = True
    with_bos = windows(TEXT, model.tokenizer, 512, 2)
    assert with_bos[:, 0].tolist() == [256, 256]
    assert torch.equal(with_bos[:, 1:], plain[:, 1:])


def test_wrong_input_is_said(tiny_folder: Path, tmp_path: Path, text: Path) -> None:
    short, binary = tmp_path / "short", tmp_path / "binary"
    short.write_text("too short")
    binary.write_bytes(b"abc\xff\xfe")
    other = write_folder(tmp_path / "other", vocab_size=400)
    for words, args in {
        "too short": (tiny_folder, tiny_folder, short),
        "UTF-8": (tiny_folder, tiny_folder, binary),
        "can't be read": (tiny_folder, tiny_folder, tmp_path / "none"),
        "different vocabularies": (other, tiny_folder, text),
    }.items():
        with pytest.raises(FewbitError, match=words):
            fewbit.evaluate(*args)
    with pytest.raises(FewbitError, match="window"):
        fewbit.evaluate(tiny_folder, tiny_folder, text, windows=0)
