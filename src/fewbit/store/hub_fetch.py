"""Brings files of a repository into the hub's cache, over plain HTTP, so that a cut download goes on where it stopped.

The hub's library begins a file anew in each process; here what came is kept in `blobs/HASH.incomplete`, a name the
library's own tools know. A file gets its name when its length and its hash are those the hub announced.
"""

from __future__ import annotations

import hashlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from fewbit import __version__
from fewbit.errors import FewbitError
from fewbit.store.hub_cache import UNFINISHED
from fewbit.store.hub_choice import RemoteFile
from fewbit.store.places import size_text

Progress = Callable[[int, int, str], None]
# files that come at once; many small shards keep a fast line busy
WORKERS = 4
# seconds before each new attempt; one that brought something begins the list anew
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
PIECE = 1 << 20
# what the hub gives over plain HTTP; larger files come by chunks, through the library
MAX_BYTES = 50_000_000_000
# seconds that files under way are given to end
FAREWELL = 1.0
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_LATER = (408, 429, 500, 502, 503, 504)


class Stopped(Exception):  # noqa: N818
    """Another file failed, or the user left."""


class _Again(Exception):  # noqa: N818
    """The connection ended before the file did."""


def kept_bytes(blobs: Path, file: RemoteFile) -> int:
    """What of a file is here already, unfinished."""
    with suppress(OSError):
        return min(file.size, partial(blobs, file).stat().st_size)
    return 0


def partial(blobs: Path, file: RemoteFile) -> Path:
    """Where a file lies until it is whole."""
    return blobs / f"{file.digest}{UNFINISHED}"


def fetchable(file: RemoteFile) -> bool:
    """Whether it has a hash to be known by and is not too large; the library fetches what is not so."""
    return bool(_HASH.fullmatch(file.digest)) and file.size <= MAX_BYTES


class Fetcher:
    """Fetches files of one commit. `url` gives a file's address, `headers` go with every request."""

    def __init__(self, blobs: Path, url: Callable[[str], str], headers: dict[str, str], timeout: float) -> None:
        self.blobs, self.url, self.timeout = blobs, url, timeout
        # the bytes themselves: a length and a range mean nothing of compressed ones
        self.headers = {**headers, "Accept-Encoding": "identity"}
        self._stop = threading.Event()
        self._count = threading.Lock()
        self._come = 0

    def run(self, files: Sequence[RemoteFile], progress: Progress) -> None:
        """All of them, some at a time; the first error ends the others.

        Whatever ends it, Ctrl-C too, leaves what came in place.
        """
        self.blobs.mkdir(parents=True, exist_ok=True)
        total = sum(f.size - kept_bytes(self.blobs, f) for f in files)
        waiting: queue.SimpleQueue[RemoteFile] = queue.SimpleQueue()
        # the largest first, so that none is left alone at the end
        for file in sorted(files, key=lambda f: -f.size):
            waiting.put(file)
        errors: list[BaseException] = []

        def work() -> None:
            try:
                while not self._stop.is_set():
                    self._fetch(waiting.get_nowait())
            except queue.Empty:
                pass
            except BaseException as error:  # noqa: BLE001 (it is raised again where the files were asked for)
                errors.append(error)
                self._stop.set()

        # daemons: a connection that hangs must not hold up a process that ends
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(WORKERS, len(files)))]
        for thread in threads:
            thread.start()
        try:
            self._watch(threads, total, progress)
        finally:
            self._stop.set()
            until = time.monotonic() + FAREWELL
            for thread in threads:
                thread.join(max(0.0, until - time.monotonic()))
        for error in errors:
            if not isinstance(error, Stopped):
                raise error

    def _watch(self, threads: Sequence[threading.Thread], total: int, progress: Progress) -> None:
        began = time.monotonic()
        while any(t.is_alive() for t in threads):
            time.sleep(0.05)
            seconds, come = time.monotonic() - began, max(0, min(self._come, total))
            if come:
                progress(come, total, f"{size_text(come)} of {size_text(total)}, {come / seconds / 1e6:.1f} MB/s")

    def _fetch(self, file: RemoteFile) -> None:
        """One file, in as many attempts as bring something, and a few more."""
        blob = self.blobs / file.digest
        with _Partial(partial(self.blobs, file), blob, self._stop) as opened:
            if opened.file is None:
                return
            got = _Received(opened.file, file)
            was_here = got.size
            self._complete(file, got)
            if was_here and not got.is_right():
                # what was here may be no part of it
                got.restart()
                self._complete(file, got)
            got.check()
            os.fsync(opened.file.fileno())
            opened.path.replace(blob)

    def _complete(self, file: RemoteFile, got: _Received) -> None:
        """All that is lacking of a file."""
        failed = 0
        while got.size < file.size:
            before = got.size
            try:
                self._stream(file, got)
            except _Again as error:
                failed = 1 if got.size > before else failed + 1
                if failed > len(PAUSES):
                    raise _given_up(file, got.size, error) from error
                if self._stop.wait(PAUSES[failed - 1]):
                    raise Stopped from error

    def _stream(self, file: RemoteFile, got: _Received) -> None:
        """What is lacking of a file, from one answer; _Again where it ends early."""
        from huggingface_hub import get_session, hf_raise_for_status

        headers = dict(self.headers)
        if got.size:
            headers["Range"] = f"bytes={got.size}-"
        try:
            with get_session().stream("GET", self.url(file.name), headers=headers, timeout=self.timeout) as answer:
                if answer.status_code in _LATER:
                    raise _Again(f"the hub answers {answer.status_code}")
                if answer.status_code == 416:
                    # it knows of no such range: nothing can follow what is here
                    self._add(-got.size)
                    got.restart()
                    raise _Again("the hub can't go on in the middle of the file")
                hf_raise_for_status(answer)
                self._begin(file, got, answer)
                # as it comes: larger pieces would be collected, and lost by a cut
                for piece in answer.iter_raw():
                    if self._stop.is_set():
                        raise Stopped
                    got.add(piece)
                    self._add(len(piece))
        except transport_errors() as error:
            raise _Again(str(error) or type(error).__name__) from error
        if got.size < file.size:
            raise _Again(f"the connection ended at byte {got.size:,}")

    def _begin(self, file: RemoteFile, got: _Received, answer: Any) -> None:
        """Check where the answer begins, and that its file is as long as announced."""
        begins, length = 0, answer.headers.get("Content-Length")
        if answer.status_code == 206:
            match = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != got.size:
                raise _Again("the hub gives another range than was asked for")
            begins, length = got.size, None if match[2] == "*" else int(match[2]) - got.size
        if length is not None and int(length) + begins != file.size:
            raise _not_announced(file, f"it has {int(length) + begins:,} bytes, {file.size:,} were announced")
        if begins != got.size:
            # the whole file comes again
            self._add(-got.size)
            got.restart()

    def _add(self, count: int) -> None:
        with self._count:
            self._come += count


def request_headers() -> dict[str, str]:
    """What goes with a request to the hub: the token, where one is given, and who asks."""
    # documented there, though the module does not mark it as its own
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers: dict[str, str] = build_hf_headers(library_name="fewbit", library_version=__version__)
    return headers


def transport_errors() -> tuple[type[Exception], ...]:
    """What is raised where no answer comes: of the HTTP library that the hub's library uses, by version."""
    from huggingface_hub.errors import HfHubHTTPError

    # its own errors are answers, and an OSError besides
    first: type[Exception] = HfHubHTTPError.__bases__[0]
    return tuple(found for found in first.__subclasses__() if found.__name__ == "RequestError")


class _Partial:
    """The unfinished file, held by one process at a time; `file` is None where another one has finished it."""

    def __init__(self, path: Path, blob: Path, stop: threading.Event) -> None:
        self.path, self._blob, self._stop = path, blob, stop
        self.file: BinaryIO | None = None

    def __enter__(self) -> _Partial:
        while not self._blob.exists():
            if self._stop.is_set():
                raise Stopped
            self.path.touch()
            opened = self.path.open("r+b", buffering=0)
            if _held(opened) and self._is_still(opened):
                self.file = opened
                return self
            opened.close()
            time.sleep(0.2)
        return self

    def _is_still(self, opened: BinaryIO) -> bool:
        """Whether the file has its name yet: who held it before may have finished it."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(opened.fileno()), self.path.stat())
        return False

    def __exit__(self, *ended: object) -> None:
        if self.file is not None:
            if not os.fstat(self.file.fileno()).st_size:
                # nothing came; under its own name it has gone already
                self.path.unlink(missing_ok=True)
            self.file.close()


def _held(opened: BinaryIO) -> bool:
    """Lock a file; False where another process has it. Without flock each writes its own way, and the hash decides."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class _Received:
    """What has come of a file, with its hash as far."""

    def __init__(self, opened: BinaryIO, file: RemoteFile) -> None:
        self._opened, self._file = opened, file
        self.size = 0
        self._hash = self._new()
        if os.fstat(opened.fileno()).st_size > file.size:
            self.restart()
        while piece := opened.read(PIECE):
            self._hash.update(piece)
            self.size += len(piece)

    def _new(self) -> Any:
        if len(self._file.digest) == 64:
            return hashlib.sha256()
        # a small file goes by its git id
        return hashlib.sha1(f"blob {self._file.size}\0".encode(), usedforsecurity=False)

    def add(self, piece: bytes) -> None:
        """Append; FewbitError where it would be longer than announced."""
        if self.size + len(piece) > self._file.size:
            raise _not_announced(self._file, f"more than the announced {self._file.size:,} bytes came")
        view = memoryview(piece)
        while view:
            view = view[self._opened.write(view) :]
        self._hash.update(piece)
        self.size += len(piece)

    def restart(self) -> None:
        """Throw away what came."""
        self._opened.seek(0)
        self._opened.truncate()
        self.size, self._hash = 0, self._new()

    def is_right(self) -> bool:
        """Whether it is what was announced."""
        return bool(self._hash.hexdigest() == self._file.digest)

    def check(self) -> None:
        """FewbitError where it is not what was announced; then nothing of it is kept."""
        if not self.is_right():
            found = self._hash.hexdigest()
            self.restart()
            raise _not_announced(self._file, f"its hash is {found[:16]}…, {self._file.digest[:16]}… was announced")


def _not_announced(file: RemoteFile, facts: str) -> FewbitError:
    return FewbitError(
        f"What came for {file.name} is not what the hub announced.",
        f"{facts[0].upper()}{facts[1:]}.",
        "Try again; if it happens twice, a proxy or a mirror (HF_ENDPOINT) between here and the hub alters files.",
    )


def _given_up(file: RemoteFile, size: int, error: Exception) -> FewbitError:
    return FewbitError(
        f"The download of {file.name} broke off.",
        f"{size_text(size)} of {size_text(file.size)} came; {len(PAUSES)} more attempts brought nothing: {error}.",
        "Check the network and give the same command again: it goes on from there.",
    )
