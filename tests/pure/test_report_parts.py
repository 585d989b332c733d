"""Labels, names and signs of the report."""

from __future__ import annotations

import itertools
import math

from hypothesis import example, given
from hypothesis import strategies as st

from fewbit.report import charts, page
from tests._report import quality


@given(st.lists(st.floats(1e-6, 10), min_size=1, max_size=20))
@example([1.375])
def test_labels_do_not_lie_over_one_another(losses: list[float]) -> None:
    low, high = charts._log_domain([quality(str(i), kl) for i, kl in enumerate(losses)])
    assert low < min(losses)
    assert max(losses) < high
    height = max(340, (charts.LABEL + 3) * len(losses))
    placed = charts._spread_labels(dict(enumerate(losses)), low, high, height)
    pixels = {i: math.log(high / v) / math.log(high / low) * height for i, v in placed.items()}
    order = sorted(pixels, key=lambda i: pixels[i])
    assert all(pixels[b] - pixels[a] > charts.LABEL - 1.5 for a, b in itertools.pairwise(order))
    assert [losses[i] for i in order] == sorted(losses, reverse=True)
    assert all(0 <= y <= height for y in pixels.values())
    ticks = charts._log_ticks(low, high)
    assert ticks
    assert all(low <= t <= high for t in ticks)


def test_names_are_short_and_tell_models_apart() -> None:
    assert page.short_names(["/a/x/q4", "/a/y/q4", "smollm2", "b.gguf"]) == ["x/q4", "y/q4", "smollm2", "b.gguf"]
    assert page.short_names(["same", "same"]) == ["same", "same"]
    assert page.short_names(["/", "."]) == ["/", "."]
    long = ["SmolLM2-135M-Instruct-int4g64", "SmolLM2-135M-Instruct-int3"]
    assert page.trimmed(long) == ["…int4g64", "…int3"]
    assert page.trimmed(["tiny-int4", "tiny-int3"]) == ["tiny-int4", "tiny-int3"]
    assert page.trimmed(long[:1]) == long[:1]


def test_characters_that_hide_are_shown() -> None:
    assert page.signs("  a\tb\n") == "␣␣a⇥b↵"
    assert page.signs("   ") == "␣␣␣"
    assert page.lines("a\u202eb\x00c\n\u2066") == "a⟨U+202E⟩b⟨U+0000⟩c\n⟨U+2066⟩"
    # every format character, whatever it is good for: two tokens that differ must be seen to
    assert page.lines("می\u200cشود") == "می⟨U+200C⟩شود"
    for c in "\u00ad\u061c\u180e\u200d\u2028\u2061\ufff9\U000e0041":
        assert page.signs(f"a{c}b") == f"a⟨U+{ord(c):04X}⟩b"
    assert page.percent(0.00941) == "0.941 %"
    assert page.percent(0.0) == "0 %"
    assert page.percent(None) == "not a number"
