"""A hub on the loopback address: the endpoints that huggingface_hub calls, answered as the real one answers them."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants

# from this size on files lie in large-file storage, behind a redirect to another host
LARGE = 2000


def git_id(content: bytes) -> str:
    """The id git gives a file."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


@dataclass
class Repo:
    """A repository: revisions (commit -> files) and refs (branch or tag -> commit)."""

    revisions: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    # the token that opens it; None: everybody may have it
    opened_by: str | None = None
    # whether others are told that it exists
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        if revision in self.refs:
            return self.refs[revision]
        return next((c for c in self.revisions if c == revision), None)


@dataclass
class Faults:
    """What goes wrong with large files, in the order in which they are asked for; each is used up once."""

    # a connection ends after so many bytes of its answer
    cuts: list[int] = field(default_factory=list)
    # an answer comes with this status
    statuses: list[int] = field(default_factory=list)
    # a connection falls silent for so many seconds after half of the answer
    silences: list[float] = field(default_factory=list)
    # standing ones
    ignores_ranges: bool = False
    longer: bytes = b""
    announces: int | None = None
    tells_no_length: bool = False
    flips_a_byte: bool = False
    # seconds before each piece of 1,000 bytes
    pace: float = 0.0


class Hub:
    """The server. `asked` has (method, path, headers) of every request in order."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults = Faults()
        # whether large files are said to come by chunks (xet) too, which is not spoken here
        self.chunks = True
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def add(self, name: str, files: dict[str, bytes], *, ref: str | None = "main", **settings: Any) -> str:
        """Another commit of a repository -> its hash."""
        commit = hashlib.sha1(repr((name, sorted(files.items()))).encode(), usedforsecurity=False).hexdigest()
        repo = self.repos.setdefault(name, Repo({}, {}, **settings))
        repo.revisions[commit] = files
        if ref:
            repo.refs[ref] = commit
        self.blobs |= {hashlib.sha256(c).hexdigest(): c for c in files.values() if len(c) >= LARGE}
        return commit

    def paths(self, method: str = "GET") -> list[str]:
        return [path for asked, path, _ in self.asked if asked == method]

    def point(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Let the library of this process talk to this hub and keep what comes in `cache`."""
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name, value in self.environment(cache).items():
            monkeypatch.setenv(name, value)
        # a client keeps the proxies it was made with
        close_session()

    def environment(self, cache: Path) -> dict[str, str]:
        """What another process is told."""
        here = "127.0.0.1,localhost"
        found = {"HF_ENDPOINT": self.endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0"}
        return found | {"NO_PROXY": here, "no_proxy": here}

    @contextmanager
    def running(self) -> Iterator[Hub]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield self
        finally:
            close_session()
            self._server.shutdown()
            thread.join()
            self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *args: Any) -> None:
        self.hub = hub
        with suppress(ConnectionError):
            super().__init__(*args)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def json(self, value: Any, **headers: str) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def refuse(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self.answer(status, body, X_Error_Code=code, X_Error_Message=message, Content_Type="application/json")

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path).strip("/").split("/")
        self.hub.asked.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        if path[0] == "cdn":
            self.large(path[1])
        elif path[:2] == ["api", "models"] and len(path) == 2:
            query = parse_qs(parts.query)
            words, owner = (query.get(key, [""])[0].lower() for key in ("search", "author"))
            found = [n for n in self.hub.repos if words in n.lower() and n.lower().startswith(owner)]
            self.json([{"id": n, "modelId": n} for n in found])
        elif path[:2] == ["api", "models"]:
            self.about("/".join(path[2:4]), path[4:], parse_qs(parts.query))
        elif len(path) > 4 and path[2] == "resolve":
            # a slash in a revision comes quoted
            name, _, rest = parts.path.strip("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            self.file(unquote(name), unquote(revision), unquote(file))
        else:
            self.answer(404)

    do_HEAD = do_GET  # noqa: N815

    def repo(self, name: str, *, content: bool) -> Repo | None:
        """The repository, where whoever asks may have it; else it is answered why not."""
        repo, given = self.hub.repos.get(name), self.headers.get("Authorization")
        allowed = repo is not None and (repo.opened_by is None or given == f"Bearer {repo.opened_by}")
        if repo is not None and (allowed or (repo.gated and not content)):
            return repo
        if repo is not None and repo.gated:
            message = f"Access to model {name} is restricted. You must have access to it and be authenticated."
            self.refuse(403 if given else 401, "GatedRepo", message)
        elif given:
            self.refuse(404, "RepoNotFound", "Repository not found")
        else:
            # the real one tells those without a token no more
            self.refuse(401, "RepoNotFound", "Invalid username or password.")
        return None

    def about(self, name: str, rest: list[str], query: dict[str, list[str]]) -> None:
        repo = self.repo(name, content=False)
        if repo is None:
            return
        if rest == ["refs"]:
            refs = [{"name": r, "ref": f"refs/heads/{r}", "targetCommit": c} for r, c in repo.refs.items()]
            self.json({"branches": refs, "converts": [], "tags": []})
            return
        commit = repo.commit("/".join(rest[1:]) or "main")
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {'/'.join(rest[1:])}")
            return
        files = repo.revisions[commit]
        if rest[:1] == ["tree"]:
            self.json([{"type": "file", "path": n, "oid": git_id(c), **self.facts(c, "oid")} for n, c in files.items()])
            return
        siblings = [
            {"rfilename": n, "blobId": git_id(c), **self.facts(c, "sha256")} if "blobs" in query else {"rfilename": n}
            for n, c in files.items()
        ]
        gated = "manual" if repo.gated else False
        self.json({"id": name, "sha": commit, "siblings": siblings, "private": False, "gated": gated, "tags": []})

    @staticmethod
    def facts(content: bytes, key: str) -> dict[str, Any]:
        """Size of a file, and what large-file storage knows it by."""
        found: dict[str, Any] = {"size": len(content)}
        if len(content) >= LARGE:
            found["lfs"] = {key: hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return found

    def file(self, name: str, revision: str, file: str) -> None:
        repo = self.repo(name, content=True)
        if repo is None:
            return
        commit = repo.commit(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        content = repo.revisions[commit].get(file)
        if content is None:
            self.refuse(404, "EntryNotFound", f"Entry not found: {file}")
        elif len(content) < LARGE:
            self.answer(200, content, ETag=f'"{git_id(content)}"', X_Repo_Commit=commit)
        else:
            digest = hashlib.sha256(content).hexdigest()
            self.answer(
                302,
                # another host, which must never see the token
                Location=f"http://localhost:{self.hub.port}/cdn/{digest}",
                ETag=f'"{git_id(content)}"',
                X_Linked_Etag=f'"{digest}"',
                X_Linked_Size=str(len(content)),
                X_Repo_Commit=commit,
                **(self.chunks(name, commit, digest) if self.hub.chunks else {}),
            )

    def chunks(self, name: str, commit: str, digest: str) -> dict[str, str]:
        route = f"{self.hub.endpoint}/api/models/{name}/xet-read-token/{commit}"
        return {"X_Xet_Hash": digest, "Link": f'<{route}>; rel="xet-auth"'}

    def large(self, digest: str) -> None:
        faults, content = self.hub.faults, self.hub.blobs[digest]
        if faults.statuses:
            self.answer(faults.statuses.pop(0))
            return
        if faults.flips_a_byte:
            content = bytes([content[0] ^ 1]) + content[1:]
        content += faults.longer
        start = 0
        asked = self.headers.get("Range")
        headers = {"ETag": f'"{digest}"'}
        if asked and not faults.ignores_ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.answer(416, Content_Range=f"bytes */{len(content)}")
                return
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        length = len(body) if faults.announces is None else faults.announces
        self.send_response(206 if "Content_Range" in headers else 200)
        if faults.tells_no_length:
            self.close_connection = True
            headers["Connection"] = "close"
        else:
            headers["Content_Length"] = str(length)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.send(body, faults)

    def send(self, body: bytes, faults: Faults) -> None:
        cut = faults.cuts.pop(0) if faults.cuts else None
        silence = faults.silences.pop(0) if faults.silences else None
        with suppress(OSError):
            if silence is not None:
                self.wfile.write(body[: len(body) // 2])
                time.sleep(silence)
                self.close_connection = True
                return
            part = body if cut is None else body[:cut]
            if faults.pace:
                for i in range(0, len(part), 1000):
                    time.sleep(faults.pace)
                    self.wfile.write(part[i : i + 1000])
            else:
                self.wfile.write(part)
        if cut is not None:
            self.close_connection = True
