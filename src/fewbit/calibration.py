"""Text into token windows."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fewbit.errors import FewbitError
from fewbit.tokenizer import Tokenizer


def read_text(file: Path) -> str:
    """A text file as UTF-8; FewbitError says where it is something else."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise FewbitError(
            f"{str(file)!r} is not a UTF-8 text.", f"Byte {e.start:,} is {e.object[e.start]:#04x}.", "Give a text file."
        ) from e
    except OSError as e:
        raise FewbitError(
            f"The text {str(file)!r} can't be read.", f"{e.strerror}.", "Check the path and its permissions."
        ) from e


def windows(text: str, tokenizer: Tokenizer, length: int, most: int) -> Tensor:
    """The first `most` consecutive windows of `length` tokens, int64 [n, length].

    A model that begins its texts with a BOS gets it in place of each window's first token. Raises FewbitError where
    the text does not fill one window.
    """
    ids = tokenizer.encode(text, bos=False)
    count = min(len(ids) // length, most)
    if not count:
        raise FewbitError(
            "The text is too short.",
            f"It has {len(ids):,} tokens; one window takes {length}.",
            "Give a longer text: a few thousand words measure well.",
        )
    found = torch.tensor(ids[: count * length]).reshape(count, length)
    if tokenizer.add_bos and tokenizer.data.bos_token_id is not None:
        found[:, 0] = tokenizer.data.bos_token_id
    return found
