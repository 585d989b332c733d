"""`fewbit eval` and `fewbit compare`: tables and JSON of several models and texts, tasks, reports, usage."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fewbit
from fewbit.cli import main
from fewbit.errors import FewbitError
from fewbit.evaluator import Quality
from fewbit.origin import Origin, of_settings
from fewbit.runtime import placement

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fewbit" / "references"


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs one command line: exit code, standard output, standard error."""

    def run(*argv: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(a) for a in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Two windows and one for a tokenizer of bytes."""
    one, two = tmp_path / "prose.txt", tmp_path / "a=b.txt"
    one.write_text("The tide clock by the door is always wrong, and nobody minds. " * 21)
    two.write_text("def tide(hours):\n    return hours % 12.42\n" * 15)
    return [one, two]


@pytest.fixture
def models(tiny_folder: Path, tmp_path: Path) -> list[Path]:
    for form in ("int8", "int4g32", "int3g32"):
        fewbit.quantize(tiny_folder, tmp_path / form, format=form, method="rtn", head="16bit")
    return [tmp_path / form for form in ("int4g32", "int8", "int3g32")]


def test_several_models_and_texts(cli: Cli, tiny_folder: Path, models: list[Path], texts: list[Path]) -> None:
    argv = ("--against", tiny_folder, "--text", texts[0], "--text", f"code={texts[1]}", "--exact")
    code, said, _ = cli("eval", *models, *argv)
    assert code == 0
    overall, domains = said.split("\n\n")
    header, four, eight, three, last = overall.splitlines()
    assert header.endswith("mean KL beside the first")
    assert str(models[0]) in four
    assert not four.endswith(("lower", "higher", "distinguishable"))
    assert eight.endswith(" lower")
    assert three.endswith(" higher")
    assert "765 predictions" in last
    lines = domains.splitlines()
    assert [line.split()[0] for line in lines] == ["text", *["prose"] * 4, *["code"] * 4]
    assert [line.split()[2] for line in lines[1:4]] == ["510"] * 3
    assert "(reference)" in lines[4]
    assert lines[2].endswith(" lower")

    found = json.loads(cli("eval", *models, *argv, "--no-cache", "--json")[1])
    assert found["text"] == [str(texts[0]), str(texts[1])]
    first, second, third = found["models"]
    assert first["paired"] is None
    assert second["paired"]["verdict"] == "lower"
    assert second["paired"]["difference"] == pytest.approx(second["mean_kl"] - first["mean_kl"])
    assert f"{second['paired']['difference']:+.5f} ± {second['paired']['error']:.5f} lower" in eight
    assert f"{third['mean_kl']:.5f} ± {third['mean_kl_error']:.5f}" in three
    assert [(d["name"], d["tokens"]) for d in third["domains"]] == [("prose", 510), ("code", 255)]
    assert third["domains"][1]["paired"]["verdict"] == "higher"
    assert f"{third['domains'][1]['mean_kl']:.5f}" in lines[7]
    assert len(third["worst"]) == 20
    assert len(third["worst"][0]["expected"]) == 3


def test_the_cache_is_on_and_said(
    cli: Cli, tiny_folder: Path, models: list[Path], texts: list[Path], references: Path
) -> None:
    argv = ("eval", models[0], "--against", tiny_folder, "--text", texts[0])
    assert "from the cache" not in cli(*argv, "--no-cache")[1]
    assert not references.exists()
    assert "from the cache" not in cli(*argv)[1]
    assert len(list(references.iterdir())) == 2
    code, said, err = cli(*argv)
    assert code == 0
    assert "reference from the cache" in said.splitlines()[-1]
    assert "checking what is cached" in err
    error = json.loads(cli(*argv, "--json")[1])["models"][0]["cache_error"]
    assert error > 0
    assert f"{error:.1e}" in said
    assert "from the cache" not in cli(*argv, "--no-cache")[1]


def test_a_text_whose_own_name_has_the_sign(cli: Cli, tiny_folder: Path, texts: list[Path]) -> None:
    argv = ("eval", tiny_folder, "--against", tiny_folder, "--windows", "1", "--json", "--text")
    assert json.loads(cli(*argv, texts[1])[1])["models"][0]["domains"][0]["name"] == "a=b"
    found = json.loads(cli(*argv, f"x={texts[1]}")[1])
    assert found["models"][0]["domains"][0]["name"] == "x"
    assert found["text"] == str(texts[1])


def test_why_the_card_is_not_used_is_said(
    cli: Cli, tiny_folder: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    automatic = placement._automatic

    def on_the_cpu(*given: Any) -> placement.Placement:
        return replace(automatic(*given), note="The CPU is used: the card is full.")

    monkeypatch.setattr(placement, "_automatic", on_the_cpu)
    argv = ["eval", tiny_folder, "--against", tiny_folder, "--text", texts[0], "--windows", "1", "--device"]
    code, _, said = cli(*argv, "auto")
    assert code == 0
    assert "note: The CPU is used: the card is full." in said
    found = json.loads(cli(*argv, "cpu", "--json")[1])["models"][0]
    assert (found["device"], found["device_note"]) == ("cpu", None)


def test_compare_says_what_the_files_say(cli: Cli, tiny_folder: Path, models: list[Path], texts: list[Path]) -> None:
    argv = ("compare", models[0], tiny_folder, "--against", tiny_folder, "--text", texts[0])
    code, said, _ = cli(*argv)
    assert code == 0
    origins, figures = said.split("\n\n")
    header, first, second = origins.splitlines()
    assert header.split()[:4] == ["model", "method", "format", "bits"]
    assert "fewbit rtn" in first
    assert "int4g32" in first
    assert "none" in second
    assert "bf16" in second
    found = json.loads(cli(*argv, "--json", "--no-cache")[1])
    assert [m["exact"] for m in found["models"]] == [True, True]
    assert found["models"][0]["origin"]["format"] == "int4g32"
    assert f"{found['models'][0]['mean_kl']:.5f}" in figures
    # the same figures as eval's, with the activations it is told to run
    for option, other in (((), ("--exact",)), (("--kernels",), ())):
        one, two = (
            json.loads(cli(*a, "--json", "--no-cache")[1])["models"][0]
            for a in ((*argv, *option), ("eval", *argv[1:], *other))
        )
        del one["origin"]
        assert one == two


@pytest.mark.parametrize(
    ("settings", "origin"),
    [
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": False},
            Origin("gptq", "group 128, act-order yes, symmetric no", "4"),
        ),
        (
            {"quant_method": "gptq", "bits": 3, "checkpoint_format": "gptq_v2", "group_size": -1},
            Origin("gptq", "gptq_v2, group -1", "3"),
        ),
        (
            {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"},
            Origin("awq", "GEMM, group 64, zero point yes", "4"),
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {
                    "group_0": {"weights": {"num_bits": 4, "group_size": 32, "symmetric": True, "actorder": None}},
                    "group_1": {"weights": {"num_bits": 8, "symmetric": True}},
                },
            },
            Origin("compressed-tensors", "pack-quantized; group 32, symmetric yes; symmetric yes", "4, 8"),
        ),
        ({"quant_method": "other"}, Origin("other", "-", "-")),
        # what a hostile file may hold
        ({"quant_method": ["x"] * 1000, "bits": {}, "config_groups": [1]}, None),
        ({"quant_method": "x" * 10_000, "bits": 10**400, "group_size": [], "config_groups": {"a": 1, "b": {}}}, None),
        ({"config_groups": {"a": {"weights": {"num_bits": None, "strategy": "y" * 999}}}}, None),
    ],
)
def test_what_settings_say(settings: dict[str, Any], origin: Origin | None) -> None:
    found = of_settings(settings)
    if origin is not None:
        assert found == origin
    assert all(len(part) < 120 for part in (found.method, found.format, found.bits))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands in for the tasks and the report, which are tested where they are made; what they were asked for."""
    calls: list[Any] = []

    def run_tasks(
        model: str, names: Sequence[str], *, limit: int | None, exact: bool, progress: Any, **place: Any
    ) -> Any:
        elsewhere = {k: v for k, v in place.items() if v not in ("cpu", None) and k != "note"}
        calls.append((model, list(names), limit, exact, *([elsewhere] if elsewhere else [])))
        return {name: {"acc": 0.25 + len(calls)} for name in names}

    def write_report(out: Path, against: str, qualities: Sequence[Quality]) -> None:
        calls.append((out, against, [q.model for q in qualities]))

    def check_report(out: Path) -> None:
        calls.append(("check", out))

    def check_tasks() -> None:
        """lm-eval need not be there."""

    for name, functions in (("tasks", [check_tasks, run_tasks]), ("report", [check_report, write_report])):
        module = types.ModuleType(f"fewbit.{name}")
        for function in functions:
            setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, f"fewbit.{name}", module)
    return calls


def test_tasks_without_a_text(cli: Cli, asked: list[Any]) -> None:
    code, said, _ = cli("eval", "A", "B", "--against", "R", "--tasks", "one,two", "--limit", "5")
    assert code == 0
    assert asked == [("R", ["one", "two"], 5, True), ("A", ["one", "two"], 5, False), ("B", ["one", "two"], 5, False)]
    lines = [line.split() for line in said.splitlines()]
    assert lines[0] == ["model", "task", "metric", "figure"]
    assert lines[1:3] == [["R", "one", "acc", "1.2500"], ["R", "two", "acc", "1.2500"]]
    assert len(lines) == 7
    asked.clear()
    found = json.loads(cli("eval", "A", "--against", "R", "--tasks", "one", "--exact", "--json")[1])
    assert found["tasks"] == {"R": {"one": {"acc": 1.25}}, "A": {"one": {"acc": 2.25}}}
    assert asked[1] == ("A", ["one"], None, True)
    asked.clear()
    assert cli("eval", "A", "--against", "R", "--tasks", "one", "--cache", "int8", "--device", "cuda:1")[0] == 0
    assert asked[1] == ("A", ["one"], None, False, {"cache": "int8", "device": "cuda:1"})


def test_tasks_and_a_report_beside_a_text(
    cli: Cli, tiny_folder: Path, texts: list[Path], asked: list[Any], tmp_path: Path
) -> None:
    argv = ("eval", tiny_folder, "--against", tiny_folder, "--text", texts[0], "--windows", "1", "--tasks", "one")
    code, said, err = cli(*argv, "--report", tmp_path / "out.html")
    assert code == 0
    assert "255 predictions" in said
    assert said.splitlines()[-1].split()[1:3] == ["one", "acc"]
    # the reference beside itself is asked once
    model = str(tiny_folder)
    page = tmp_path / "out.html"
    assert asked == [("check", page), (page, model, [model]), (model, ["one"], None, True)]
    assert "out.html" in err


def test_a_report_that_fails_loses_no_figures(
    cli: Cli, tiny_folder: Path, texts: list[Path], asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ("eval", tiny_folder, "--against", tiny_folder, "--text", texts[0], "--windows", "1", "--json")
    whole = json.loads(cli(*argv)[1])

    def fails(error: BaseException) -> None:
        def write_report(*_: Any) -> None:
            raise error

        monkeypatch.setattr(sys.modules["fewbit.report"], "write_report", write_report)

    for error, code, what in (
        (FewbitError("It broke.", "Here.", "Mend it."), 1, "It broke."),
        (OSError(28, "No space left on device", "o.html"), 1, "The disk is full."),
        (KeyboardInterrupt(), 130, "Interrupted."),
    ):
        fails(error)
        found, said, err = cli(*argv, "--report", tmp_path / "o.html")
        assert found == code
        # one document, with all that was measured
        result = json.loads(said)
        assert result.pop("error")["what"] == what
        assert result == whole
        assert f"error: {what}" in err
    # what is no user's mistake keeps its traceback, after the figures
    fails(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        cli(*argv, "--report", tmp_path / "o.html")


@pytest.mark.parametrize("text", [True, False])
def test_a_task_that_fails_loses_no_figures(
    cli: Cli, tiny_folder: Path, texts: list[Path], asked: list[Any], monkeypatch: pytest.MonkeyPatch, text: bool
) -> None:
    works = sys.modules["fewbit.tasks"].run_tasks

    def run_tasks(model: str, *args: Any, **settings: Any) -> Any:
        if model == "B":
            raise FewbitError("There is no B.", "None.", "Name another.")
        return works(model, *args, **settings)

    monkeypatch.setattr(sys.modules["fewbit.tasks"], "run_tasks", run_tasks)
    monkeypatch.setattr("fewbit.cli.eval._evaluate", lambda *_: fewbit.evaluate(tiny_folder, tiny_folder, texts[0]))
    argv = ("eval", "A", "B", "--against", "R", "--tasks", "one", *(("--text", texts[0]) if text else ()))
    code, said, _ = cli(*argv, "--json")
    result = json.loads(said)
    assert code == 1
    assert result["error"]["what"] == "There is no B."
    assert result["tasks"] == {"R": {"one": {"acc": 1.25}}, "A": {"one": {"acc": 2.25}}}
    assert ("mean_kl" in result["models"][0]) == text
    # the table, too, has what was answered
    code, said, err = cli(*argv)
    assert code == 1
    assert [line.split()[0] for line in said.splitlines()[-2:]] == ["R", "A"]
    assert "There is no B." in err


def test_what_fails_before_anything_is_measured_is_an_error_alone(cli: Cli, tiny_folder: Path, tmp_path: Path) -> None:
    code, said, _ = cli("eval", tiny_folder, "--against", tiny_folder, "--text", tmp_path / "none", "--json")
    assert code == 1
    assert list(json.loads(said)) == ["error"]


@pytest.mark.parametrize("verb", ["eval", "compare"])
@pytest.mark.parametrize(
    ("options", "what"),
    [
        ([], "nothing to measure on"),
        (["--tasks", " , "], "names no task"),
        (["--tasks", "one", "--report", "o.html"], "needs a text"),
        (["--text", "t", "--limit", "3"], "--limit is for --tasks"),
        (["--text", "a/t.txt", "--text", "b/t.md"], "'t'"),
        (["--text", "t", "--windows", "0"], "not a whole number"),
    ],
)
def test_usage(cli: Cli, verb: str, options: list[str], what: str) -> None:
    code, said, err = cli(verb, "no-such-model", "--against", "r", *options)
    assert code == 2
    assert said == ""
    assert what in err.splitlines()[0]
    if what in ("nothing to measure on", "needs a text"):
        assert f"fewbit {verb} MODEL" in err
