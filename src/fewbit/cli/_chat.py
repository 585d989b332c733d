"""The chat loop of `fewbit run`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from fewbit.cli._terminal import note, print_error
from fewbit.cli.run import stats_line, stream
from fewbit.errors import FewbitError
from fewbit.lookup import nearest

if TYPE_CHECKING:
    from fewbit.runtime.engine import LanguageModel
    from fewbit.runtime.sampler import Sampling

COMMANDS = {
    "/help": "this list",
    "/clear": "forget the conversation",
    "/exit": "leave (/bye and Ctrl-D too)",
}
PROMPT = ">>> "


class Chat:
    """One conversation. Each turn passes the whole of it; the model keeps what it has already read."""

    def __init__(
        self,
        model: LanguageModel,
        system: list[dict[str, str]],
        *,
        max_tokens: int | None,
        sampling: Sampling,
        stats: bool,
    ) -> None:
        if model.tokenizer.chat_template is None:
            raise FewbitError(
                "This model can't chat.",
                f"{model.name!r} has no chat template.",
                'Give a prompt to continue: fewbit run MODEL "Once upon a time".',
            )
        self._model = model
        self._system = system
        self._messages = list(system)
        self._max_tokens = max_tokens
        self._sampling = sampling
        self._stats = stats

    def loop(self) -> int:
        """Read, answer, repeat until the user leaves."""
        try:
            import readline  # noqa: F401  (imported for line editing in input())
        except ImportError:
            note("Line editing is not available: this Python has no readline.")
        note(f"{self._model.name}: /help for commands, Ctrl-C stops an answer, Ctrl-D leaves.")
        while True:
            try:
                line = input(PROMPT if sys.stdout.isatty() else "").strip()
            except EOFError:
                note("")
                return 0
            except KeyboardInterrupt:
                note("\nCtrl-D or /exit leaves.")
                continue
            if line in ("/exit", "/bye", "/quit"):
                return 0
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._turn(line)

    def _command(self, line: str) -> None:
        if line == "/help":
            for name, meaning in COMMANDS.items():
                note(f"  {name:<8}{meaning}")
        elif line == "/clear":
            self._messages = list(self._system)
            note("The conversation is forgotten.")
        else:
            note(f"There is no command {line!r}: {nearest(line, list(COMMANDS))}")

    def _turn(self, line: str) -> None:
        asked = {"role": "user", "content": line}
        said: list[str] = []
        try:
            answer = self._model.chat([*self._messages, asked], max_tokens=self._max_tokens, sampling=self._sampling)
            try:
                stream(answer, said)
            except KeyboardInterrupt:
                note("(stopped)")
        except FewbitError as error:
            # A turn that doesn't fit leaves the conversation as it was.
            print_error(error, as_json=False)
            return
        self._messages += [asked, {"role": "assistant", "content": "".join(said)}]
        if self._stats:
            note(stats_line(answer.stats))
