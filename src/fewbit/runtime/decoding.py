"""One token after the other, the model in between. On a card the next step begins before the host knows its token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewbit.errors import FewbitError
from fewbit.runtime.cache import Sequence
from fewbit.runtime.sampler import Sampler

if TYPE_CHECKING:
    from fewbit.runtime.engine import LanguageModel


def decode(
    model: LanguageModel,
    sequence: Sequence,
    logits: Tensor,
    sampler: Sampler,
    history: list[int],
    count: int,
    owner: object,
) -> Iterator[int]:
    """At most `count` tokens that follow from `logits` [vocab], added to `history` one by one.

    A step that began for a token which turns out to be the last is forgotten. Raises as `LanguageModel.prefill` does.
    """
    for i in range(count):
        following: Tensor | None = None
        if model.runs_ahead and (choice := sampler.start(logits, history)) is not None:
            if i + 1 < count:
                following = model.step_ahead(sequence, choice.ids, owner)
            token = choice.tokens()[0]
        else:
            token = sampler(logits, history)
        if token < 0:
            raise not_finite(logits, len(sequence.ids))
        history.append(token)
        yield token
        if i + 1 == count:
            return
        if following is None:
            logits = model.prefill(sequence, [token], owner)
        else:
            model.keep(sequence, token, owner)
            logits = following


def not_finite(logits: Tensor, tokens: int) -> FewbitError:
    """The model's output after `tokens` tokens can't be sampled from."""
    broken = int((~torch.isfinite(logits)).sum())
    return FewbitError(
        "The model's output is not a number.",
        f"{broken:,} of {logits.numel():,} logits after {tokens} tokens.",
        "Its weights are damaged or overflow: try --exact, or `fewbit quantize`, which names a broken tensor.",
    )
