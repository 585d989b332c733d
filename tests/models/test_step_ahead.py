"""Steps that begin with a token the host has not seen yet: on a card, and with a stand-in that runs them on the CPU."""

from __future__ import annotations

from collections.abc import Sequence as Several
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import fewbit
from fewbit import FewbitError
from fewbit.kernels import _nvrtc
from fewbit.runtime import graphs, sampler
from fewbit.runtime.cache import PAGE_SIZE, Sequence
from fewbit.runtime.engine import LanguageModel
from fewbit.runtime.sampler import Sampler, Sampling

PROMPT = [5, 6, 7, 200, 31]
CONTEXT = 2 * PAGE_SIZE


class Later:
    """A choice whose token is looked at later; the log has when."""

    def __init__(self, ids: Tensor, log: list[str]) -> None:
        self.ids, self.log = ids, log

    def tokens(self) -> list[int]:
        self.log.append("seen")
        found: list[int] = self.ids.tolist()
        return found


@pytest.fixture
def log() -> list[str]:
    """What happened, in its order; of the stand-in alone."""
    return []


@pytest.fixture(params=["stand-in", "card"])
def model(request: pytest.FixtureRequest, tiny_folder: Path, log: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "card":
        if reason := _nvrtc.missing():
            pytest.skip(reason)
        return fewbit.load(tiny_folder, device="cuda:0", context=CONTEXT)

    def choose(logits: Tensor, *settings: Any) -> Later:
        assert settings[0] == 0
        log.append("chosen")
        return Later(logits.argmax(-1), log)

    def run(recorded: Any, model: Any, pool: Any) -> Tensor:
        log.append("ran")
        logits: Tensor = model(recorded.ids, recorded.positions, recorded.batch)
        return logits

    monkeypatch.setattr(sampler, "chooser", lambda _: choose)
    monkeypatch.setattr(graphs._Recorded, "run", run)
    model = fewbit.load(tiny_folder, device="cpu", context=CONTEXT)
    model._graphs = graphs.StepGraphs(model.model, model.device, CONTEXT // PAGE_SIZE, PAGE_SIZE)
    model._graphs._pool = object()
    return model


def one_by_one(model: LanguageModel, prompt: list[int], count: int, penalty: float = 1.0) -> list[int]:
    """Greedy tokens by forward and argmax."""
    found, new, sequence = list(prompt), prompt, Sequence()
    for _ in range(count):
        logits = model.forward([(sequence, new)])[0].cpu().clone()
        if penalty != 1.0:
            # of each token that was there, whatever the order
            for token in set(found):
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        new = [int(logits.argmax())]
        found += new
    model.allocator.truncate(sequence, 0)
    return found[len(prompt) :]


def ahead(model: LanguageModel, prompt: list[int], count: int, **settings: float) -> list[int]:
    sequence, history, free = Sequence(), list(prompt), len(model.allocator.free)
    logits = model.prefill(sequence, prompt)
    found = list(model.tokens(sequence, logits, Sampler(Sampling(**settings)), history, count, None))  # type: ignore[arg-type]
    assert history == prompt + found
    # the last one is chosen and not run
    assert sequence.ids == (prompt + found)[:-1]
    model.allocator.truncate(sequence, 0)
    assert len(model.allocator.free) == free
    return found


# the second ends on the last place of a page, the third begins a new one and the fourth crosses into it
@pytest.mark.parametrize("have", [5, PAGE_SIZE - 6, PAGE_SIZE, PAGE_SIZE - 3])
def test_tokens_are_those_of_forward_and_argmax(model: LanguageModel, log: list[str], have: int) -> None:
    prompt = [(7 * i) % 300 for i in range(have)]
    assert ahead(model, prompt, 7) == one_by_one(model, prompt, 7)
    # each step but the last began before its token was seen
    assert not log or log[:18] == ["chosen", "ran", "seen"] * 6


def test_a_penalty_needs_no_look_at_the_token(model: LanguageModel, log: list[str]) -> None:
    expected = one_by_one(model, PROMPT, 12, penalty=1.5)
    log.clear()
    assert ahead(model, PROMPT, 12, repetition_penalty=1.5) == expected
    assert expected != one_by_one(model, PROMPT, 12)
    assert not log or log[:33] == ["chosen", "ran", "seen"] * 11


def test_a_sampler_may_be_given_any_history(model: LanguageModel) -> None:
    logits = model.prefill(Sequence(), PROMPT)
    best = Sampler(Sampling())(logits, ())
    penalized = Sampler(Sampling(repetition_penalty=100.0))
    first = logits if float(logits[best]) > 0 else logits - 2 * float(logits[best])
    assert penalized(first, ()) == best
    other = penalized(first, [best])
    assert other != best
    # as long as the next of an answer's would be, and another
    assert penalized(first, [0 if best else 1, 2]) == best
    started = penalized.start(first, [best])
    assert started is not None
    assert started.tokens() == [other]


def test_an_answer_that_stops_early_leaves_a_prefix_to_use(model: LanguageModel) -> None:
    expected = one_by_one(model, PROMPT, 6)
    answer = model.generate(PROMPT)
    # as for a stop string: the step for the last token has begun by now
    while answer.stats.new_tokens < 3:
        next(answer)
    del answer
    longer = [*PROMPT, *expected[:2], 9, 10]
    again = model.generate(longer, max_tokens=5)
    text = "".join(again)
    assert again.stats.cached_tokens == len(PROMPT) + 2
    whole = "".join(model.generate([1], max_tokens=1)) and "".join(model.generate(longer, max_tokens=5))
    assert text == whole
    assert one_by_one(model, longer, 5) == ahead(model, longer, 5)


def test_another_answer_takes_over_between_two_steps(model: LanguageModel) -> None:
    other = [9, 8, 7, 6, 5]
    expected = "".join(model.generate(other, max_tokens=6))
    one = model.generate(PROMPT, max_tokens=20)
    while one.stats.new_tokens < 3:
        next(one)
    assert "".join(model.generate(other, max_tokens=6)) == expected
    with pytest.raises(FewbitError, match="ended by a newer one"):
        list(one)
    # what the first did before it was told changed nothing, in the midst of the other's answer too
    one = model.generate(PROMPT, max_tokens=20)
    next(one)
    two = model.generate(other, max_tokens=6)
    begun = [next(two), next(two)]
    ids = list(model._kept.ids)
    with pytest.raises(FewbitError, match="ended by a newer one"):
        next(one)
    assert model._kept.ids == ids
    assert "".join([*begun, *two]) == expected


def test_the_last_place_of_the_context_is_used_and_none_behind_it(model: LanguageModel) -> None:
    prompt = [(11 * i) % 300 for i in range(CONTEXT - 4)]
    answer = model.generate(prompt)
    model.tokenizer.eos_ids = frozenset()  # type: ignore[misc]
    list(answer)
    assert answer.stats.new_tokens == 4
    assert answer.stats.finish_reason == "length"


def test_ids_that_are_none_are_refused_and_the_model_lives_on(model: LanguageModel) -> None:
    expected = one_by_one(model, PROMPT, 3)
    size = model.source.args.vocab_size
    for wrong in ([3, size], [-1], [2**40]):
        sequence = Sequence()
        with pytest.raises(IndexError, match=f"0 .. {size - 1}"):
            model.forward([(sequence, wrong)])
        assert (sequence.ids, sequence.pages) == ([], [])
    assert one_by_one(model, PROMPT, 3) == expected


def test_a_table_of_pages_is_filled_up() -> None:
    from fewbit.runtime.cache import PageAllocator

    allocator, one, two = PageAllocator(8, 4), Sequence(), Sequence(ids=[1] * 3, pages=[])
    allocator.reserve(two, 3)
    steps: Several[tuple[Sequence, Several[int]]] = [(one, [7] * 6), (two, [8, 9])]
    flat = allocator.lay_out(steps)
    assert (flat.ids, flat.positions) == ([7] * 6 + [8, 9], [0, 1, 2, 3, 4, 5, 3, 4])
    assert (flat.starts, flat.lengths, flat.pages) == ([0, 6, 8], [6, 5], [[1, 2], [0, 3]])
    assert flat.slots == [4, 5, 6, 7, 8, 9, 3, 12]
    assert allocator.lay_out([(Sequence(), [1]), (Sequence(), [1] * 5)]).table() == [[4, 0], [5, 6]]
