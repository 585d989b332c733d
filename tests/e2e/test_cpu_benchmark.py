"""benchmarks/cpu.py without its clock: marks, tables, the peers' files and their printed figures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fewbit
from fewbit.formats import parse
from fewbit.source import open_source

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _cpu_marks

    return _cpu_marks  # type: ignore[no-any-return]


def row(prefill: float, decode: float, size: int, prefill_share: float = 0.42, decode_share: float = 0.9) -> Any:
    shares = {"prefill_share": prefill_share, "decode_share": decode_share}
    return {"prefill": prefill, "decode": decode, "bytes": size} | shares


def all_good(marks: ModuleType) -> dict[str, Any]:
    """Results that meet every mark with some room: peers of b bits decode 100 / b tokens/s."""
    rows = {f"fewbit {spec}": row(300.0, 150 / bits, bits * 100) for spec, bits in marks.WIDTHS.items()}
    for bits, kinds in marks.TYPES.items():
        for kind in kinds:
            rows |= {f"llama.cpp {kind}": row(100.0, 100 / bits, bits * 100 + 20)}
            rows |= {f"ik_llama.cpp {kind}": row(200.0, 100 / bits, bits * 100 + 20)}
    part = {"ceilings": {"read": 40e9, "dots": 400e9}, "rows": rows}
    shape = {
        "microseconds": {"1": 100.0, "4": 130.0, "512": 9000.0},
        "read_share": 0.9,
        "dot_share": 0.6,
        "four_over_one": 1.3,
        "bytes": 5,
    }
    shapes = {"2048x8192": shape, "8192x2048": shape}
    products = {"ceilings": part["ceilings"], "rows": dict.fromkeys(marks.WIDTHS, shapes)}
    whole = {"machine": "A CPU.", "products": products, "large": part, "small": part}
    # no two of them one object
    found: dict[str, Any] = json.loads(json.dumps(whole))
    return found


def missed(marks: ModuleType, results: dict[str, Any], whole: bool = True) -> list[str]:
    return [m.name for m in marks.marks(results, whole) if not m.holds]


def test_good_figures_meet_every_mark(marks: ModuleType) -> None:
    results = all_good(marks)
    found = marks.marks(results, True)
    assert missed(marks, results) == []
    assert {m.name for m in found} == marks.expected()
    # 1.2B: 5 of 6 widths read, 6 multiply, 5 beside llama.cpp, 2 prefills beside it, 6 beside ik, a spread;
    # 135M: 6 beside llama.cpp; products: 6 twice and a spread
    assert len(found) == 25 + 6 + 13


@pytest.mark.parametrize(
    ("part", "name", "key", "value", "mark"),
    [
        ("large", "fewbit int4g32", "decode_share", 0.849, "1.2B int4g32: decode, share of the read ceiling"),
        ("large", "fewbit int3g64", "decode_share", 0.74, "1.2B int3g64: decode, share of the read ceiling"),
        ("large", "fewbit int2g64", "decode_share", 0.64, "1.2B int2g64: decode, share of the read ceiling"),
        ("large", "fewbit int6g64", "prefill_share", 0.39, "1.2B int6g64: prefill, share of the dot ceiling"),
        ("large", "fewbit int8", "decode", 12.5 * 1.04, "1.2B int8: decode over llama.cpp"),
        ("large", "fewbit int3g64", "decode", 33.3 * 1.29, "1.2B int3g64: decode over llama.cpp"),
        ("large", "ik_llama.cpp Q2_K", "prefill", 280.0, "1.2B int2g64: prefill over ik_llama.cpp"),
        ("large", "fewbit int8", "prefill_share", 0.48, "1.2B: prefill, fastest width over slowest"),
        ("small", "fewbit int6g64", "decode", 16.0, "135M int6g64: decode over llama.cpp"),
    ],
)
def test_each_mark_is_missed_by_its_own_figure(
    marks: ModuleType, part: str, name: str, key: str, value: float, mark: str
) -> None:
    results = all_good(marks)
    results[part]["rows"][name][key] = value
    assert missed(marks, results) == [mark]


def test_the_faster_of_two_types_is_the_one_to_beat(marks: ModuleType) -> None:
    results = all_good(marks)
    results["large"]["rows"]["llama.cpp Q4_K"]["prefill"] = 160.0
    prefill = [f"1.2B {spec}: prefill over llama.cpp" for spec in ("int4g64", "int4g32")]
    assert missed(marks, results) == prefill
    # a type of fewer bytes than ours proves nothing, and without it there is nothing to compare with
    results = all_good(marks)
    results["large"]["rows"]["llama.cpp Q3_K"]["bytes"] = 299
    (left,) = missed(marks, results)
    assert left.startswith("1.2B int3g64: decode over llama.cpp (not measured")


def test_a_ratio_is_taken_within_its_round(marks: ModuleType) -> None:
    results = all_good(marks)
    rows = results["large"]["rows"]
    # the machine slows down by half; medians of either side would give 1.5
    rows["fewbit int8"] |= {"decode": 12.0, "rounds": {"decode": [12.0, 6.0, 24.0], "prefill": [300.0] * 3}}
    rows["llama.cpp Q8_0"] |= {"decode": 8.0, "rounds": {"decode": [12.0, 6.0, 8.0], "prefill": [100.0] * 3}}
    rows["ik_llama.cpp Q8_0"] |= {"rounds": {"prefill": [200.0] * 3}}
    assert missed(marks, results) == ["1.2B int8: decode over llama.cpp"]


def test_the_worse_shape_counts(marks: ModuleType) -> None:
    results = all_good(marks)
    results["products"]["rows"]["int3g64"]["8192x2048"]["four_over_one"] = 1.5
    results["products"]["rows"]["int2g64"]["8192x2048"]["four_over_one"] = 1.75
    results["products"]["rows"]["int8"]["2048x8192"]["dot_share"] = 0.5
    results["products"]["rows"]["int8"]["2048x8192"]["microseconds"]["512"] = 12000.0
    expected = ["products int8: M = 512, share of the dot ceiling", "products int3g64: M = 4 over M = 1"]
    assert missed(marks, results) == [*expected, "products: M = 512, slowest width over fastest"]


def test_what_was_not_run_is_missed_only_in_the_whole(marks: ModuleType) -> None:
    results = all_good(marks)
    rows = results["large"]["rows"]
    results["large"]["rows"] = {name: r for name, r in rows.items() if not name.startswith("ik_")}
    del results["products"]
    assert missed(marks, results, whole=False) == []
    assert len(missed(marks, results)) == 6 + 13
    assert len(missed(marks, {})) == len(marks.expected())


def test_tables_have_a_row_for_everything(marks: ModuleType) -> None:
    text = marks.tables(all_good(marks))
    lines = text.splitlines()
    assert lines[0] == "A CPU."
    assert text.count("Ceilings of this run: 40.0 GB/s read, 400 G multiply-adds/s.") == 3
    body = [line for line in lines if line.startswith("| ") and "---" not in line]
    assert len(body) == 2 * (1 + 6 + 2 * 6) + 1 + 2 * 6
    assert "| int4g64 | **fewbit** | 0 | 300.0 | 42 % | 37.5 | 90 % |" in lines
    assert "| int2g64 | 8192x2048 | 100 | 130 | 9000 | 90 % | 60 % | 1.30 |" in lines


def test_llama_bench_is_read(marks: ModuleType) -> None:
    import _llama_bench

    entries = [
        {"n_prompt": 512, "n_gen": 0, "avg_ts": 71.5, "model_size": 800, "samples_ts": [71.5]},
        {"n_prompt": 0, "n_gen": 64, "avg_ts": 21.25, "model_size": 800, "samples_ts": [21.25]},
    ]
    printed = f"loading\n{json.dumps(entries)}\nbye [1]\n"
    assert _llama_bench.rates(printed) == {"prefill": 71.5, "decode": 21.25}


def test_the_peers_file_is_the_same_model(marks: ModuleType, tiny_folder: Path, tmp_path: Path) -> None:
    import _llama_bench

    file = _llama_bench.write_gguf(tiny_folder, tmp_path / "tiny.gguf")
    written, source = open_source(file), open_source(tiny_folder)
    assert [w.name for w in written.weights] == [w.name for w in source.weights]
    for w in source.weights:
        ours, theirs = (parse(q.spec).dequantize(q) for q in (source.read(w.name), written.read(w.name)))
        assert torch.equal(ours, theirs), w.name
    assert list(tmp_path.glob("*.partial")) == []
    # 2 bytes a weight, 4 where it is of a norm
    counts = [(w.role, torch.Size(w.shape).numel()) for w in source.weights]
    assert _llama_bench.tensor_bytes(file) == sum(n * (4 if role == "norm" else 2) for role, n in counts)


def test_a_run_gives_shares_to_both_sides(
    marks: ModuleType, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cpu as benchmark

    from fewbit.kernels import _ceilings
    from fewbit.kernels.cpu import backend

    if (native := backend()) is None:
        pytest.skip("fewbit._cpu is not built")
    monkeypatch.setattr(_ceilings, "LEAST_BYTES", 1 << 20)
    monkeypatch.setattr(_ceilings, "CACHES", 0)
    monkeypatch.setattr(benchmark, "PROMPT", 8)
    monkeypatch.setattr(benchmark, "NEW", 2)
    calls = []

    class Peer:
        name = "llama.cpp"

        def run(self, file: Path, threads: int, prompt: int, new: int) -> dict[str, float]:
            calls.append((file.name, threads, prompt, new))
            return {"prefill": 10.0 * len(calls), "decode": 5.0, "bytes": 1000}

    model = fewbit.load(tiny_folder)
    found = benchmark.measure_model(
        {"int8": model}, {"Q8_0": Path("q8")}, [Peer()], argparse.Namespace(rounds=3, threads=2), native
    )
    assert calls == [("q8", 2, 8, 2)] * 3
    ours, theirs = found["rows"]["fewbit int8"], found["rows"]["llama.cpp Q8_0"]
    assert list(found["rows"]) == ["fewbit int8", "llama.cpp Q8_0"]
    # the median of 10, 20 and 30
    assert theirs["prefill"] == 20.0
    per_token = benchmark.multiply_adds(model, 8) / 8
    assert theirs["prefill_share"] == pytest.approx(20.0 * per_token / found["ceilings"]["dots"])
    assert theirs["decode_share"] == pytest.approx(5000 / found["ceilings"]["read"])
    assert ours["bytes"] == benchmark.read_bytes(model)
    assert ours["prefill_share"] > 0
    assert len(ours["rounds"]["decode"]) == 3
