"""Text to token ids and back, the chat template, and text that arrives token by token."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from fewbit.checkpoint import TokenizerData
from fewbit.errors import FewbitError
from fewbit.tokenizer.chat_template import ChatTemplate

# the beginning of a character is at most three bytes, shown as one to three U+FFFD by the kinds of decoders
LONGEST_BEGINNING = 3
# ids that are decoded again with each new one, where none of them ends a character
LONGEST_WINDOW = 32


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

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids; a model that wants a BOS gets one, unless `bos` is False or the text begins with it."""
        try:
            ids: list[int] = self.inner.encode(text, add_special_tokens=False).ids
        # the library takes no half of a surrogate pair, which is how Python shows bytes that are not text
        except (TypeError, UnicodeEncodeError) as e:
            at = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if at is None:
                raise
            raise FewbitError(
                "The text is not valid Unicode.",
                f"Character {at:,} is the lone surrogate U+{ord(text[at]):04X}.",
                "Save the text as UTF-8, or leave the character out.",
            ) from e
        if bos and self.add_bos and self.data.bos_token_id is not None and ids[:1] != [self.data.bos_token_id]:
            return [self.data.bos_token_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of the ids."""
        return str(self.inner.decode(list(ids), skip_special_tokens=skip_special))

    def render(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True, now: datetime | None = None
    ) -> str:
        """The conversation as the model was taught to read it; without a template, the contents line by line.

        `now` is the time a template that writes the date is told (default: the clock's).
        """
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
            now, messages=list(messages), add_generation_prompt=add_generation_prompt, **tokens
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
        # characters after those of ids[context:start] that were given out already
        self.sent = 0
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
        open_end = 0 if final else min(len(after) - len(after.rstrip("\ufffd")), LONGEST_BEGINNING)
        sure = len(after) - open_end - len(before)
        if sure > self.sent:
            self.held += after[len(before) + self.sent : len(before) + sure]
            self.sent = sure
        if not open_end:
            self.context, self.start, self.sent = self.start, len(self.ids), 0
        elif len(self.ids) - self.start > LONGEST_WINDOW:
            self._shorten(after, len(before) + self.sent)
        return self._release(final)

    def _shorten(self, after: str, given: int) -> None:
        """Settle the ids before a point where the bytes break, so that endless broken ones cost the same each."""
        for cut in range(len(self.ids) - LONGEST_BEGINNING - 1, self.start, -1):
            before = self.tokenizer.decode(self.ids[self.context : cut])
            # a character cut in two would show otherwise
            if len(before) <= given and before + self.tokenizer.decode(self.ids[cut:]) == after:
                self.context, self.start, self.sent = cut, cut, given - len(before)
                return

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
