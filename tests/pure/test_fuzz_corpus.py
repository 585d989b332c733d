"""What the fuzzer kept: every file that once reached something new, through the same targets (see `fuzz/`)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fewbit.checkpoint import gguf
from fewbit.errors import FewbitError

FUZZ = Path(__file__).resolve().parents[2] / "fuzz"
FILES = sorted(p for p in (FUZZ / "corpus").glob("*/*") if p.is_file())


@pytest.fixture(scope="module")
def targets() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_targets", FUZZ / "targets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_kept_files_only_ever_raise_fewbit_errors(targets: ModuleType) -> None:
    assert {f.parent.name for f in FILES} == set(targets.TARGETS)
    assert len(FILES) > 60
    for file in FILES:
        try:
            targets.TARGETS[file.parent.name](file.read_bytes())
        except BaseException as error:
            raise AssertionError(f"{file}: {type(error).__name__}: {error}") from error


def test_the_kept_corpus_is_small() -> None:
    assert sum(f.stat().st_size for f in FILES) < 200_000


def test_a_target_lets_any_other_exception_out(targets: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = next(f for f in FILES if f.parent.name == "gguf" and b"bf16" in f.read_bytes().lower()).read_bytes()

    def fail(self: object, name: str) -> str:
        raise KeyError(name)

    monkeypatch.setattr(gguf.Gguf, "spec", fail)
    with pytest.raises(KeyError):
        targets.use_gguf(whole)

    def refuse(self: object, name: str) -> str:
        raise FewbitError("No.", "Because.", "Do not.")

    monkeypatch.setattr(gguf.Gguf, "spec", refuse)
    targets.use_gguf(whole)
