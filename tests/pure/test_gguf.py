"""GGUF files as gguf-py writes them, then as an enemy would."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fewbit import formats
from fewbit.checkpoint import gguf, open_checkpoint
from fewbit.checkpoint._gguf_file import EAGER_LENGTH, LazyArray
from fewbit.errors import FewbitError

RNG = np.random.default_rng(11)
WEIGHTS = {
    "norm": RNG.standard_normal(64).astype(np.float32),
    "half": RNG.standard_normal((3, 8)).astype(np.float16),
    "experts": RNG.standard_normal((2, 3, 32)).astype(np.float32),
    "q4_0": RNG.standard_normal((4, 64)).astype(np.float32),
    "q4_1": RNG.standard_normal((5, 96)).astype(np.float32),
    "q8_0": RNG.standard_normal((6, 32)).astype(np.float32),
    "bf16": RNG.standard_normal((7, 4)).astype(np.float32),
}
LONG = [f"token{i}é" for i in range(EAGER_LENGTH + 5)]


def write_sample(path: Path, alignment: int | None = None) -> Path:
    writer = GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_block_count(2)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_int64("a.negative", -5)
    writer.add_string("a.text", "naïve 漢字")
    writer.add_array("a.short", [1, 2, 3])
    writer.add_array("a.flags", [True, False])
    writer.add_array("a.long", LONG)
    writer.add_array("a.numbers", list(range(EAGER_LENGTH + 1)))
    for name, w in WEIGHTS.items():
        if name in ("q4_0", "q4_1", "q8_0", "bf16"):
            kind = GGMLQuantizationType[name.upper()]
            writer.add_tensor(name, quantize(w, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("gguf") / "sample.gguf")


def test_metadata_comes_back(sample: Path) -> None:
    config = gguf.open(sample).config
    assert config["general.architecture"] == "llama"
    assert config["llama.block_count"] == 2
    assert (config["a.float"], config["a.bool"], config["a.negative"]) == (0.5, True, -5)
    assert config["a.text"] == "naïve 漢字"
    assert config["a.short"] == [1, 2, 3]
    assert config["a.flags"] == [True, False]


def test_long_arrays_are_decoded_when_asked_for(sample: Path) -> None:
    config = gguf.open(sample).config
    long, numbers = config["a.long"], config["a.numbers"]
    assert isinstance(long, LazyArray)
    assert (len(long), long[3], long[-1], list(long), long[1:3]) == (len(LONG), LONG[3], LONG[-1], LONG, LONG[1:3])
    assert list(numbers) == list(range(EAGER_LENGTH + 1))
    assert str(len(LONG)) in repr(long)


def test_names_shapes_specs_and_values(sample: Path) -> None:
    checkpoint = gguf.open(sample)
    specs = {
        "norm": "f32",
        "half": "f16",
        "experts": "f32",
        "q4_0": "gguf:q4_0",
        "q4_1": "gguf:q4_1",
        "q8_0": "gguf:q8_0",
        "bf16": "bf16",
    }
    steps = {"gguf:q4_0": 0.5, "gguf:q4_1": 0.25, "gguf:q8_0": 0.02, "bf16": 0.02, "f16": 0, "f32": 0}
    assert checkpoint.names() == list(WEIGHTS)
    assert (checkpoint.naming, checkpoint.weight_bytes()) == ("gguf", sample.stat().st_size)
    for name, w in WEIGHTS.items():
        q = checkpoint.read(name)
        assert checkpoint.shape(name) == q.shape == w.shape
        assert checkpoint.spec(name) == q.spec == specs[name]
        got = formats.parse(q.spec).dequantize(q).numpy()
        assert np.abs(got - w).max() <= steps[q.spec], name


@pytest.mark.parametrize("name", [n for n, w in WEIGHTS.items() if w.ndim > 1])
def test_rows_are_views_of_the_whole(sample: Path, name: str) -> None:
    checkpoint = gguf.open(sample)
    whole, some = checkpoint.read(name), checkpoint.read(name, (1, 2))
    ((part, a),), ((_, b),) = whole.parts.items(), some.parts.items()
    assert some.shape == (1, *whole.shape[1:])
    assert torch.equal(a[1:2], b)
    assert b.data_ptr() - a.data_ptr() == a[0].numel() * a.element_size()
    layout = formats.parse(whole.spec).layout(some.shape, torch.float32)
    assert layout[part] == (b.dtype, tuple(b.shape))
    for rows in ((-1, 1), (1, 1), (0, whole.shape[0] + 1)):
        with pytest.raises(ValueError, match="rows"):
            checkpoint.read(name, rows)


def test_writing_to_a_tensor_never_reaches_the_file(sample: Path) -> None:
    before = sample.read_bytes()
    checkpoint = gguf.open(sample)
    checkpoint.read("norm").parts["weight"].zero_()
    assert checkpoint.read("norm").parts["weight"].abs().sum() == 0
    assert sample.read_bytes() == before
    assert gguf.open(sample).read("norm").parts["weight"].abs().sum() > 0


def test_a_tensor_outlives_its_checkpoint(sample: Path) -> None:
    kept = gguf.open(sample).read("norm").parts["weight"]
    assert np.array_equal(kept.numpy(), WEIGHTS["norm"])


def test_other_alignments_are_followed(tmp_path: Path) -> None:
    checkpoint = gguf.open(write_sample(tmp_path / "a.gguf", alignment=256))
    assert checkpoint.config["general.alignment"] == 256
    assert np.array_equal(checkpoint.read("norm").parts["weight"].numpy(), WEIGHTS["norm"])


def test_version_2_reads_like_version_3(sample: Path, tmp_path: Path) -> None:
    data = bytearray(sample.read_bytes())
    data[4] = 2
    (tmp_path / "two.gguf").write_bytes(data)
    assert gguf.open(tmp_path / "two.gguf").names() == list(WEIGHTS)


def test_matches_by_magic_or_suffix(sample: Path, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(sample.read_bytes())
    (tmp_path / "empty.GGUF").write_bytes(b"")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "other").write_bytes(b"{}")
    assert [gguf.matches(tmp_path / n) for n in ("blob", "empty.GGUF", "folder.gguf", "other", "absent")] == [
        *(True, True),
        *(False, False, False),
    ]
    assert isinstance(open_checkpoint(tmp_path / "blob"), gguf.Gguf)


def test_an_unknown_tensor_is_an_error_with_the_nearest_name(sample: Path) -> None:
    with pytest.raises(FewbitError, match="did you mean norm") as caught:
        gguf.open(sample).read("nor")
    assert "7 tensors" in caught.value.facts


# Files that are broken, foreign or hostile: built byte by byte


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def build(
    pairs: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: int = 4096,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    pairs, tensors = pairs or [], tensors or []
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(pairs))))
    body = head + b"".join(pairs) + b"".join(tensors)
    return body + bytes(-len(body) % 32) + bytes(data)


U64 = 2**64 - 1
HUGE_STRING = struct.pack("<Q", U64)
HOSTILE = {
    "empty": (b"", "0 bytes"),
    "short": (b"GGUF\x03\0\0\0", "8 bytes"),
    "not gguf": (b"PK\x03\x04" + bytes(60), "PK"),
    "version 1": (build(version=1), "version 1"),
    "version 4": (build(version=4), "version 4"),
    "big endian": (build(version=3 << 24), "big endian, version 3"),
    "tensor count": (build(counts=(U64, 0)), f"{U64} tensors"),
    "pair count": (build(counts=(0, 2**40)), f"{2**40} pairs"),
    "key length": (build([HUGE_STRING + bytes(9)]), str(U64)),
    "string length": (build([pair("k", 8, HUGE_STRING)]), str(U64)),
    "value type": (build([pair("k", 13, b"")]), "unknown value type 13"),
    "array count": (build([pair("k", 9, struct.pack("<IQ", 0, U64))]), f"{U64} items"),
    "array of numbers": (build([pair("k", 9, struct.pack("<IQ", 10, 2**61))]), f"{2**61} items"),
    "array of strings": (build([pair("k", 9, struct.pack("<IQ", 8, 2**40))]), f"{2**40} items"),
    "array item type": (build([pair("k", 9, struct.pack("<IQ", 99, 1))]), "unknown value type 99"),
    "strings past the end": (
        build([pair("k", 9, struct.pack("<IQ", 8, 2000) + text("a") * 1999 + HUGE_STRING)]),
        "item 1999 of 2000",
    ),
    "short strings past the end": (
        build([pair("k", 9, struct.pack("<IQ", 8, 2) + text("a") + HUGE_STRING)]),
        "item 1 of 2",
    ),
    "nested arrays": (build([pair("k", 9, struct.pack("<IQ", 9, 1) * 50 + struct.pack("<IQ", 0, 0))]), "nests arrays"),
    "text": (build([pair("k", 8, struct.pack("<Q", 2) + b"\xff\xfe")]), "not UTF-8"),
    "key twice": (build([pair("k", 0, b"\1")] * 2), "'k' appears twice"),
    "alignment 0": (build([pair("general.alignment", 4, struct.pack("<I", 0))]), "general.alignment is 0"),
    "alignment 48": (build([pair("general.alignment", 4, struct.pack("<I", 48))]), "general.alignment is 48"),
    "alignment 4": (build([pair("general.alignment", 4, struct.pack("<I", 4))]), "general.alignment is 4"),
    "alignment text": (build([pair("general.alignment", 8, text("x" * 99))]), "general.alignment is xxx"),
    "tensor twice": (build(tensors=[tensor("t", (8,))] * 2), "'t' appears twice"),
    "rank 0": (build(tensors=[tensor("t", ()) + bytes(8)]), "0 dimensions"),
    "rank 5": (build(tensors=[tensor("t", (1,) * 5)]), "5 dimensions"),
    "rank huge": (build(tensors=[text("t") + struct.pack("<I", 2**32 - 1) + bytes(40)]), f"{2**32 - 1} dimensions"),
    "empty shape": (build(tensors=[tensor("t", (8, 0))]), "empty shape (0, 8)"),
    "overflow": (build(tensors=[tensor("t", (2**32, 2**32))]), "ends at"),
    "overflow to few": (build(tensors=[tensor("t", (2**63, 2, 2, 2))]), "ends at"),
    "past the end": (build(tensors=[tensor("t", (1024,), offset=32)]), "ends at 4192"),
    "offset": (build(tensors=[tensor("t", (8,), offset=U64 - 31)]), "ends at"),
    "crooked offset": (build(tensors=[tensor("t", (8,), offset=4)]), "lies at 4, not a multiple of 32"),
    "ragged blocks": (build(tensors=[tensor("t", (40, 2), kind=2)]), "multiple of 32 columns, not 40"),
    "unreadable past the end": (build(tensors=[tensor("t", (256,), kind=14, offset=4096)]), "ends at"),
    "split": (build([pair("split.count", 2, struct.pack("<H", 3))]), "one of 3 parts"),
    "split into text": (build([pair("split.count", 8, text("3"))]), "split.count = 3"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_wrong_with_a_file_is_said_with_figures(tmp_path: Path, case: str) -> None:
    data, words = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    with pytest.raises(FewbitError) as caught:
        gguf.open(path)
    assert words in caught.value.facts
    assert "hostile.gguf" in caught.value.what


def test_the_builder_of_hostile_files_can_build_a_good_one(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(build([pair("split.count", 2, b"\1\0")], [tensor("t", (1024,))]))
    assert gguf.open(path).read("t").shape == (1024,)


def test_text_that_is_not_utf8_in_a_lazy_array_is_an_error_when_read(tmp_path: Path) -> None:
    path = tmp_path / "lazy.gguf"
    items = struct.pack("<IQ", 8, 2000) + text("a") * 1999 + struct.pack("<Q", 1) + b"\xff"
    path.write_bytes(build([pair("k", 9, items)]))
    array = gguf.open(path).config["k"]
    assert len(array) == 2000
    with pytest.raises(FewbitError, match="item 1999 of"):
        list(array)


@pytest.mark.parametrize(("kind", "called"), [(15, "q8_k"), (4711, "number 4711")])
def test_a_type_that_is_not_readable_is_named_when_asked_for(tmp_path: Path, kind: int, called: str) -> None:
    path = tmp_path / "k.gguf"
    path.write_bytes(build(tensors=[tensor("norm", (64,)), tensor("t", (256, 2), kind=kind, offset=256)]))
    checkpoint = gguf.open(path)
    assert checkpoint.shape("t") == (2, 256)
    assert checkpoint.spec("norm") == "f32"
    asks: list[Callable[[str], object]] = [checkpoint.spec, checkpoint.read]
    for ask in asks:
        with pytest.raises(FewbitError, match=f"{called} of 't'") as caught:
            ask("t")
        assert "readable: f32, f16, q4_0, q4_1, q5_0, q5_1, q8_0, q2_k" in caught.value.facts
        assert "1 tensors of f32" in caught.value.facts


def use_everything(path: Path) -> None:
    """Open a file and read all it has; FewbitError is the only way out that is not the end."""
    try:
        checkpoint = gguf.open(path)
        for value in checkpoint.config.values():
            if isinstance(value, LazyArray):
                list(value)
        for name in checkpoint.names():
            q = checkpoint.read(name)
            assert q.shape == checkpoint.shape(name)
            assert formats.parse(q.spec).dequantize(q).numel() == q.numel
        json.loads(checkpoint.tokenizer().json)
    except FewbitError as error:
        check_words(error)


def check_words(error: FewbitError) -> None:
    assert error.what
    assert 0 < len(error.facts) < 2000


edits = st.lists(st.tuples(st.integers(0, 2**20), st.binary(min_size=1, max_size=9)), max_size=6)


@settings(deadline=None, max_examples=300)
@given(edits=edits, cut=st.one_of(st.none(), st.integers(0, 2**20)), where=st.sampled_from(["header", "anywhere"]))
@example(edits=[], cut=None, where="header")
def test_mutations_and_truncations_only_ever_raise_fewbit_errors(
    sample: Path, edits: list[tuple[int, bytes]], cut: int | None, where: str
) -> None:
    whole = sample.read_bytes()
    data = bytearray(whole)
    # 600 bytes are the magic, the counts and the short pairs; the tensor table follows the long arrays
    span = 600 if where == "header" else len(whole)
    for position, new in edits:
        at = position % span
        data[at : at + len(new)] = new
    path = sample.with_name("mutated.gguf")
    path.write_bytes(data if cut is None else data[: cut % len(data)])
    use_everything(path)


@settings(deadline=None, max_examples=150)
@given(edits=edits)
def test_mutations_of_the_tensor_table_only_ever_raise_fewbit_errors(
    sample: Path, edits: list[tuple[int, bytes]]
) -> None:
    data = bytearray(sample.read_bytes())
    start = data.index(text("norm"))
    for position, new in edits:
        at = start + position % 400
        data[at : at + len(new)] = new
    path = sample.with_name("mutated.gguf")
    path.write_bytes(data)
    use_everything(path)
