"""Imports go one way, names mean one thing, and nothing heavy is loaded before it is needed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fewbit

ROOT = Path(fewbit.__file__).parent

# what each part of fewbit may import; the order is the order of the layers
LOW = {"errors", "lookup", "qtensor"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "memory": set(),
    "kept": set(),
    "lookup": {"errors"},
    "qtensor": {"errors"},
    "config_values": {"errors"},
    "gguf_parts": set(),
    "store": {"errors", "lookup", "gguf_parts"},
    "formats": LOW,
    "methods": LOW | {"formats"},
    "kernels": LOW | {"formats", "store", "kept"},
    "prepared": {"qtensor", "store", "kept", "kernels"},
    "layers": LOW | {"config_values", "formats", "kernels", "prepared"},
    "rotary": {"errors", "config_values"},
    "models": LOW | {"config_values", "formats", "kernels", "layers", "rotary"},
    "checkpoint": LOW | {"config_values", "formats", "gguf_parts"},
    "tokenizer": {"errors", "checkpoint"},
    "scoring": {"tokenizer"},
    "quality": {"scoring"},
    "documents": {"errors"},
    "calibration": {"errors", "tokenizer", "documents"},
    "source": LOW | {"formats", "models", "checkpoint", "store"},
    "shapes": set(),
    "random_models": LOW | {"formats", "models", "checkpoint", "source", "shapes"},
    "scratch": set(),
    "fetching": {"errors", "qtensor", "checkpoint", "scratch"},
    "origin": {"config_values", "checkpoint", "source"},
    "reference_cache": {"store", "scoring", "source"},
    "runtime": LOW | {"formats", "kernels", "layers", "models", "checkpoint", "tokenizer", "store", "source", "memory"},
    "blocks": LOW | {"formats", "kernels", "layers", "source", "fetching"},
    "passes": LOW | {"methods", "blocks"},
    "feeds": LOW | {"methods", "source", "blocks"},
    "calibrated": LOW | {"formats", "methods", "source", "blocks", "feeds"},
    "sensitivity": LOW | {"formats", "layers", "source", "blocks", "passes", "scratch"},
    "preflight": LOW | {"formats", "methods", "source", "blocks", "passes", "sensitivity", "memory"},
    "walk": LOW | {"formats", "methods", "checkpoint", "source", "blocks", "calibrated", "scratch", "sensitivity"},
}
MAY_IMPORT["walk"] |= {"preflight", "passes", "memory", "fetching"}
MAY_IMPORT["companions"] = {"checkpoint", "source", "tokenizer"}
MAY_IMPORT["runtime"] |= {"prepared", "random_models", "fetching"}
MAY_IMPORT["self_calibration"] = MAY_IMPORT["runtime"] | {"runtime", "calibration"}
MAY_IMPORT["recipes"] = {"errors", "lookup", "models"}
MAY_IMPORT["quantizer"] = MAY_IMPORT["walk"] | {"walk", "models", "tokenizer", "store", "calibration"}
MAY_IMPORT["quantizer"] |= {"self_calibration", "companions"}
MAY_IMPORT["on_demand"] = {"errors", "checkpoint", "source", "store", "quantizer"}
MAY_IMPORT["quantizer"] |= {"recipes"}
MAY_IMPORT["allocation"] = {"errors"}
MAY_IMPORT["rates"] = MAY_IMPORT["sensitivity"] | MAY_IMPORT["walk"] | {"sensitivity", "walk", "allocation"}
MAY_IMPORT["curve"] = {"allocation", "rates"}
MAY_IMPORT["judge"] = {"blocks", "passes", "sensitivity", "source"}
MAY_IMPORT["fitting"] = MAY_IMPORT["rates"] | {
    "rates",
    "curve",
    "judge",
    "quantizer",
    "calibration",
    "tokenizer",
    "store",
}
MAY_IMPORT["engines"] = {"errors"}
MAY_IMPORT["exports"] = MAY_IMPORT["walk"] | {"walk", "companions", "models", "tokenizer", "store", "quantizer"}
MAY_IMPORT["exports"] |= {"rotary"}
MAY_IMPORT["verification"] = MAY_IMPORT["runtime"] | {"runtime", "engines", "exports", "methods"}
MAY_IMPORT["model_card"] = {"exports", "verification"}
MAY_IMPORT["evaluator"] = MAY_IMPORT["runtime"] | {"runtime", "calibration", "scoring", "reference_cache", "quality"}
MAY_IMPORT["tasks"] = MAY_IMPORT["runtime"] | {"runtime"}
MAY_IMPORT["report"] = {"errors", "qtensor", "formats", "models", "source", "evaluator", "quality"}
# the public names and the command line stand above all
TOP = {"__init__", "cli"}
# the compiled kernels are read through the kernels package
NATIVE = "_cpu"
OTHERS = {"torch", "numpy", "safetensors", "tokenizers", "jinja2", "regex", "altair", "vl_convert", "cuda"}
# what one part alone may use
ALONE = {"rich": "cli", "huggingface_hub": "store", "triton": "kernels"}


def part(path: Path) -> str:
    """`formats` of src/fewbit/formats/integer.py, `errors` of src/fewbit/errors.py."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, wherever in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fewbit":
            found.append((node.lineno, f"fewbit.{node.attr}"))
    return found


def wrong_imports(path: Path) -> list[str]:
    here = part(path)
    allowed = MAY_IMPORT[here] | {here, "__version__"}
    if here == "kernels":
        allowed.add(NATIVE)
    wrong = []
    for line, name in imported(path):
        package, _, rest = name.partition(".")
        if package == "fewbit" and rest and rest.split(".")[0] not in allowed:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return wrong


FILES = sorted(ROOT.rglob("*.py"))


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 25
    unplaced = {part(f) for f in FILES} - set(MAY_IMPORT) - TOP
    assert not unplaced, f"say in MAY_IMPORT where these stand: {unplaced}"


def test_imports_go_one_way() -> None:
    assert [w for f in FILES if part(f) not in TOP for w in wrong_imports(f)] == []


def test_the_table_itself_goes_one_way() -> None:
    order = list(MAY_IMPORT)
    for name, allowed in MAY_IMPORT.items():
        assert {order.index(a) < order.index(name) for a in allowed} <= {True}, name


def test_only_declared_packages_are_imported() -> None:
    for file in FILES:
        for line, name in imported(file):
            package = name.split(".")[0]
            known = (
                package in OTHERS | set(ALONE)
                or package in sys.stdlib_module_names
                or package in ("fewbit", "__future__")
            )
            # programs of their own, run by an interpreter that has the engine
            known |= file.parent.name == "engines" and file.stem == f"_run_{package}"
            assert known, f"{file}:{line} imports {name}"
            assert part(file) == ALONE.get(package, part(file)), f"{file}:{line} imports {name}"


def test_no_module_shares_a_name_with_a_function_of_its_package() -> None:
    for init in ROOT.rglob("__init__.py"):
        modules = {p.stem for p in init.parent.glob("*.py")} | {
            p.parent.name for p in init.parent.glob("*/__init__.py")
        }
        tree = ast.parse(init.read_text(encoding="utf-8"))
        functions = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        assert not modules & functions, init
    top = {p.stem for p in ROOT.glob("*.py")} | {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert not top & set(fewbit.__all__)


@pytest.mark.parametrize(
    "code",
    [
        "import fewbit",
        "from fewbit.cli import main; main(['--help'])",
        "from fewbit.cli import main; main(['--version'])",
        "from fewbit.cli import main; main(['ls'])",
        "from fewbit.cli import main; main(['pull'])",
        "from fewbit.cli import main; main(['rm'])",
        "from fewbit.cli import main; main(['no-such-command'])",
        "from fewbit.cli import main; main(['run', '--no-such-option'])",
    ],
)
def test_nothing_heavy_is_loaded_early(code: str, tmp_path: Path) -> None:
    code += "; import json, sys; print('\\n' + json.dumps(sorted(m.split('.')[0] for m in sys.modules)))"
    home = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=home)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    heavy = {"torch", "numpy", "transformers", "tokenizers", "safetensors", "jinja2"}
    if "'ls'" not in code:
        # a table is drawn by rich; the hub's library says where its cache is
        heavy |= {"rich", "huggingface_hub"}
    assert not loaded & heavy
    assert "fewbit" in loaded
