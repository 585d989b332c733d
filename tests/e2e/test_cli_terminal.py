"""What reaches a terminal: progress, tables, and no control characters from a model."""

from __future__ import annotations

import io
import json
import math

import pytest

from fewbit.cli import _terminal
from fewbit.cli._terminal import Column


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_model_can_not_drive_the_terminal() -> None:
    words = "red \x1b[31m title \x1b]0;x\x07 bell \x07 back \b c1 \x9b2J\r kept: \t é 漢 \n"
    screen, pipe = Screen(), io.StringIO()
    _terminal.write(words, screen)
    _terminal.write(words, pipe)
    assert not set(screen.getvalue()) & {"\x1b", "\x07", "\b", "\x9b", "\r"}
    assert screen.getvalue().endswith("kept: \t é 漢 \n")
    assert pipe.getvalue() == words


def test_tables_in_a_pipe_are_plain_and_never_folded(capsys: pytest.CaptureFixture[str]) -> None:
    long = "model.layers." + "x" * 300
    _terminal.print_table([Column("name", right=False), Column("bytes")], [[long, "1"], ["[red]b[/red]", "1,234"]])
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "bytes"]
    assert first == f"{long}      1"
    assert second.split() == ["[red]b[/red]", "1,234"]
    assert len(second) == len(first)


def test_tables_without_titles_have_no_header(capsys: pytest.CaptureFixture[str]) -> None:
    _terminal.print_table([Column("", right=False), Column("", right=False)], [["a", "1"], ["bcd", "2"]])
    assert capsys.readouterr().out == "a    1\nbcd  2\n"


def test_tables_on_a_terminal_drop_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    _terminal.print_table([Column("name", right=False)], [["a\x1b[2Jb"]])
    assert "a[2Jb" in screen.getvalue()
    assert "\x1b" not in screen.getvalue()


def test_json_is_valid_whatever_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    _terminal.print_json({"kl": math.nan, "ppl": [math.inf, 1.5], "specs": {"int8": (1, 2)}, "name": "é\x1b"})
    out = capsys.readouterr().out
    assert json.loads(out) == {"kl": None, "ppl": [None, 1.5], "specs": {"int8": [1, 2]}, "name": "é\x1b"}
    assert "\x1b" not in out


def test_progress_lines_are_sparse(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    lines = _terminal._Lines(lambda: now)
    lines.update(0, 100, "fetching")
    lines.update(0, 100, "fetching")
    for done in range(1, 101):
        now += 0.25
        lines.update(done, 100, f"layer {done}")
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "fetching"
    assert said[1] == "20 %, about 20 s left: layer 20"
    assert said[-1] == "100 %: layer 100"
    assert len(said) == 6


def test_progress_lines_count_each_stage_alone(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    lines = _terminal._Lines(lambda: now)
    now = 1000.0
    lines.update(0, 10, "second stage")
    now = 1010.0
    lines.update(5, 10, "half of it")
    assert capsys.readouterr().err.splitlines() == ["second stage", "50 %, about 10 s left: half of it"]


def test_progress_bar_goes_away_and_stages_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with _terminal.progress() as report:
        report(0, 1, "fetching [smollm2]")
        report(3, 10, "layer \x1b]0;x\x07 1")
        report(10, 10, "layer 2")
    shown = screen.getvalue()
    assert "fetching [smollm2]\n" in shown.replace("\r\n", "\n")
    assert "\x1b]" not in shown
    assert "ETA" in shown
    # the cursor comes back, and the bar's line is erased at the end
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert shown.endswith("\x1b[2K")
