"""The report: nothing is loaded, nothing hostile runs, and every figure is the one that was measured."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fewbit
from fewbit.errors import FewbitError
from fewbit.evaluator import Paired, Quality
from fewbit.report import check_report, weights, write_report
from fewbit.source import open_source
from tests._report import ATTACK, Page, quality
from tests.conftest import CONFIG, random_weights, write_folder

# as a folder's name, which has no slash
ATTACK_NAME = "<img src=x onerror=alert(1)><!--<script>"
KINDS = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn", "gate": "mlp", "up": "mlp"}


@dataclass
class Written:
    page: Page
    reference: Path
    four: Path
    three: Path
    qualities: list[Quality]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A report of two candidates of a tiny model, one under a hostile name."""
    here = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(here / "data"))
        reference = write_folder(here / "tiny")
        four, three = here / ATTACK_NAME, here / "int3"
        fewbit.quantize(reference, four, format="int4g32", method="rtn")
        fewbit.quantize(reference, three, format="int3g64a", method="rtn")
        paired = Paired(0.3408, 0.0021, "higher")
        one, two = quality(three, 0.412).domains
        domains = (one, replace(two, paired=Paired(-0.0021, 0.0017, "not distinguishable")))
        found = [quality(four), quality(three, 0.412, weight_bytes=71_700_000, paired=paired, domains=domains)]
        write_report(here / "out.html", str(reference), found)
    return Written(Page((here / "out.html").read_text(encoding="utf-8")), reference, four, three, found)


def test_a_browser_would_load_nothing(written: Written) -> None:
    for tag, attrs in written.page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form", "audio", "video", "a"), tag
        assert not {"src", "href", "srcset", "action", "data", "poster", "xlink:href", "background"} & set(attrs), tag
        assert not any(name.startswith("on") for name in attrs), attrs
    style = written.page.html.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert '"url"' not in written.page.scripts[0]


def test_the_policy_allows_these_scripts_and_no_request(written: Written) -> None:
    (policy,) = (a["content"] for t, a in written.page.tags if t == "meta" and "http-equiv" in a)
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    assert rules["default-src"] == "'none'"
    assert "connect-src" not in rules
    code = [s for s, (_, a) in zip(written.page.scripts, _scripts(written.page), strict=True) if a["type"] == "module"]
    digests = {f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in code}
    assert set(rules["script-src"].split()) == digests
    assert len(code) == 2


def test_hostile_text_stays_text(written: Written) -> None:
    found = written.page
    assert len(_scripts(found)) == found.ends.count("script") == 3
    assert "alert(1)" not in "".join(found.scripts[1:])
    # names and tokens are there to be read, as they are
    assert f"He said{ATTACK}⟨U+202E⟩and & then⟨U+001B⟩[31m{ATTACK}" in found.text
    assert ATTACK_NAME in json.dumps(found.data)
    assert not set("<>&") & set(found.scripts[0])
    assert not any(tag in ("b", "img") and a for tag, a in found.tags)
    assert "\u202e" not in found.html
    assert "\x1b" not in found.html


def _scripts(found: Page) -> list[tuple[str, dict[str, str | None]]]:
    return [(tag, attrs) for tag, attrs in found.tags if tag == "script"]


def test_tables_have_the_figures_given(written: Written) -> None:
    rows = [[" ".join(cell.split()) for cell in row] for row in written.page.rows]
    one = ["85.0", "4.90", "0.07120 ± 0.00142", "0.02848", "0.6408", "90.66 ± 0.24", "17.353 ± 0.331"]
    two = ["71.7", "4.90", "0.41200 ± 0.00142", *one[3:], "+0.34080 ± 0.00210"]
    assert [f"1{ATTACK_NAME}", *one, ""] in rows
    assert ["2int3", *two] in rows
    assert [
        "2int3",
        "0.82400 ± 0.00226",
        "0.02540",
        "1.2200",
        "87.00 ± 0.31",
        "21.500 ± 0.420",
        "\N{MINUS SIGN}0.00210 ± 0.00170",
    ] in rows
    headings = [r for r in rows if len(r) == 2 and "predictions" in r[1]]
    assert headings == [
        ["prose", "510 predictions, the reference's perplexity 19.500 ± 0.370"],
        [f"code {ATTACK}", "1,020 predictions, the reference's perplexity 20.500 ± 0.370"],
    ]
    assert ["␣turned", "", "62.0 %"] in rows
    assert ["␣fore<b>cast", "", "34.0 %"] in rows
    assert ["↵", "", "8.0 %"] in rows
    for text in ("16.247", "0.308", str(written.reference), "16,320 predictions", f"fewbit {fewbit.__version__}"):
        assert text in written.page.text


def test_the_size_chart_has_every_candidate(written: Written) -> None:
    spec = written.page.data["specs"]["size"]
    rows = {row["name"]: row for row in _values(spec)}
    for i, q in enumerate(written.qualities):
        row = rows[q.model]
        assert (row["mb"], row["kl"]) == (q.weight_bytes / 1e6, q.mean_kl)
        assert (row["from"], row["to"]) == pytest.approx((q.mean_kl - q.mean_kl_error, q.mean_kl + q.mean_kl_error))
        assert row["label"].startswith(f"{i + 1} ")
    scales = [layer["encoding"]["y"].get("scale") for layer in spec["layer"] if "y" in layer["encoding"]]
    assert {s["type"] for s in scales if s} == {"log"}


def _values(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows of a chart: Altair keeps each table once, under a name."""
    assert spec["datasets"]
    return [row for rows in spec["datasets"].values() for row in rows]


def dequantized(folder: Path, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """int4g32, read as the layout is documented: one weight after the other, without fewbit."""
    parts = {}
    for file in folder.glob("*.safetensors"):
        parts |= load_file(file)
    rows, columns = parts[f"{name}_shape"].tolist()
    packed, scale = parts[f"{name}_packed"], parts[f"{name}_scale"].double()
    out = np.zeros((rows, columns))
    bits = packed.shape[1] * 32 // columns
    span = columns // scale.shape[1]
    for row in range(rows):
        stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(packed[row].tolist()))
        for column in range(columns):
            code = (stream >> (bits * column)) & (2**bits - 1)
            out[row, column] = (code - 2 ** (bits - 1)) * float(scale[row, column // span])
    return out


def test_layer_errors_equal_a_loop_over_the_files(written: Written) -> None:
    original = load_file(written.reference / "model.safetensors")
    seen = 0
    for k in (*KINDS, "down"):
        rows = {(r["c"], r["b"]): r for r in _values(written.page.data["specs"][f"layers-{k}"])}
        assert set(rows) == {(c, b) for c in (0, 1) for b in (0, 1)}
        for block in (0, 1):
            name = f"model.layers.{block}.{KINDS.get(k, 'mlp')}.{k}_proj.weight"
            w = original[name].double().numpy()
            expected = ((dequantized(written.four, name) - w) ** 2).sum() / (w**2).sum()
            assert rows[0, block]["e"] == pytest.approx(expected, rel=1e-5)
            assert rows[1, block]["e"] > 2 * rows[0, block]["e"]
            assert rows[0, block]["name"] == name
            seen += 1
    assert seen == 14


def test_the_sum_over_kinds_is_that_of_their_matrices(written: Written) -> None:
    original = load_file(written.reference / "model.safetensors")
    lost = total = 0.0
    for block in (0, 1):
        name = f"model.layers.{block}.self_attn.k_proj.weight"
        w = original[name].double().numpy()
        lost, total = lost + ((dequantized(written.four, name) - w) ** 2).sum(), total + (w**2).sum()
    header = next(r for r in written.page.rows if r and r[0] == "whole model")
    row = written.page.rows[written.page.rows.index(header) + 1]
    assert row[header.index("k")] == f"{100 * lost / total:#.3g} %"


def test_slices_of_rows_give_the_same_errors(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = open_source(written.reference), [open_source(written.four), open_source(written.three)]
    whole = weights.layer_errors(one, two)
    looks = [weights.rounding(one, c, found[3]) for c, found in zip(two, whole, strict=True)]
    monkeypatch.setattr(weights, "SLICE_WEIGHTS", 1000)
    for a, b in zip(whole, weights.layer_errors(one, two), strict=True):
        assert [x.name for x in a] == [x.name for x in b]
        assert [x.lost for x in a] == pytest.approx([x.lost for x in b], rel=1e-9)
        assert [x.total for x in a] == pytest.approx([x.total for x in b], rel=1e-9)
    for look, c, found in zip(looks, two, whole, strict=True):
        again = weights.rounding(one, c, found[3])
        assert look is not None
        assert again is not None
        assert (look.before, look.after, look.outside) == (again.before, again.after, again.outside)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_histograms_count_every_weight(written: Written, asymmetric: bool) -> None:
    reference, candidate = open_source(written.reference), open_source(written.three if asymmetric else written.four)
    (layers,) = weights.layer_errors(reference, [candidate])
    layer = next(x for x in layers if x.kind == "gate" and x.block == 1)
    look = weights.rounding(reference, candidate, layer)
    assert look is not None
    assert sum(y * look.width for _, y in look.before) == pytest.approx(1)
    codes = [code for code, _ in look.after]
    assert codes == (list(range(8)) if asymmetric else list(range(-8, 8)))
    w = load_file(written.reference / "model.safetensors")[layer.name].double().numpy()
    if not asymmetric:
        scale = load_file(next(written.four.glob("*.safetensors")))[f"{layer.name}_scale"].double().numpy()
        steps = np.repeat(scale, 32, axis=1)
        taken = np.rint(dequantized(written.four, layer.name) / steps)
        for code, share in look.after:
            assert share == pytest.approx((taken == code).mean())
        left, density = look.before[60]
        inside = ((w / steps >= left) & (w / steps < left + look.width)).mean()
        assert density * look.width == pytest.approx(inside, abs=2 / w.size)
        assert look.outside == pytest.approx(((w / steps < -8.5) | (w / steps > 7.5)).mean())


def test_the_group_shown_lies_where_it_is_said_to(written: Written) -> None:
    reference, candidate = open_source(written.reference), open_source(written.four)
    (layers,) = weights.layer_errors(reference, [candidate])
    look = weights.rounding(reference, candidate, layers[2])
    assert look is not None
    row, column, span, shown = look.place
    assert (span, shown, len(look.group)) == (32, 32, 32)
    w = load_file(written.reference / "model.safetensors")[layers[2].name].double().numpy()
    after = dequantized(written.four, layers[2].name)
    columns = slice(column, column + shown)
    assert [a for a, _ in look.group] == pytest.approx(w[row, columns].tolist())
    assert [b for _, b in look.group] == pytest.approx(after[row, columns].tolist(), rel=1e-6)
    assert len(look.grid) == 16
    assert np.diff(look.grid) == pytest.approx([look.grid[1] - look.grid[0]] * 15, rel=1e-4)
    for before, moved in look.group:
        assert abs(before - moved) <= min(abs(before - g) for g in look.grid) + 1e-7
    errors = ((w - after) ** 2).reshape(len(w), -1, span).sum(-1) / (w**2).reshape(len(w), -1, span).sum(-1)
    assert errors[row, column // span] == pytest.approx(np.sort(errors.ravel())[(errors.size - 1) // 2], rel=1e-4)


def test_the_matrices_looked_at_are_the_worst_and_the_middle_one(written: Written) -> None:
    (layers,) = weights.layer_errors(open_source(written.reference), [open_source(written.four)])
    inside = sorted((x.lost / x.total, x.name) for x in layers if x.block is not None)
    assert [x.name for _, x in weights.notable(layers)] == [inside[-1][1], inside[6][1]]
    assert "Largest error" in written.page.text
    assert inside[-1][1] in written.page.text


def test_vega_draws_every_chart(written: Written) -> None:
    import vl_convert

    specs = written.page.data["specs"]
    assert len(specs) == 1 + 7 + 2 * 2 * 2
    for name, spec in specs.items():
        svg = vl_convert.vegalite_to_svg(json.dumps(spec))
        marks = len(re.findall(r'aria-roledescription="(?:bar|point|rule mark|tick)', svg)) + svg.count("<line")
        assert marks > 1, name
        assert "NaN" not in svg
    assert "2  int3" in vl_convert.vegalite_to_svg(json.dumps(specs["size"])).replace("\u00a0", " ")


def test_without_altair_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(FewbitError) as caught:
        write_report(tmp_path / "out.html", "nowhere", [quality("nothing")])
    assert caught.value.facts == "altair is not installed."
    assert "pip install 'fewbit[report]'" in caught.value.next_step
    assert list(tmp_path.iterdir()) == []


def test_folders_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for out in (tmp_path, tmp_path / "link"):
        with pytest.raises(FewbitError, match="is a folder"):
            write_report(out, "nowhere", [quality("nothing")])
    with pytest.raises(FewbitError, match="no folder"):
        check_report(tmp_path / "absent" / "out.html")
    check_report(tmp_path / "out.html")


def test_a_folder_that_can_not_be_written_is_said_before_the_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.html").write_text("older")
    check_report(tmp_path / "out.html")
    assert [p.name for p in tmp_path.iterdir()] == ["out.html"]
    assert (tmp_path / "out.html").read_text() == "older"
    make = os.open

    def read_only(path: Any, flags: int, *rest: Any, **settings: Any) -> int:
        # what a read-only disk answers, also to root
        if flags & os.O_CREAT:
            raise OSError(30, "Read-only file system", str(path))
        return make(path, flags, *rest, **settings)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(FewbitError, match="cannot be written") as failed:
        check_report(tmp_path / "out.html")
    assert failed.value.facts == "The system says: Read-only file system."


def test_rescaled_channels_are_not_shown_as_rounding(tmp_path: Path) -> None:
    """The same function with other matrices, as folding scales into the norms leaves it."""
    reference = write_folder(tmp_path / "m")
    original = random_weights(CONFIG)
    folded = {name: w.clone() for name, w in original.items()}
    scale = torch.linspace(0.8, 1.3, 64)
    folded["model.layers.0.input_layernorm.weight"] /= scale
    for k in "qkv":
        folded[f"model.layers.0.self_attn.{k}_proj.weight"] *= scale
    write_folder(tmp_path / "folded", folded)
    rounded = {name: w.half() if "norm" in name else w.clone() for name, w in original.items()}
    write_folder(tmp_path / "rounded", rounded)
    fewbit.quantize(tmp_path / "folded", tmp_path / "awq", format="int4g32", method="rtn")
    fewbit.quantize(tmp_path / "rounded", tmp_path / "q", format="int4g32", method="rtn")
    small = write_folder(tmp_path / "small", random_weights(CONFIG | {"intermediate_size": 96}), intermediate_size=96)
    models = [tmp_path / "q", tmp_path / "awq", small]
    write_report(
        tmp_path / "out.html", str(reference), [quality(model, cache_error=1e-5 * i) for i, model in enumerate(models)]
    )
    found = Page((tmp_path / "out.html").read_text(encoding="utf-8"))
    why = "this candidate rescaled channels, so weights are not comparable matrix by matrix"
    specs = found.data["specs"]
    # bars and histograms of the first alone
    assert {r["c"] for k in (*KINDS, "down") for r in _values(specs[f"layers-{k}"])} == {0}
    assert {name for name in specs if name.startswith(("steps", "group"))} == {
        f"{kind}-0-{i}" for kind in ("steps", "group") for i in (0, 1)
    }
    assert f"awq has no bars: {why}." in found.text
    assert f"T{why[1:]}." in found.text
    rows = [row for row in found.rows if row[1:] == [why]]
    assert [row[0] for row in rows] == ["2awq"]
    # as wide as the kinds there are
    header = next(r for r in found.rows if r and r[0] == "whole model")
    spans = [a["colspan"] for tag, a in found.tags if tag == "td" and "colspan" in a]
    assert spans[-2:] == [str(len(header) - 1)] * 2
    # the largest error of the cache, not the first's
    assert "within ± 0.000020 of" in found.text


def test_a_report_replaces_an_older_one_and_never_what_a_link_leads_to(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    out = tmp_path / "out.html"
    out.symlink_to(tmp_path / "precious")
    write_report(out, str(tiny_folder), [quality(tiny_folder, 0.0, domains=(), worst=())])
    assert (tmp_path / "precious").read_text() == "kept"
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.html", "precious", "tiny"]


def test_a_failed_write_leaves_the_older_report(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.html").write_text("older")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path / "out.html", str(tiny_folder), [quality(tiny_folder)])
    assert (tmp_path / "out.html").read_text() == "older"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.html", "tiny"]


def test_candidates_without_grid_or_of_other_shapes_still_get_a_page(tiny_folder: Path, tmp_path: Path) -> None:
    small = write_folder(tmp_path / "small", random_weights(CONFIG | {"intermediate_size": 96}), intermediate_size=96)
    odd = quality(small, math.nan, mean_kl_error=math.nan)
    write_report(tmp_path / "out.html", str(tiny_folder), [quality(tiny_folder, 0.0), odd, quality(small, 0.3)])
    found = Page((tmp_path / "out.html").read_text(encoding="utf-8"))
    assert "None of its matrices was moved to an evenly spaced grid." in found.text
    assert "Its matrices have other shapes than the reference's." in found.text
    assert "Not drawn, because their KL is not a number: small." in found.text
    assert "a KL of 0 has no place on such an axis: tiny." in found.text
    assert {row["name"] for row in _values(found.data["specs"]["size"])} == {str(tiny_folder), str(small)}
    assert {r["e"] for r in _values(found.data["specs"]["layers-q"])} == {0.0}
    assert any("nan ± nan" in cell for row in found.rows for cell in row)


def test_a_model_that_broke_is_said_to_have(tiny_folder: Path, tmp_path: Path) -> None:
    broken = {name: w.clone() for name, w in random_weights(CONFIG).items()}
    broken["model.layers.0.self_attn.q_proj.weight"][3, 4] = torch.nan
    write_folder(tmp_path / "broken", broken)
    write_report(tmp_path / "out.html", str(tiny_folder), [quality(tmp_path / "broken")])
    found = Page((tmp_path / "out.html").read_text(encoding="utf-8"))
    assert any("not a number" in row for row in found.rows)
    assert [r["b"] for r in _values(found.data["specs"]["layers-q"])] == [1]


def test_one_candidate_needs_no_choice(tiny_folder: Path, tmp_path: Path) -> None:
    fewbit.quantize(tiny_folder, tmp_path / "q", format="int8", method="rtn")
    one = replace(quality(tmp_path / "q"), domains=quality("x").domains[:1], cache_error=0.000012)
    write_report(tmp_path / "out.html", str(tiny_folder), [one])
    found = Page((tmp_path / "out.html").read_text(encoding="utf-8"))
    assert not any(tag == "select" for tag, _ in found.tags)
    assert "Each text by itself" not in found.text
    assert "each mean KL is within ± 0.000012 of" in found.text
    assert "one standard error over windows" in found.text
    assert "256 values" in found.text
