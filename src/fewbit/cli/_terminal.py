"""What the verbs print with: text, tables, JSON, progress, errors. Rich is imported only to draw on a terminal."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from fewbit.errors import FewbitError

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

Progress = Callable[[int, int, str], None]
# Control characters (C0, DEL, C1) but newline and tab: a model's words must not drive the terminal.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
# Seconds between two lines of progress where no bar can be drawn.
_LINE_EVERY = 5.0
# Wide enough that no table is folded; a narrow terminal wraps the lines itself.
_TABLE_WIDTH = 4096


def write(text: str, stream: TextIO | None = None) -> None:
    """Write `text` (standard output by default) as it is, less control characters where a terminal reads it."""
    stream = stream or sys.stdout
    stream.write(text.translate(_CONTROLS) if stream.isatty() else text)
    stream.flush()


def note(text: str) -> None:
    """One line on standard error."""
    write(text + "\n", sys.stderr)


def print_json(value: Any) -> None:
    """One JSON value on standard output; numbers that JSON has no spelling for become null."""
    write(json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n")


def print_error(error: FewbitError, *, as_json: bool) -> None:
    """Three lines on standard error, and the same parts as JSON on standard output where the user asked for JSON."""
    if as_json:
        print_json({"error": error.to_dict()})
    note(f"error: {error}")


def megabytes(count: int) -> str:
    """Bytes as 10^6 bytes, one decimal."""
    return f"{count / 1e6:,.1f} MB"


@dataclass(frozen=True)
class Column:
    """A table column; numbers stand to the right."""

    title: str
    right: bool = True


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """An aligned table on standard output, ruled on a terminal; a line is never folded, whoever reads it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    titled = any(column.title for column in columns)
    console = Console(file=sys.stdout, width=_TABLE_WIDTH)
    table = Table(box=box.SIMPLE_HEAD if terminal and titled else None, pad_edge=terminal, show_header=titled)
    for column in columns:
        table.add_column(column.title, justify="right" if column.right else "left", no_wrap=True)
    for row in rows:
        # Text, not str: names come from files and must not be read as rich's markup.
        table.add_row(*(Text(cell.translate(_CONTROLS)) for cell in row))
    with console.capture() as captured:
        console.print(table)
    sys.stdout.write("\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n")
    sys.stdout.flush()


@contextmanager
def progress() -> Iterator[Callable[[int, int, str], None]]:
    """Gives the callback `(done, total, doing)`: a bar with an ETA on a terminal, now and then a line elsewhere."""
    meter = _Bar() if sys.stderr.isatty() else _Lines(time.monotonic)
    try:
        yield meter.update
    finally:
        meter.close()


class _Bar:
    """A bar that goes away when it is done; a stage that begins (`done` is 0) leaves its line above."""

    def __init__(self) -> None:
        self._drawn: tuple[RichProgress, TaskID] | None = None
        self._done = 0
        self._stage = ""

    def update(self, done: int, total: int, doing: str) -> None:
        doing = doing.translate(_CONTROLS)
        if self._drawn is None:
            self._drawn = self._start(doing, total)
        bar, task = self._drawn
        if done < self._done:
            # Another stage has begun: its speed is its own.
            bar.reset(task)
        self._done = done
        if done == 0 and doing != self._stage:
            self._stage = doing
            bar.console.print(doing, markup=False, highlight=False)
        bar.update(task, completed=done, total=total or None, description=doing)

    def close(self) -> None:
        if self._drawn is not None:
            self._drawn[0].stop()

    @staticmethod
    def _start(doing: str, total: int) -> tuple[RichProgress, TaskID]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.table import Column as RichColumn

        bar = Progress(
            TextColumn("{task.description}", markup=False, table_column=RichColumn(no_wrap=True, max_width=48)),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        task = bar.add_task(doing, total=total or None)
        bar.start()
        return bar, task


class _Lines:
    """A line for each stage that begins (`done` is 0) and one every few seconds: a log shows life and stays short."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started = self._last = clock()
        self._done = 0
        self._stage = ""

    def update(self, done: int, total: int, doing: str) -> None:
        now = self._clock()
        begins = done == 0 and doing != self._stage
        if begins or done < self._done:
            self._started, self._stage = now, doing
        self._done = done
        if begins:
            note(doing)
        elif now - self._last >= _LINE_EVERY:
            left = f", about {(now - self._started) / done * (total - done):.0f} s left" if 0 < done < total else ""
            note(f"{100 * done // max(total, 1)} %{left}: {doing}")
        else:
            return
        self._last = now

    def close(self) -> None:
        """Nothing is held."""


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
