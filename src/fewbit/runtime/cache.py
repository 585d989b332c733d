"""Who owns which page of the cache: plain Python, no torch. A page holds `page_size` consecutive tokens of one
sequence; pages need not be neighbours.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field

from fewbit.errors import FewbitError

PAGE_SIZE = 256


@dataclass
class Sequence:
    """One conversation: the tokens whose keys and values are cached, and the pages that hold them."""

    ids: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)

    def slot(self, position: int, page_size: int = PAGE_SIZE) -> int:
        """Cache row of a token."""
        return self.pages[position // page_size] * page_size + position % page_size

    def common_prefix(self, ids: list[int]) -> int:
        """How many leading tokens of `ids` are cached already."""
        return next(
            (i for i, (a, b) in enumerate(zip(self.ids, ids, strict=False)) if a != b), min(len(self.ids), len(ids))
        )


# sequences with the new tokens of each
Steps = abc.Sequence[tuple[Sequence, abc.Sequence[int]]]


@dataclass(frozen=True)
class FlatStep:
    """The new tokens of several sequences, one after the other, as `kernels.ops.Batch` has them."""

    ids: list[int]
    positions: list[int]
    # cache row of each
    slots: list[int]
    # first new token of each sequence, and the one behind the last
    starts: list[int]
    # of the sequences, with their new tokens
    lengths: list[int]
    # of each sequence
    pages: list[list[int]]

    def table(self) -> list[list[int]]:
        """The pages, filled up to the same number everywhere."""
        longest = max(len(pages) for pages in self.pages)
        return [pages + [0] * (longest - len(pages)) for pages in self.pages]


class PageAllocator:
    """Hands out pages and takes them back."""

    def __init__(self, pages: int, page_size: int = PAGE_SIZE) -> None:
        self.page_size = page_size
        # lowest first, so that a lone sequence lies contiguously
        self.free = list(range(pages - 1, -1, -1))
        self.pages = pages

    def reserve(self, sequence: Sequence, tokens: int) -> None:
        """Pages for a sequence of `tokens` tokens; FewbitError where too few are left, with nothing taken."""
        missing = -(-tokens // self.page_size) - len(sequence.pages)
        if missing > len(self.free):
            raise FewbitError(
                "The cache has no room for more tokens.",
                f"{tokens:,} tokens need {missing} more pages of {self.page_size} tokens; {len(self.free)} are free.",
                "Load the model with a larger context (`--context`).",
            )
        sequence.pages += [self.free.pop() for _ in range(missing)]

    def lay_out(self, steps: Steps) -> FlatStep:
        """Where the new tokens of a step go, with pages reserved for them; the sequences' ids are left as they are."""
        flat = FlatStep([], [], [], [0], [], [])
        for sequence, new in steps:
            have = len(sequence.ids)
            places = range(have, have + len(new))
            self.reserve(sequence, places.stop)
            flat.ids.extend(new)
            flat.positions.extend(places)
            flat.slots.extend(sequence.slot(p, self.page_size) for p in places)
            flat.starts.append(len(flat.slots))
            flat.lengths.append(places.stop)
            flat.pages.append(sequence.pages)
        return flat

    def truncate(self, sequence: Sequence, tokens: int) -> None:
        """Forget all but the first `tokens` tokens and give back the pages behind them."""
        del sequence.ids[tokens:]
        keep = -(-tokens // self.page_size)
        self.free += reversed(sequence.pages[keep:])
        del sequence.pages[keep:]
