"""A dataset of a hub that lives on this machine, through the real `datasets` library in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

if find_spec("datasets") is None:
    pytest.skip("the `datasets` library is not installed", allow_module_level=True)

ROWS = [{"id": i, "text": f"Row {i}: the quick brown fox jumps over the lazy dog.\n"} for i in range(50)]
FILES = {
    "README.md": b"---\nlicense: mit\n---\n",
    "train.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
}
COMMIT = "1".rjust(40, "0")
API, FILE = "/api/datasets/owner/name", "/datasets/owner/name/resolve/"
CODE = """
import sys, json
from fewbit.calibration import collect
from fewbit.checkpoint import TokenizerData
from fewbit.errors import FewbitError
from fewbit.tokenizer import Tokenizer
tokenizer = Tokenizer(TokenizerData(open(sys.argv[1]).read(), None, 256, (257,)))
try:
    found = collect(sys.argv[2], tokenizer, count=2, length=64)
    print(json.dumps([found.facts["name"], tokenizer.decode(found.windows.flatten().tolist())]))
except FewbitError as e:
    print(json.dumps(e.to_dict()))
"""


class Handler(BaseHTTPRequestHandler):
    """As much of the hub's API as reading a dataset's files takes."""

    protocol_version = "HTTP/1.1"

    def __init__(self, asked: list[str], *args: Any) -> None:
        self.asked = asked
        super().__init__(*args)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        if path.startswith(FILE):
            name = path.removeprefix(FILE).partition("/")[2]
            known = FILES.get(name)
            if known is None:
                self.send(404, X_Error_Code="EntryNotFound")
            else:
                self.send(200, known, X_Repo_Commit=COMMIT, ETag=f'"{name}"')
        elif path.startswith(f"{API}/tree/"):
            inside = path.count("/") > 6
            entries = [{"type": "file", "path": f, "size": len(b), "oid": COMMIT} for f, b in FILES.items()]
            self.send(200, json.dumps([] if inside else entries).encode())
        elif path.startswith(API):
            facts = {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": f} for f in FILES]}
            self.send(200, json.dumps(facts | {"private": False, "tags": []}).encode())
        else:
            self.send(404)

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, asked))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def run(tmp_path: Path, endpoint: str, chosen: str) -> Any:
    from tests.conftest import byte_tokenizer

    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    there = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "tokenizer.json"), chosen],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=os.environ | there,
        timeout=120,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_a_dataset_is_read_from_its_hub(tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    endpoint, asked = hub
    name, text = run(tmp_path, endpoint, "owner/name")
    assert name == "owner/name"
    # the id stands between two rows, and is no text
    assert text == "".join(row["text"] for row in ROWS)[: len(text)]
    assert len(text) >= 120
    assert any(path.endswith("train.jsonl") for path in asked)


def test_a_dataset_or_split_that_is_not_there_is_said(tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    error = run(tmp_path, hub[0], "owner/other")
    assert error["what"] == "The dataset 'owner/other' can't be had."
    assert "No file lies at that path" in error["facts"]
    error = run(tmp_path, hub[0], "owner/name:test")
    assert "split 'test'" in error["facts"]
    assert '"train"' in error["facts"] or "train" in error["facts"]
