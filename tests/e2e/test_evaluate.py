"""The measuring protocol against a slow loop, and what it says of wrong input."""

from __future__ import annotations

import importlib
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewbit
from fewbit.errors import FewbitError
from fewbit.evaluator import Quality
from fewbit.quality import paired as paired_of
from fewbit.quality import standard_error
from fewbit.runtime.cache import Sequence
from fewbit.runtime.engine import LanguageModel
from fewbit.scoring import Prediction, score
from tests.conftest import CONFIG, random_weights, write_folder

LETTERS = random.Random(5)
TEXT = "".join(LETTERS.choice("abcde fghij.\n") for _ in range(1300))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def test_figures_equal_a_loop_over_transformers(tiny_folder: Path, tmp_path: Path, text: Path) -> None:
    from transformers import AutoModelForCausalLM

    fewbit.quantize(tiny_folder, tmp_path / "q", format="int4g32", method="rtn", head="16bit")
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
    # windows are what is independent, so one error is that of their two sums
    assert found.mean_kl_error == pytest.approx(clustered(np.array(kl)), rel=1e-2)
    assert found.top1_error == pytest.approx(clustered(np.array(agree)), rel=0.2)
    assert found.perplexity_error == pytest.approx(found.perplexity * clustered(np.array(loss)), rel=2e-2)
    (domain,) = found.domains
    assert (domain.mean_kl_error, domain.top1_error) == (found.mean_kl_error, found.top1_error)


def clustered(x: np.ndarray[Any, Any], size: int = 255) -> float:
    """The error of a mean over windows, as a loop."""
    groups, total = len(x) // size, 0.0
    for g in range(groups):
        total += sum(float(v - x.mean()) for v in x[g * size : (g + 1) * size]) ** 2
    return math.sqrt(groups / (groups - 1) * total) / len(x)


def test_errors_hold_where_the_tokens_of_a_window_are_alike() -> None:
    """Of many samples, the error that each states is the spread of their means."""
    random = np.random.default_rng(0)
    samples = random.normal(size=(400, 40, 1)) + random.normal(size=(400, 40, 255))
    stated = [standard_error(torch.from_numpy(s.reshape(-1)), 255) for s in samples]
    spread = samples.mean((1, 2)).std(ddof=1)
    assert np.mean(stated) == pytest.approx(spread, rel=0.1)
    iid = samples.reshape(400, -1).std(1, ddof=1).mean() / samples[0].size ** 0.5
    assert iid < spread / 5
    assert stated[0] == pytest.approx(clustered(samples[0].reshape(-1)))


def test_a_single_window_has_the_error_over_its_tokens() -> None:
    x = torch.randn(255, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert standard_error(x, 255) == pytest.approx(float(x.std()) / 255**0.5)
    assert standard_error(x[:1], 255) == 0


def test_the_benchmarks_state_the_same_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    peers, quality = (importlib.import_module(name) for name in ("peers", "quality"))
    random = np.random.default_rng(1)
    kl = (random.random((6, 1)) + random.random((6, 255))).astype(np.float32).reshape(-1)
    scores = dict.fromkeys(("kl", "agrees", "loss", "reference_loss"), kl)
    truth = standard_error(torch.from_numpy(kl).double(), 255)
    assert peers.figures(scores)["mean_kl_error"] == pytest.approx(truth)
    found = quality.Results(tmp_path / "q.npz")
    found.add("int4g64/rtn", scores, {})
    assert found.figures["int4g64/rtn"]["mean_kl_error"] == pytest.approx(truth)
    # what an older file states is not believed
    (tmp_path / "q.json").write_text((tmp_path / "q.json").read_text().replace("mean_kl_error", "other"))
    assert quality.Results(tmp_path / "q.npz").figures["int4g64/rtn"]["mean_kl_error"] == pytest.approx(truth)
    # one window that is lower by much, five that are not: clear token by token, not window by window
    tokens = np.repeat(np.float32([1.0, 0.01, -0.01, 0.02, -0.02, 0.0]), 255)
    assert tokens.mean() > 2 * tokens.std(ddof=1) / len(kl) ** 0.5
    found.add("a", scores | {"kl": np.zeros_like(kl)}, {})
    found.add("b", scores | {"kl": tokens}, {})
    assert not quality.is_lower(found, "a", "b")
    found.add("b", scores | {"kl": np.repeat(np.float32([1.0, 0.9, 1.1, 1.0, 0.8, 1.2]), 255)}, {})
    assert quality.is_lower(found, "a", "b")


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


def test_tokenizers_that_differ_are_said(tiny_folder: Path, tmp_path: Path, text: Path) -> None:
    """Of the same vocabulary size, so that nothing else would show it."""
    other = write_folder(tmp_path / "other")
    settings = json.loads((other / "tokenizer.json").read_text())
    vocab = settings["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(settings))
    at = min(TEXT.index("a"), TEXT.index("b"))
    with pytest.raises(FewbitError, match="in different tokens") as failed:
        fewbit.evaluate([tiny_folder, other], tiny_folder, text)
    ids = [vocab["b"], vocab["a"]]
    pair = ids if TEXT[at] == "a" else ids[::-1]
    assert failed.value.facts == f"Token {at + 1} of {str(text)!r} is {pair[1]} and {pair[0]}."
    # a tokenizer that is written otherwise and reads the same is the same
    (other / "tokenizer.json").write_text(
        json.dumps(json.loads((tiny_folder / "tokenizer.json").read_text()), indent=2)
    )
    (found,) = fewbit.evaluate(other, tiny_folder, text, windows=1, exact=True)
    assert found.mean_kl == 0


def test_only_the_beginning_of_a_long_text_is_read(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / "long.txt"
    # what is not read can't be refused
    long.write_bytes(TEXT.encode() * 60 + b"\xff")
    with pytest.raises(FewbitError, match="UTF-8"):
        fewbit.evaluate(tiny_folder, tiny_folder, long, windows=1)
    monkeypatch.setattr("fewbit.evaluator.LEAST_BYTES", 1000)
    (found,) = fewbit.evaluate(tiny_folder, tiny_folder, long, windows=2)
    assert found.tokens == 510


# One window


def test_scores_equal_a_slow_loop() -> None:
    random = torch.Generator().manual_seed(2)
    one, two = torch.randn(11, 37, generator=random) * 4, torch.randn(11, 37, generator=random) * 4
    targets = torch.randint(0, 37, (11,), generator=random)
    found = score(Prediction(one), Prediction(two), targets)
    for i in range(11):
        p, q = ([math.exp(x) for x in row.double().tolist()] for row in (one[i], two[i]))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        assert float(found.kl[i]) == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        assert float(found.loss[i]) == pytest.approx(-math.log(q[targets[i]]))
        assert float(found.reference_loss[i]) == pytest.approx(-math.log(p[targets[i]]))
        assert bool(found.agrees[i]) == (p.index(max(p)) == q.index(max(q)))


def test_a_divergence_of_a_billionth_is_seen_and_none_is_negative() -> None:
    random = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(64, 5000, generator=random)
    near = Prediction(logits + 3e-5 * torch.randn(64, 5000, generator=random))
    one = Prediction(logits)
    truth = (
        logits.double().softmax(-1) * (logits.double().log_softmax(-1) - near.logits.double().log_softmax(-1))
    ).sum(-1)
    assert 1e-10 < float(truth.mean()) < 1e-9
    assert torch.allclose(one.kl(near), truth, rtol=1e-4, atol=1e-13)
    # the same distributions from logits that differ by a constant
    assert 0 <= float(one.kl(Prediction(logits + 8)).min()) <= float(one.kl(Prediction(logits + 8)).max()) < 1e-12


# Several candidates and texts


@pytest.fixture
def measured(tiny_folder: Path, tmp_path: Path, text: Path) -> list[Quality]:
    """Three candidates on three windows of two texts."""
    second = tmp_path / "other.txt"
    second.write_text(TEXT[::-1][:700])
    for form in ("int8", "int4g32", "int3g32"):
        fewbit.quantize(tiny_folder, tmp_path / form, format=form, method="rtn", head="16bit")
    models = [tmp_path / form for form in ("int4g32", "int8", "int3g32")]
    return fewbit.evaluate(models, tiny_folder, {"prose": text, "code": second}, exact=True)


@pytest.fixture
def by_hand(tiny_folder: Path, tmp_path: Path, measured: list[Quality]) -> dict[str, dict[str, torch.Tensor]]:
    """Per-token KL float64 of each model on each text, from this project's logits and nothing else of its own."""
    reference = fewbit.load(tiny_folder, exact=True)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for model in (tmp_path / form for form in ("int4g32", "int8", "int3g32")):
        candidate = fewbit.load(model, exact=True)
        for name, content in (("prose", TEXT), ("code", TEXT[::-1][:700])):
            ids, kl = reference.tokenizer.encode(content), []
            for start in range(0, len(ids) - 511, 512):
                p, q = (log_probs(m, ids[start : start + 512]) for m in (reference, candidate))
                kl.append((p.exp() * (p - q)).sum(-1))
            found.setdefault(model.name, {})[name] = torch.cat(kl)
    return found


def log_probs(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    sequence = Sequence()
    logits = model.forward([(sequence, ids)], list(range(256, 511)))
    model.allocator.truncate(sequence, 0)
    return logits.double().log_softmax(-1)


def test_domains_add_up(measured: list[Quality], by_hand: dict[str, dict[str, torch.Tensor]]) -> None:
    for quality in measured:
        assert [(d.name, d.tokens) for d in quality.domains] == [("prose", 510), ("code", 255)]
        assert quality.tokens == 765
        for figure in ("mean_kl", "top1"):
            whole = sum(getattr(d, figure) * d.tokens for d in quality.domains) / quality.tokens
            assert getattr(quality, figure) == pytest.approx(whole)
        loss = sum(math.log(d.perplexity) * d.tokens for d in quality.domains) / quality.tokens
        assert math.log(quality.perplexity) == pytest.approx(loss)
        for domain in quality.domains:
            slow = by_hand[Path(quality.model).name][domain.name]
            assert domain.mean_kl == pytest.approx(float(slow.mean()), rel=1e-5)
            assert domain.p99_kl == pytest.approx(float(slow.quantile(0.99)), rel=1e-4)


def test_the_paired_error_is_that_over_windows(
    measured: list[Quality], by_hand: dict[str, dict[str, torch.Tensor]]
) -> None:
    first, *others = measured
    assert first.paired is None
    assert all(domain.paired is None for domain in first.domains)
    kl = {name: np.concatenate([t.numpy() for t in texts.values()]) for name, texts in by_hand.items()}
    for quality, word in zip(others, ("lower", "higher"), strict=True):
        difference = kl[Path(quality.model).name] - kl["int4g32"]
        assert quality.paired is not None
        assert quality.paired.difference == pytest.approx(difference.mean(), rel=1e-5)
        assert quality.paired.error == pytest.approx(clustered(difference), rel=1e-4)
        assert quality.paired.verdict == word
        assert [d.paired.verdict for d in quality.domains if d.paired] == [word, word]


def test_two_of_the_same_are_not_told_apart(tiny_folder: Path, tmp_path: Path, text: Path) -> None:
    fewbit.quantize(tiny_folder, tmp_path / "q", format="int4g32", method="rtn")
    _, second = fewbit.evaluate([tmp_path / "q"] * 2, tiny_folder, text, windows=1)
    assert second.paired is not None
    assert (second.paired.difference, second.paired.verdict) == (0, "not distinguishable")
    noise = torch.tensor([1.0, -1.0] * 50, dtype=torch.float64)
    # the error of such a mean is 0.1005
    for shift, verdict in ((0.19, "not distinguishable"), (0.21, "higher"), (-0.21, "lower")):
        assert paired_of(noise + shift, 100).verdict == verdict


def test_the_worst_tokens_are_those_of_a_sort(
    measured: list[Quality], by_hand: dict[str, dict[str, torch.Tensor]]
) -> None:
    for quality in measured:
        texts = by_hand[Path(quality.model).name]
        everything = sorted(((float(v), n, i) for n, t in texts.items() for i, v in enumerate(t)), reverse=True)[:20]
        assert len(quality.worst) == 20
        for token, (kl, name, i) in zip(quality.worst, everything, strict=True):
            assert token.kl == pytest.approx(kl, rel=1e-4)
            assert (token.domain, token.window, token.position) == (name, i // 255, 257 + i % 255)
            content = TEXT if name == "prose" else TEXT[::-1]
            at = token.window * 512 + token.position
            # a token is a character here
            assert token.actual == content[at]
            assert token.before == content[at - 40 : at]
            for side in (token.expected, token.found):
                probabilities = [p for _, p in side]
                assert len(side) == 3
                assert probabilities == sorted(probabilities, reverse=True)
                assert 0 < sum(probabilities) <= 1
        # the candidate's own words, not the reference's twice
        assert any(token.expected != token.found for token in quality.worst)


def test_texts_go_by_their_stems(tiny_folder: Path, tmp_path: Path, text: Path) -> None:
    (found,) = fewbit.evaluate(tiny_folder, tiny_folder, [text], windows=1)
    assert [d.name for d in found.domains] == ["text"]
    (tmp_path / "in").mkdir()
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(FewbitError, match=r"short.txt: It has 9 tokens"):
        fewbit.evaluate(tiny_folder, tiny_folder, [text, tmp_path / "short.txt"])
    with pytest.raises(FewbitError, match="'text'"):
        fewbit.evaluate(tiny_folder, tiny_folder, [text, tmp_path / "in" / "text.md"])
    for nothing in ([], {}):
        with pytest.raises(FewbitError, match="no text"):
            fewbit.evaluate(tiny_folder, tiny_folder, nothing)
    with pytest.raises(FewbitError, match="no model"):
        fewbit.evaluate([], tiny_folder, text)


# Models that fail


@pytest.mark.parametrize("role", ["candidate", "reference"])
@pytest.mark.parametrize("size", [3e38, float("nan")])
def test_predictions_that_are_not_finite_are_counted(
    tiny_folder: Path, tmp_path: Path, text: Path, role: str, size: float
) -> None:
    weights = random_weights(CONFIG | {"tie_word_embeddings": False})
    # its products overflow to either side, at some positions and not at others
    weights["lm_head.weight"][7] *= size
    broken = write_folder(tmp_path / "broken", weights, tie_word_embeddings=False)
    model = fewbit.load(broken, exact=True)
    logits = model.forward([(Sequence(), model.tokenizer.encode(TEXT)[:512])], list(range(256, 511)))
    count = int((~logits.isfinite().all(-1)).sum())
    assert 0 < count <= 255
    assert (count == 255) == math.isnan(size)
    pair = (broken, tiny_folder) if role == "candidate" else (tiny_folder, broken)
    with pytest.raises(FewbitError) as failed:
        fewbit.evaluate(*pair, text, exact=True)
    assert failed.value.what == f"The predictions of {broken} are not finite."
    assert failed.value.facts == f"{count} of the 255 scored positions of window 1 of 'text'."
    assert "--exact" in failed.value.next_step


def test_a_token_that_a_candidate_rules_out_is_no_mean_of_infinity(
    tiny_folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = LanguageModel.forward

    def ruled_out(self: LanguageModel, *args: Any, **settings: Any) -> torch.Tensor:
        logits = plain(self, *args, **settings).clone()
        if not self.exact:
            logits[[3, 5, 8], 7] = -math.inf
        return logits

    monkeypatch.setattr(LanguageModel, "forward", ruled_out)
    with pytest.raises(FewbitError) as failed:
        fewbit.evaluate(tiny_folder, tiny_folder, text)
    assert failed.value.facts.startswith("3 of the 255 scored positions of window 1 ")
