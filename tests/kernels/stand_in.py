"""Card sources compiled for the CPU, over a header that stands in for the card's own."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

# what an older compiler lacks; any other error is the sources' own
LACKING = ("barrier: No such file", "_Float16")


def compiled(folder: Path, defines: dict[str, object]) -> ctypes.CDLL:
    """run.cpp of the folder with these defines, as a library; skips where this machine can't compile it."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", "-pthread", "-w", f"-I{Path(__file__).parent}"]
    flags += [f"-D{k}={v}" for k, v in defines.items()]
    done = subprocess.run(
        [compiler, *flags, str(folder / "run.cpp"), "-o", str(folder / "run.so")],
        capture_output=True,
        text=True,
        check=False,
    )
    if any(lack in done.stderr for lack in LACKING):
        pytest.skip("this C++ compiler has no <barrier> or no halves")
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "run.so"))
