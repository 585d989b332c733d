"""The measuring protocol with a cached reference: how near it comes, when it is used, when it is refused."""

from __future__ import annotations

import functools
import gc
import random
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit import evaluator
from fewbit.evaluator import Quality
from fewbit.reference_cache import ReferenceCache
from fewbit.runtime.engine import LanguageModel
from fewbit.source import open_source
from tests.conftest import CONFIG, random_weights, write_folder

LETTERS = random.Random(5)
TEXT = "".join(LETTERS.choice("abcde fghij.\n") for _ in range(4 * 512 + 9))
# more tokens than are kept
VOCAB = 3000


@pytest.fixture(autouse=True)
def references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fewbit" / "references"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A model whose tail holds most of the probability."""
    return write_folder(tmp_path / "wide", vocab_size=VOCAB)


@pytest.fixture
def candidates(wide: Path, tmp_path: Path) -> list[Path]:
    for form in ("int8", "int4g32", "int3g32"):
        fewbit.quantize(wide, tmp_path / form, format=form, method="rtn", head="16bit")
    return [tmp_path / form for form in ("int8", "int4g32", "int3g32")]


class Loads:
    """Which models were loaded, in order, and how many of them are alive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.windows: list[str] = []
        self.alive: list[weakref.ref[Any]] = []
        self.most = 0
        outer = self

        class Watched(LanguageModel):
            def __init__(self, source: Any, *args: Any, **settings: Any) -> None:
                super().__init__(source, *args, **settings)
                outer.names.append(Path(source.name).name)
                outer.alive.append(weakref.ref(self))
                gc.collect()
                outer.most = max(outer.most, sum(1 for model in outer.alive if model() is not None))

            def forward(self, *args: Any, **settings: Any) -> Any:
                outer.windows.append(Path(self.name).name)
                return super().forward(*args, **settings)

        monkeypatch.setattr(evaluator, "LanguageModel", Watched)


def figures(q: Quality) -> list[float]:
    return [q.top1, q.perplexity, q.reference_perplexity]


def test_cached_figures_agree_within_the_stated_error(wide: Path, candidates: list[Path], text: Path) -> None:
    plain = fewbit.evaluate(candidates, wide, text, exact=True)
    fresh = fewbit.evaluate(candidates, wide, text, exact=True, cache=True)
    again = fewbit.evaluate(candidates, wide, text, exact=True, cache=True)
    assert fresh == plain
    for one, two in zip(plain, again, strict=True):
        assert one.cache_error == 0
        assert 0 < two.cache_error < 0.05 * one.mean_kl
        # what is stated is two standard errors or more
        assert 0 < abs(two.mean_kl - one.mean_kl) <= 2 * two.cache_error
        assert figures(two) == pytest.approx(figures(one), rel=1e-6)
        assert two.tokens == one.tokens == 4 * 255
        same = {(t.domain, t.window, t.position) for t in one.worst} & {
            (t.domain, t.window, t.position) for t in two.worst
        }
        assert len(same) > 10
    assert again[1].paired is not None
    assert again[1].paired.verdict == "higher"


def test_the_reference_runs_for_one_window_and_goes(
    wide: Path, candidates: list[Path], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = Loads(monkeypatch)
    fewbit.evaluate(candidates[:1], wide, text, cache=True)
    assert loads.windows.count("wide") == 4
    loads = Loads(monkeypatch)
    fewbit.evaluate(candidates[:1], wide, text, cache=True)
    assert loads.names == ["wide", "int8"]
    assert loads.windows.count("wide") == 1
    # it was let go before the candidate came
    assert loads.most == 1


def test_more_windows_use_what_is_there(
    wide: Path, candidates: list[Path], text: Path, monkeypatch: pytest.MonkeyPatch, references: Path
) -> None:
    fewbit.evaluate(candidates[0], wide, text, windows=2, cache=True)
    assert len(list(references.iterdir())) == 2
    loads = Loads(monkeypatch)
    fewbit.evaluate(candidates[0], wide, text, windows=4, cache=True)
    # two that are new, and the one that is checked
    assert loads.windows.count("wide") == 3
    assert len(list(references.iterdir())) == 4


def test_off_means_off(wide: Path, text: Path, references: Path) -> None:
    fewbit.evaluate(wide, wide, text, windows=1)
    assert not references.exists()


def test_a_model_against_itself_still_loses_nothing(wide: Path, text: Path) -> None:
    for _ in range(2):
        (found,) = fewbit.evaluate(wide, wide, text, exact=True, cache=True)
        assert 0 <= found.mean_kl < 1e-11
        assert found.top1 == 1


def test_one_window_is_always_exact(wide: Path, candidates: list[Path], text: Path) -> None:
    plain = fewbit.evaluate(candidates[1], wide, text, windows=1)
    for _ in range(2):
        assert fewbit.evaluate(candidates[1], wide, text, windows=1, cache=True) == plain


def test_a_changed_model_misses(wide: Path, candidates: list[Path], text: Path, tmp_path: Path) -> None:
    fewbit.evaluate(candidates[1], wide, text, cache=True)
    other = write_folder(tmp_path / "other", random_weights(CONFIG | {"vocab_size": VOCAB}, seed=1), vocab_size=VOCAB)
    shutil.copy(other / "model.safetensors", wide / "model.safetensors")
    plain = fewbit.evaluate(candidates[1], wide, text)
    found = fewbit.evaluate(candidates[1], wide, text, cache=True)
    assert found == plain


def test_predictions_of_another_model_under_the_right_name_are_refused(
    wide: Path, candidates: list[Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an older fewbit that computed something else would have left them."""
    plain = fewbit.evaluate(candidates[1], wide, text, exact=True)
    other = write_folder(tmp_path / "other", random_weights(CONFIG | {"vocab_size": VOCAB}, seed=1), vocab_size=VOCAB)
    name = ReferenceCache(open_source(wide))._model
    with monkeypatch.context() as patched:
        patched.setattr("fewbit.reference_cache._fingerprint", lambda _: name)
        wrong = fewbit.evaluate(candidates[1], other, text, exact=True, cache=True)
    assert wrong[0].mean_kl > 2 * plain[0].mean_kl
    assert fewbit.evaluate(candidates[1], wide, text, exact=True, cache=True) == plain
    # and they were replaced
    (healed,) = fewbit.evaluate(candidates[1], wide, text, exact=True, cache=True)
    assert healed.mean_kl == pytest.approx(plain[0].mean_kl, abs=2 * healed.cache_error)
    assert healed.cache_error > 0


@pytest.mark.parametrize("which", ["one", "all"])
def test_broken_files_are_made_again(
    wide: Path, candidates: list[Path], text: Path, references: Path, which: str
) -> None:
    plain = fewbit.evaluate(candidates[1], wide, text, exact=True, cache=True)
    files = sorted(references.iterdir())
    sizes = [file.stat().st_size for file in files]
    for file in files if which == "all" else files[:1]:
        file.write_bytes(file.read_bytes()[:-100])
    (found,) = fewbit.evaluate(candidates[1], wide, text, exact=True, cache=True)
    assert found.mean_kl == pytest.approx(plain[0].mean_kl, rel=0.05)
    assert [file.stat().st_size for file in files] == sizes
    if which == "all":
        assert [found] == plain


def test_a_run_that_stops_keeps_what_it_has(
    wide: Path, candidates: list[Path], text: Path, references: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, total: int, doing: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fewbit.evaluate(candidates[0], wide, text, cache=True, progress=stop)
    assert len(list(references.iterdir())) == 2
    loads = Loads(monkeypatch)
    fewbit.evaluate(candidates[0], wide, text, cache=True)
    assert loads.windows.count("wide") == 3


def test_windows_that_vanish_load_the_reference_once(
    wide: Path, candidates: list[Path], text: Path, references: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plain,) = fewbit.evaluate(candidates[0], wide, text, exact=True, cache=True)

    def vanish(done: int, total: int, doing: str) -> None:
        if done == 1:
            for file in references.iterdir():
                file.unlink()

    loads = Loads(monkeypatch)
    (found,) = fewbit.evaluate(candidates[0], wide, text, exact=True, cache=True, progress=vanish)
    # to check the cache, and for the second and the fourth window; the third one was the check
    assert loads.names == ["wide", "int8", "wide"]
    assert loads.windows.count("wide") == 3
    assert found.mean_kl == pytest.approx(plain.mean_kl, rel=0.05)


def test_a_run_removes_others_windows_before_its_own(
    wide: Path, candidates: list[Path], text: Path, tmp_path: Path, references: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"old": text}
    for name, step in (("newer", 3), ("fresh", 5)):
        texts[name] = tmp_path / name
        texts[name].write_text("".join(TEXT[i * step % len(TEXT)] for i in range(len(TEXT))))
    for name in ("old", "newer"):
        fewbit.evaluate(candidates[0], wide, {name: texts[name]}, cache=True)
    size = sum(file.stat().st_size for file in references.iterdir())
    monkeypatch.setattr(evaluator, "ReferenceCache", functools.partial(ReferenceCache, max_bytes=size))
    loads = Loads(monkeypatch)
    fewbit.evaluate(candidates[0], wide, {name: texts[name] for name in ("fresh", "old")}, cache=True)
    # four that are new, and the one that is checked
    assert loads.windows.count("wide") == 5
    assert len(list(references.iterdir())) == 8


def test_a_cache_that_can_not_be_written_costs_only_time(
    wide: Path, candidates: list[Path], text: Path, references: Path
) -> None:
    references.parent.mkdir(parents=True)
    references.write_text("in the way")
    plain = fewbit.evaluate(candidates[0], wide, text)
    for _ in range(2):
        assert fewbit.evaluate(candidates[0], wide, text, cache=True) == plain


def test_vocabularies_beyond_16_bits(tmp_path: Path, text: Path) -> None:
    folder = write_folder(tmp_path / "huge", vocab_size=70_000, num_hidden_layers=1)
    fewbit.quantize(folder, tmp_path / "q", format="int4g32", method="rtn", head="16bit")
    (plain,), (found,) = [
        fewbit.evaluate(tmp_path / "q", folder, text, exact=True, windows=2, cache=True) for _ in range(2)
    ]
    assert found.cache_error > 0
    assert found.mean_kl == pytest.approx(plain.mean_kl, abs=2 * found.cache_error)
    assert torch.tensor(figures(found)).allclose(torch.tensor(figures(plain)))
