"""Jinja's sandbox with a budget: what a template reads, makes and writes is counted, and it stops where that is spent.

Jinja bounds neither time nor memory. Before a template is compiled, a counter is put into the body of each of its
loops, macros and blocks, and around the expressions that can grow; filters, calls and operators count by themselves.
A unit is about a character made or an item looked at. The count is of the order of the work, not a clock: a template
that spends all of it takes seconds, and a value may be as large as MAX_TEXT for a moment before it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from functools import wraps
from typing import Any, Final

from jinja2 import TemplateError, nodes, pass_context
from jinja2.filters import do_batch, do_indent, do_round, make_attrgetter
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

BUDGET: Final = 1 << 26
# units of one step through a piece of template, for each of its nodes
STEP: Final = 16
MAX_TEXT: Final = 1 << 24
# units of a list with all that is in it
MAX_ITEMS: Final = 1 << 22
MAX_INTEGER_BITS: Final = 4096


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


# what chat templates use; left out are those that pad or wrap to any width
FILTERS: Final = _words(
    "abs batch capitalize count d default dictsort first float groupby indent int items join last length list lower",
    "map max min reject rejectattr replace reverse round select selectattr sort string sum title trim unique",
    "upper wordcount",
)
# of these the arguments are made into text, whatever they hold
TEXT_FILTERS: Final = _words(
    "capitalize indent join lower replace string title trim upper wordcount sort max min unique groupby dictsort",
    "tojson safe e escape",
)
METHODS: Final[dict[type, frozenset[str]]] = {
    str: _words(
        "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric",
        "isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition",
        "rsplit rstrip split splitlines startswith strip swapcase title upper",
    ),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    range: frozenset(),
    int: frozenset(),
    float: frozenset({"is_integer"}),
    bytes: frozenset(),
}
# printf conversions without a wide field: %s, %02d, %.2f
_PRINTF = re.compile(r"(?:[^%]|%0?\d{0,2}(?:\.\d{1,2})?[sdifrx%])*")
_CONTAINERS = (list, tuple, dict, set, frozenset, KeysView, ValuesView, ItemsView, Namespace)


class Sandbox(ImmutableSandboxedEnvironment):
    """One template's environment; `budget` is what it has left."""

    intercepted_binops = frozenset({"+", "-", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], finalize=self.text
        )
        self.budget = BUDGET
        self.globals = {"dict": dict, "namespace": Namespace}
        known: dict[str, Callable[..., Any]] = {name: self.filters[name] for name in FILTERS}
        known |= {"replace": self._replace, "join": self._join, "indent": self._indent}
        known |= {"batch": self._batch, "round": self._round}
        known |= {"safe": lambda value: str(value), "e": _escape, "escape": _escape}
        self.filters: dict[str, Callable[..., Any]] = {name: self._counted(name, f) for name, f in known.items()}
        self.filters |= {"_text": self.text, "_made": self.made, "_seen": self.seen, "_step": self._step}
        tests: Any = self.tests
        self.tests = {name: self._counted(name, f) for name, f in tests.items()}

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """A filter of fewbit's own, counted as the others are."""
        self.filters[name] = self._counted(name, function)

    def prepare(self, source: str) -> nodes.Template:
        """The template's tree with its counters, for `from_string`."""
        tree: nodes.Template = _Counters().visit(self.parse(source))
        tree.set_environment(self)
        return tree

    # counting

    def spend(self, units: int) -> None:
        """Take from the budget; TemplateError where it is spent."""
        self.budget -= units
        if self.budget < 0:
            raise TemplateError(f"the template does more work than {BUDGET:,} steps")

    def seen(self, value: Any) -> Any:
        """Count a value that is read whole: compared, searched, cut."""
        self.spend(1 + (len(value) >> 4 if isinstance(value, str | bytes | range) else self._walk(value, False)))
        return value

    def made(self, value: Any) -> Any:
        """Count a value the template has made. An iterator becomes a list: what feeds it is then known to end."""
        if isinstance(value, Iterator) and not isinstance(value, LoopContext):
            value = list(self._limited(value))
        if isinstance(value, str | bytes):
            self._fits(len(value))
        elif isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
            raise TemplateError("the template makes a number too large")
        else:
            self.spend(self._walk(value, False))
        return value

    def text(self, value: Any) -> Any:
        """Count a value that is made into text."""
        self._fits(len(value) if isinstance(value, str) else self._walk(value, True))
        return value

    def _fits(self, size: int) -> None:
        if size > MAX_TEXT:
            raise TemplateError(f"the template makes a text of more than {MAX_TEXT:,} characters")
        self.spend(1 + size)

    def _limited(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.spend(STEP)
            yield value

    def _walk(self, value: Any, texts: bool) -> int:
        """Items in a value, those of shared parts as often as they appear; with `texts`, characters too."""
        total, waiting = 1, [value]
        while waiting:
            item = waiting.pop()
            if texts and isinstance(item, str | bytes):
                total += len(item)
            elif texts and isinstance(item, int):
                total += item.bit_length() >> 1
            elif isinstance(item, _CONTAINERS):
                inner = item._Namespace__attrs if isinstance(item, Namespace) else item
                total += STEP * len(inner)
                waiting += [*inner, *inner.values()] if isinstance(inner, dict) else inner
            if total > self.budget:
                self.spend(total)
            if total > (MAX_TEXT if texts else MAX_ITEMS):
                raise TemplateError("the template makes a value too large")
        return total

    @staticmethod
    @pass_context
    def _step(context: Any, nodes_passed: int) -> bool:
        # a context makes the compiler leave it in: a constant would be worked out once
        context.environment.spend(STEP * nodes_passed)
        return True

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            values = [self.made(v) if isinstance(v, Iterator) else v for v in args]
            for value in (*values, *kwargs.values()):
                # a string is text already; its length counts where something is made of it
                (self.text if name in TEXT_FILTERS and not isinstance(value, str) else self.seen)(value)
            return self.made(function(*values, **kwargs))

        return run

    # growth that is known before it happens

    def _replace(self, value: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = str(value), str(old), str(new)
        self._replacement(text, old, new)
        return text.replace(old, new, -1 if count is None else count)

    def _replacement(self, text: str, old: str = "", new: str = "") -> None:
        self._fits(len(text) + (text.count(old) if old else len(text) + 1) * len(new))

    def _join(self, values: Any, glue: Any = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            values = map(make_attrgetter(self, attribute), values)
        pieces, glue = [str(self.text(v)) for v in values], str(glue)
        self._fits(len(pieces) * len(glue))
        return str(glue.join(pieces))

    def _indent(self, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text, wide = str(value), len(width) if isinstance(width, str) else width
        self._fits(len(text) + (text.count("\n") + 1) * max(wide, 0))
        return str(do_indent(text, width, first, blank))

    def _batch(self, value: Any, linecount: int, fill_with: Any = None) -> Iterator[list[Any]]:
        self._fits(STEP * max(linecount, 0))
        return do_batch(value, linecount, fill_with)

    @staticmethod
    def _round(value: float, precision: int = 0, method: Any = "common") -> float:
        if not 0 <= precision <= 20:
            raise TemplateError("a template may round to 20 places at most")
        return do_round(value, precision, method)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise TemplateError("a template may not take powers")
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | bytes | list | tuple):
                    if not isinstance(times, int):
                        raise TemplateError("* needs a number")
                    size = len(value) if isinstance(value, str | bytes) else self._walk(value, False)
                    self._fits(max(times, 0) * size)
        if operator == "%" and isinstance(left, str | bytes):
            if not isinstance(left, str) or not _PRINTF.fullmatch(left):
                raise TemplateError(f"the format {left[:40]!r} is not one a template may use")
            self.text(right)
        elif isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple) and operator == "+":
            self.seen(left)
            self.seen(right)
        return self.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        self, owner = __self, getattr(__obj, "__self__", None)
        self.spend(STEP)
        name = getattr(__obj, "__name__", "")
        for value in (owner, *args, *kwargs.values()):
            self.seen(value)
        if isinstance(owner, str) and name == "join":
            args = tuple(self.text(self.made(a)) for a in args)
            self._fits(sum(len(a) for a in args if isinstance(a, (str, *_CONTAINERS[:-1]))) * len(owner))
        elif isinstance(owner, str) and name == "replace":
            self._replacement(owner, *[a for a in args if isinstance(a, str)][:2])
        return self.made(super().call(__context, __obj, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, allowed in METHODS.items():
            # a subclass's own attributes, such as a group's `grouper`, are not of the kind
            if isinstance(obj, kind) and hasattr(kind, attr):
                return attr in allowed
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No `format`: its fields may be of any width. `is_safe_attribute` then refuses it as any other method."""


_ESCAPES: Final = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "'": "&#39;", '"': "&#34;"})


def _escape(value: Any) -> str:
    """As the filter of Jinja, in plain text."""
    return str(value).translate(_ESCAPES)


class _Counters(NodeTransformer):
    """Puts the counters into a template's tree."""

    def __init__(self) -> None:
        self.changes: dict[type[nodes.Node], Callable[[Any], Any]] = {
            nodes.For: self._loop,
            nodes.Concat: self._concat,
            nodes.Compare: self._compare,
            nodes.Getitem: self._getitem,
            **dict.fromkeys((nodes.Macro, nodes.CallBlock, nodes.Block), self._body),
            **dict.fromkeys((nodes.List, nodes.Tuple, nodes.Dict), self._literal),
        }

    def _body(self, node: Any) -> Any:
        cost = _size(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(cost), "_step"), lineno=node.lineno))
        return node

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        change = next((f for kind, f in self.changes.items() if isinstance(node, kind)), self.generic_visit)
        return change(node)

    def _loop(self, node: Any) -> Any:
        if node.test is not None:
            # the elements it turns away pass no body
            node.test = nodes.And(_filter(nodes.Const(_size(node.test)), "_step"), node.test, lineno=node.lineno)
        return self._body(node)

    def _concat(self, node: Any) -> Any:
        self.generic_visit(node)
        node.nodes = [_filter(n, "_text") for n in node.nodes]
        return node

    def _compare(self, node: Any) -> Any:
        self.generic_visit(node)
        node.expr = _filter(node.expr, "_seen")
        for operand in node.ops:
            operand.expr = _filter(operand.expr, "_seen")
        return node

    def _getitem(self, node: Any) -> Any:
        self.generic_visit(node)
        return _filter(node, "_made") if isinstance(node.arg, nodes.Slice) else node

    def _literal(self, node: Any) -> Any:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _filter(node, "_made")


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _size(node: nodes.Node) -> int:
    """Nodes in a piece of template, and its plain text in pieces of STEP characters."""
    total, waiting = 0, [node]
    while waiting:
        item = waiting.pop()
        total += 1 + (len(item.data) // STEP if isinstance(item, nodes.TemplateData) else 0)
        waiting += item.iter_child_nodes()
    return total
