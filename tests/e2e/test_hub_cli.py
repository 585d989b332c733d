"""`pull`, `ls` and `rm` on a hub of this machine, and every verb that takes a model by its hub id."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fewbit import prepared, store
from fewbit.cli import main
from fewbit.cli.ls import since
from fewbit.store import aliases, hub_cache, hub_fetch, written
from tests._hub import Hub
from tests.conftest import write_folder

NAME = "owner/name"
GGUFS = {f"m-{q}.gguf": b"GGUF" + q.encode() * 2000 for q in ("Q4_0", "Q8_0")}
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    def run(*argv: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        code = main([str(a) for a in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    monkeypatch.chdir(tmp_path)
    with made.running():
        made.point(monkeypatch, tmp_path / "hub")
        yield made


@pytest.fixture
def model(tmp_path: Path) -> dict[str, bytes]:
    """The files of a tiny model that runs."""
    folder = write_folder(tmp_path / "source" / "tiny")
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def used(folder: Path) -> int:
    """Bytes the disk gives to a folder's files and links, each once."""
    names = (Path(inside) / name for inside, _, names in os.walk(folder) for name in names)
    found = {f.lstat().st_ino: f.lstat().st_blocks * 512 for f in names}
    return sum(found.values())


def listed(cli: Cli) -> dict[str, dict[str, Any]]:
    code, out, _ = cli("ls", "--json")
    assert code == 0
    return {m["name"]: m for m in json.loads(out)["models"]}


def test_pull_prints_the_path_and_what_came(cli: Cli, hub: Hub, model: dict[str, bytes]) -> None:
    commit = hub.add(NAME, model)
    code, out, err = cli("pull", NAME)
    path = hub_cache.repo_dir(NAME) / "snapshots" / commit
    assert (code, out) == (0, f"{path}\n")
    assert f"Fetching {NAME} (commit {commit[:8]})" in err
    assert f"{NAME}: commit {commit[:8]}" in err
    code, out, err = cli("pull", NAME, "--json")
    size = sum(map(len, model.values()))
    assert json.loads(out) == {
        "name": NAME, "path": str(path), "commit": commit, "bytes": size, "fetched_bytes": 0,
    }  # fmt: skip
    assert err == ""
    code, _, err = cli("pull", NAME)
    assert "nothing new" in err
    assert cli("pull", path)[:2] == (0, f"{path}\n")


def test_pull_tells_an_error_in_three_parts_and_how_to_go_on(
    cli: Cli, hub: Hub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, GGUFS)
    code, out, err = cli("pull", NAME, "--json")
    assert code == 1
    assert "m-Q8_0.gguf" in json.loads(out)["error"]["facts"]
    assert err.startswith(f"error: {NAME} holds 2 models")
    hub.add("owner/big", model | {"model.safetensors": bytes(300_000)})
    monkeypatch.setattr(hub_fetch, "PAUSES", (0.01,))
    hub.faults.cuts = [1000] + [0] * 20
    code, _, err = cli("pull", "owner/big")
    assert code == 1
    assert "To go on then: fewbit pull owner/big" in err
    assert "are kept." in err


def test_every_verb_takes_a_hub_id(cli: Cli, hub: Hub, model: dict[str, bytes], tmp_path: Path) -> None:
    hub.add(NAME, model)
    text = tmp_path / "text.txt"
    text.write_text("The tide clock by the door is always wrong, and nobody minds. " * 21)
    code, out, err = cli("show", NAME)
    assert code == 0
    assert "Fetching owner/name" in err
    assert "bf16" in out
    hub.asked.clear()
    assert cli("run", NAME, "hello", "--max-tokens", "2")[0] == 0
    assert cli("bench", NAME, "--prompt", "8", "--tokens", "2")[0] == 0
    out_folder = tmp_path / "out"
    assert cli("quantize", NAME, "-o", out_folder, "--effort", "0")[0] == 0
    code, out, _ = cli("eval", out_folder, "--against", NAME, "--text", text, "--windows", "1")
    assert code == 0
    assert f"against {NAME}: " in out
    assert cli("compare", NAME, "--against", NAME, "--text", text, "--windows", "1")[0] == 0
    # all of it from what show brought
    assert hub.asked == []
    # the written folder knows where it came from
    assert written.notes(out_folder)["source"] == f"{NAME}@{hub.repos[NAME].refs['main']}"


def test_ls_shows_what_is_here(cli: Cli, hub: Hub, model: dict[str, bytes], tmp_path: Path) -> None:
    old = hub.add(NAME, model | {"config.json": b"{}"}, ref=None)
    commit = hub.add(NAME, model)
    hub.add("owner/g", GGUFS)
    hub.add("owner/other", {"config.json": b'{"model_type": "whisper"}', "pytorch_model.bin": b"p" * 3000})
    for text in (NAME, f"{NAME}@{old}", "owner/g:Q4_0", "owner/g:Q8_0"):
        assert cli("pull", text)[0] == 0
    assert cli("run", NAME, "hello", "--max-tokens", "1", "--bits", "4")[0] == 0
    assert cli("quantize", NAME, "-o", tmp_path / "mine", "--effort", "0")[0] == 0
    half = hub_cache.repo_dir("owner/half") / "blobs"
    half.mkdir(parents=True)
    (half / f"{'0' * 64}.incomplete").write_bytes(bytes(700))
    found = listed(cli)
    assert found[NAME]["detail"] == "llama, full precision, bfloat16"
    assert found[NAME]["bytes"] == sum(map(len, model.values()))
    assert found[NAME]["path"].endswith(commit)
    assert found[NAME]["used"] is not None
    assert found[f"{NAME}@{old[:8]}"]["detail"] == "no weights that fewbit reads"
    assert found["owner/g:m-Q8_0.gguf"]["bytes"] == len(GGUFS["m-Q8_0.gguf"])
    assert found["owner/g:m-Q8_0.gguf"]["detail"] == "Q8_0"
    assert (found["owner/half"]["kind"], found["owner/half"]["bytes"]) == ("unfinished", 700)
    assert found["mine"]["kind"] == "folder"
    (kept,) = (m for m in found.values() if m["kind"] == "quantized")
    assert kept["name"].startswith("name-int4g64-")
    assert kept["detail"] == f"int4g64 rtn, head int8, of {NAME}@{commit}"
    assert found["smollm2"]["kind"] == "alias"
    # every name is one that runs
    for name, entry in found.items():
        if entry["kind"] in ("hub", "quantized", "folder") and "no weights" not in entry["detail"]:
            assert store.locate(name).absolute() == Path(entry["path"])
    code, out, err = cli("ls")
    assert code == 0
    assert out.splitlines()[0].split() == ["name", "size", "kind", "used", "detail", "path"]
    assert "today" in out
    assert "on the disk in all" in err


def test_ls_counts_shared_files_once(cli: Cli, hub: Hub, model: dict[str, bytes]) -> None:
    for ref in ("main", "v2"):
        hub.add(NAME, model | {"generation_config.json": ref.encode()}, ref=ref)
        assert cli("pull", f"{NAME}@{ref}")[0] == 0
    found = json.loads(cli("ls", "--json")[1])
    mine = [m for m in found["models"] if m["kind"] == "hub"]
    assert len(mine) == 2
    # two settings files of their own, everything else the same
    assert found["total_bytes"] - aliases_on_disk() == mine[0]["bytes"] + len("v2")


def aliases_on_disk() -> int:
    return sum(p.stat().st_size for p in map(aliases.place, aliases.ALIASES.values()) if p.is_file())


@pytest.mark.parametrize(("days", "said"), [(0, "today"), (1, "1 day ago"), (40, "40 days ago")])
def test_days_since(days: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1e9 + days * 86_400 + 5)
    assert since(1e9) == said
    assert since(None) == "-"


# Removing


def test_rm_of_a_hub_model_asks_and_says_what_is_free_again(
    cli: Cli, hub: Hub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add(NAME, model)
    cli("pull", NAME)
    code, _, err = cli("rm", NAME)
    assert code == 1
    assert "--yes" in err
    assert str(hub_cache.repo_dir(NAME)) in err

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for answer, gone in (("\n", False), ("no\n", False), ("y\n", True)):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        before = used(hub_cache.hub_dir())
        assert main(["rm", NAME]) == (0 if gone else 1)
        assert hub_cache.repo_dir(NAME).exists() is not gone
        assert (used(hub_cache.hub_dir()) < before) is gone
    out, err = capsys.readouterr()
    assert err.count("[y/N]") == 3
    assert "bytes freed" in out
    assert listed(cli).keys() == {"smollm2"}


def test_rm_frees_what_no_other_revision_has(cli: Cli, hub: Hub, model: dict[str, bytes]) -> None:
    changed = {"model.safetensors": model["model.safetensors"] + bytes(100_000)}
    for ref, files in (
        ("main", model),
        ("same", model | {"generation_config.json": b"{}"}),
        ("other", model | changed),
    ):
        hub.add(NAME, files, ref=ref)
        cli("pull", f"{NAME}@{ref}")
    for ref, freed_weights in (("same", False), ("other", True)):
        before = used(hub_cache.repo_dir(NAME))
        code, out, _ = cli("rm", f"{NAME}@{ref}", "--yes", "--json")
        assert code == 0
        freed = json.loads(out)["freed_bytes"]
        assert freed == before - used(hub_cache.repo_dir(NAME))
        assert (freed > 100_000) is freed_weights
        assert f"{NAME}@{ref}" not in listed(cli)
        assert store.locate(NAME).is_dir()
    before = used(hub_cache.repo_dir(NAME))
    assert json.loads(cli("rm", NAME, "--yes", "--json")[1])["freed_bytes"] == before
    assert not hub_cache.repo_dir(NAME).exists()


def test_rm_of_one_gguf_leaves_the_others(cli: Cli, hub: Hub) -> None:
    hub.add(NAME, GGUFS)
    cli("pull", f"{NAME}:Q4_0")
    cli("pull", f"{NAME}:Q8_0")
    before = used(hub_cache.repo_dir(NAME))
    code, out, _ = cli("rm", f"{NAME}:m-Q4_0.gguf", "-y", "--json")
    assert code == 0
    assert json.loads(out)["freed_bytes"] == before - used(hub_cache.repo_dir(NAME)) > 0
    assert [m for m in listed(cli) if m != "smollm2"] == [f"{NAME}:m-Q8_0.gguf"]
    assert cli("rm", f"{NAME}:m-Q4_0.gguf", "-y")[0] == 1


def test_rm_of_what_has_another_name_frees_nothing(cli: Cli, hub: Hub, model: dict[str, bytes], tmp_path: Path) -> None:
    hub.add(NAME, model)
    cli("pull", NAME)
    weights = (store.locate(NAME) / "model.safetensors").resolve()
    os.link(weights, tmp_path / "kept.safetensors")
    held = weights.stat().st_blocks * 512
    before = used(hub_cache.repo_dir(NAME))
    assert json.loads(cli("rm", NAME, "-y", "--json")[1])["freed_bytes"] == before - held
    assert (tmp_path / "kept.safetensors").read_bytes() == model["model.safetensors"]


def test_rm_of_an_unfinished_download(cli: Cli, hub: Hub) -> None:
    half = hub_cache.repo_dir(NAME) / "blobs"
    half.mkdir(parents=True)
    (half / f"{'0' * 64}.incomplete").write_bytes(bytes(5000))
    freed = used(half)
    assert json.loads(cli("rm", NAME, "-y", "--json")[1])["freed_bytes"] == freed
    assert not half.parent.exists()


def test_rm_of_what_fewbit_keeps_needs_no_question(cli: Cli, hub: Hub, model: dict[str, bytes]) -> None:
    hub.add(NAME, model)
    cli("run", NAME, "x", "--max-tokens", "1", "--bits", "4")
    (kept,) = written.kept()
    held = used(kept.path)
    code, out, err = cli("rm", NAME, "-y")
    assert f"still here: {kept.name}" in err
    assert kept.path.is_dir()
    code, out, _ = cli("rm", kept.name, "--json")
    assert (code, json.loads(out)) == (0, {"freed_bytes": held, "removed": {kept.name: held}})
    assert list(store.quantized_dir().iterdir()) == []


def test_rm_of_an_alias(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    alias = aliases.Alias("tiny", "tiny", "1", "0" * 64, 1, "m", "tiny-rm-test.gguf", 5000, "CC0-1.0", "a test")
    monkeypatch.setitem(aliases.ALIASES, "tiny", alias)
    assert "not here" in cli("rm", "tiny")[2]
    place = aliases.place(alias)
    place.write_bytes(bytes(5000))
    assert cli("rm", "tiny")[0] == 0
    assert not place.exists()


def test_rm_of_a_written_folder_wants_its_path(cli: Cli, tiny_folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "results" / "mine"
    mine.parent.mkdir()
    assert cli("quantize", tiny_folder, "-o", mine, "--effort", "0")[0] == 0
    code, _, err = cli("rm", "mine", "-y")
    assert code == 1
    assert f"fewbit rm {mine}" in err
    code, _, err = cli("rm", mine)
    assert "Nobody is there to answer" in err
    (mine / "notes.txt").write_text("weeks of work")
    code, _, err = cli("rm", mine, "-y")
    assert "notes.txt" in err
    (mine / "notes.txt").unlink()
    held = used(mine)
    code, out, _ = cli("rm", mine, "-y", "--json")
    assert (code, json.loads(out)["freed_bytes"]) == (0, held)
    assert list(mine.parent.iterdir()) == []
    assert "mine" not in listed(cli)


def test_rm_never_removes_what_others_made(
    cli: Cli, hub: Hub, model: dict[str, bytes], tiny_folder: Path, tmp_path: Path
) -> None:
    hub.add(NAME, model)
    path = Path(cli("pull", NAME)[1].strip())
    link = tmp_path / "link"
    link.symlink_to(tiny_folder)
    for name, said in (
        (tiny_folder, "not written by fewbit"),
        (tiny_folder / "config.json", "not written by fewbit"),
        (link, "It is a link"),
        (path, f"fewbit rm {NAME}@"),
        (tmp_path, "not written by fewbit"),
        ("nothing-of-that-name", "nothing called"),
        ("owner/absent", "nothing called"),
        (f"{NAME}@v9", f"{NAME}"),
        ("", "nothing called"),
    ):
        code, _, err = cli("rm", name, "--yes")
        assert code == 1, name
        assert said in err, name
    # a name that is wrong keeps the right one from going
    assert cli("rm", NAME, "nothing-of-that-name", "--yes")[0] == 1
    assert (path / "model.safetensors").exists()
    assert (tiny_folder / "model.safetensors").exists()
    assert cli("rm")[0] == 2


def test_rm_prepared_clears_layouts_and_kernels(cli: Cli, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "SMALL_BYTES", 0)
    assert cli("quantize", tiny_folder, "-o", tiny_folder.with_name("q"), "--effort", "0")[0] == 0
    assert cli("run", tiny_folder.with_name("q"), "x", "--max-tokens", "1")[0] == 0
    store.compiled_dir().mkdir()
    (store.compiled_dir() / "x.cubin").write_bytes(bytes(5000))
    (entry,) = json.loads(cli("ls", "--json")[1])["prepared"]
    assert entry["name"] == str(tiny_folder.with_name("q"))
    held = used(store.prepared_dir()) + used(store.compiled_dir())
    assert held > 5000
    code, out, _ = cli("rm", "--prepared", "--json")
    assert (code, json.loads(out)["freed_bytes"]) == (0, held)
    assert store.prepared_bytes() == 0
    assert not store.compiled_dir().exists()
    assert cli("run", tiny_folder.with_name("q"), "x", "--max-tokens", "1")[0] == 0
    assert "nothing freed" not in cli("rm", "--prepared")[1]
    assert "nothing freed" in cli("rm", "--prepared")[1]


def test_layouts_of_a_hubs_gguf_are_not_taken_for_orphans(hub: Hub, model: dict[str, bytes], tmp_path: Path) -> None:
    """A GGUF file of the hub's cache is a link to a file of another name."""
    hub.add(NAME, GGUFS)
    store.locate(f"{NAME}:Q4_0")
    link = store.locate(f"{NAME}:m-Q4_0.gguf")
    assert link.is_symlink()
    before = prepared._source(link)
    assert before["files"]
    assert prepared._source(Path(before["path"])) == before
