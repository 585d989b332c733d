"""Which files of a repository are a model: safetensors with their settings, or one GGUF file. Never a pickle.

A listing comes from elsewhere: names that could lead out of a folder are as if they were not there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fewbit.errors import FewbitError
from fewbit.store.hub_names import HubName
from fewbit.store.places import size_text

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
# no settings file of a model is as large
MAX_SETTINGS = 1 << 28
# what holds weights that run code when they are opened
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
_SHARD = re.compile(r"-of-(\d{5})\.safetensors$")
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE | re.DOTALL)
# GGUF files that are parts of something else: a picture's encoder, statistics
_NO_MODELS = ("mmproj", "imatrix")
# how a file's name says its format, for lists
_QUANT = re.compile(r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|TQ\d_\d|MXFP4\w*|B?F16|F32))(?=$|[-.])", re.IGNORECASE)
SHOWN = 40


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it; `digest` is the SHA-256 of a large one, the git id of a small one, or empty."""

    name: str
    size: int
    digest: str = ""


@dataclass(frozen=True)
class Choice:
    """The files to have, and which of them is opened: "" for the folder they lie in."""

    files: tuple[RemoteFile, ...]
    entry: str

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(f.size for f in self.files)


def choose(wanted: HubName, listed: Iterable[RemoteFile], index: Callable[[RemoteFile], bytes]) -> Choice:
    """The files that are the model `wanted`; `index` gives the content of the list of shards where there is one.

    FewbitError where the repository has none, has several of which one must be picked, or has pickles alone.
    """
    files = {f.name: f for f in listed if _is_clean(f.name) and f.size >= 0}
    models = _gguf_models(files.values())
    if wanted.part:
        return _picked(wanted, wanted.part, files, models)
    if CONFIG in files and (weights := _safetensors(wanted, files, index)):
        settings = [f for f in files.values() if _is_setting(f)]
        # the settings last, config.json behind all: where it is, everything is
        order = sorted(settings, key=lambda f: (f.name == CONFIG, f.name))
        return Choice((*weights, *order), "")
    if len(models) == 1:
        return _whole(wanted, *models.values())
    if models:
        raise _which(wanted, f"{wanted} holds {len(models)} models, and one must be picked.", models)
    raise _none(wanted, files.values())


def quant_of(name: str) -> str:
    """What a GGUF file's name says of its format, as it is written there; empty where it says nothing."""
    found = _QUANT.findall(_stem(name))
    return str(found[-1]) if found else ""


def gguf_names(names: Iterable[str]) -> list[str]:
    """Of some files the GGUF models, split ones by their first part."""
    return list(_gguf_models(RemoteFile(n, 0) for n in names))


def gguf_parts(first: str, names: Iterable[str]) -> list[str]:
    """The files of the GGUF model that `gguf_names` gave by its first."""
    return [f.name for f in _gguf_models(RemoteFile(n, 0) for n in names)[first]]


def _is_clean(name: str) -> bool:
    parts = name.split("/")
    return len(name) <= 500 and not set(name) & set("\\:\0\r\n") and all(p not in ("", ".", "..") for p in parts)


def _is_setting(file: RemoteFile) -> bool:
    """Settings, tokenizers and templates lie beside the weights; a list of shards comes with them."""
    if "/" in file.name or file.size > MAX_SETTINGS:
        return False
    return file.name.endswith((".json", ".jinja")) or file.name == "tokenizer.model"


def _safetensors(
    wanted: HubName, files: dict[str, RemoteFile], index: Callable[[RemoteFile], bytes]
) -> list[RemoteFile]:
    """The weight files that belong together: by the list of shards, or by their names."""
    if INDEX in files:
        return _by_index(wanted, files, index(files[INDEX]))
    if "model.safetensors" in files:
        return [files["model.safetensors"]]
    beside = [f for f in files.values() if f.name.endswith(".safetensors") and "/" not in f.name]
    # the publisher's own spelling of the same weights, and what is put on top of a model
    beside = [f for f in beside if not f.name.startswith(("consolidated", "adapter"))]
    beside = [f for f in beside if f.name.startswith("model")] or beside
    # shards without their list are whole by their count
    counts = {int(match[1]) for f in beside if (match := _SHARD.search(f.name))}
    if counts and counts != {len(beside)}:
        raise _lacking(wanted, f"Shards are counted to {max(counts)}; {len(beside)} are there.")
    return sorted(beside, key=lambda f: f.name)


def _by_index(wanted: HubName, files: dict[str, RemoteFile], content: bytes) -> list[RemoteFile]:
    try:
        table = json.loads(content)["weight_map"]
        names = sorted({str(name) for name in table.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FewbitError(
            f"{wanted} has no usable list of its weight files.",
            f"{INDEX}: {type(error).__name__}: {error}.",
            "Take another revision of it, or another model.",
        ) from error
    if lacking := [n for n in names if n not in files or not n.endswith(".safetensors") or "/" in n]:
        first = lacking[0][:100]
        raise _lacking(wanted, f"{INDEX} names {len(names)}; {len(lacking)} are not there, the first {first!r}.")
    return [files[n] for n in names]


def _lacking(wanted: HubName, facts: str) -> FewbitError:
    return FewbitError(f"{wanted} lacks weight files.", facts, "Take another revision of it, or another model.")


def _gguf_models(files: Iterable[RemoteFile]) -> dict[str, list[RemoteFile]]:
    """The first (or only) file of each GGUF model, with all of its parts in their order."""
    found: dict[str, list[RemoteFile]] = {}
    groups: dict[tuple[str, str], list[RemoteFile]] = {}
    for file in sorted(files, key=lambda f: f.name):
        base = file.name.rpartition("/")[2].lower()
        if not base.endswith(".gguf") or any(word in base for word in _NO_MODELS):
            continue
        if match := _SPLIT.fullmatch(file.name):
            groups.setdefault((match[1], match[3]), []).append(file)
        else:
            found[file.name] = [file]
    for parts in groups.values():
        found[parts[0].name] = parts
    return dict(sorted(found.items()))


def _whole(wanted: HubName, parts: list[RemoteFile]) -> Choice:
    """A GGUF model with all of its parts; FewbitError where some are not there."""
    if match := _SPLIT.fullmatch(parts[0].name):
        count = int(match[3])
        if [p.name for p in parts] != [f"{match[1]}-{i:05}-of-{match[3]}.gguf" for i in range(1, count + 1)]:
            raise FewbitError(
                f"{wanted} lacks parts of the model.",
                f"{parts[0].name} is one of {count} parts; {len(parts)} are there.",
                "Pick another file of it, or another repository.",
            )
    return Choice(tuple(parts), parts[0].name)


def _picked(wanted: HubName, part: str, files: dict[str, RemoteFile], models: dict[str, list[RemoteFile]]) -> Choice:
    """The GGUF model that a file's name, or the name of its format, stands for."""
    for parts in models.values():
        if part in [f.name for f in parts]:
            return _whole(wanted, parts)
    if part in files:
        raise FewbitError(
            f"{part} of {wanted.repo} is no model by itself.",
            f"Only GGUF files can be picked; the repository has {len(models)}.",
            f"Leave it out for the safetensors: {wanted.repo}." if not models else _example(wanted, models),
        )
    fitting = {name: parts for name, parts in models.items() if _fits(name, part)}
    if len(fitting) == 1:
        return _whole(wanted, *fitting.values())
    if fitting:
        raise _which(wanted, f"{len(fitting)} files of {wanted.repo} fit {part!r}.", fitting)
    if models:
        raise _which(wanted, f"{wanted.repo} has no {part!r}.", models)
    raise FewbitError(
        f"{wanted.repo} has no GGUF file, so none can be picked.",
        f"Asked for {part!r}; it has {len(files)} files.",
        f"Leave it out for the safetensors: {wanted.repo}.",
    )


def _stem(name: str) -> str:
    base = name.rpartition("/")[2]
    match = _SPLIT.fullmatch(base)
    return match[1] if match else base[: -len(".gguf")]


def _fits(name: str, part: str) -> bool:
    """Whether a file's name has the word: Q4_K is no part of Q4_K_M."""
    return bool(re.search(rf"(?:^|[-._]){re.escape(part)}(?=$|[-.])", _stem(name), re.IGNORECASE))


def _which(wanted: HubName, what: str, models: dict[str, list[RemoteFile]]) -> FewbitError:
    rows = [(quant_of(name), size_text(sum(p.size for p in parts)), name) for name, parts in models.items()]
    wide = max(len(quant) for quant, _, _ in rows[:SHOWN])
    lines = [f"{quant:<{wide}}  {size:>9}  {name}" for quant, size, name in rows[:SHOWN]]
    if len(rows) > SHOWN:
        lines.append(f"and {len(rows) - SHOWN} more")
    return FewbitError(what, "There are:\n    " + "\n    ".join(lines), _example(wanted, models))


def _example(wanted: HubName, models: dict[str, list[RemoteFile]]) -> str:
    quants = [quant_of(name) for name in models]
    names = [quant for quant in quants if quants.count(quant) == 1 and quant] or list(models)
    # what most people take, where it is there
    best = next((n for liked in ("Q4_K_M", "Q4_0", "Q8_0") for n in names if n.upper() == liked), names[0])
    revision = str(HubName(wanted.repo, wanted.revision))
    return f"Name a format or a file behind a colon, such as {revision}:{best}."


def _none(wanted: HubName, files: Sequence[RemoteFile] | Iterable[RemoteFile]) -> FewbitError:
    """Nothing there that fewbit reads."""
    all_files = list(files)
    names = [f.name for f in all_files]
    pickles = [f for f in all_files if f.name.lower().endswith(_PICKLES)]
    if "adapter_config.json" in names:
        return FewbitError(
            f"{wanted} is an adapter, not a model.",
            "It has adapter_config.json and no weights of a whole model.",
            "Merge it into its base model (peft: merge_and_unload, save_pretrained) and give that folder.",
        )
    if pickles:
        first = max(pickles, key=lambda f: f.size)
        return FewbitError(
            f"{wanted} has no safetensors or GGUF files.",
            f"Its weights are pickles ({first.name}, {size_text(first.size)}), which can run code when opened: "
            "fewbit reads none.",
            f"Look among its pull requests for a safetensors version and add @refs/pr/N to the name, or take another "
            f"repository of the model: {wanted.repo}.",
        )
    lacks = "no config.json" if any(n.endswith(".safetensors") for n in names) else "no safetensors or GGUF files"
    return FewbitError(
        f"{wanted} holds no model that fewbit reads.",
        f"Among its {len(names)} files there is {lacks}.",
        "Check that it is a language model for transformers or llama.cpp, not for another library.",
    )
