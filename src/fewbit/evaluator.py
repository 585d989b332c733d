"""How much was lost: candidates' predictions beside the full-precision model's on the same texts.

The protocol is that of llama.cpp's perplexity tool, so that figures compare: consecutive 512-token windows, each run
alone, predictions at positions 256 to 510 scored. KL(reference || candidate) is in nats a token.
Errors are over windows, because the tokens of one window are alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from torch import Tensor

from fewbit.calibration import BYTES_PER_TOKEN, read_text
from fewbit.calibration import windows as windows_of
from fewbit.errors import FewbitError
from fewbit.quality import DomainQuality, Paired, Quality, figures, paired, standard_error
from fewbit.reference_cache import ReferenceCache
from fewbit.runtime.cache import Sequence as CachedSequence
from fewbit.runtime.engine import LanguageModel, cache_dtype, placed, set_threads
from fewbit.scoring import Expected, Prediction, Scores, Worst, WorstToken, joined, score
from fewbit.source import Source, describe_source, open_source
from fewbit.tokenizer import Tokenizer

__all__ = ["DomainQuality", "Paired", "Quality", "WorstToken", "evaluate", "named_texts"]

Progress = Callable[[int, int, str], None]
Texts = str | Path | Sequence[str | Path] | Mapping[str, str | Path]
WINDOW = 512
FIRST_SCORED = WINDOW // 2
SCORED = WINDOW - 1 - FIRST_SCORED
# of a text file, this much is read at least
LEAST_BYTES = 1 << 22


def evaluate(
    models: str | Path | Sequence[str | Path],
    against: str | Path,
    text: Texts,
    *,
    windows: int = 64,
    exact: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    cache: bool = False,
    kv_cache: str | None = None,
    progress: Progress | None = None,
) -> list[Quality]:
    """Measure each of `models` against the full-precision model `against`, run in float32.

    text     a text file, several (named by their stems), or names with files; figures are given for each and for all
    windows  how many windows of 512 tokens to take of each text, at most
    exact    runs the quantized weights with float activations; otherwise the default kernels run
    device   where the models run, as `load` takes it; the reference runs on the CPU
    cache    keeps what the reference predicted on disk, compressed, and uses what an earlier call kept; one window is
             then run again to state the error (`Quality.cache_error`), or to refuse what was kept
    kv_cache what the candidates keep keys and values in: `load`'s `cache`
    Raises FewbitError where a text is too short, the models' vocabularies or their tokens of a text differ, or
    predictions are not finite.
    """
    # refused before the reference runs
    cache_dtype(exact, kv_cache)
    if threads is not None:
        set_threads(threads)
    source = open_source(against)
    candidates = [open_source(model) for model in ([models] if isinstance(models, str | Path) else models)]
    _check(source, candidates)
    tokenizer = Tokenizer(source.checkpoint.tokenizer())
    pieces = _pieces(source, candidates, named_texts(text), windows)
    reference = _Reference(source, pieces, ReferenceCache(source) if cache else None, progress)
    # before the candidates are loaded: with a whole cache, the reference and they are never in memory together
    reference.prepare()
    runs = [
        _Candidate(
            LanguageModel(s, exact, None, cache=kv_cache, placement=placed(s, device, exact, None, kv_cache)),
            Worst(tokenizer),
        )
        for s in candidates
    ]
    for done, piece in enumerate(pieces):
        expected, kept = reference.expected(piece), reference.kept(piece)
        for j, run in enumerate(runs):
            run.add(piece, expected, kept)
            if progress:
                doing = f"window {piece.window + 1} of {piece.text}"
                progress(done * len(runs) + j + 1, len(pieces) * len(runs), doing)
    return [run.quality(runs[0], reference.cached) for run in runs]


def named_texts(text: Texts) -> dict[str, Path]:
    """Names and files of the texts; a file without a name goes by its stem. FewbitError where two go by one name."""
    if isinstance(text, Mapping):
        return {name: Path(file) for name, file in text.items()}
    found: dict[str, Path] = {}
    for file in map(Path, [text] if isinstance(text, str | Path) else text):
        if file.stem in found:
            raise FewbitError(
                f"Two texts go by the name {file.stem!r}.",
                f"{str(found[file.stem])!r} and {str(file)!r}.",
                "Name them: --text NAME=FILE, or a dictionary in Python.",
            )
        found[file.stem] = file
    return found


@dataclass(frozen=True)
class _Piece:
    """One window int64 [512] of a text, and the window's number in it."""

    text: str
    window: int
    tokens: Tensor

    @property
    def targets(self) -> Tensor:
        return self.tokens[FIRST_SCORED + 1 :]

    def run(self, model: LanguageModel) -> Prediction:
        """What a model predicts at positions 256 to 510 of the window run alone; FewbitError where it is not finite."""
        sequence = CachedSequence()
        try:
            wanted = list(range(FIRST_SCORED, WINDOW - 1))
            found = Prediction(model.forward([(sequence, self.tokens.tolist())], wanted=wanted).cpu())
        finally:
            model.allocator.truncate(sequence, 0)
        if not found.total.isfinite().all():
            raise self.not_finite(model.name, int((~found.logits.isfinite().all(-1)).sum()))
        return found

    def not_finite(self, model: str, count: int) -> FewbitError:
        return FewbitError(
            f"The predictions of {model} are not finite.",
            f"{count} of the {SCORED} scored positions of window {self.window + 1} of {self.text!r}.",
            "Its weights are damaged or overflow: try --exact, or `fewbit quantize`, which names a broken tensor.",
        )


class _Reference:
    """What the full-precision model predicts, from the cache or by running it; it is in memory only while needed."""

    def __init__(
        self, source: Source, pieces: list[_Piece], cache: ReferenceCache | None, progress: Progress | None
    ) -> None:
        self.source, self.cache, self.progress = source, cache, progress
        # windows that the cache has answered
        self.cached = 0
        # whether a cached window was gone when it came to be used: others may be too
        self._missed = False
        self._model: LanguageModel | None = None
        # pieces the model must run for
        self._pending = {id(p) for p in pieces if not cache or not cache.has(p.tokens)}
        cached = [p for p in pieces if id(p) not in self._pending]
        # any of them would do; always the same one keeps a command's output the same
        self._checked = cached[len(cached) // 2] if cached else None
        self._pieces = pieces
        self._exact: Prediction | None = None
        self._kept: Expected | None = None

    def prepare(self) -> None:
        """Run the window that checks the cache; where the two disagree, nothing cached is used."""
        piece, cache = self._checked, self.cache
        if piece is None or cache is None:
            return
        for each in self._pieces:
            # what this run writes then pushes out others' windows before its own
            cache.touch(each.tokens)
        if self.progress:
            self.progress(0, 0, f"checking what is cached of {self.source.name}")
        self._exact, kept = self._run(piece), cache.read(piece.tokens, SCORED)
        if kept is not None and kept.is_of(self._exact):
            self._kept = kept
        else:
            self._pending = {id(p) for p in self._pieces if p is not piece}
            self._store(piece, self._exact)
        self._release()

    def kept(self, piece: _Piece) -> Expected | None:
        """The cached predictions of the one window whose exact ones are `expected`'s."""
        return self._kept if piece is self._checked else None

    def expected(self, piece: _Piece) -> Expected:
        """The reference's predictions on a window."""
        if piece is self._checked and self._exact is not None:
            exact, self._exact = self._exact, None
            return exact
        if self.cache and id(piece) not in self._pending and (found := self.cache.read(piece.tokens, SCORED)):
            self.cached += 1
            return found
        self._missed |= id(piece) not in self._pending
        exact = self._run(piece)
        self._store(piece, exact)
        self._release()
        return exact

    def _run(self, piece: _Piece) -> Prediction:
        if self._model is None:
            # opened after the cache has hashed the files, so that what is kept is what was hashed
            self._model = LanguageModel(open_source(self.source.name), exact=True, context=None)
        self._pending.discard(id(piece))
        return piece.run(self._model)

    def _store(self, piece: _Piece, exact: Prediction) -> None:
        if self.cache:
            self.cache.write(piece.tokens, exact, piece.targets)

    def _release(self) -> None:
        if not self._pending and not self._missed:
            self._model = None


@dataclass
class _Candidate:
    """A loaded candidate and its figures so far."""

    model: LanguageModel
    worst: Worst
    scores: dict[str, list[Scores]] = field(default_factory=dict)
    # cached less exact KL at each token of the window that was checked
    differences: Tensor | None = None

    def add(self, piece: _Piece, expected: Expected, kept: Expected | None) -> None:
        """Score one window; `kept` is what the cache has for it where `expected` is exact."""
        found = piece.run(self.model)
        scores = score(expected, found, piece.targets)
        if bad := scores.unusable():
            raise piece.not_finite(self.model.name, bad)
        self.scores.setdefault(piece.text, []).append(scores)
        place = (piece.text, piece.window)
        self.worst.add(place, piece.tokens, FIRST_SCORED + 1, scores.kl, (expected, found))
        if kept is not None:
            self.differences = kept.kl(found) - scores.kl

    def cache_error(self, windows: int) -> float:
        """Of the mean KL when `windows` of the windows came from the cache."""
        if self.differences is None or not windows:
            return 0.0
        # each position's sample was drawn by itself, so its noise falls with the number of windows; a bias would not
        return math.hypot(float(self.differences.mean()), 2 * standard_error(self.differences, SCORED) / windows**0.5)

    def quality(self, first: _Candidate, cached: int) -> Quality:
        """The figures of all windows, and beside those of the `first` candidate."""
        by_text = {name: joined(scores) for name, scores in self.scores.items()}
        theirs = {name: joined(scores) for name, scores in first.scores.items()}
        whole, size = joined(list(by_text.values())), describe_source(self.model.source)
        domains = []
        for name, scores in by_text.items():
            beside = None if first is self else paired(scores.kl - theirs[name].kl, SCORED)
            domains.append(DomainQuality(name=name, paired=beside, **figures(scores, SCORED)))
        return Quality(
            model=self.model.name,
            weight_bytes=size.weight_bytes,
            bits_per_weight=size.bits_per_weight,
            exact=self.model.exact,
            device=self.model.device_name,
            device_note=self.model.device_note,
            domains=tuple(domains),
            worst=tuple(self.worst.tokens),
            cache_error=self.cache_error(cached),
            paired=None if first is self else paired(whole.kl - joined(list(theirs.values())).kl, SCORED),
            **figures(whole, SCORED),
        )


def _pieces(source: Source, candidates: list[Source], texts: dict[str, Path], most: int) -> list[_Piece]:
    """The windows of all texts, in the reference's tokens; FewbitError where a candidate's are others."""
    if most < 1:
        raise FewbitError("No window to score.", f"Asked for {most}.", "Give --windows 1 or more.")
    if not texts:
        raise FewbitError("There is no text to measure on.", "None was given.", "Give --text FILE.")
    tokenizer = Tokenizer(source.checkpoint.tokenizer())
    others = {c.name: Tokenizer(c.checkpoint.tokenizer()) for c in candidates}
    others = {name: other for name, other in others.items() if other.data.json != tokenizer.data.json}
    found = []
    for name, file in texts.items():
        try:
            content = read_text(file, max(BYTES_PER_TOKEN * most * WINDOW, LEAST_BYTES))
            windows = windows_of(content, tokenizer, WINDOW, most)
        except FewbitError as e:
            raise FewbitError(e.what, f"{file}: {e.facts}", e.next_step) from e
        if int(windows.max()) >= source.args.vocab_size:
            raise FewbitError(
                f"The tokenizer of {source.name} does not belong to its weights.",
                f"It gives token {int(windows.max()):,}; the model has {source.args.vocab_size:,}.",
                "Download the model again.",
            )
        ids = tokenizer.encode(content, bos=False)[: windows.numel()] if others else []
        for model, other in others.items():
            _same_tokens(source.name, ids, model, other.encode(content, bos=False)[: len(ids)], file)
        found += [_Piece(name, i, window) for i, window in enumerate(windows)]
    return found


def _same_tokens(reference: str, ids: list[int], model: str, others: list[int], file: Path) -> None:
    """FewbitError where two tokenizers disagree on a text: a candidate would be fed what it was not made for."""
    if ids == others:
        return
    pairs = enumerate(zip_longest(ids, others))
    at, (one, two) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    raise FewbitError(
        f"{model} and {reference} read the text in different tokens.",
        f"Token {at + 1:,} of {str(file)!r} is {two} and {one}.",
        "Compare a model with the one it was made from, or give both the same tokenizer.",
    )


def _check(reference: Source, candidates: list[Source]) -> None:
    """Before anything is loaded: windows must fit the models, and the vocabularies be the same."""
    if not candidates:
        raise FewbitError("There is no model to measure.", "None was given.", "Give one model or several.")
    for source in (reference, *candidates):
        if source.args.max_position_embeddings < WINDOW:
            raise FewbitError(
                f"{source.name} is too small to measure.",
                f"Its context is {source.args.max_position_embeddings}; a window takes {WINDOW} tokens.",
                "Use a model with a longer context.",
            )
        if source.args.vocab_size != reference.args.vocab_size:
            raise FewbitError(
                f"{source.name} and {reference.name} have different vocabularies.",
                f"{source.args.vocab_size:,} and {reference.args.vocab_size:,} tokens.",
                "Compare a model with the one it was made from.",
            )
