"""Why there is nothing to compile or launch with, in words that name what lacks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fewbit import FewbitError
from fewbit.kernels import _nvrtc, chooser, missing, ops_on, slower, triton
from fewbit.kernels.ops import Ops

CPU = torch.device("cpu")


@pytest.fixture
def bindings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """bindings(driver, nvrtc): a cuda-bindings with these two modules in place of what is installed."""
    for name in [n for n in sys.modules if n == "cuda" or n.startswith("cuda.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def install(driver: str, nvrtc: str) -> None:
        folder = tmp_path / "cuda" / "bindings"
        folder.mkdir(parents=True)
        for file, text in ((tmp_path / "cuda" / "__init__.py", ""), (folder / "__init__.py", "")):
            file.write_text(text)
        (folder / "driver.py").write_text(driver)
        (folder / "nvrtc.py").write_text(nvrtc)

    for cached in (_nvrtc.lacking, _nvrtc._imported):
        cached.cache_clear()
    yield install
    for name in [n for n in sys.modules if n == "cuda" or n.startswith("cuda.")]:
        del sys.modules[name]
    for cached in (_nvrtc.lacking, _nvrtc._imported):
        cached.cache_clear()


def test_a_library_that_is_not_there_is_named(bindings: Callable[[str, str], None]) -> None:
    bindings("", "def nvrtcVersion():\n    raise RuntimeError('Failure finding libnvrtc.so\\nsearched: everywhere')\n")
    assert _nvrtc.missing() == (
        "NVRTC's library can't be loaded (the extra fewbit[cuda] has it): Failure finding libnvrtc.so"
    )
    with pytest.raises(FewbitError) as told:
        _nvrtc._both()
    assert "libnvrtc" in told.value.facts


def test_bindings_that_do_not_load_say_why(bindings: Callable[[str, str], None]) -> None:
    bindings("raise ImportError('libcuda.so.1: no such file')", "def nvrtcVersion():\n    return 0, 13, 0\n")
    assert _nvrtc.missing() == "cuda-bindings can't be imported: libcuda.so.1: no such file"


def test_what_is_whole_lacks_nothing(bindings: Callable[[str, str], None]) -> None:
    bindings("", "def nvrtcVersion():\n    return 0, 13, 0\n")
    assert _nvrtc.missing() is None


def test_nothing_installed_is_another_thing(
    bindings: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = _nvrtc.importlib.util.find_spec
    monkeypatch.setattr(_nvrtc.importlib.util, "find_spec", lambda name: None if name == "cuda" else real(name))
    assert "cuda-bindings is not installed" in str(_nvrtc.missing())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _nvrtc.missing() == "torch sees no CUDA card"


def test_the_cpu_lacks_nothing_and_chooses_by_itself() -> None:
    assert missing("cpu") is None
    assert chooser(CPU) is None
    assert type(ops_on(CPU, exact=True)) is Ops


def test_triton_stands_in_for_what_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    for here, there, reason in (
        (None, "no triton", None),
        ("no NVRTC", None, None),
        ("no NVRTC", "no triton", "no NVRTC; no triton"),
    ):
        monkeypatch.setattr(_nvrtc, "missing", lambda here=here: here)
        monkeypatch.setattr(triton, "missing", lambda there=there: there)
        assert missing("cuda") == reason
        assert (slower("cuda") is None) == (here is None)
