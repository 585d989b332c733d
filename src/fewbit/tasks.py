"""Tasks of EleutherAI's evaluation harness (lm-eval), run in this process on a model of fewbit's.

The harness asks for the log-likelihood of continuations and for greedy answers. Requests are taken in the order of
their tokens, so that what neighbours share (a question with several answers, the same few examples) is computed once.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import FewbitError
from fewbit.runtime.engine import LanguageModel, load
from fewbit.runtime.sampler import Sampling

# inputs that run at once: all of their logits are wanted
CHUNK = 256
Progress = Callable[[int, int, str], None]
# resamples for the error of a figure that is no plain mean
RESAMPLES = 1000
# tokens of an answer where a task does not say how many
ANSWER_TOKENS = 256
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def run_tasks(
    model: str | Path,
    names: Sequence[str],
    *,
    limit: int | None = None,
    exact: bool = False,
    device: str = "cpu",
    cache: str | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Run tasks of lm-eval on a model -> {task: {figure: value}}, groups of tasks among them.

    names  the harness's own names or patterns, or YAML files of tasks; limit  questions of each task; exact, device
    and cache as in `load`; note  told why a card is not used
    A figure is spelled as the harness does (`acc`, `acc_stderr`, `word_perplexity`), with its filter where it has one
    (`exact_match,strict-match`). Raises FewbitError where lm-eval is missing, a task is unknown, or its data can't be
    had, beside what `load` raises.
    """
    if not names:
        raise FewbitError("No task is named.", "The list is empty.", "Name one, such as arc_easy.")
    if limit is not None and limit < 1:
        raise FewbitError("That many questions are not possible.", f"Got {limit:,}.", "Ask for one or more.")
    evaluator, manager = _harness(known=not all(_is_file(name) for name in names))
    # before the model: a misspelt name should not cost its loading
    tasks = _load_tasks(manager, names)
    language_model = load(model, exact=exact, device=device, cache=cache, progress=progress)
    if note and language_model.device_note:
        note(language_model.device_note)
    harness_model = _adapter(language_model, progress)
    # the harness prints, and standard output belongs to figures
    with contextlib.redirect_stdout(sys.stderr):
        found = evaluator.simple_evaluate(
            harness_model, tasks=tasks, limit=limit, log_samples=False, task_manager=manager, bootstrap_iters=RESAMPLES
        )
    return {name: _figures(figures) for name, figures in found["results"].items()}


class Scorer:
    """The harness's three questions, answered by a LanguageModel. A request's `args` is what the harness asks."""

    def __init__(self, model: LanguageModel, progress: Progress | None = None) -> None:
        super().__init__()
        self.model, self.progress = model, progress
        self.tokenizer = model.tokenizer
        # what a text without context follows: BOS, or the end of a text before
        ends = self.tokenizer.data.eos_token_ids
        bos = self.tokenizer.data.bos_token_id
        self.prefix = bos if bos is not None else next(iter(ends), None)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """log p(continuation | context) of each (context, continuation), and whether greedy decoding would say it."""
        pairs = [self._pair(*request.args) for request in requests]
        return self._scored(pairs, "scoring answers")

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """log p of each whole (text,): every token once, in windows of the whole context."""
        windows: list[tuple[list[int], int]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = [self._first_token(), *self.tokenizer.encode(request.args[0], bos=False)]
            for window in rolling(ids, self.model.context):
                windows.append(window)
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._scored(windows, "scoring texts"), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each (context, settings): greedy unless the settings ask for sampling."""
        asked = []
        for request in requests:
            context, said = request.args
            tokens = next((int(said[key]) for key in LENGTHS if said.get(key) is not None), ANSWER_TOKENS)
            ids = self.tokenizer.encode(context) or [self._first_token()]
            room = self.model.context
            # an answer may be long, but not at the cost of the question: that keeps three quarters
            tokens = max(1, min(tokens, max(room - len(ids), min(tokens, room // 4))))
            # the end of a context that is too long is nearer to the question
            asked.append((ids[-max(1, room - tokens) :], tokens, said))
        answers = [""] * len(asked)
        for done, i in enumerate(sorted(range(len(asked)), key=lambda i: asked[i][0])):
            ids, tokens, said = asked[i]
            until = said.get("until") or []
            stop = [until] if isinstance(until, str) else [str(s) for s in until]
            answers[i] = "".join(self.model.generate(ids, max_tokens=tokens, sampling=_sampling(said), stop=stop))
            self._tell(done + 1, len(asked), "answering")
        return answers

    def _pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Tokens of both together, and how many of the last are the continuation's, with the spaces before it."""
        before = context.rstrip()
        if not before:
            whole = self.tokenizer.encode(context + continuation, bos=False)
            count = len(whole)
        else:
            whole = self.tokenizer.encode(context + continuation)
            # a continuation that merges with what stands before it is scored with that token
            count = max(1 if continuation else 0, len(whole) - len(self.tokenizer.encode(before)))
        if continuation and not whole:
            raise FewbitError(
                "A continuation has no tokens.",
                f"The tokenizer gives none for {(context + continuation)[:80]!r}.",
                "Choose other tasks: this model can't read their answers.",
            )
        # the first that is scored needs one before it
        return (whole if count < len(whole) else [self._first_token(), *whole]), count

    def _first_token(self) -> int:
        if self.prefix is None:
            raise FewbitError(
                "The model has no token to begin a text with.",
                "Its tokenizer names neither a bos_token nor an eos_token.",
                "Choose tasks that always give a context.",
            )
        return self.prefix

    def _scored(self, asked: list[tuple[list[int], int]], text: str) -> list[tuple[float, bool]]:
        """For (ids, n): the log-likelihood of the last n ids after those before, and whether each was the likeliest."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(asked)
        latest: tuple[list[int], int] = ([], 0)
        logs = torch.empty(0)
        for done, i in enumerate(sorted(range(len(asked)), key=lambda i: asked[i][0])):
            ids, count = asked[i]
            if count > self.model.context:
                raise FewbitError(
                    "A continuation does not fit the context.",
                    f"It has {count:,} tokens, the context {self.model.context:,}.",
                    "Choose other tasks, or a model with a longer context.",
                )
            # the last token is only predicted; what is too long loses its beginning
            inputs = ids[-(self.model.context + 1) : -1]
            if count:
                count = min(count, len(inputs))
                # answers of one token differ in their target alone
                if (inputs, count) != latest:
                    logs, latest = self._log_probabilities(inputs, count), (inputs, count)
                targets = torch.tensor(ids[-count:])
                value = float(logs.gather(1, targets[:, None]).double().sum())
                found[i] = (value, bool((logs.argmax(1) == targets).all()))
            self._tell(done + 1, len(asked), text)
        return found

    def _log_probabilities(self, inputs: list[int], count: int) -> Tensor:
        """float32 [count, vocab]: what follows each of the last `count` inputs. Uses what the model has cached."""
        first = len(inputs) - count
        # the first wanted token must run, and all after it
        sequence, shared = self.model.begin(self, inputs[: first + 1])
        wanted: list[Tensor] = []
        for start in range(shared, len(inputs), CHUNK):
            chunk = inputs[start : start + CHUNK]
            rows = list(range(max(first - start, 0), len(chunk)))
            logits = self.model.forward([(sequence, chunk)], rows or None).cpu()
            wanted += [logits] if rows else []
        logits = torch.cat(wanted)
        if not torch.isfinite(logits).all():
            raise FewbitError(
                "The model's output is not a number.",
                f"{int((~torch.isfinite(logits)).sum()):,} of {logits.numel():,} logits after {len(inputs)} tokens.",
                "Its weights are damaged or overflow: try --exact.",
            )
        return logits.log_softmax(-1)

    def _tell(self, done: int, total: int, text: str) -> None:
        if self.progress:
            self.progress(done, total, text)


def rolling(ids: list[int], context: int) -> Iterator[tuple[list[int], int]]:
    """Windows that predict every id but the first exactly once, as (ids, how many of the last are predicted).

    A window's inputs are at most `context` ids; only the last may predict fewer, and then still sees a whole context.
    """
    at = 1
    while at < len(ids):
        end = min(at + context, len(ids))
        yield ids[max(0, end - context - 1) : end], end - at
        at = end


def _sampling(said: dict[str, Any]) -> Sampling:
    """Greedy unless `do_sample` is set, or left out with a temperature above 0."""
    temperature = float(said.get("temperature") or 0.0)
    if said.get("do_sample", temperature > 0):
        return Sampling(temperature or 1.0, int(said.get("top_k") or 0), float(said.get("top_p") or 1.0), seed=0)
    return Sampling()


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml")


def check_tasks() -> None:
    """FewbitError where lm-eval is missing: better before hours are spent on something else than after."""
    _imported()


def _imported() -> tuple[ModuleType, ModuleType]:
    try:
        return importlib.import_module("lm_eval.evaluator"), importlib.import_module("lm_eval.tasks")
    except ImportError as e:
        raise FewbitError(
            "Tasks need the package lm-eval.", f"{e}.", "Install it with: pip install 'fewbit[tasks]'"
        ) from e


def _harness(known: bool) -> tuple[ModuleType, Any]:
    """lm-eval's evaluator and its list of tasks. Without `known` the list is empty: filling it takes long."""
    evaluator, tasks = _imported()
    return evaluator, tasks.TaskManager(include_defaults=known)


def _load_tasks(manager: Any, names: Sequence[str]) -> list[Any]:
    """The named tasks with their data."""
    found: list[Any] = []
    for name in names:
        matched = ([name] if Path(name).is_file() else []) if _is_file(name) else manager.match_tasks([name])
        if not matched:
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks, 3)) or "none"
            raise FewbitError(
                f"There is no task {name!r}.",
                f"lm-eval knows {len(manager.all_tasks):,}; like it: {near}.",
                "List them with: lm-eval ls tasks",
            )
        found += matched
    try:
        with contextlib.redirect_stdout(sys.stderr):
            loaded = manager.load(found)
    # data that is not there yet comes from the Hugging Face hub
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError) as e:
        raise FewbitError(
            f"The task {', '.join(found)[:80]} can't be loaded.",
            f"{type(e).__name__}: {str(e)[:300]}.",
            "Check the network (most tasks fetch their data when first used), or the task's own requirements.",
        ) from e
    inner = {child for children in loaded["group_map"].values() for child in children}
    return [task for kind in ("groups", "tasks") for name, task in loaded[kind].items() if name not in inner]


def _adapter(model: LanguageModel, progress: Progress | None) -> Any:
    """A Scorer that is the harness's own kind of model too."""
    base = importlib.import_module("lm_eval.api.model").LM
    return type("Fewbit", (Scorer, base), {})(model, progress)


def _figures(found: dict[str, Any]) -> dict[str, float]:
    """Numbers alone, a filter named only where it is one."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
