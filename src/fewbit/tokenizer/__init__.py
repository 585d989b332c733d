"""Text to token ids and back, the chat template, and text that arrives token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fewbit.checkpoint import TokenizerData
from fewbit.errors import FewbitError
from fewbit.tokenizer.chat_template import ChatTemplate

# a character spans at most four byte tokens; more that don't decode are not one
LONGEST_CHARACTER = 4


class Tokenizer:
    """A tokenizers.Tokenizer with the model's special ids and chat template."""

    def __init__(self, data: TokenizerData) -> None:
        import tokenizers

        try:
            self.inner = tokenizers.Tokenizer.from_str(data.json)
        # the library raises bare Exception for anything it can't read
        except Exception as e:
            raise FewbitError("The model's tokenizer can't be read.", f"{e}.", "Download tokenizer.json again.") from e
        self.inner.no_truncation()
        self.inner.no_padding()
        self.data = data
        self.add_bos = data.bos_token_id is not None and (data.add_bos or self._template_adds(data.bos_token_id))
        self.eos_ids = frozenset(data.eos_token_ids)
        self.chat_template = data.chat_template

    def _template_adds(self, bos: int) -> bool:
        return bool(self.inner.encode("a").ids[:1] == [bos])

    @property
    def vocabulary(self) -> int:
        """Ids the tokenizer knows."""
        return int(self.inner.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids; a model that wants a BOS gets one, unless `bos` is False or the text begins with it."""
        ids: list[int] = self.inner.encode(text, add_special_tokens=False).ids
        if bos and self.add_bos and self.data.bos_token_id is not None and ids[:1] != [self.data.bos_token_id]:
            return [self.data.bos_token_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of the ids."""
        return str(self.inner.decode(list(ids), skip_special_tokens=skip_special))

    def render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model was taught to read it; without a template, the contents line by line."""
        if self.chat_template is None:
            return "\n".join(str(m["content"]) for m in messages) + "\n"
        tokens = {
            name: self.inner.id_to_token(i) if i is not None else ""
            for name, i in (
                ("bos_token", self.data.bos_token_id),
                ("eos_token", next(iter(self.data.eos_token_ids), None)),
            )
        }
        return ChatTemplate(self.chat_template).render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, **tokens
        )


class TextStream:
    """Turns ids that come one by one into text pieces that never break a character.

    A piece is held back while its bytes may be the beginning of a character, or its text that of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, [s for s in stop if s]
        self.ids: list[int] = []
        # ids[:start] are settled; their decoded tail gives the next ones their context (leading spaces)
        self.context = self.start = 0
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain after one more token."""
        self.ids.append(token)
        return self._take(final=False)

    def flush(self) -> str:
        """What is left at the end, incomplete bytes shown as U+FFFD."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        if self.stopped:
            return ""
        before = self.tokenizer.decode(self.ids[self.context : self.start])
        after = self.tokenizer.decode(self.ids[self.context :])
        broken = after.endswith("\ufffd") and len(self.ids) - self.start < LONGEST_CHARACTER
        if not broken or final:
            self.held += after[len(before) :]
            self.context, self.start = self.start, len(self.ids)
        return self._release(final)

    def _release(self, final: bool) -> str:
        cut = min((i for s in self.stop if (i := self.held.find(s)) >= 0), default=-1)
        if cut >= 0:
            self.stopped = True
            text, self.held = self.held[:cut], ""
            return text
        keep = 0 if final else max((_overlap(self.held, s) for s in self.stop), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
