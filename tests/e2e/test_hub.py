"""Models of a hub on this machine, through the real huggingface_hub: fetched, cut off, gone on with, refused."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from fewbit import store
from fewbit.errors import FewbitError
from fewbit.store import hub as hub_module
from fewbit.store import hub_cache, hub_fetch
from fewbit.store.hub_names import parse
from tests._hub import Faults, Hub

WEIGHTS = bytes(range(256)) * 40
SMALL = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "tokenizer_config.json": b'{"a": 1}'}
FILES = {
    "model.safetensors": WEIGHTS,
    **SMALL,
    "README.md": b"# A model",
    "pytorch_model.bin": b"pickle" * 1000,
    "original/model.safetensors": b"twice" * 1000,
}
WANTED = [*SMALL, "model.safetensors"]
HASH = hashlib.sha256(WEIGHTS).hexdigest()
NAME = "owner/name"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    with made.running():
        made.point(monkeypatch, tmp_path / "hub")
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
        monkeypatch.setattr(hub_fetch, "PAUSES", (0.01, 0.01, 0.01))
        monkeypatch.chdir(tmp_path)
        yield made


def quiet(done: int, total: int, doing: str) -> None:
    pass


def pull(text: str, progress: store.Progress = quiet) -> hub_module.Pulled:
    wanted = parse(text)
    assert wanted is not None
    return hub_module.pull(wanted, progress)


def refused(text: str) -> FewbitError:
    with pytest.raises(FewbitError) as caught:
        pull(text)
    for part in (caught.value.what, caught.value.facts, caught.value.next_step):
        assert part
        assert "Traceback" not in part
    return caught.value


def blobs(name: str = NAME) -> Path:
    return hub_cache.repo_dir(name) / "blobs"


def unfinished() -> list[str]:
    return [f.name for f in hub_cache.unfinished(hub_cache.repo_dir(NAME))]


def large_answers(hub: Hub) -> list[str | None]:
    """The Range of each request for a large file's bytes."""
    return [h.get("range") for method, path, h in hub.asked if method == "GET" and path.startswith("/cdn/")]


def test_a_model_is_fetched_once_and_found_without_a_question(hub: Hub) -> None:
    commit = hub.add(NAME, FILES)
    said: list[tuple[int, int, str]] = []
    found = pull(NAME, lambda *step: said.append(step))
    assert found.path == hub_cache.repo_dir(NAME) / "snapshots" / commit
    assert sorted(f.name for f in found.path.iterdir()) == sorted(WANTED)
    assert {name: (found.path / name).read_bytes() for name in WANTED} == {name: FILES[name] for name in WANTED}
    assert (found.commit, found.bytes, found.fetched) == (commit, sum(len(FILES[n]) for n in WANTED), found.bytes)
    # one copy, which the snapshot's names lead to
    assert len([f for f in blobs().iterdir() if not f.is_symlink()]) == len(WANTED)
    assert (found.path / "model.safetensors").resolve() == blobs() / HASH
    assert not any("pytorch_model" in p or "original" in p or "README" in p for p in hub.paths())
    assert said[0][0] == 0
    assert said[0][1] == found.bytes
    for fact in (NAME, commit[:8], "4 of 4 files", f"{found.bytes} bytes"):
        assert fact in said[0][2]
    hub.asked.clear()
    assert store.locate(NAME, quiet) == found.path
    assert store.locate(f"{NAME}@{commit[:8]}", quiet) == found.path
    assert hub.asked == []
    again = pull(NAME)
    assert (again.path, again.fetched) == (found.path, 0)
    assert not any("/resolve/" in p for p in hub.paths())


def test_locate_fetches_what_is_not_here(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add(NAME, FILES)
    path = store.locate(NAME)
    assert (path / "model.safetensors").read_bytes() == WEIGHTS
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"Fetching {NAME} ")
    assert len(err.splitlines()) == 1


def test_the_cache_is_shared_with_the_hubs_own_library(hub: Hub) -> None:
    commit = hub.add(NAME, FILES)
    hub.add("owner/other", FILES)
    hub.chunks = False
    ours = pull(NAME).path
    patterns = [*SMALL, "model.safetensors"]
    hub.asked.clear()
    theirs = snapshot_download(NAME, allow_patterns=patterns)
    assert Path(theirs) == ours
    assert large_answers(hub) == []
    assert snapshot_download(NAME, allow_patterns=patterns, local_files_only=True) == theirs
    assert hub_cache.title(ours) == f"{NAME}@{commit}"
    # and the other way round
    path = Path(snapshot_download("owner/other", allow_patterns=patterns))
    hub.asked.clear()
    assert store.locate("owner/other", quiet) == path
    assert hub.asked == []


def test_a_new_commit_fetches_what_changed(hub: Hub) -> None:
    old = pull(f"{NAME}@{hub.add(NAME, FILES)}")
    assert not (hub_cache.repo_dir(NAME) / "refs").exists()
    new = hub.add(NAME, FILES | {"config.json": b'{"model_type": "llama", "new": 1}'})
    found = pull(NAME)
    assert (found.commit, found.fetched) == (new, 33)
    assert found.path != old.path
    assert large_answers(hub) == [None]
    assert store.locate(NAME, quiet) == found.path
    assert store.locate(f"{NAME}@{old.commit}", quiet) == old.path


def test_branches_and_tags(hub: Hub) -> None:
    hub.add(NAME, FILES)
    commit = hub.add(NAME, FILES | {"config.json": b"{}"}, ref="refs/pr/1")
    found = pull(f"{NAME}@refs/pr/1")
    assert found.commit == commit
    hub.asked.clear()
    assert store.locate(f"{NAME}@refs/pr/1", quiet) == found.path
    assert hub.asked == []
    error = refused(f"{NAME}@v9")
    assert "no revision 'v9'" in error.what
    assert "main, refs/pr/1" in error.facts


def test_shards_go_by_their_index(hub: Hub) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": WEIGHTS + bytes([i]) for i in (1, 2)}
    index = b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    hub.add(NAME, {**SMALL, **shards, "model.safetensors.index.json": index, "consolidated.safetensors": WEIGHTS})
    found = pull(NAME)
    assert sorted(f.name for f in found.path.glob("*.safetensors")) == sorted(shards)
    assert (found.path / "model.safetensors.index.json").read_bytes() == index
    assert store.locate(NAME, quiet) == found.path


def test_one_gguf_of_several_and_all_parts_of_a_split_one(hub: Hub) -> None:
    files = {f"m-{q}.gguf": b"GGUF" + q.encode() * 1000 for q in ("Q4_0", "Q8_0")}
    split = {f"F16/m-F16-0000{i}-of-00002.gguf": b"GGUF" + bytes([i]) * 3000 for i in (1, 2)}
    commit = hub.add(NAME, {**files, **split, "README.md": b"x"})
    assert "m-Q8_0.gguf" in refused(NAME).facts
    found = pull(f"{NAME}:q8_0")
    assert found.path == hub_cache.repo_dir(NAME) / "snapshots" / commit / "m-Q8_0.gguf"
    assert found.path.read_bytes() == files["m-Q8_0.gguf"]
    assert len(large_answers(hub)) == 1
    # the only one that is here
    assert store.locate(NAME, quiet) == found.path
    whole = pull(f"{NAME}:F16")
    assert whole.path.name == "m-F16-00001-of-00002.gguf"
    assert {f.name: f.read_bytes() for f in whole.path.parent.iterdir()} == {
        name.removeprefix("F16/"): content for name, content in split.items()
    }
    assert store.locate(f"{NAME}:F16", quiet) == whole.path
    assert hub_cache.title(whole.path) == f"{NAME}@{commit}:F16/m-F16-00001-of-00002.gguf"


# Connections that fail


def test_cuts_are_gone_on_with_from_where_they_came_to(hub: Hub) -> None:
    hub.add(NAME, FILES)
    hub.faults.cuts = [1000, 500, 0, 3000]
    assert (pull(NAME).path / "model.safetensors").read_bytes() == WEIGHTS
    assert large_answers(hub) == [None, "bytes=1000-", "bytes=1500-", "bytes=1500-", "bytes=4500-"]
    assert unfinished() == []


def test_a_pull_that_gave_up_is_gone_on_with_by_the_next(hub: Hub) -> None:
    hub.add(NAME, FILES)
    hub.faults.cuts = [4000, 0, 0, 0]
    error = refused(NAME)
    assert "model.safetensors broke off" in error.what
    assert "4000 bytes of 10240 bytes" in error.facts
    notes = "; ".join(getattr(error, "__notes__", ()))
    assert "are kept" in notes
    assert f"{HASH}.incomplete" in unfinished()
    assert (blobs() / f"{HASH}.incomplete").read_bytes() == WEIGHTS[:4000]
    assert hub_cache.lookup(parse(NAME)) is None  # type: ignore[arg-type]
    hub.asked.clear()
    said: list[tuple[int, int, str]] = []
    found = pull(NAME, lambda *step: said.append(step))
    assert (found.path / "model.safetensors").read_bytes() == WEIGHTS
    assert large_answers(hub) == ["bytes=4000-"]
    assert "4000 bytes of it here already" in said[0][2]
    assert said[0][1] <= len(WEIGHTS) - 4000 + sum(map(len, SMALL.values()))


def test_a_server_that_knows_no_ranges_begins_anew(hub: Hub) -> None:
    hub.add(NAME, FILES)
    hub.faults.ignores_ranges = True
    hub.faults.cuts = [3000]
    assert (pull(NAME).path / "model.safetensors").read_bytes() == WEIGHTS
    assert large_answers(hub) == [None, "bytes=3000-"]


def test_slow_answers_are_not_waited_for_for_ever(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, FILES)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.faults.silences = [1.0]
    assert (pull(NAME).path / "model.safetensors").read_bytes() == WEIGHTS
    assert large_answers(hub) == [None, f"bytes={len(WEIGHTS) // 2}-"]


def test_a_hub_in_trouble_is_asked_again(hub: Hub) -> None:
    hub.add(NAME, FILES)
    hub.faults.statuses = [503, 500, 429]
    assert pull(NAME).fetched
    hub.add(NAME, FILES | {"model.safetensors": WEIGHTS[::-1]})
    hub.faults.statuses = [503] * 9
    assert "answers 503" in refused(NAME).facts


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"announces": 5000}, "it has 5,000 bytes, 10,240 were announced"),
        ({"announces": 50_000}, "it has 50,000 bytes, 10,240 were announced"),
        ({"longer": b"more"}, "it has 10,244 bytes"),
        ({"longer": b"more", "tells_no_length": True}, "more than the announced 10,240 bytes"),
        ({"flips_a_byte": True}, "its hash is"),
    ],
)
def test_what_is_not_what_was_announced_is_not_kept(hub: Hub, fault: dict[str, object], said: str) -> None:
    hub.add(NAME, FILES)
    for name, value in fault.items():
        setattr(hub.faults, name, value)
    error = refused(NAME)
    assert "not what the hub announced" in error.what
    assert said.lower() in error.facts.lower()
    assert not (blobs() / HASH).exists()
    assert hub_cache.lookup(parse(NAME)) is None  # type: ignore[arg-type]
    hub.faults = Faults(tells_no_length=True)
    assert (pull(NAME).path / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("left", "asked"),
    [
        (b"wrong" * 100, ["bytes=500-", None]),
        (WEIGHTS + b"x", [None]),
        (WEIGHTS[:-1] + b"x", [None]),
        (WEIGHTS, []),
    ],
)
def test_a_part_that_is_no_part_of_the_file_does_no_harm(hub: Hub, left: bytes, asked: list[str | None]) -> None:
    hub.add(NAME, FILES)
    blobs().mkdir(parents=True)
    (blobs() / f"{HASH}.incomplete").write_bytes(left)
    assert (pull(NAME).path / "model.safetensors").read_bytes() == WEIGHTS
    assert large_answers(hub) == asked


def test_two_at_once_fetch_once(hub: Hub) -> None:
    hub.add(NAME, FILES)
    hub.faults.pace = 0.02
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(pull(NAME).path)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0] == found[1]
    assert large_answers(hub) == [None]


def test_an_error_of_one_file_ends_the_others_and_keeps_them(hub: Hub) -> None:
    big = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 60_000 for i in (1, 2)}
    hub.add(NAME, {**SMALL, **big})
    del hub.blobs[hashlib.sha256(b"\2" * 60_000).hexdigest()]
    hub.faults.pace = 0.01
    with pytest.raises((FewbitError, OSError)):
        pull(NAME)
    # what was going on stops soon after
    assert not any(t.name.startswith("Thread") and "work" in t.name and t.is_alive() for t in threading.enumerate())


# Refusals


def test_there_is_no_such_model(hub: Hub) -> None:
    hub.add("HuggingFaceTB/SmolLM2-135M", FILES)
    hub.add("HuggingFaceTB/SmolLM2-360M", FILES)
    error = refused("HuggingFaceTB/SmolLM-135M")
    assert error.what == "There is no model HuggingFaceTB/SmolLM-135M on the hub."
    assert "private" in error.facts
    assert "HuggingFaceTB/SmolLM2-135M" in error.next_step
    assert hub.endpoint in refused("nobody/nothing").next_step


def test_a_gated_model_says_where_to_ask_and_how_to_give_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, FILES, opened_by="hf_right", gated=True)
    error = refused(NAME)
    assert error.what == f"Access to {NAME} is restricted."
    assert "no token is given" in error.facts
    assert f"{hub.endpoint}/{NAME}" in error.next_step
    assert "HF_TOKEN" in error.next_step
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    error = refused(NAME)
    assert "its account has no access" in error.facts
    assert "hf_wrong" not in str(error)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert pull(NAME).fetched
    # the hub gets it, the host the bytes come from does not
    to_hub = [h.get("authorization") for _, p, h in hub.asked if not p.startswith("/cdn/")]
    to_others = [h.get("authorization") for _, p, h in hub.asked if p.startswith("/cdn/")]
    assert to_hub[-1] == "Bearer hf_right"
    assert to_others
    assert set(to_others) == {None}


def test_a_stored_token_is_used(hub: Hub) -> None:
    hub.add(NAME, FILES, opened_by="hf_stored")
    assert "no token is given" in refused(NAME).facts
    Path(constants.HF_TOKEN_PATH).write_text("hf_stored")
    assert pull(NAME).fetched


def test_offline_only_what_is_here(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, FILES)
    here = pull(NAME).path
    hub.add("owner/other", FILES)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert store.locate(NAME, quiet) == here
    for text in ("owner/other", f"{NAME}:Q4_0"):
        with pytest.raises(FewbitError, match="offline") as caught:
            store.locate(text, quiet)
        assert "HF_HUB_OFFLINE" in caught.value.facts
    assert hub.asked == []


def test_what_another_tool_left_without_a_tokenizer_is_found_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, FILES)
    hub.chunks = False
    path = Path(snapshot_download(NAME, allow_patterns=["config.json", "model.safetensors"]))
    assert store.locate(NAME, quiet) == path
    assert (path / "tokenizer.json").exists()
    (path / "tokenizer.json").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert store.locate(NAME, quiet) == path


def test_nobody_answers(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    error = refused(NAME)
    assert "can't be reached" in error.what
    assert "http://127.0.0.1:1: " in error.facts
    assert "refused" in error.facts
    assert "HF_ENDPOINT" in error.next_step


def test_an_answer_that_is_no_hubs(hub: Hub) -> None:
    hub.add(NAME, FILES)
    hub.repos[NAME].refs["main"] = "not-a-commit"
    hub.repos[NAME].revisions["not-a-commit"] = FILES
    assert "'not-a-commit'" in refused(NAME).facts


def test_a_full_disk_is_seen_before_anything_comes(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, FILES)
    usage = namedtuple("usage", "total used free")
    needed = sum(len(FILES[n]) for n in WANTED)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, needed - 1))
    error = refused(NAME)
    assert f"{needed} bytes are to be fetched" in error.facts
    assert "HF_HOME" in error.next_step
    assert not any("/resolve/" in p for p in hub.paths())
    # what is here already needs no room
    blobs().mkdir(parents=True)
    (blobs() / f"{HASH}.incomplete").write_bytes(WEIGHTS[:1])
    assert pull(NAME).fetched == needed


def test_a_disk_that_fills_up_keeps_what_came(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, FILES)
    monkeypatch.setattr(hub_fetch.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(FewbitError, match="The disk is full") as caught:
        pull(NAME)
    assert str(hub_cache.hub_dir()) in caught.value.facts
    assert "are kept" in "; ".join(caught.value.__notes__)


def test_a_folder_of_the_owners_name_means_a_path(hub: Hub, tmp_path: Path) -> None:
    hub.add(NAME, FILES)
    (tmp_path / "owner").mkdir()
    with pytest.raises(FewbitError) as caught:
        store.locate(NAME, quiet)
    assert f"hf://{NAME}" in caught.value.next_step
    assert hub.asked == []
    path = store.locate(f"hf://{NAME}", quiet)
    # it is here now, so nothing else can be meant
    assert store.locate(NAME, quiet) == path
    (tmp_path / "owner" / "name").mkdir()
    assert store.locate(NAME, quiet) == Path(NAME)


PULL = "import sys; from fewbit.cli import main; sys.exit(main(sys.argv[1:]))"


def test_ctrl_c_prints_the_line_that_goes_on(hub: Hub, tmp_path: Path) -> None:
    """A process of its own, told of the hub by the environment, as a user's is."""
    hub.add(NAME, FILES | {"model.safetensors": WEIGHTS * 100})
    hub.faults.pace = 0.02
    cache = tmp_path / "elsewhere"
    environment = {**os.environ, **hub.environment(cache)}
    start = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {PULL}"
    command = [sys.executable, "-c", start, "pull", NAME]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not any(f.stat().st_size > 5000 for f in cache.rglob("*.incomplete")):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert out == ""
    what, facts, again = err.splitlines()[-3:]
    assert what == "error: Interrupted."
    assert "of 1 MB are kept" in facts
    assert again.strip() == f"To go on: fewbit pull {NAME}"
    (left,) = (f for f in cache.rglob("*.incomplete") if f.stat().st_size)
    kept = left.stat().st_size
    hub.faults.pace = 0
    hub.asked.clear()
    done = subprocess.run(
        [sys.executable, "-c", PULL, "pull", NAME], env=environment, capture_output=True, text=True, check=True
    )
    assert (Path(done.stdout.strip()) / "model.safetensors").read_bytes() == WEIGHTS * 100
    assert large_answers(hub)[-1] == f"bytes={kept}-"
