"""The walk over a model: embedding, blocks, head; each unit quantized, written, committed.

With a method that wants data, calibration text runs along: every block sees what the blocks before it hand on as they
were written, so a run that was stopped takes up the very same numbers by running the text through its finished blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Protocol

import torch
from torch import Tensor

from fewbit.blocks import FloatBlock, embed, fast_product, load_block
from fewbit.calibrated import BlockSolver, Goals, Line, Solved
from fewbit.checkpoint import open_checkpoint
from fewbit.checkpoint._writer import Planned, Writer
from fewbit.errors import FewbitError
from fewbit.fetching import Fetcher, Stored
from fewbit.formats import parse
from fewbit.memory import card_free
from fewbit.methods import Target, rtn
from fewbit.passes import collect, propagate
from fewbit.preflight import CARD_BYTES, Preflight, check, needed
from fewbit.qtensor import QTensor
from fewbit.scratch import mapped, pin
from fewbit.sensitivity import PROBES, Probe, Sensitivity
from fewbit.source import FLOATS, Source

Progress = Callable[[int, int, str], None]
# rows of one slice hold about this many weights; a multiple of 32 rows keeps packed zero points whole
SLICE_WEIGHTS = 1 << 24
# what the loss makes of errors, in the unfinished output
SENSITIVITY = "sensitivity.safetensors"


class Settings(Protocol):
    """What the walk reads of the options."""

    @property
    def share(self) -> float: ...
    @property
    def weighted(self) -> bool: ...
    @property
    def prefix(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def offload(self) -> bool: ...


class Log:
    """One JSON line for each matrix, appended as it is done: a resumed run goes on in the same file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def __enter__(self) -> Log:
        self._file = self.path.open("a", encoding="utf-8") if self.path else None
        return self

    def write(self, line: Line) -> None:
        """Append, and let readers see it."""
        if self._file:
            self._file.write(json.dumps(line.to_dict()) + "\n")
            self._file.flush()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file:
            self._file.close()


def device_of(name: str) -> torch.device:
    """`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:1`; FewbitError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = "cuda:0"
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise FewbitError(f"There is no device {name!r}.", "Known: auto, cpu, cuda, cuda:N.", "Use auto.") from e
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise FewbitError(
            f"There is no device {name!r} here.",
            f"PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices.",
            "Use --device cpu, or install the NVIDIA driver and a CUDA build of PyTorch.",
        )
    if device.type not in ("cpu", "cuda"):
        raise FewbitError(f"{name!r} is no device to quantize on.", "Known: auto, cpu, cuda, cuda:N.", "Use auto.")
    return device


def identity(source: Source) -> dict[str, str]:
    """Size and time of each file of the source by its name: a changed model is another model."""
    path = source.path
    kinds = (".safetensors", ".json", ".jinja", ".gguf")
    files = sorted(p for p in path.iterdir() if p.suffix in kinds) if path.is_dir() else [path]
    return {p.name: f"{p.stat().st_size} bytes of {p.stat().st_mtime_ns}" for p in files}


class Walk:
    """One quantization, from the first unit that is not done to the last."""

    def __init__(
        self,
        source: Source,
        writer: Writer,
        plan: list[Planned],
        modules: list[ModuleType],
        target: Target,
        settings: Settings,
        progress: Progress,
        log: Log,
        note: Callable[[str], None],
    ) -> None:
        self.source, self.writer, self.modules, self.target = source, writer, modules, target
        self.settings, self.log, self.note = settings, log, note
        self.needs = frozenset().union(*(m.NEEDS for m in modules))
        self.device = device_of(settings.device) if self.needs else torch.device("cpu")
        self.product = fast_product(source, self.device)
        self._progress = progress
        self.plan = {p.name: p for p in plan}
        self.units: dict[str, list[Planned]] = {}
        for w in source.weights:
            unit = f"block {w.block}" if w.block is not None else w.role
            self.units.setdefault(unit, []).append(self.plan[w.name])
        self.total = sum(_weights(planned) for planned in self.units.values())
        self.finished = 0
        # what is let go of at the end
        self._held = ExitStack()
        # linears that no calibration token came to
        self.unseen: list[str] = []

    def run(self, windows: Tensor | None) -> None:
        """Every unit that is not committed; `windows` int64 [n, length] where the method wants data.

        An error that comes after a commit carries a note of how much is kept.
        """
        try:
            with self._held:
                self._run(windows)
        except BaseException as e:
            if kept := len(self.writer.done):
                e.add_note(f"{kept} of {len(self.units)} units are kept")
            raise

    def _run(self, windows: Tensor | None) -> None:
        done = set(self.writer.done)
        if done:
            self._progress(0, 1, f"going on after {self.writer.done[-1]} ({len(done)} of {len(self.units)} units kept)")
        blocks = [unit for unit in self.units if unit.startswith("block ")]
        for unit, planned in self.units.items():
            if unit not in blocks or windows is None or not self.needs:
                self._plain(unit, planned, unit in done)
            elif unit == blocks[0]:
                # all blocks at once: hidden states go from one to the next
                self._calibrated(windows, blocks, done)

    def _report(self, doing: str, share: float = 0.0) -> None:
        self._progress(int(self.finished + share), self.total, doing)

    def _plain(self, unit: str, planned: list[Planned], kept: bool) -> None:
        """A unit by round to nearest (or casts), tensor by tensor in slices of rows."""
        if kept:
            self.writer.keep(planned)
            self.finished += _weights(planned)
            return
        method = self.modules[-1] if unit.startswith("block ") else rtn
        for p in planned:
            self.writer.write(p, self._pieces(p, method))
        self.writer.commit(unit, planned)

    def _pieces(self, planned: Planned, method: ModuleType) -> Iterator[QTensor]:
        for piece in quantized(self.source, planned, method, self.target):
            self.finished += piece.numel
            self._report(planned.name)
            yield piece

    def _calibrated(self, windows: Tensor, blocks: list[str], done: set[str]) -> None:
        written = open_checkpoint(self.writer.folder)
        wants_goals = bool(self.needs & {"goals"} or self.settings.share) or self.settings.prefix == "original"
        place = self._place(windows, wants_goals)
        hidden = self._hidden(windows, written.read, "hidden.bin", place)
        reference = self._hidden(windows, self.source.read, "reference.bin", place) if wants_goals else None
        solver = BlockSolver(self.source, self.modules, self.target, lambda name: self.plan[name].spec)
        length = windows.shape[1]
        sensitivity = None
        if any(unit not in done for unit in blocks):
            # now, not after an hour; this also reads the whole source once
            for planned in self.units.values():
                check_finite(self.source, planned, self.device)
            self._preflight(hidden, sum(unit not in done for unit in blocks), reference is not None)
            sensitivity = self._sensitivity(windows) if self.settings.weighted else None
        for index, unit in enumerate(blocks):
            if unit in done:
                self._report(f"running calibration text through {unit}")
                self.writer.keep(self.units[unit])
                if reference is not None:
                    propagate(self._float_block(index, length), reference)
            else:
                self._block(solver, unit, index, hidden, reference, sensitivity)
            self.finished += _weights(self.units[unit])
            if index + 1 < len(blocks):
                propagate(self._float_block(index, length, written), hidden)
        (self.writer.folder / SENSITIVITY).unlink(missing_ok=True)

    def _sensitivity(self, windows: Tensor) -> Sensitivity:
        """Measured once: a run that goes on finds it beside the journal."""
        file = self.writer.folder / SENSITIVITY
        if file.exists():
            return Sensitivity.load(file)
        weights = sum(_weights(planned) for unit, planned in self.units.items() if unit.startswith("block "))
        weights = weights * min(PROBES, len(windows)) // len(windows)
        self.total += weights
        probe = Probe(self.source, self.device, self.product, lambda text, share: self._report(text, weights * share))
        found = probe.measure(windows, self.writer.folder)
        found.save(file)
        self.finished += weights
        return found

    def _block(
        self,
        solver: BlockSolver,
        unit: str,
        index: int,
        hidden: Tensor,
        reference: Tensor | None,
        sensitivity: Sensitivity | None,
    ) -> None:
        weights = _weights(self.units[unit])
        place = f"block {index + 1} of {sum(u.startswith('block ') for u in self.units)}"
        self._report(f"{place}: running calibration text")
        block = self._float_block(index, hidden.shape[1])
        seen = reference if self.settings.prefix == "original" and reference is not None else hidden
        positions = sensitivity.positions[index] if sensitivity else None
        stats = collect(block, seen, reference if self.settings.share else None, positions)
        for found in stats:
            if "cross" in found:
                found["cross"] = found["hessian"].lerp(found["cross"], self.settings.share)
        if reference is not None:
            propagate(block, reference)
        goals = None
        if reference is not None and "goals" in self.needs:
            goals = Goals(reference, sensitivity.channels[index] if sensitivity else torch.ones(hidden.shape[-1]))

        def report(name: str, part: int, parts: int) -> None:
            self._report(f"{place}: {name.removeprefix(block.prefix)}", weights * part / parts)

        with torch.no_grad():
            solved = solver.solve(block, stats, hidden, goals, report)
        # before the commit: a line may be there twice after a kill, but never lack
        for line in solved.lines:
            self.log.write(line)
        self._write(unit, solved)
        if solved.unseen:
            self._say_unseen(place, solved.unseen)
        for line in solved.lines:
            better = f"{line.error / line.rtn_error:.2f} of round to nearest's" if line.rtn_error else "exact"
            self._report(f"{place}: {line.name} error {line.error:.2e}, {better}", weights)

    def _say_unseen(self, place: str, unseen: list[str]) -> None:
        """Experts that the router sent no calibration token to."""
        self.unseen += unseen
        experts = sorted({int(name.split(".experts.")[1].split(".")[0]) for name in unseen})
        self.note(
            f"{place}: {len(experts)} of {self.source.args.experts} experts saw no calibration token and are rounded "
            f"to nearest: {', '.join(map(str, experts))}"
        )

    def _float_block(self, index: int, length: int, stored: Stored | None = None) -> FloatBlock:
        return load_block(self.source, index, length, self.device, self.product, stored)

    def _write(self, unit: str, solved: Solved) -> None:
        for planned in self.units[unit]:
            self.writer.write(planned, [solved.tensors[planned.name]])
        self.writer.commit(unit, self.units[unit])

    def _hidden(self, windows: Tensor, read: Callable[[str], QTensor], name: str, place: torch.device) -> Tensor:
        """Embedded tokens float32 [n, length, d], in memory or in a file that lives as long as the output is made."""
        shape = (*windows.shape, self.source.args.hidden_size)
        if self.settings.offload:
            hidden = mapped(self.writer.folder / name, shape, torch.float32)
        else:
            hidden = torch.empty(shape, device=place)
            if self.device.type != place.type:
                self._held.callback(pin(hidden, self.device))
        start = 0
        for part in embed(self.source, windows, read=read):
            hidden[start : start + len(part)] = part
            start += len(part)
        if not bool(hidden.isfinite().all()):
            raise FewbitError(
                "The embedding gives NaN or infinity.",
                f"{int((~hidden.isfinite()).sum()):,} values for the calibration text.",
                "The checkpoint is damaged: download it again.",
            )
        return hidden

    def _place(self, windows: Tensor, wants_goals: bool) -> torch.device:
        """Where hidden states lie: on the card where a block's work has room beside them, else in host memory, from
        where they go through the card a few windows at a time.
        """
        if self.device.type == "cuda":
            shape = (windows.shape[0], windows.shape[1], self.source.args.hidden_size)
            tuned = getattr(self.modules[-1], "WINDOWS", 0)
            drift, weighted = bool(self.settings.share), self.settings.weighted
            work, state = needed(self.source, shape, wants_goals, drift, tuned, weighted)
            if work + CARD_BYTES + state <= card_free(self.device):
                return self.device
        return torch.device("cpu")

    def _preflight(self, hidden: Tensor, blocks: int, with_goals: bool) -> None:
        """Tries the largest layer once and tells what the rest takes; FewbitError where it does not fit."""
        found: Preflight = check(
            self.source, hidden, blocks, with_goals, bool(self.settings.share), self.settings.weighted, self.modules,
            self.target, self.device, lambda name: self.plan[name].spec, self.settings.offload,
        )  # fmt: skip
        self.note(f"{found}; {self.writer.nbytes / 1e9:.2f} GB on disk")
        self._progress(0, 1, f"{found}")


def check_finite(source: Source, planned: list[Planned], device: torch.device) -> None:
    """FewbitError where a tensor of a unit holds NaN or infinity."""
    if device.type == "cuda":
        with Fetcher(source, [p.name for p in planned], device) as fetcher:
            for p in planned:
                w = parse(source.spec(p.name)).dequantize(fetcher.read(p.name))
                if not torch.isfinite(w.sum()):
                    _name_the_broken(p, w, None)
        return
    for p in planned:
        for rows in _slices(p):
            w = parse(source.spec(p.name)).dequantize(source.read(p.name, rows))
            if not torch.isfinite(w.sum()):
                _name_the_broken(p, w, rows)


def _slices(planned: Planned) -> list[tuple[int, int] | None]:
    """Rows [start, stop) of a matrix, about SLICE_WEIGHTS weights at a time; None: all of a vector."""
    if len(planned.shape) < 2:
        return [None]
    rows = max(32, SLICE_WEIGHTS // planned.shape[1] // 32 * 32)
    return [(i, min(i + rows, planned.shape[0])) for i in range(0, planned.shape[0], rows)]


def quantized(source: Source, planned: Planned, method: ModuleType, target: Target) -> Iterator[QTensor]:
    """A tensor's slices of rows, quantized or cast."""
    fmt = parse(planned.spec)
    for part in _slices(planned):
        q = source.read(planned.name, part)
        w = parse(q.spec).dequantize(q)
        if planned.spec in FLOATS:
            # also what the narrower type can't hold
            w = w.to(FLOATS[planned.spec])
        if not torch.isfinite(w.float().sum()):
            _name_the_broken(planned, w, part)
        yield fmt.pack(w, {}) if planned.spec in FLOATS else method.quantize(w, fmt, {}, target)


def _name_the_broken(planned: Planned, w: Tensor, part: tuple[int, int] | None) -> None:
    broken = ~torch.isfinite(w)
    if count := int(broken.sum()):
        first = [int(i) for i in broken.nonzero()[0]]
        first[0] += part[0] if part else 0
        as_stored = f" as {planned.spec}" if planned.spec in FLOATS else ""
        raise FewbitError(
            f"The tensor {planned.name!r} holds NaN or infinity{as_stored}.",
            f"{count:,} of {w.numel():,} weights; the first at {first}.",
            "The checkpoint is damaged, or its weights are too large for the type: download it again, or keep bf16.",
        )


def _weights(planned: list[Planned]) -> int:
    return sum(torch.Size(p.shape).numel() for p in planned)
