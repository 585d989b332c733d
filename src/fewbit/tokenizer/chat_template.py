"""Chat templates are programs that come with a model: they run in a sandbox with a budget of work (see `_sandbox`)."""

from __future__ import annotations

import json
import re
from datetime import datetime
from functools import partial
from typing import Any

from jinja2 import TemplateError

from fewbit.errors import FewbitError
from fewbit.tokenizer._sandbox import BUDGET, MAX_TEXT, Sandbox

MAX_OUTPUT = MAX_TEXT
MAX_SOURCE = 1 << 18
MAX_ITERATIONS = 1 << 20


class ChatTemplate:
    """A compiled template; FewbitError where it is too long, or not one Jinja can read."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise FewbitError(
                "The model's chat template is too long.",
                f"It has {len(source):,} characters; at most {MAX_SOURCE:,} are read.",
                "Use a plain prompt (`--raw`), or check where the model came from.",
            )
        self.environment = Sandbox()
        self.environment.add_filter("tojson", _tojson)
        try:
            self.template = self.environment.from_string(self.environment.prepare(source))
        # besides Jinja's own errors, Python's compiler has several for code that nests too deep
        except Exception as e:
            raise FewbitError(
                "The model's chat template can't be read.",
                _said(e),
                "Use a plain prompt (`--raw`), or check where the model came from.",
            ) from e

    def render(self, now: datetime | None = None, /, **values: Any) -> str:
        """The rendered text; FewbitError where the template fails, objects, or spends its budget."""
        pieces, size = [], 0
        tools = {"range": _range, "raise_exception": _raise, "strftime_now": partial(_strftime_now, now)}
        self.environment.budget = BUDGET
        try:
            for piece in self.template.generate(**tools, **values):
                size += len(piece)
                if size > MAX_OUTPUT:
                    raise TemplateError(f"the template writes more than {MAX_OUTPUT:,} characters")
                pieces.append(piece)
        # whatever a template makes Python raise is the template's failure
        except Exception as e:
            raise FewbitError(
                "The model's chat template refused the conversation.",
                _said(e),
                "Check the order and roles of the messages, or use a plain prompt (`--raw`).",
            ) from e
        return "".join(pieces)


def _said(error: Exception) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text if len(text) <= 500 else text[:500] + '…'}."


def _range(*bounds: int) -> range:
    found = range(*bounds)
    if len(found) > MAX_ITERATIONS:
        raise TemplateError(f"the template loops more than {MAX_ITERATIONS:,} times")
    return found


def _strftime_now(now: datetime | None, pattern: str) -> str:
    """The time given, or the local one; no padding to a width, which C libraries take to any length."""
    if len(pattern) > 200 or re.search(r"%[-_0^#+]*\d", pattern):
        raise TemplateError(f"the time format {pattern[:40]!r} is not one a template may use")
    return (now or datetime.now()).strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As templates know it from transformers: not escaped for HTML."""
    if indent is not None and not 0 <= indent <= 16:
        raise TemplateError("tojson indents by 16 at most")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)
