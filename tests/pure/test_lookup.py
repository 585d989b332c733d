"""The file name is the registry."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fewbit.errors import FewbitError
from fewbit.lookup import find, names, nearest


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package of two public modules, one of which must not be imported for its name to be known."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "hammer.py").write_text("def hit(): return 'bang'\n")
    (folder / "saw.py").write_text("raise RuntimeError('imported too early')\n")
    (folder / "_glue.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield "shelf"
    for name in [m for m in sys.modules if m.split(".")[0] == "shelf"]:
        del sys.modules[name]


def test_names_are_sorted_public_and_unimported(package: str) -> None:
    assert names(package) == ["hammer", "saw"]
    assert "shelf.saw" not in sys.modules


def test_find_imports_the_module(package: str) -> None:
    assert find(package, "hammer").hit() == "bang"


@pytest.mark.parametrize("name", ["hamer", "_glue", "", "..errors", "hammer.hit"])
def test_find_refuses_what_is_not_listed(package: str, name: str) -> None:
    with pytest.raises(FewbitError) as caught:
        find(package, name)
    assert "shelf" in caught.value.what
    assert "hammer, saw" in caught.value.facts


def test_nearest_names_the_close_ones_or_all() -> None:
    assert nearest("hamer", ["hammer", "saw"]) == "did you mean hammer?"
    assert nearest("zzz", ["hammer", "saw"]) == "known: hammer, saw"


def test_the_error_has_three_parts() -> None:
    error = FewbitError("No such file.", "There is nothing at 'x'.", "Check the path.")
    assert str(error) == "No such file.\n  There is nothing at 'x'.\n  Check the path."
    assert error.to_dict() == {
        "what": "No such file.",
        "facts": "There is nothing at 'x'.",
        "next_step": "Check the path.",
    }
