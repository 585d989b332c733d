"""`fewbit run`: one answer, or a chat in the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fewbit.cli._failures import UsageError
from fewbit.cli._parser import BITS_HELP, MODEL_HELP, Parser, add_cache, add_device, count, format_of_bits
from fewbit.cli._terminal import Progress, note, print_json, progress, write
from fewbit.errors import FewbitError

if TYPE_CHECKING:
    from pathlib import Path

    from fewbit.runtime.engine import LanguageModel
    from fewbit.runtime.generation import Generation, Stats
    from fewbit.runtime.sampler import Sampling

HELP = "answer one prompt, or chat in the terminal"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help="one question; default: standard input when piped, else a chat"
    )
    parser.add_argument("--system", metavar="TEXT", help="instructions put before the conversation")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    parser.add_argument(
        "--max-tokens", type=count, metavar="N", help="longest answer (default: what the context holds)"
    )
    parser.add_argument("--stats", action="store_true", help="print tokens/s on standard error")
    parser.add_argument("--json", action="store_true", help="print one object with the answer and its figures")
    how = parser.add_argument_group("choosing tokens")
    how.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default)"
    )
    how.add_argument("--top-k", type=int, default=0, metavar="K", help="choose among the K likeliest (default 0: all)")
    how.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="choose among the likeliest that add up to P (default 1)"
    )
    how.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="drop tokens below P times the likeliest (default 0)"
    )
    how.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1 discourages words already used (default 1)",
    )
    how.add_argument("--seed", type=int, metavar="N", help="makes a sampled answer repeatable")
    less = parser.add_argument_group(
        "fewer bits (of a full-precision model: rounded to nearest, once, and kept; see fewbit ls)"
    )
    bits = less.add_mutually_exclusive_group()
    bits.add_argument("--bits", type=int, choices=range(2, 9), metavar="N", help=BITS_HELP)
    bits.add_argument("--format", metavar="SPEC", help="intN, intNgM or intNgMa: N bits, M inputs share a scale")
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--context", type=count, metavar="N", help="tokens to keep room for (default: the model's own)"
    )
    add_cache(machine)
    machine.add_argument("--threads", type=count, metavar="N", help="default: the machine's cores")
    add_device(machine)
    machine.add_argument("--exact", action="store_true", help="float activations: slower, free of activation rounding")


def run(args: argparse.Namespace) -> int:
    prompt = args.prompt
    if prompt is None and (sys.stdin is None or not sys.stdin.isatty()):
        prompt = _read_standard_input()
    _check(args, prompt)
    from fewbit.runtime.sampler import Sampling

    sampling = Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )
    import fewbit

    with progress() as report:
        model = fewbit.load(
            _in_few_bits(args, report),
            exact=args.exact,
            context=args.context,
            threads=args.threads,
            device=args.device,
            cache=args.cache,
            progress=report,
        )
    if model.device_note:
        note(f"note: {model.device_note}")
    for text in model.source.notes:
        note(f"note: {text}")
    for reason in model.notes:
        note(f"note: the slow reference kernel runs part of this model. {reason}")
    if model.prepared_note:
        note(f"note: {model.prepared_note}")
    system = [{"role": "system", "content": args.system}] if args.system else []
    if prompt is None:
        from fewbit.cli._chat import Chat

        return Chat(model, system, max_tokens=args.max_tokens, sampling=sampling, stats=args.stats).loop()
    answer = _start(model, prompt, system, args, sampling)
    if args.json:
        print_json({"text": "".join(answer), "stats": stats_dict(answer.stats)})
        return 0
    stream(answer, [])
    if args.stats:
        note(stats_line(answer.stats))
    return 0


def _in_few_bits(args: argparse.Namespace, report: Progress) -> str | Path:
    """The model as it was asked for: itself, or its rounded copy in the cache."""
    if not (args.bits or args.format):
        return str(args.model)
    from fewbit.on_demand import in_few_bits

    return in_few_bits(args.model, args.format or format_of_bits(args.bits), progress=report, note=note)


def _read_standard_input() -> str:
    data = b"" if sys.stdin is None else sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FewbitError(
            "The prompt on standard input is not UTF-8 text.",
            f"Byte {error.start} of {len(data)} is {data[error.start]:#04x}: {error.reason}.",
            "Pipe in UTF-8 text (iconv converts other encodings).",
        ) from None


def _check(args: argparse.Namespace, prompt: str | None) -> None:
    """Refuse what can't work before anything heavy is loaded."""
    if prompt is None and (args.raw or args.json):
        option = "--raw" if args.raw else "--json"
        raise UsageError(
            FewbitError(f"{option} needs a prompt.", "No PROMPT was given.", f'fewbit run {args.model} {option} "..."')
        )
    if args.raw and args.system:
        raise UsageError(
            FewbitError(
                "--raw and --system exclude each other.",
                "Instructions are placed by the chat template, which --raw leaves out.",
                "Drop one of the two, or write the instructions into the prompt.",
            )
        )
    if prompt is not None and not prompt.strip():
        raise FewbitError("The prompt is empty.", f"It has {len(prompt)} characters, all blank.", "Give some text.")
    for text in (prompt, args.system):
        # The shell passes bytes that are not UTF-8 as lone surrogates.
        if text and any("\ud800" <= c <= "\udfff" for c in text):
            raise FewbitError("The prompt is not UTF-8 text.", f"It reads {text[:60]!r}.", "Give UTF-8 text.")


def _start(
    model: LanguageModel, prompt: str, system: list[dict[str, str]], args: argparse.Namespace, sampling: Sampling
) -> Generation:
    if args.raw or model.tokenizer.chat_template is None:
        if args.system:
            raise FewbitError(
                "This model can't take --system.",
                f"{model.name!r} has no chat template to put instructions into.",
                "Write the instructions into the prompt.",
            )
        return model.generate(prompt, max_tokens=args.max_tokens, sampling=sampling)
    messages = [*system, {"role": "user", "content": prompt}]
    return model.chat(messages, max_tokens=args.max_tokens, sampling=sampling)


def stream(answer: Iterator[str], said: list[str]) -> None:
    """Write the pieces as they come and a newline at the end; `said` has them also when the user interrupts."""
    try:
        for piece in answer:
            said.append(piece)
            write(piece)
    except KeyboardInterrupt:
        # Whatever is printed next begins on its own line.
        write("\n")
        raise
    if not (said and said[-1].endswith("\n")):
        write("\n")


def stats_dict(stats: Stats) -> dict[str, int | float | str]:
    """The figures of one answer under their names; seconds and tokens/s."""
    return {
        "prompt_tokens": stats.prompt_tokens,
        "cached_tokens": stats.cached_tokens,
        "new_tokens": stats.new_tokens,
        "prompt_seconds": stats.prompt_seconds,
        "decode_seconds": stats.decode_seconds,
        "prompt_rate": stats.prompt_rate,
        "decode_rate": stats.decode_rate,
        "finish_reason": stats.finish_reason,
    }


def stats_line(stats: Stats) -> str:
    """The same for people."""
    cached = f" ({stats.cached_tokens} kept from before)" if stats.cached_tokens else ""
    return (
        f"prompt {stats.prompt_tokens} tokens{cached}, {stats.prompt_rate:.1f} tokens/s; "
        f"answer {stats.new_tokens} tokens, {stats.decode_rate:.1f} tokens/s; ended by {stats.finish_reason or 'you'}"
    )
