"""Names of the hub's models, and which files of a repository are a model."""

from __future__ import annotations

import json

import pytest

from fewbit.errors import FewbitError
from fewbit.store.hub_choice import Choice, RemoteFile, choose, quant_of
from fewbit.store.hub_names import HubName, parse

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("text", "repo", "revision", "part"),
    [
        ("owner/name", "owner/name", "main", None),
        ("hf://owner/name", "owner/name", "main", None),
        ("owner/name@v1.0", "owner/name", "v1.0", None),
        ("owner/name@refs/pr/3", "owner/name", "refs/pr/3", None),
        ("owner/name:Q4_K_M", "owner/name", "main", "Q4_K_M"),
        (
            "owner/name-GGUF@abc1234:sub/x-00001-of-00002.gguf",
            "owner/name-GGUF",
            "abc1234",
            "sub/x-00001-of-00002.gguf",
        ),
        ("0wn.er_/N-a.me_1", "0wn.er_/N-a.me_1", "main", None),
    ],
)
def test_a_name_is_taken_apart(text: str, repo: str, revision: str, part: str | None) -> None:
    found = parse(text)
    assert found == HubName(repo, revision, part, text.startswith("hf://"))
    assert str(found) == text.removeprefix("hf://")
    assert parse(str(found)) == HubName(repo, revision, part)


@pytest.mark.parametrize(
    "text",
    [
        "", "name", "a/b/c", "./a", "../a/b", "/a/b", "a/", "/b", "a//b", "-a/b", "a b/c", "a/b c", "a/b@", "a/b:",
        "a/b@-x",         "a/b@../../x", "a/b--c", "a..b/c", "x.gguf/y", "a/model.safetensors", "a/b.gguf", "a/b\n",
        "a/b:x\ny", "a/b:\x1b[2J",         "ä/b", "a/" + "b" * 97, "https://huggingface.co/a/b",
    ],
)  # fmt: skip
def test_what_is_no_name_of_the_hub(text: str) -> None:
    assert parse(text) is None


def pick(text: str, files: dict[str, int], index: bytes | None = None) -> Choice:
    wanted = parse(text)
    assert wanted is not None

    def content(file: RemoteFile) -> bytes:
        assert file.name == INDEX
        assert index is not None
        return index

    return choose(wanted, [RemoteFile(n, s) for n, s in files.items()], content)


def names(choice: Choice) -> list[str]:
    return [f.name for f in choice.files]


SETTINGS = {"config.json": 700, "tokenizer.json": 9000, "tokenizer_config.json": 50, "chat_template.jinja": 100}
AROUND = {
    "README.md": 5000,
    ".gitattributes": 50,
    "pytorch_model.bin": 10**9,
    "consolidated.00.pth": 10**9,
    "original/consolidated.00.pth": 10**9,
    "original/model.safetensors": 10**9,
    "onnx/model.onnx": 10**9,
    "flax_model.msgpack": 10**9,
    "consolidated.safetensors": 10**9,
    "huge.json": 1 << 30,
}


def test_safetensors_and_settings_and_nothing_else() -> None:
    found = pick("o/n", {"model.safetensors": 10**9, **SETTINGS, **AROUND})
    assert sorted(names(found)) == sorted(["model.safetensors", *SETTINGS])
    # where it is, everything is
    assert names(found)[-1] == "config.json"
    assert found.entry == ""
    assert found.nbytes == 10**9 + sum(SETTINGS.values())


def test_shards_are_those_the_index_names() -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": 500 for i in (1, 2)}
    table = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    files = {**shards, "model-00003-of-00002.safetensors": 9, INDEX: 99, **SETTINGS, **AROUND}
    found = pick("o/n", files, json.dumps({"weight_map": table}).encode())
    assert sorted(names(found)) == sorted([*shards, INDEX, *SETTINGS])


@pytest.mark.parametrize(
    "index",
    [
        b"", b"{", b"[]", b'{"weight_map": 3}', b'{"weight_map": {"a": "absent.safetensors"}}',
        b'{"weight_map": {"a": "../../x.safetensors"}}', b'{"weight_map": {"a": "pytorch_model.bin"}}',
        b'{"weight_map": {"a": "original/model.safetensors"}}', b"[" * 100_000,
    ],
)  # fmt: skip
def test_an_index_that_leads_nowhere_is_an_error(index: bytes) -> None:
    with pytest.raises(FewbitError):
        pick("o/n", {"model-00001-of-00001.safetensors": 5, INDEX: 9, **SETTINGS, **AROUND}, index)


def test_shards_without_an_index_are_whole_by_their_count() -> None:
    shards = {f"model-0000{i}-of-00003.safetensors": 500 for i in (1, 2, 3)}
    assert len(pick("o/n", {**shards, **SETTINGS}).files) == 3 + len(SETTINGS)
    del shards["model-00002-of-00003.safetensors"]
    with pytest.raises(FewbitError, match="lacks weight files"):
        pick("o/n", {**shards, **SETTINGS})


GGUFS = {
    "m-Q4_K_M.gguf": 4 * 10**9,
    "m-Q4_K_S.gguf": 3 * 10**9,
    "m-Q4_0.gguf": 3 * 10**9,
    "m-UD-Q5_K_XL.gguf": 5 * 10**9,
    "BF16/m-BF16-00001-of-00002.gguf": 9 * 10**9,
    "BF16/m-BF16-00002-of-00002.gguf": 7 * 10**9,
    "mmproj-m-F16.gguf": 10**8,
    "m.imatrix.gguf": 10**6,
    "README.md": 9,
    "config.json": 9,
}


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("Q4_K_M", ["m-Q4_K_M.gguf"]),
        ("q4_k_m", ["m-Q4_K_M.gguf"]),
        ("Q4_0", ["m-Q4_0.gguf"]),
        ("Q5_K_XL", ["m-UD-Q5_K_XL.gguf"]),
        ("m-Q4_0.gguf", ["m-Q4_0.gguf"]),
        ("BF16", ["BF16/m-BF16-00001-of-00002.gguf", "BF16/m-BF16-00002-of-00002.gguf"]),
        ("BF16/m-BF16-00002-of-00002.gguf", ["BF16/m-BF16-00001-of-00002.gguf", "BF16/m-BF16-00002-of-00002.gguf"]),
    ],
)
def test_one_gguf_is_picked_with_all_its_parts(part: str, expected: list[str]) -> None:
    found = pick(f"o/n:{part}", GGUFS)
    assert names(found) == expected
    assert found.entry == expected[0]


def test_what_several_files_fit_is_a_list_with_sizes() -> None:
    for text, fitting in (("o/n", 5), ("o/n:Q4_K", 5), ("o/n:Q9", 5)):
        with pytest.raises(FewbitError) as caught:
            pick(text, GGUFS)
        lines = caught.value.facts.splitlines()[1:]
        assert len(lines) == fitting
        assert "16.0 GB  BF16/m-BF16-00001-of-00002.gguf" in caught.value.facts
        assert "mmproj" not in caught.value.facts
        assert "o/n:Q4_K_M" in caught.value.next_step
    with pytest.raises(FewbitError, match="2 files of o/n fit 'm'"):
        pick("o/n:m", {"m-Q4_0.gguf": 1, "m-Q8_0.gguf": 2})


def test_a_lone_gguf_needs_no_name_and_a_part_must_be_one() -> None:
    assert pick("o/n", {"m.gguf": 5, "mmproj-m.gguf": 5, "README.md": 1}).entry == "m.gguf"
    with pytest.raises(FewbitError, match="no model by itself"):
        pick("o/n:config.json", GGUFS)
    with pytest.raises(FewbitError, match="no GGUF file"):
        pick("o/n:Q4_0", {"model.safetensors": 5, **SETTINGS})


def test_a_split_gguf_that_lacks_a_part_is_refused() -> None:
    with pytest.raises(FewbitError, match="lacks parts"):
        pick("o/n", {f"m-0000{i}-of-00003.gguf": 5 for i in (1, 3)})


def test_safetensors_come_before_ggufs_beside_them() -> None:
    both = {"model.safetensors": 5, **SETTINGS, **GGUFS}
    assert pick("o/n", both).entry == ""
    assert not any(n.endswith(".gguf") for n in names(pick("o/n", both)))
    assert names(pick("o/n:Q4_0", both)) == ["m-Q4_0.gguf"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"pytorch_model.bin": 2 * 10**9, **SETTINGS}, "pickles (pytorch_model.bin, 2.0 GB)"),
        ({"original/consolidated.00.pth": 10**9}, "pickles"),
        ({"adapter_config.json": 5, "adapter_model.safetensors": 10**6}, "no weights of a whole model"),
        ({"model.safetensors": 10**6, "README.md": 1}, "no config.json"),
        ({"README.md": 1}, "no safetensors or GGUF"),
        ({}, "no safetensors or GGUF"),
    ],
)
def test_a_repository_without_a_model_says_what_it_lacks(files: dict[str, int], said: str) -> None:
    with pytest.raises(FewbitError) as caught:
        pick("o/n", files)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../x.gguf", "/x.gguf", "a/../x.gguf", "a//x.gguf", "./x.gguf", "a\\x.gguf", "C:x.gguf", "x\n.gguf"]
)
def test_names_that_lead_elsewhere_are_not_there(name: str) -> None:
    assert names(pick("o/n", {name: 5, "good.gguf": 5})) == ["good.gguf"]
    with pytest.raises(FewbitError):
        pick("o/n", {name: 5})


def test_sizes_below_zero_are_not_there() -> None:
    assert names(pick("o/n", {"bad.gguf": -1, "good.gguf": 5})) == ["good.gguf"]


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("m-Q4_K_M.gguf", "Q4_K_M"), ("m.q8_0.gguf", "q8_0"), ("x/m-UD-IQ2_XXS-00001-of-00009.gguf", "UD-IQ2_XXS"),
        ("m_f16.gguf", "f16"), ("m-BF16.gguf", "BF16"), ("m.gguf", ""), ("Qwen3-8B.gguf", ""),
        ("m-MXFP4_MOE.gguf", "MXFP4_MOE"),
    ],
)  # fmt: skip
def test_a_files_name_says_its_format(name: str, quant: str) -> None:
    assert quant_of(name) == quant
