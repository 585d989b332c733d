"""Scores a model folder by running its blocks one after the other in float32, on a CPU or a GPU.

The figures equal `fewbit eval --exact`; on a GPU a table of many rows takes minutes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from fewbit.blocks import FloatBlock, embed
from fewbit.formats import parse
from fewbit.source import Source, open_source

WINDOW, FIRST_SCORED, BATCH = 512, 256, 4


def windows(model: Path, text: Path, count: int, first: int = 0) -> Tensor:
    """Windows `first` .. `first + count` of a text tokenized whole, int64 [<= count, 512]."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    whole = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    return whole[first : first + count]


@torch.inference_mode()
def hidden(source: Source, text: Tensor, device: torch.device) -> Tensor:
    """What the last block gives at the scored positions, float32 [n, 255, d]."""
    x = torch.cat(list(embed(source, text))).to(device)
    for i in range(source.args.num_hidden_layers):
        block = FloatBlock(source, i, WINDOW, device)
        x = torch.cat([block(part) for part in x.split(BATCH)])
    return x[:, FIRST_SCORED:-1]


class Head:
    """The final norm and the output head of a model, in float32."""

    def __init__(self, source: Source, device: torch.device) -> None:
        def dense(name: str) -> Tensor:
            return parse(source.spec(name)).dequantize(source.read(name)).to(device)

        roles = {w.role: w.name for w in source.weights}
        self.norm = dense("model.norm.weight")
        self.weight = dense(roles.get("head", roles["embedding"]))
        self.eps = source.args.rms_norm_eps

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [n, d] -> log-probabilities [n, vocab]."""
        return F.linear(F.rms_norm(x, x.shape[-1:], self.norm, self.eps), self.weight).log_softmax(-1)


class Reference:
    """The full-precision model's hidden states on some texts."""

    def __init__(self, model: Path, texts: dict[str, Tensor], device: torch.device) -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        self.source, self.texts, self.device = open_source(model), texts, device
        self.head = Head(self.source, device)
        self.hidden = {name: hidden(self.source, text, device) for name, text in texts.items()}

    @torch.inference_mode()
    def score(self, folder: Path) -> dict[str, dict[str, np.ndarray]]:
        """For each text: kl, agrees, loss and reference_loss of every scored token."""
        source = open_source(folder)
        head = Head(source, self.device)
        found = {}
        for name, text in self.texts.items():
            parts = []
            for ids, ours, theirs in zip(text, hidden(source, text, self.device), self.hidden[name], strict=True):
                p, q = self.head(theirs), head(ours)
                target = ids[FIRST_SCORED + 1 :, None].to(self.device)
                kl = (p.double().exp() * (p.double() - q.double())).sum(-1).float()
                agrees = (p.argmax(-1) == q.argmax(-1)).float()
                parts.append(torch.stack([kl, agrees, -q.gather(1, target)[:, 0], -p.gather(1, target)[:, 0]]))
            names = ("kl", "agrees", "loss", "reference_loss")
            found[name] = dict(zip(names, torch.cat(parts, 1).cpu().numpy(), strict=True))
        return found
