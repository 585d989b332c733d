"""`fewbit eval`: what quantization lost, against a reference model on texts and tasks."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbit.cli._failures import UsageError, explain
from fewbit.cli._models import fetch
from fewbit.cli._parser import Parser, add_cache, add_device, count
from fewbit.cli._terminal import Column, note, print_json, print_table, progress, write
from fewbit.errors import FewbitError

if TYPE_CHECKING:
    from fewbit.evaluator import DomainQuality, Paired, Quality

HELP = "measure what was lost: KL divergence, perplexity, top-1"

Progress = Callable[[int, int, str], None]
# model -> task -> metric -> figure
Tasks = dict[str, dict[str, dict[str, float]]]

FIGURES = [Column("mean KL"), Column("median KL"), Column("99 % KL"), Column("top-1 %"), Column("PPL")]
COLUMNS = [Column("model", right=False), Column("MB"), Column("bits/weight"), *FIGURES]
BESIDE = Column("mean KL beside the first", right=False)


def add_arguments(parser: Parser) -> None:
    add_measuring(parser)
    parser.add_argument("--exact", action="store_true", help="float activations: the weights' own error alone")


def add_measuring(parser: Parser) -> None:
    """The options that every measuring verb has."""
    parser.add_argument("model", metavar="MODEL", nargs="+", help="alias, folder or .gguf file; one or several")
    parser.add_argument("--against", metavar="REF", required=True, help="the reference model, run in float32")
    parser.add_argument(
        "--text", metavar="[NAME=]FILE", action="append", help="UTF-8 text to measure on; several for several domains"
    )
    parser.add_argument(
        "--windows",
        type=count,
        default=64,
        metavar="N",
        help="windows of 512 tokens of each text (default %(default)s)",
    )
    parser.add_argument("--no-cache", action="store_true", help="run the reference on every window, keep nothing of it")
    add_cache(parser)
    parser.add_argument("--tasks", metavar="NAME[,NAME]", help="tasks of lm-eval, which must be installed")
    parser.add_argument("--limit", type=count, metavar="N", help="questions of each task (default: all)")
    parser.add_argument("--report", type=Path, metavar="OUT.html", help="write a page that shows everything")
    parser.add_argument("--threads", type=count, metavar="N", help="default: the machine's cores")
    # figures stay the same wherever they are measured, unless a card is asked for
    add_device(parser, "cpu")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    return measure(args, exact=args.exact)


def measure(args: argparse.Namespace, *, exact: bool, origins: Sequence[dict[str, str]] = ()) -> int:
    """Measure, print, write the report. `origins` go beside the models of the JSON."""
    started = time.monotonic()
    tasks = task_names(args)
    texts = named_files(args.text or [])
    if args.report:
        from fewbit.report import check_report

        check_report(args.report)
    if tasks:
        from fewbit.tasks import check_tasks

        check_tasks()
    fetch(*args.model, args.against)
    found: list[Quality] = []
    answers: Tasks = {}
    try:
        _measure(args, texts, tasks, exact, found, answers)
    except (Exception, KeyboardInterrupt) as error:
        # what took hours to measure is not lost with what failed after it
        if not args.json or not (found or answers):
            raise
        failure = explain(error, shlex.join(["fewbit", *sys.argv[1:]]), time.monotonic() - started)
        said = failure.error.to_dict() if failure else {"what": repr(error)}
        print_json(_result(args, texts, found, answers, origins) | {"error": said})
        if failure is None:
            raise
        # one document: raising would print another
        note(f"error: {failure.error}")
        return failure.exit_code
    if args.json:
        print_json(_result(args, texts, found, answers, origins))
    return 0


def _measure(
    args: argparse.Namespace,
    texts: dict[str, Path],
    tasks: list[str],
    exact: bool,
    found: list[Quality],
    answers: Tasks,
) -> None:
    """Fill `found` and `answers`, and print their tables as soon as they are known."""
    if texts:
        with progress() as report:
            found += _evaluate(args, texts, exact, report)
        for reason in dict.fromkeys(q.device_note for q in found if q.device_note):
            note(f"note: {reason}")
        # what is known is shown: tasks may take hours more, or fail
        if not args.json:
            print_quality(args.against, found)
        if args.report:
            from fewbit.report import write_report

            write_report(args.report, args.against, found)
            note(f"report: {args.report}")
    if tasks:
        try:
            with progress() as report:
                _run_tasks(args, tasks, exact, report, answers)
        finally:
            if answers and not args.json:
                print_tasks(answers, apart=bool(found))


def _result(
    args: argparse.Namespace,
    texts: dict[str, Path],
    found: Sequence[Quality],
    answers: Tasks,
    origins: Sequence[dict[str, str]],
) -> dict[str, Any]:
    """What --json prints."""
    models = [q.to_dict() for q in found] or [{"model": model} for model in args.model]
    for model, origin in zip(models, origins, strict=False):
        model["origin"] = origin
    files = [str(file) for file in texts.values()]
    text = files[0] if len(files) == 1 else files
    result = {"against": args.against, "text": text, "models": models}
    return result | {"tasks": answers} if args.tasks else result


def task_names(args: argparse.Namespace, verb: str = "eval") -> list[str]:
    """The tasks asked for; UsageError where there is nothing to measure, or not what an option needs."""
    names = [name.strip() for name in (args.tasks or "").split(",") if name.strip()]
    command = f"fewbit {verb} MODEL --against REF --text FILE"
    if args.tasks is not None and not names:
        raise UsageError(FewbitError("--tasks names no task.", f"It is {args.tasks!r}.", "Such as --tasks arc_easy"))
    if not args.text and not names:
        raise UsageError(
            FewbitError("There is nothing to measure on.", "Neither --text nor --tasks was given.", command)
        )
    if args.report and not args.text:
        raise UsageError(
            FewbitError("--report needs a text.", "Its page shows divergences, which --text FILE measures.", command)
        )
    if args.limit is not None and not names:
        raise UsageError(FewbitError("--limit is for --tasks.", "No task was given.", "Use --windows to bound texts."))
    return names


def named_files(options: Sequence[str]) -> dict[str, Path]:
    """The --text options as names and files: NAME=FILE, or a file that goes by its stem."""
    found: dict[str, Path] = {}
    for option in options:
        name, equals, file = option.partition("=")
        # a file whose own name has the sign is still a file
        if not equals or not name or Path(option).exists():
            name, file = Path(option).stem, option
        if name in found:
            raise UsageError(
                FewbitError(
                    f"Two texts go by the name {name!r}.",
                    f"{str(found[name])!r} and {file!r}.",
                    f"Name them: --text NAME={file}",
                )
            )
        found[name] = Path(file)
    return found


def _evaluate(args: argparse.Namespace, texts: dict[str, Path], exact: bool, report: Progress) -> list[Quality]:
    import fewbit

    return fewbit.evaluate(
        args.model,
        args.against,
        texts,
        windows=args.windows,
        exact=exact,
        device=args.device,
        threads=args.threads,
        cache=not args.no_cache,
        kv_cache=args.cache,
        progress=report,
    )


def _run_tasks(args: argparse.Namespace, names: list[str], exact: bool, report: Progress, found: Tasks) -> None:
    """Fill `found`, the reference first: a task's figure says little without it."""
    from fewbit.runtime.engine import set_threads
    from fewbit.tasks import run_tasks

    if args.threads is not None:
        set_threads(args.threads)
    found[args.against] = run_tasks(args.against, names, limit=args.limit, exact=True, progress=report)
    for model in args.model:
        if model not in found:
            found[model] = run_tasks(
                model,
                names,
                limit=args.limit,
                exact=exact,
                device=args.device,
                cache=args.cache,
                progress=report,
                note=lambda reason: note(f"note: {reason}"),
            )


def print_quality(against: str, found: Sequence[Quality]) -> None:
    """The table of all texts together, one line on the reference, and a table of the texts where there are several."""
    several = len(found) > 1
    print_table([*COLUMNS, BESIDE] if several else COLUMNS, [row(q) + beside(q.paired, several) for q in found])
    first = found[0]
    reference = f"{first.reference_perplexity:.3f} ± {first.reference_perplexity_error:.3f}"
    write(f"against {against}: PPL {reference}, {first.tokens:,} predictions scored; KL in nats{cached(found)}\n")
    if len(first.domains) < 2:
        return
    write("\n")
    rows = []
    for place, domain in enumerate(first.domains):
        for q in found:
            of = q.domains[place]
            rows.append([of.name, q.model, f"{of.tokens:,}", *figures(of), *beside(of.paired, several)])
        perplexity = f"{domain.reference_perplexity:.3f} ± {domain.reference_perplexity_error:.3f}"
        blank = [""] * (len(FIGURES) - 1)
        rows.append(
            [domain.name, f"{against} (reference)", f"{domain.tokens:,}", *blank, perplexity, *beside(None, several)]
        )
    titles = [Column("text", right=False), Column("model", right=False), Column("predictions"), *FIGURES]
    print_table([*titles, BESIDE] if several else titles, rows)


def row(q: Quality) -> list[str]:
    """One line of the table; KL in nats, errors are one standard error over windows."""
    return [q.model, f"{q.weight_bytes / 1e6:.1f}", f"{q.bits_per_weight:.2f}", *figures(q)]


def figures(q: Quality | DomainQuality) -> list[str]:
    """The cells under FIGURES."""
    return [
        f"{q.mean_kl:.5f} ± {q.mean_kl_error:.5f}",
        f"{q.median_kl:.4f}",
        f"{q.p99_kl:.4f}",
        f"{100 * q.top1:.2f} ± {100 * q.top1_error:.2f}",
        f"{q.perplexity:.3f} ± {q.perplexity_error:.3f}",
    ]


def beside(paired: Paired | None, several: bool) -> list[str]:
    """The cell under BESIDE where there is one: the difference, its standard error, and what two of them say."""
    if not several:
        return []
    return [f"{paired.difference:+.5f} ± {paired.error:.5f} {paired.verdict}" if paired else ""]


def cached(found: Sequence[Quality]) -> str:
    """What the cached reference may add to or take from each mean KL; nothing where the reference itself ran."""
    if not any(q.cache_error for q in found):
        return ""
    errors = ", ".join(f"{q.cache_error:.1e}" for q in found)
    return f"; reference from the cache, which a window run again shows to be within {errors} (--no-cache runs it all)"


def print_tasks(answers: Tasks, *, apart: bool) -> None:
    """A line for each model, task and metric."""
    if apart:
        write("\n")
    columns = [
        Column("model", right=False),
        Column("task", right=False),
        Column("metric", right=False),
        Column("figure"),
    ]
    rows = [
        [model, task, metric, f"{figure:.4f}"]
        for model, tasks in answers.items()
        for task, metrics in tasks.items()
        for metric, figure in metrics.items()
    ]
    print_table(columns, rows)
