"""The charts of the page as Vega-Lite, made with Altair. Colours are the page's CSS variables, so they follow it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from fewbit.errors import FewbitError
from fewbit.report.weights import LayerError, Rounding

if TYPE_CHECKING:
    from altair import Axis, Chart

    from fewbit.evaluator import Quality

Spec = dict[str, Any]
INK, SOFT, LINE = "var(--ink)", "var(--soft)", "var(--line)"
ACCENT, MUTED, OTHER = "var(--accent)", "var(--muted)", "var(--other)"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
# pixels a label of the size chart needs
LABEL = 17
# the left margin of charts that stand above one another
MARGIN = 48


def require() -> None:
    """FewbitError where what draws the charts is not installed."""
    try:
        import altair  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise FewbitError(
            "A report needs Altair and vl-convert.",
            f"{error.name or error} is not installed.",
            "Install them: pip install 'fewbit[report]'.",
        ) from error


@cache
def javascript() -> str:
    """Vega, Vega-Lite and the embedder as one script that sets `window.vegaEmbed` and loads nothing."""
    from vl_convert import javascript_bundle

    return javascript_bundle("window.vegaEmbed = vegaEmbed;")


def size_chart(qualities: Sequence[Quality], names: Sequence[str]) -> Spec | None:
    """Size in MB against mean KL on a logarithmic axis; None where no candidate has a finite KL."""
    import altair as alt

    drawn = [(i, q) for i, q in enumerate(qualities) if math.isfinite(q.mean_kl)]
    if not drawn:
        return None
    low, high = _log_domain([q for _, q in drawn])
    height = max(340, (LABEL + 3) * len(drawn))
    sizes = [q.weight_bytes / 1e6 for _, q in drawn]
    margin = (max(sizes) - min(sizes)) * 0.06 or max(sizes) * 0.2
    left, right = min(sizes) - margin, max(sizes) + margin
    at = {i: min(max(q.mean_kl, low), high) for i, q in drawn}
    label_at = _spread_labels(at, low, high, height)
    rows = [
        {
            "mb": q.weight_bytes / 1e6,
            "kl": at[i],
            "from": min(max(q.mean_kl - _finite(q.mean_kl_error), low), high),
            "to": min(max(q.mean_kl + _finite(q.mean_kl_error), low), high),
            "at": label_at[i],
            "label": f"{i + 1}  {names[i]}",
            "moved": abs(math.log(label_at[i] / at[i])) * height / math.log(high / low) > 3,
            "right": q.weight_bytes / 1e6 <= (left + right) / 2,
            "tip": f"{q.mean_kl:.5f} ± {q.mean_kl_error:.5f}",
            "name": q.model,
        }
        for i, q in drawn
    ]
    base = _chart(rows)
    x_axis = _axis(title="weight files, MB", format=",~f", tickCount=alt.ExprRef("width / 90"))
    x = alt.X("mb:Q", axis=x_axis, scale=alt.Scale(domain=[left, right], nice=False, zero=False))
    y_scale = alt.Scale(type="log", domain=[low, high], nice=False)
    y_axis = _axis(values=_log_ticks(low, high), format="~g", grid=True, title="mean KL, nats a token")
    y = alt.Y("kl:Q", scale=y_scale, axis=y_axis)
    tips = [alt.Tooltip("name:N", title="model"), alt.Tooltip("mb:Q", title="MB", format=",.1f")]
    tips.append(alt.Tooltip("tip:N", title="mean KL"))
    layers = [
        base.mark_rule(color=ACCENT, strokeWidth=1.5).encode(x=x, y=alt.Y("from:Q", scale=y_scale), y2="to:Q"),
        base.mark_point(color=ACCENT, fill=ACCENT, size=50, opacity=1).encode(x=x, y=y, tooltip=tips),
    ]
    label_y = alt.Y("at:Q", scale=y_scale)
    for right_side in (True, False):
        side = base.transform_filter(f"datum.right === {str(right_side).lower()}")
        sign = 1 if right_side else -1
        room = "width * (1 - (datum.mb - {0}) / {1}) - 16" if right_side else "width * (datum.mb - {0}) / {1} - 16"
        leader = side.transform_filter("datum.moved").mark_rule(color=SOFT, strokeWidth=0.8, x2Offset=13 * sign)
        mark = side.mark_text(
            align="left" if right_side else "right",
            dx=15 * sign,
            baseline="middle",
            fontSize=12,
            color=INK,
            limit=alt.ExprRef(room.format(left, right - left)),
        )
        layers.insert(0, leader.encode(x=x, x2="mb:Q", y=y, y2="at:Q"))
        layers.append(mark.encode(x=x, y=label_y, text="label:N", tooltip=tips))
    return _spec(alt.layer(*layers), height)


def layer_chart(candidates: Sequence[Sequence[LayerError]], kind: str, last: bool) -> Spec:
    """Bars of one kind of linear, a bar a block. The page sets three parameters: `candidate` (whose bars), `other`
    (whose ticks, -1: nobody's) and `top` (the end of the axis, the same for all kinds)."""
    import altair as alt

    rows = [
        {"c": c, "b": layer.block, "e": layer.relative, "spec": layer.spec, "name": layer.name}
        for c, layers in enumerate(candidates)
        for layer in layers
        if layer.kind == kind and layer.block is not None and layer.relative is not None
    ]
    blocks = sorted({layer.block for layers in candidates for layer in layers if layer.block is not None})
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if len(blocks) / s <= 16)
    x_axis = _axis(
        values=[b for b in blocks if b % step == 0],
        title="block" if last else None,
        labels=last,
        ticks=False,
        labelAngle=0,
    )
    x = alt.X("b:O", axis=x_axis, scale=alt.Scale(paddingInner=0.35, paddingOuter=0.15, domain=blocks))
    y_axis = _axis(format="~%", tickCount=2, grid=True, title=None, minExtent=MARGIN, maxExtent=MARGIN)
    y = alt.Y("e:Q", axis=y_axis, scale=alt.Scale(domain=[0, alt.ExprRef("top")], nice=False))
    tips = [
        alt.Tooltip("name:N", title="tensor"),
        alt.Tooltip("e:Q", title="relative squared error", format=".3~%"),
        alt.Tooltip("spec:N", title="format"),
    ]
    bars = _chart(rows).transform_filter("datum.c === candidate").mark_bar(color=ACCENT)
    ticks = _chart(rows).transform_filter("datum.c === other").mark_tick(color=OTHER, thickness=2.5)
    chart = alt.layer(bars.encode(x=x, y=y, tooltip=tips), ticks.encode(x=x, y=y, tooltip=tips))
    params = [alt.param(name=name, value=value) for name, value in (("candidate", 0), ("other", -1), ("top", 1))]
    return _spec(chart.add_params(*params), 54)


def rounding_chart(r: Rounding) -> Spec:
    """All weights of a matrix in steps of their group's scale: the bars are the reference's, the stems the codes."""
    import altair as alt

    bars = [{"x": x, "x2": x + r.width, "y": y} for x, y in r.before if y > 0]
    stems = [{"x": code, "y": share} for code, share in r.after]
    first, last = r.after[0][0], r.after[-1][0]
    every = next(s for s in (1, 2, 4, 8, 16, 32) if len(r.after) / s <= 16)
    axis = _axis(values=[c for c in range(first, last + 1) if c % every == 0], title="code", format="d")
    scale = alt.Scale(domain=[first - 1.5, last + 1.5], nice=False)
    x = alt.X("x:Q", axis=axis, scale=scale)
    y = alt.Y("y:Q", axis=_axis(format="~%", tickCount=3, grid=True, title="weights per step", minExtent=MARGIN))
    zero = alt.Y2Datum(0)
    tips = [alt.Tooltip("x:Q", title="code"), alt.Tooltip("y:Q", title="weights", format=".2~%")]
    chart = alt.layer(
        _chart(stems).mark_rule(color=LINE).encode(x=x),
        _chart(bars).mark_bar(color=MUTED, binSpacing=0).encode(x=x, x2="x2:Q", y=y, y2=zero),
        _chart(stems).mark_rule(color=ACCENT, strokeWidth=1.5).encode(x=x, y=y, y2=zero, tooltip=tips),
        _chart(stems).mark_point(color=ACCENT, fill=ACCENT, size=22, opacity=1).encode(x=x, y=y, tooltip=tips),
    )
    return _spec(chart, 170)


def group_chart(r: Rounding) -> Spec:
    """One group in its own units: every weight falls from where it was to a line of the grid."""
    import altair as alt

    moves = [{"from": a, "to": b, "top": 1, "bottom": 0} for a, b in r.group]
    grid = [{"x": v, "top": 0, "bottom": -0.35} for v in r.grid]
    values = [v for move in r.group for v in move] + r.grid
    pad = (max(values) - min(values)) * 0.02 or 1.0
    scale = alt.Scale(domain=[min(values) - pad, max(values) + pad], nice=False)
    x_axis = _axis(title="weight", tickCount=5, format="~g", grid=False)
    y_scale = alt.Scale(domain=[-0.35, 1.3])
    y_axis = _axis(
        values=[0, 1], labelExpr="datum.value === 1 ? 'before' : 'after'", title=None, minExtent=MARGIN, domain=False
    )

    def at(field: str) -> Any:
        return alt.X(f"{field}:Q", scale=scale, axis=x_axis)

    def height(field: str) -> Any:
        return alt.Y(f"{field}:Q", scale=y_scale, axis=y_axis)

    tips = [alt.Tooltip("from:Q", title="before", format=".5~f"), alt.Tooltip("to:Q", title="after", format=".5~f")]
    fall = _chart(moves).mark_rule(color=SOFT, strokeWidth=0.8, opacity=0.55)
    before = _chart(moves).mark_rule(color=INK, strokeWidth=1, opacity=0.7).transform_calculate(over="1.3")
    after = _chart(moves).mark_point(color=ACCENT, fill=ACCENT, size=16, opacity=1)
    chart = alt.layer(
        _chart(grid).mark_rule(color=ACCENT, strokeWidth=1.2).encode(x=at("x"), y=height("top"), y2="bottom:Q"),
        fall.encode(x=at("from"), x2="to:Q", y=height("top"), y2="bottom:Q", tooltip=tips),
        before.encode(x=at("from"), y=height("top"), y2="over:Q", tooltip=tips),
        after.encode(x=at("to"), y=height("bottom"), tooltip=tips),
    )
    return _spec(chart, 130)


def _chart(rows: list[dict[str, Any]]) -> Chart:
    import altair as alt

    return alt.Chart(alt.InlineData(values=rows))


def _axis(**changes: Any) -> Axis:
    import altair as alt

    return alt.Axis(**changes)


def _spec(chart: Any, height: int) -> Spec:
    """The finished specification: as wide as its place on the page, in the page's type and colours."""
    axis = {
        "labelColor": SOFT,
        "titleColor": SOFT,
        "gridColor": LINE,
        "domainColor": LINE,
        "tickColor": LINE,
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "grid": False,
        "labelOverlap": True,
    }
    chart = chart.properties(width="container", height=height, background="transparent")
    chart = chart.configure(font=FONT).configure_axis(**axis).configure_view(stroke=None)
    found: Spec = chart.configure_axisQuantitative(tickSize=4).to_dict()
    return found


def _finite(x: float) -> float:
    return x if math.isfinite(x) else 0.0


def _log_domain(qualities: Sequence[Quality]) -> tuple[float, float]:
    """Ends of the axis: what is drawn, error bars and a margin; a KL of 0 or less lies on the lower end."""
    positive = [q for q in qualities if q.mean_kl > 0]
    if not positive:
        return 1e-7, 1e-5
    low = min(max(q.mean_kl - _finite(q.mean_kl_error), q.mean_kl / 3) for q in positive)
    high = max(q.mean_kl + _finite(q.mean_kl_error) for q in positive)
    if len(positive) < len(qualities):
        low /= 10
    margin = max((high / low) ** 0.08, 1.35)
    return low / margin, high * margin


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of each decade; powers of ten alone where these would be many, every digit where they would be few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 2, 5), range(1, 10)):
        found = [digit * 10.0**decade for decade in decades for digit in digits]
        found = [float(f"{tick:.3g}") for tick in found if low <= tick <= high]
        if len(found) >= 3:
            break
    # a narrow range may have no round figure in it
    return found or [float(f"{math.sqrt(low * high):.4g}")]


def _spread_labels(at: dict[int, float], low: float, high: float, height: int) -> dict[int, float]:
    """Values to write the labels at: each beside its own, moved up or down until no two lie over one another."""
    order = sorted(at, key=lambda i: -at[i])
    pixel = height / math.log(high / low)
    y = [(math.log(high) - math.log(at[i])) * pixel for i in order]
    for _ in range(200):
        for i in range(len(y) - 1):
            short = LABEL - (y[i + 1] - y[i])
            if short > 0:
                y[i], y[i + 1] = y[i] - short / 2, y[i + 1] + short / 2
        y = [min(max(v, LABEL * (k + 0.5)), height - LABEL * (len(y) - k - 0.5)) for k, v in enumerate(y)]
    return {i: high * math.exp(-v / pixel) for i, v in zip(order, y, strict=True)}
