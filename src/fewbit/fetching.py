"""Tensors from files onto a device: a few threads read ahead into a ring of buffers, and what is asked for goes from
there to the card while they read on.

The host holds the ring and nothing else. Threads only read; the one that asks for tensors makes all calls to the card,
so that copies and what follows them are in order on its stream. Files are read, not mapped: a page fault brings in
little at a time, and a mapped file that becomes shorter would end the process.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from fewbit.checkpoint import Extent
from fewbit.errors import FewbitError
from fewbit.qtensor import QTensor
from fewbit.scratch import pin

# a buffer, of whole pages; how many there are; threads that fill them
PIECE_BYTES, PIECES, READERS = 16 << 20, 32, 8


class Stored(Protocol):
    """What tensors are fetched from: a source, or a checkpoint under its own names."""

    def extents(self, name: str) -> dict[str, Extent]: ...
    def assemble(self, name: str, stored: dict[str, Tensor]) -> QTensor: ...
    def read(self, name: str) -> QTensor: ...


@dataclass(eq=False)
class _Piece:
    """Bytes [offset, offset + count) of a file, for [at, at + count) of a tensor."""

    file: Path
    offset: int
    count: int
    at: int
    # where in the ring they lie once they are read; or why they can't be
    slot: int | None = None
    error: Exception | None = None
    # somebody reads them now, or has
    taken: bool = False


class Fetcher:
    """Reads the tensors `names` ahead, in this order, for `read` to give out on `device`.

    Asked for in another order they still come, and other names are simply read. `close` at last in any case.
    """

    def __init__(self, source: Stored, names: Sequence[str], device: torch.device) -> None:
        self.source, self.device = source, device
        self._places = {name: source.extents(name) for name in names}
        self._pieces = {name: [_cut(place) for place in found.values()] for name, found in self._places.items()}
        self._todo = deque(p for name in names for pieces in self._pieces[name] for p in pieces)
        count = min(PIECES, len(self._todo))
        # on the border of a page, as slots are pinned one by one, when they are filled again: that takes longer than
        # copying them once
        memory = mmap.mmap(-1, (count + 1) * PIECE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._ring = torch.frombuffer(memory, dtype=torch.uint8).view(count + 1, PIECE_BYTES)
        self._filled: set[int] = set()
        self._unpin: dict[int, Callable[[], None]] = {}
        # slots to be written, with what the card must have done before; one is kept for the thread that asks
        self._free: deque[tuple[int, Any]] = deque((i, None) for i in range(count))
        self._own: tuple[int, Any] = (count, None)
        self._files: dict[Path, int] = {}
        self._changed, self._closing = threading.Condition(), False
        self._readers = [threading.Thread(target=self._fill, daemon=True) for _ in range(min(READERS, count))]
        for reader in self._readers:
            reader.start()

    def read(self, name: str) -> QTensor:
        """A tensor in canonical row order, on the device. FewbitError where its file can't be read."""
        pieces, places = self._pieces.pop(name, []), self._places.get(name)
        if not pieces or not places:
            return _on(self.source.read(name), self.device)
        stored = {part: self._brought(place, cut) for (part, place), cut in zip(places.items(), pieces, strict=True)}
        return self.source.assemble(name, stored)

    def _brought(self, place: Extent, pieces: list[_Piece]) -> Tensor:
        raw = torch.empty(place.nbytes, dtype=torch.uint8, device=self.device)
        for piece in pieces:
            slot = self._wait(piece)
            raw[piece.at : piece.at + piece.count].copy_(self._ring[slot, : piece.count], non_blocking=True)
            done = None
            if self.device.type == "cuda":
                done = torch.cuda.Event()
                done.record(torch.cuda.current_stream(self.device))
            if slot == self._own[0]:
                self._own = (slot, done)
                continue
            with self._changed:
                self._free.append((slot, done))
                self._changed.notify()
        return raw.view(place.dtype).view(place.shape)

    def _wait(self, piece: _Piece) -> int:
        """The slot where a piece lies when it has been read."""
        with self._changed:
            mine = not piece.taken
            if mine:
                # before its turn, or all slots hold what is asked for later: read here, into the slot kept for that
                piece.taken = True
                self._todo.remove(piece)
            while not mine and piece.slot is None:
                self._changed.wait()
        if mine:
            self._fill_one(piece, *self._own)
        if piece.error is not None:
            raise _unreadable(piece, piece.error)
        assert piece.slot is not None  # noqa: S101
        return piece.slot

    def _fill_one(self, piece: _Piece, slot: int, done: Any) -> None:
        try:
            if done is not None:
                done.synchronize()
            if slot in self._filled and slot not in self._unpin:
                self._unpin[slot] = pin(self._ring[slot], self.device)
            self._filled.add(slot)
            _read(self._opened(piece.file), piece, self._ring[slot, : piece.count])
        except Exception as error:  # noqa: BLE001
            # whoever asked for it raises it
            piece.error = error
        with self._changed:
            piece.slot = slot
            self._changed.notify_all()

    def _fill(self) -> None:
        """What a thread does: read pieces in turn, each into a free slot."""
        while True:
            with self._changed:
                while not self._closing and not (self._todo and self._free):
                    self._changed.wait()
                if self._closing:
                    return
                piece, (slot, done) = self._todo.popleft(), self._free.popleft()
                piece.taken = True
            self._fill_one(piece, slot, done)

    def _opened(self, file: Path) -> int:
        with self._changed:
            if file not in self._files:
                self._files[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            return self._files[file]

    def close(self) -> None:
        """Stop reading and let go of the ring."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for reader in self._readers:
            reader.join()
        # nothing of it is on its way to the card any more
        for unpin in self._unpin.values():
            unpin()
        self._unpin.clear()
        self._ring = torch.empty(0, 0, dtype=torch.uint8)
        for descriptor in self._files.values():
            with suppress(OSError):
                os.close(descriptor)
        self._files.clear()

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _cut(place: Extent) -> list[_Piece]:
    return [
        _Piece(place.file, place.offset + at, min(PIECE_BYTES, place.nbytes - at), at)
        for at in range(0, place.nbytes, PIECE_BYTES)
    ]


def _read(descriptor: int, piece: _Piece, into: Tensor) -> None:
    # mypy knows no buffer protocol before Python 3.12
    room, have = memoryview(into.numpy()), 0  # type: ignore[arg-type]
    while have < piece.count:
        count = os.preadv(descriptor, [room[have:]], piece.offset + have)
        if not count:
            raise EOFError(f"it ends at byte {piece.offset + have:,}, and {piece.offset + piece.count:,} are needed")
        have += count


def _unreadable(piece: _Piece, error: Exception) -> FewbitError:
    if not isinstance(error, OSError | EOFError):
        raise error
    reason = error.strerror if isinstance(error, OSError) else error
    return FewbitError(
        f"{piece.file.name} can't be read to its end.",
        f"{piece.file}: {reason or error}.",
        "Download or copy the file again, and let nothing write to it meanwhile.",
    )


def _on(q: QTensor, device: torch.device) -> QTensor:
    return QTensor(q.spec, q.shape, {name: part.to(device) for name, part in q.parts.items()})
