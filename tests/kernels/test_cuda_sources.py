"""The CUDA sources compile for every architecture they are meant for, and what was compiled is kept. Needs no card."""

from __future__ import annotations

import pytest

from fewbit import FewbitError
from fewbit.kernels import _nvrtc
from fewbit.kernels._cuda_layout import Kind
from fewbit.kernels._cuda_shapes import shape_for, tile_for

ARCHITECTURES = [80, 86, 89, 90, 120]
# every width, span, scale and shift once
KINDS = [
    Kind(2, 32, 0, 0),
    Kind(3, 64, 1, 1),
    Kind(4, 128, 2, 0),
    Kind(5, 0, 2, 2),
    Kind(6, 64, 1, 2),
    Kind(8, 0, 0, 1),
]


@pytest.fixture(autouse=True)
def _compiler(tmp_path, monkeypatch):
    if reason := _nvrtc.lacking():
        pytest.skip(reason)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sources_compile(arch):
    if arch not in _nvrtc.architectures():
        pytest.skip(f"this NVRTC does not know sm_{arch}")
    images = [_nvrtc.compiled("halve.cu", {}, arch), _nvrtc.compiled("read.cu", {}, arch)]
    # all kinds over all architectures would take minutes: each architecture has its own two
    at = ARCHITECTURES.index(arch)
    for kind, wide, gated in ((KINDS[at], 1 + at % 2, at % 2), (KINDS[at + 1], 1, 0)):
        shape = shape_for(kind, 256, 64, wide, 99 << 10)
        defines = kind.defines() | shape.defines() | {"NT": wide, "GATED": gated}
        images += [_nvrtc.compiled("product.cu", defines, arch)]
        tile, _ = tile_for(kind, 256, 64, 32 * wide, 99 << 10, 82)
        images += [_nvrtc.compiled("many.cu", kind.defines() | tile.defines() | {"GATED": gated}, arch)]
    images += [_nvrtc.compiled("expand.cu", KINDS[at].defines(), arch)]
    assert all(image.startswith(b"\x7fELF") for image in images)


def test_a_card_newer_than_the_compiler_gets_ptx():
    assert b".target sm_" in _nvrtc.compiled("read.cu", {}, 990)


def test_a_card_that_is_too_old_is_refused():
    with pytest.raises(FewbitError, match="too old"):
        _nvrtc.compiled("read.cu", {}, 20)


def test_compiled_code_is_kept_and_damage_is_made_good(tmp_path, monkeypatch):
    calls = []
    real = _nvrtc.compiled
    monkeypatch.setattr(_nvrtc, "compiled", lambda *a: calls.append(a) or real(*a))
    first = _nvrtc._kept("read.cu", (), 86)
    assert _nvrtc._kept("read.cu", (), 86) == first
    assert len(calls) == 1
    (file,) = (tmp_path / "fewbit" / "cuda").iterdir()
    for damaged in (b"", file.read_bytes()[:-1], bytes(len(first))):
        file.write_bytes(damaged)
        assert _nvrtc._kept("read.cu", (), 86) == first
    assert len(calls) == 4
    # another architecture, another define: another file
    _nvrtc._kept("read.cu", (), 89)
    _nvrtc._kept("read.cu", (("X", "1"),), 86)
    assert len(list((tmp_path / "fewbit" / "cuda").iterdir())) == 3


def test_a_changed_header_is_another_file(tmp_path, monkeypatch):
    before = _nvrtc._key("read.cu", (), 86)
    headers = _nvrtc._headers()
    monkeypatch.setattr(_nvrtc, "_headers", lambda: headers | {"pieces.cuh": headers["pieces.cuh"] + b"\n"})
    assert _nvrtc._key("read.cu", (), 86) != before


def test_a_folder_that_can_not_be_written_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert _nvrtc._kept("read.cu", (), 86).startswith(b"\x7fELF")


def test_what_does_not_compile_is_told_with_the_log():
    with pytest.raises(FewbitError) as told:
        _nvrtc.compiled("product.cu", {"BITS": 4}, 86)
    assert "did not compile" in told.value.what
    assert "SPAN" in told.value.facts
    assert told.value.next_step
