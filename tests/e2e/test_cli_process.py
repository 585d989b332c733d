"""The command as a process of its own: Ctrl-C, a reader that goes away, and a chat on a real terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

# Ctrl-C works even where the tests themselves run in the background, with SIGINT ignored.
START = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from fewbit.cli import main
{before}
sys.exit(main(sys.argv[1:]))
"""
SLOW_QUANTIZE = """
import fewbit.methods.rtn
fewbit.methods.rtn.quantize = lambda *_: time.sleep(60)
"""
# a tiny random model answers with noise at once; these are words at a pace that a person could interrupt
SLOW_WORDS = """
from fewbit.tokenizer import TextStream
def push(self, token):
    time.sleep(0.02)
    return "blah\\x1b[2J "
TextStream.push = push
"""
PATIENCE = 60.0


def command(before: str, *argv: str | Path) -> list[str]:
    return [sys.executable, "-c", START.format(before=before), *map(str, argv)]


def test_interrupted_quantize_leaves_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    results = tmp_path / "my results"
    results.mkdir()
    argv = ["quantize", str(tiny_folder), "-o", str(results / "out"), "--method", "rtn"]
    process = subprocess.Popen(command(SLOW_QUANTIZE, *argv), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + PATIENCE
    # config.json comes first: from then on the walk is under way
    while not any(f.name == "config.json" for f in results.rglob("*")):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert list(results.iterdir()) == []
    assert out == ""
    assert "Traceback" not in err
    what, facts, again = err.splitlines()[-3:]
    assert what == "error: Interrupted."
    assert "no unfinished output" in facts
    assert again.strip() == "To start again: " + shlex.join(["fewbit", *argv])


def test_a_reader_that_goes_away_is_no_error(tiny_folder: Path) -> None:
    process = subprocess.Popen(
        command(SLOW_WORDS, "run", tiny_folder, "hello"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(4) == b"blah"
    process.stdout.close()
    assert process.wait(timeout=PATIENCE) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


class Terminal:
    """A command on a pseudo-terminal, typed to and read from as by a person."""

    def __init__(self, argv: list[str]) -> None:
        self.fd, child = pty.openpty()
        self.process = subprocess.Popen(argv, stdin=child, stdout=child, stderr=child, start_new_session=True)
        os.close(child)

    def until(self, sign: str) -> str:
        """What is shown up to and with `sign`."""
        shown, end = "", time.monotonic() + PATIENCE
        while sign not in shown:
            assert time.monotonic() < end, f"{sign!r} did not come: {shown!r}"
            ready, _, _ = select.select([self.fd], [], [], 0.2)
            if ready:
                # Linux reports the closed end of a terminal as an input/output error
                with contextlib.suppress(OSError):
                    shown += os.read(self.fd, 4096).decode("utf-8", "replace")
        return shown

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


def test_a_chat(tiny_folder: Path) -> None:
    argv = command(SLOW_WORDS, "run", tiny_folder, "--max-tokens", "20", "--stats", "--context", "800")
    with Terminal(argv) as chat:
        assert "/help for commands" in chat.until(">>> ")

        chat.type("hello\n")
        shown = chat.until(">>> ")
        # the words are shown, what would clear the screen is not
        assert "blah[2J blah[2J" in shown
        assert "\x1b[2J" not in shown
        assert "prompt 24 tokens" in shown

        chat.type("again\n")
        chat.until("blah")
        chat.interrupt()
        shown = chat.until(">>> ")
        assert "(stopped)" in shown
        # the first turn is part of the second: 24 tokens of question, 20 words of answer
        assert "kept from before" in shown
        found = re.search(r"prompt (\d+) tokens", shown)
        assert found is not None
        assert int(found[1]) > 24 + 20 * len("blah [2J ")

        # too long for the context: an error, and the chat goes on
        chat.type("x" * 900 + "\n")
        shown = chat.until("\n>>> ")
        assert "error: " in shown
        assert "800" in shown

        chat.type("/claer\n")
        assert "did you mean /clear?" in chat.until("\n>>> ")
        chat.type("/clear\n")
        chat.until("\n>>> ")
        chat.type("hello\n")
        assert "prompt 24 tokens" in chat.until("\n>>> ")

        chat.type("/help\n")
        assert "/clear" in chat.until("\n>>> ")
        # readline misses a signal that comes between showing its prompt and waiting for keys
        time.sleep(0.5)
        chat.interrupt()
        chat.until(">>> ")
        chat.type("\x04")
        assert chat.process.wait(timeout=PATIENCE) == 0
