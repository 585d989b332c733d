"""Chat templates are programs that come with a model: they run in a sandbox, with their loops and output bounded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fewbit.errors import FewbitError

MAX_OUTPUT = 1 << 24
MAX_ITERATIONS = 1 << 20


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with repetition and powers bounded too."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or (isinstance(left, str | list | tuple) or isinstance(right, str | list | tuple)):
            count = right if isinstance(right, int) else left
            if operator == "**" or not isinstance(count, int) or count > MAX_ITERATIONS:
                raise TemplateError(f"{operator} is too large for a template")
        return super().call_binop(context, operator, left, right)


class _Range:
    """`range`, counted over the whole rendering."""

    def __init__(self) -> None:
        self.left = MAX_ITERATIONS

    def __call__(self, *bounds: int) -> Iterator[int]:
        found = range(*bounds)
        self.left -= len(found)
        if self.left < 0:
            raise TemplateError(f"the template loops more than {MAX_ITERATIONS:,} times")
        return iter(found)


class ChatTemplate:
    """A compiled template."""

    def __init__(self, source: str) -> None:
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = _tojson
        try:
            self.template = environment.from_string(source)
        except (TemplateError, RecursionError) as e:
            raise _failed(e) from e

    def render(self, **values: Any) -> str:
        """The rendered text; FewbitError where the template fails, objects, or grows out of bounds."""
        pieces, size = [], 0
        tools = {"range": _Range(), "raise_exception": _raise, "strftime_now": datetime.now().strftime}
        try:
            for piece in self.template.generate(**tools, **values):
                size += len(piece)
                if size > MAX_OUTPUT:
                    raise TemplateError(f"the template writes more than {MAX_OUTPUT:,} characters")
                pieces.append(piece)
        except (TemplateError, RecursionError, ArithmeticError, TypeError, ValueError, LookupError) as e:
            raise _failed(e) from e
        return "".join(pieces)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _failed(error: Exception) -> FewbitError:
    return FewbitError(
        "The model's chat template refused the conversation.",
        f"{type(error).__name__}: {error}.",
        "Check the order and roles of the messages, or use a plain prompt (`--raw`).",
    )
