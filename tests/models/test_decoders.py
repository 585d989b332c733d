"""Every architecture against transformers: logits, in pieces and side by side, and block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit.blocks import FloatBlock, embed
from fewbit.passes import propagate
from fewbit.runtime.cache import PAGE_SIZE, PageAllocator, Sequence
from fewbit.source import open_source
from tests.models.decoders import CASE_NAMES, CASES, transformers_model, written

IDS = torch.randint(256, (40,), generator=torch.Generator().manual_seed(3)).tolist()
CPU = torch.device("cpu")


@pytest.mark.parametrize(("model_type", "changes"), CASES, ids=CASE_NAMES)
def test_logits_equal_transformers(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    folder = written(tmp_path / "m", model_type, changes)
    theirs = transformers_model(folder)
    with torch.inference_mode():
        output = theirs.model(torch.tensor([IDS]), output_hidden_states=True)
        expected = theirs(torch.tensor([IDS])).logits[0]
    # the context says which rotation a stretched model takes
    model = fewbit.load(folder, exact=True, context=len(IDS))
    whole = model.forward([(Sequence(), list(IDS))], wanted=list(range(len(IDS))))
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4)

    # in pieces, from the cache, on scattered pages, and beside another sequence
    model.model.allocate(4 * PAGE_SIZE, torch.float32)
    model.allocator = PageAllocator(4)
    model.allocator.free.reverse()
    sequence, other = Sequence(), Sequence()
    pieces = [model.forward([(sequence, IDS[:11])], wanted=list(range(11)))]
    both = model.forward([(sequence, IDS[11:12]), (other, IDS[:20])], wanted=list(range(21)))
    pieces += [both[:1], model.forward([(sequence, IDS[12:]), (other, IDS[20:21])], wanted=list(range(28)))]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[1:], whole[:20], rtol=1e-4, atol=1e-4)

    # a block at a time, as calibration sees it
    source = open_source(folder)
    hidden = torch.cat(list(embed(source, torch.tensor([IDS, IDS[::-1]]))))
    torch.testing.assert_close(hidden[:1], output.hidden_states[0], rtol=1e-6, atol=1e-6)
    for i in range(source.args.num_hidden_layers - 1):
        propagate(FloatBlock(source, i, len(IDS), CPU), hidden)
        torch.testing.assert_close(hidden[:1], output.hidden_states[i + 1], rtol=1e-4, atol=1e-4)
