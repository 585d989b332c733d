"""A model writes its own calibration text; the shipped text as a real tokenizer cuts it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from string import ascii_letters
from typing import Any

import pytest
import torch

import fewbit
from fewbit import self_calibration
from fewbit.calibration import collect
from fewbit.errors import FewbitError
from fewbit.self_calibration import FIRST_TOKENS, LONGEST_QUESTION, write
from fewbit.source import open_source
from fewbit.tokenizer import Tokenizer
from tests.conftest import CONFIG, TEMPLATE, random_weights, write_folder

END = 257


@pytest.fixture
def plain_folder(tmp_path: Path) -> Path:
    """A tiny model that was never taught to chat."""
    folder = write_folder(tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    return folder


def tokenizer(folder: Path | str) -> Tokenizer:
    return Tokenizer(open_source(folder).checkpoint.tokenizer())


def is_letter(token: int) -> bool:
    return chr(token + 33) in ascii_letters


def test_the_same_seed_writes_the_same_whatever_the_count(tiny_folder: Path) -> None:
    found = write(tiny_folder, 5, 300)
    assert [len(ids) for ids in found] == [300] * 5
    assert write(tiny_folder, 5, 300) == found
    assert write(tiny_folder, 2, 300) == found[:2]
    other = write(tiny_folder, 5, 300, seed=1)
    assert not any(a == b for a in found for b in other)
    assert len({tuple(ids[:40]) for ids in found[::2]}) == 3


def test_collect_takes_them_as_its_windows(tiny_folder: Path) -> None:
    found = collect("self", tokenizer(tiny_folder), 4, 64, partial(write, tiny_folder))
    assert found.windows.tolist() == write(tiny_folder, 4, 64)
    assert found.facts["name"] == "self"


@pytest.mark.parametrize("system", ["", "A system's word that is longer than one step of the model takes at once. "])
def test_each_token_is_the_models_own_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_folder(tmp_path / "cold")
    (folder / "chat_template.jinja").write_text(system + TEMPLATE)
    # so cold that only the likeliest is drawn
    for setting, value in {"TEMPERATURE": 1e-6, "FIRST_TEMPERATURE": 1e-6, "LONGEST_QUESTION": 1000}.items():
        monkeypatch.setattr(self_calibration, setting, value)
    found = torch.tensor(write(folder, 7, 300))
    assert END not in found
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        p = theirs(found).logits[:, :-1]
        p[:, :, END] = -torch.inf
        p = p.log_softmax(-1)
    gap = p.amax(-1) - p.gather(-1, found[:, 1:, None])[..., 0]
    assert gap[::2].max() < 0.1
    opening = tokenizer(folder).encode(f"{system}<|im_start|>user\n")
    assert found[1::2, : len(opening)].tolist() == [opening] * 3
    assert gap[1::2, len(opening) - 1 :].max() < 0.1


def test_a_draw_follows_the_models_probabilities(plain_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(self_calibration, "TEMPERATURE", 1.0)
    monkeypatch.setattr(self_calibration, "TOP_K", 320)
    found = torch.tensor(write(plain_folder, 24, 256))
    theirs = AutoModelForCausalLM.from_pretrained(plain_folder, dtype=torch.float32)
    with torch.inference_mode():
        p = theirs(found).logits[:, :-1].log_softmax(-1)
    said = p.gather(-1, found[:, 1:, None])[..., 0]
    # where nothing was put in for the model: behind an end stands a token drawn from no probabilities
    own = (found[:, 1:] != END) & (found[:, :-1] != END)
    expected, spread = (p.exp() * p).sum(-1), (p.exp() * p * p).sum(-1) - (p.exp() * p).sum(-1) ** 2
    error = float(spread[own].sum() ** 0.5 / own.sum())
    assert abs(float((said - expected)[own].mean())) < 4 * error


def follows(ids: list[int], at: int, expected: list[int]) -> int:
    """Where `ids` go on behind `expected`, of which the window may cut off an end."""
    assert ids[at : at + len(expected)] == expected[: max(0, len(ids) - at)]
    return at + len(expected)


def own(ids: list[int], at: int) -> int:
    """Where the model's own words end."""
    return ids.index(END, at) if END in ids[at:] else len(ids)


def test_every_second_window_is_conversation(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    # ends come often enough to see what follows them
    weights["model.embed_tokens.weight"][END] *= 2
    folder = write_folder(tmp_path / "ending", weights)
    encode = tokenizer(folder).encode
    opening, turn, closing = (
        encode(t) for t in ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n")
    )
    questions, texts, cut = 0, 0, 0
    found = write(folder, 16, 512)
    assert {len(ids) for ids in found} == {512}
    for i, ids in enumerate(found):
        at = 0
        while at < len(ids):
            if i % 2:
                at = follows(ids, at, opening)
                begin, at = at, own(ids, at)
                assert FIRST_TOKENS <= at - begin <= LONGEST_QUESTION or at == len(ids)
                questions, cut = questions + 1, cut + (at - begin == LONGEST_QUESTION)
                at = follows(ids, at, turn)
            else:
                assert is_letter(ids[at])
            begin, at = at, own(ids, at)
            assert at - begin >= FIRST_TOKENS or at >= len(ids)
            texts += 1
            at = follows(ids, at, closing if i % 2 else [])
            at = follows(ids, at, [END])
    assert questions > 16
    assert 0 < cut < questions
    assert texts > 32


def test_a_bos_stands_at_the_beginning_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "bos")
    before = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(before.replace("false", "true"))
    for ids in write(folder, 4, 64):
        assert ids[0] == 256
        assert ids[1] != 256


def test_progress_rises_to_its_total(plain_folder: Path) -> None:
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int, note: str) -> None:
        if "calibration" in note:
            seen.append((done, total))

    write(plain_folder, 3, 40, progress=progress)
    assert seen == sorted(seen)
    assert seen[-1] == (120, 120)


def test_what_can_not_be_written_is_said(tmp_path: Path, tiny_folder: Path) -> None:
    weights = random_weights(CONFIG)
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan
    broken = write_folder(tmp_path / "broken", weights)
    refusing = write_folder(tmp_path / "refusing")
    (refusing / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    for words, args in {
        "so little": (tiny_folder, 0, 64),
        "longer than the model's context": (tiny_folder, 1, 1025),
        "context of 9,000 tokens is not possible": (tiny_folder, 1, 9000),
        "not a number": (broken, 1, 64),
        "chat template can't write": (refusing, 1, 64),
        "There is no model": (tmp_path / "none", 1, 64),
    }.items():
        with pytest.raises(FewbitError, match=words) as e:
            write(*args)
        assert all(e.value.to_dict().values())


def test_a_template_that_leaves_the_words_out_makes_no_conversations(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mute")
    (folder / "chat_template.jinja").write_text("<|im_start|>")
    assert all(is_letter(ids[0]) for ids in write(folder, 4, 32))


def test_a_real_model_writes_text_that_varies() -> None:
    known = tokenizer("smollm2")
    found = write("smollm2", 6, 96)
    texts = [known.decode(ids, skip_special=False) for ids in found]
    assert all("<|im_start|>user\n" in text for text in texts[1::2])
    words: Any = [word for text in texts for word in text.split()]
    assert len(words) > 150
    starts = {tuple(ids[-48:]) for ids in found}
    assert len(starts) == 6


def test_the_shipped_text_fills_the_windows_of_a_real_tokenizer() -> None:
    found = collect(None, tokenizer("smollm2"))
    assert found.windows.shape[0] >= 120
    assert found.facts["templated"]
    # a text of this size that used fewer would be of one kind
    assert len(found.windows.unique()) > 6000


def test_load_and_write_leave_the_model_usable(tiny_folder: Path) -> None:
    model = fewbit.load(tiny_folder)
    before = "".join(model.generate("Once", max_tokens=8))
    write(tiny_folder, 2, 64)
    assert "".join(fewbit.load(tiny_folder).generate("Once", max_tokens=8)) == before
