"""Pages, sampling, streaming text and chat templates: plain parts without a model."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.checkpoint import TokenizerData
from fewbit.errors import FewbitError
from fewbit.runtime.cache import PageAllocator, Sequence
from fewbit.runtime.sampler import Sampler, Sampling, candidates
from fewbit.tokenizer import TextStream, Tokenizer
from fewbit.tokenizer.chat_template import ChatTemplate
from tests.conftest import byte_tokenizer

TOKENIZER = Tokenizer(TokenizerData(byte_tokenizer().to_str(), None, 256, (257,)))


@given(st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_pages_are_never_shared_and_never_lost(seed: int) -> None:
    rng = random.Random(seed)
    allocator = PageAllocator(12, page_size=4)
    sequences = [Sequence() for _ in range(4)]
    for _ in range(60):
        s = rng.choice(sequences)
        if rng.random() < 0.6:
            new = rng.randrange(1, 9)
            before = list(s.pages)
            try:
                allocator.reserve(s, len(s.ids) + new)
            except FewbitError:
                assert s.pages == before
                continue
            s.ids += range(new)
        else:
            allocator.truncate(s, rng.randrange(len(s.ids) + 1))
        owned = [p for q in sequences for p in q.pages]
        assert sorted(owned + allocator.free) == list(range(12))
        slots = [q.slot(i, 4) for q in sequences for i in range(len(q.ids))]
        assert len(set(slots)) == len(slots)


def test_a_lone_sequence_lies_contiguously() -> None:
    allocator, s = PageAllocator(4, 8), Sequence()
    allocator.reserve(s, 25)
    assert s.pages == [0, 1, 2, 3]
    s.ids = list(range(25))
    allocator.truncate(s, 9)
    assert (s.pages, s.ids) == ([0, 1], list(range(9)))
    allocator.reserve(s, 25)
    assert s.pages == [0, 1, 2, 3]


def test_common_prefix() -> None:
    s = Sequence(ids=[1, 2, 3])
    assert [s.common_prefix(x) for x in ([1, 2, 3, 4], [1, 2], [1, 9, 3], [], [7])] == [3, 2, 1, 0, 0]


def draws(sampling: Sampling, logits: torch.Tensor, n: int = 4000, history: tuple[int, ...] = ()) -> torch.Tensor:
    sampler = Sampler(sampling)
    return torch.bincount(torch.tensor([sampler(logits, history) for _ in range(n)]), minlength=len(logits)) / n


LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -5.0])


def test_greedy_is_argmax_and_a_seed_repeats() -> None:
    assert Sampler(Sampling())(LOGITS, ()) == 0
    one, two = (Sampler(Sampling(temperature=1.0, seed=7)) for _ in range(2))
    assert [one(LOGITS, ()) for _ in range(50)] == [two(LOGITS, ()) for _ in range(50)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_draws_from_the_softmax(temperature: float) -> None:
    got = draws(Sampling(temperature=temperature, seed=1), LOGITS)
    torch.testing.assert_close(got, (LOGITS / temperature).softmax(0), atol=0.04, rtol=0)


@pytest.mark.parametrize(
    ("sampling", "survivors"),
    [
        (Sampling(temperature=1.0, top_k=2, seed=1), [0, 1]),
        (Sampling(temperature=1.0, top_k=99, seed=1), [0, 1, 2, 3]),
        # probabilities 0.64 0.24 0.09 0.03 0.0006: the first two reach 0.8
        (Sampling(temperature=1.0, top_p=0.8, seed=1), [0, 1]),
        (Sampling(temperature=1.0, top_p=0.01, seed=1), [0]),
        (Sampling(temperature=1.0, min_p=0.1, seed=1), [0, 1, 2]),
        # among the top 3, renormalized (0.665 0.245 0.09), top-p 0.7 keeps two
        (Sampling(temperature=1.0, top_k=3, top_p=0.7, seed=1), [0, 1]),
    ],
)
def test_filters_keep_the_right_tokens_in_proportion(sampling: Sampling, survivors: list[int]) -> None:
    got = draws(sampling, LOGITS)
    expected = torch.zeros(5)
    expected[survivors] = LOGITS[survivors].softmax(0)
    torch.testing.assert_close(got, expected, atol=0.04, rtol=0)


def sorted_whole(logits: torch.Tensor, s: Sampling) -> tuple[list[float], list[int]]:
    """The filters' definition: every token sorted, then dropped one filter after the other."""
    values, ids = logits.sort(descending=True, stable=True)
    if s.top_k:
        values, ids = values[: s.top_k], ids[: s.top_k]
    p = values.double().softmax(0)
    inside = (p.cumsum(0) - p < s.top_p) | (torch.tensor(s.top_p) == 1)
    kept = max(1, int((inside & (p >= s.min_p * p[0])).sum()))
    return values[:kept].tolist(), ids[:kept].tolist()


@given(
    st.integers(0, 2**32),
    st.sampled_from([0, 1, 3, 40, 700, 5000]),
    st.sampled_from([1.0, 0.9999, 0.99, 0.9, 0.5, 0.01]),
    st.sampled_from([0.0, 0.01, 0.3]),
    st.sampled_from([0.0, 0.3, 4.0, 30.0]),
)
@settings(max_examples=200, deadline=None)
def test_no_candidate_differs_from_the_full_sorts(seed: int, k: int, p: float, low: float, spread: float) -> None:
    g = torch.Generator().manual_seed(seed)
    # on a grid, so that many are equal
    logits = (torch.randn(1500, generator=g) * spread * 8).round() / 8 - 3
    s = Sampling(temperature=1.0, top_k=k, top_p=p, min_p=low)
    values, ids = candidates(logits.numpy(), s)
    if s.top_k in (0, 5000) and p == 1.0 and not low:
        assert values.tolist() == logits.tolist()
        assert ids.tolist() == list(range(1500))
    else:
        theirs, their_ids = sorted_whole(logits, s)
        # the two sum in different orders: a token on top-p's very border may fall on either side
        assert abs(len(theirs) - len(ids)) <= (p < 1)
        assert (
            list(zip(values.tolist(), ids.tolist(), strict=True))[: len(theirs)]
            == list(zip(theirs, their_ids, strict=True))[: len(ids)]
        )


def test_top_p_of_a_flat_distribution_takes_enough_tokens() -> None:
    flat = torch.zeros(5000)
    seen = {Sampler(Sampling(temperature=1.0, top_p=0.9, seed=i))(flat, ()) for i in range(3000)}
    assert len(seen) > 1500


def test_a_temperature_next_to_zero_is_greedy() -> None:
    assert Sampler(Sampling(temperature=1e-40, seed=1))(LOGITS, ()) == 0


def test_repetition_penalty_divides_positive_and_multiplies_negative() -> None:
    sampler = Sampler(Sampling(repetition_penalty=3.0))
    assert sampler(torch.tensor([2.0, 1.0]), [0, 0]) == 1
    assert sampler(torch.tensor([-1.0, -2.5]), [0]) == 1
    assert sampler(torch.tensor([-1.0, -3.5]), [0]) == 0


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_k": -1},
        {"min_p": 1.0},
        {"repetition_penalty": 0.0},
        {"temperature": float("nan")},
        {"seed": 10**20},
    ],
)
def test_settings_out_of_range_are_errors(setting: dict[str, float]) -> None:
    with pytest.raises(FewbitError, match=next(iter(setting))):
        Sampling(**setting)  # type: ignore[arg-type]


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_streamed_text_is_whole_and_never_breaks_a_character(text: str) -> None:
    text = text.replace("\ufffd", "?")
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(i) for i in TOKENIZER.encode(text, bos=False)]
    assert not any("\ufffd" in p for p in pieces)
    assert "".join(pieces) + stream.flush() == text


# ByteLevel's character for each byte: printable ones are themselves, the others follow from U+0100 on
_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_CHARACTERS = {b: chr(b) for b in _PRINTED} | {
    b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in _PRINTED)
}
BYTE_TOKENS = [sorted(_CHARACTERS.values()).index(_CHARACTERS[b]) for b in range(256)]


def byte_ids(data: bytes) -> list[int]:
    """The token of each byte; the tokenizer's vocabulary is the sorted alphabet of ByteLevel."""
    return [BYTE_TOKENS[b] for b in data]


@given(st.lists(st.one_of(st.binary(max_size=4), st.sampled_from(["é", "😀", "€", "a"]).map(str.encode))))
@settings(max_examples=300, deadline=None)
def test_any_bytes_stream_as_they_decode(parts: list[bytes]) -> None:
    ids = byte_ids(b"".join(parts))
    whole, stream, got = TOKENIZER.decode(ids), TextStream(TOKENIZER), ""
    for i in ids:
        got += stream.push(i)
        # what was given out is never taken back: no half of a character that is whole in the end
        assert whole.startswith(got)
    assert got + stream.flush() == whole


def test_a_character_after_a_broken_byte_is_whole() -> None:
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(i) for i in byte_ids(b"\x80\xf0\x9f\x98\x80")]
    assert "".join(pieces) + stream.flush() == "\ufffd😀"


def test_endless_broken_bytes_are_decoded_in_short_windows() -> None:
    stream = TextStream(TOKENIZER)
    ids = byte_ids(b"\x80\xff\xe2" * 200)
    got = "".join(stream.push(i) for i in ids)
    assert len(stream.ids) - stream.context < 100
    assert got + stream.flush() == TOKENIZER.decode(ids)


def test_text_with_a_lone_surrogate_is_an_error() -> None:
    with pytest.raises(FewbitError, match="Unicode") as caught:
        TOKENIZER.encode("caf\udce9")
    assert "Character 3" in caught.value.facts
    caught.value.to_dict()["facts"].encode()


def test_broken_bytes_do_not_hold_the_stream_back_for_ever() -> None:
    stream = TextStream(TOKENIZER)
    lone = TOKENIZER.encode("é", bos=False)[0]
    pieces = [stream.push(i) for i in [lone] * 6 + TOKENIZER.encode("abc", bos=False)]
    assert ("".join(pieces) + stream.flush()).endswith("abc")
    assert "\ufffd" in "".join(pieces)


@given(st.text("abXY", max_size=30), st.lists(st.text("abXY", min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_stop_strings_cut_the_text_where_they_begin(text: str, stop: list[str]) -> None:
    stream, got = TextStream(TOKENIZER, stop), ""
    for i in TOKENIZER.encode(text, bos=False):
        got += stream.push(i)
        if stream.stopped:
            break
    got += stream.flush()
    # the first stop string to be complete ends the text
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    expected = text
    if ends:
        first = min(e for e, _ in ends)
        expected = text[: min(at for e, at in ends if e == first)]
    assert got == expected


def test_template_renders_and_sees_its_tokens() -> None:
    template = ChatTemplate("{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    text = template.render(messages=[{"role": "user", "content": "<hi>"}], bos_token="<s>")  # noqa: S106
    assert text == "<s>[user] <hi>\n"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 999999999 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{% for %}",
        "{{ messages[7].content }}",
    ],
)
def test_hostile_and_broken_templates_are_errors(source: str) -> None:
    with pytest.raises(FewbitError, match="chat template"):
        ChatTemplate(source).render(messages=[{"role": "user", "content": "x"}])


def test_bos_is_added_once() -> None:
    wants = Tokenizer(TokenizerData(byte_tokenizer().to_str(), None, 256, (257,), add_bos=True))
    assert wants.encode("a")[0] == 256
    assert wants.encode("<|im_start|>a").count(256) == 1
    assert wants.encode("a", bos=False) == TOKENIZER.encode("a")


def test_a_broken_tokenizer_is_an_error() -> None:
    with pytest.raises(FewbitError, match="tokenizer"):
        Tokenizer(TokenizerData("{}"))
