"""The figure "here is why": measured speedups over the predicted band, acceptance against break-even, and where the
time of a round goes.

In: an `Explanation`. Out: a Plotly figure as a JSON-ready dictionary, light or dark, that needs nothing else to be
drawn. Imports neither Plotly nor torch.
"""

from __future__ import annotations

from typing import Any

from .intervals import Interval
from .model import Explanation
from .words import named

Figure = dict[str, Any]

# The palette of assets/app.css. Every series also has a mark or pattern of its own.
THEMES: dict[str, dict[str, str]] = {
    "light": {
        "paper": "#ffffff", "ink": "#1d2125", "muted": "#5c646d", "line": "#e4e5e3", "accent": "#0f766e",
        "soft": "rgba(15,118,110,0.16)", "base": "#7a828b", "bonus": "#3457c2", "warn": "#8a5200",
    },
    "dark": {
        "paper": "#171b1e", "ink": "#e7eaec", "muted": "#9aa4ad", "line": "#272d31", "accent": "#4cc9b8",
        "soft": "rgba(76,201,184,0.2)", "base": "#8f99a3", "bonus": "#9db4ff", "warn": "#f0bd68",
    },
}  # fmt: skip
PANELS = ("speedup ×", "accepted", "plain steps")  # titles of the vertical axes, from the top
_BOTTOM = ((0.7, 1.0), (0.385, 0.62), (0.0, 0.3))


def figure(explanation: Explanation, theme: str = "light") -> Figure:
    """Three panels over each other, readable at the width of a phone.

    1. Speedup over draft length: the predicted band, and what was measured with its interval; a policy as a line.
    2. Acceptance by position in the draft with intervals, and the acceptance from which each γ pays.
    3. The time of a round in plain steps, by draft, target pass and the rest; the marks are tokens a round: where they
       are above the bar, it pays.

    Raises:
        KeyError: no theme of that name.
    """
    c = THEMES[theme]
    data = [*_speedups(explanation, c), *_acceptance(explanation, c), *_times(explanation, c)]
    layout: dict[str, Any] = {
        "height": 760,
        "margin": {"l": 56, "r": 16, "t": 64, "b": 48},
        "paper_bgcolor": c["paper"],
        "plot_bgcolor": c["paper"],
        "font": {"color": c["ink"], "size": 12, "family": "system-ui, sans-serif"},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 11}},
        "barmode": "stack",
        "bargap": 0.35,
        "hovermode": "closest",
        "shapes": [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "yref": "y", "y0": 1, "y1": 1,
             "line": {"color": c["base"], "width": 1.5, "dash": "dot"}},
        ],
    }  # fmt: skip
    below = ("draft length γ", "position in the draft; draft length γ", "draft length γ")
    for i, (title, name) in enumerate(zip(PANELS, below, strict=True)):
        number = "" if i == 0 else str(i + 1)
        layout[f"xaxis{number}"] = _axis(c, name, anchor=f"y{number}", dtick=1)
        layout[f"yaxis{number}"] = _axis(c, title, anchor=f"x{number}", domain=list(_BOTTOM[i]), rangemode="tozero")
    layout["yaxis2"] |= {"range": [0, 1.04], "tickformat": ".0%"}
    layout["xaxis3"] |= {"type": "category"}
    return {"data": data, "layout": layout}


def both(explanation: Explanation) -> dict[str, Figure]:
    """The figure in every theme, by its name."""
    return {theme: figure(explanation, theme) for theme in THEMES}


def _axis(c: dict[str, str], title: str, **more: Any) -> dict[str, Any]:
    return {
        "title": {"text": title, "font": {"size": 11, "color": c["muted"]}, "standoff": 6},
        "gridcolor": c["line"], "linecolor": c["line"], "zeroline": False, "fixedrange": True,
        "tickfont": {"size": 11, "color": c["muted"]}, **more,
    }  # fmt: skip


def _bars(found: list[Interval], color: str) -> dict[str, Any]:
    """Error bars that are not symmetric; none where an interval has no end."""
    wide = 1e6
    return {
        "type": "data", "symmetric": False, "color": color, "thickness": 1.5,
        "array": [min(e.high - e.value, wide) if e.high < wide else 0.0 for e in found],
        "arrayminus": [e.value - e.low if e.low > 0 else 0.0 for e in found],
    }  # fmt: skip


def _speedups(explanation: Explanation, c: dict[str, str]) -> list[Figure]:
    fixed = [f for f in explanation.lengths if isinstance(f.length, int)]
    band = [(f.length, f.predicted) for f in fixed if f.predicted is not None]
    measured = [(f.length, f.measured) for f in fixed if f.measured is not None]
    found: list[Figure] = []
    if band:
        lengths, ends = [n for n, _ in band], [e for _, e in band]
        found.append({
            "type": "scatter", "mode": "lines", "name": f"predicted from {named(explanation.source)}, 90 % band",
            "x": [*lengths, *reversed(lengths)], "y": [*(e.high for e in ends), *(e.low for e in reversed(ends))],
            "fill": "toself", "fillcolor": c["soft"], "line": {"width": 1, "color": c["accent"], "dash": "dot"},
            "hoverinfo": "skip",
        })  # fmt: skip
        found.append({
            "type": "scatter", "mode": "lines", "name": "predicted", "showlegend": False, "x": lengths,
            "y": [e.value for e in ends], "line": {"width": 2, "color": c["accent"]},
            "hovertemplate": "γ = %{x}: %{y:.2f}× predicted<extra></extra>",
        })  # fmt: skip
    if measured:
        ends = [e for _, e in measured]
        found.append({
            "type": "scatter", "mode": "markers", "name": "measured, median with 95 % interval",
            "x": [n for n, _ in measured], "y": [e.value for e in ends],
            "marker": {"symbol": "diamond", "size": 9, "color": c["bonus"]}, "error_y": _bars(ends, c["bonus"]),
            "hovertemplate": "γ = %{x}: %{y:.2f}× measured<extra></extra>",
        })  # fmt: skip
    last = max([f.length for f in fixed if isinstance(f.length, int)], default=1)
    policies = [(f.length, f.measured.value) for f in explanation.lengths if isinstance(f.length, str) and f.measured]
    return found + [
        {
            "type": "scatter", "mode": "lines", "name": f"{name}, measured", "x": [0.5, last + 0.5], "y": [value] * 2,
            "line": {"color": c["bonus"], "width": 1.5, "dash": "dash"},
            "hovertemplate": f"{name}: %{{y:.2f}}× measured<extra></extra>",
        }
        for name, value in policies
    ]  # fmt: skip


def _acceptance(explanation: Explanation, c: dict[str, str]) -> list[Figure]:
    even = [(f.length, f.break_even) for f in explanation.lengths if f.break_even is not None]
    found: list[Figure] = [{
        "type": "scatter", "mode": "lines+markers", "name": f"accepted at this position ({named(explanation.counted)})",
        "x": list(range(1, len(explanation.acceptance) + 1)), "y": [e.value for e in explanation.acceptance],
        "xaxis": "x2", "yaxis": "y2", "line": {"color": c["accent"], "width": 2}, "marker": {"size": 7},
        "error_y": _bars(list(explanation.acceptance), c["accent"]),
        "hovertemplate": "position %{x}: %{y:.0%} accepted<extra></extra>",
    }]  # fmt: skip
    if even:
        found.append({
            "type": "scatter", "mode": "lines+markers", "name": "γ pays from this acceptance on",
            "x": [n for n, _ in even], "y": [a for _, a in even], "xaxis": "x2", "yaxis": "y2",
            "line": {"color": c["warn"], "width": 1.5, "dash": "dash"}, "marker": {"symbol": "x-thin-open", "size": 7},
            "hovertemplate": "γ = %{x} pays from %{y:.0%} a token on<extra></extra>",
        })  # fmt: skip
    return found


def _times(explanation: Explanation, c: dict[str, str]) -> list[Figure]:
    raced = [f for f in explanation.lengths if f.tokens_per_pass is not None]
    names = [str(f.length) for f in raced]
    parts = (("verify", "target pass", "base", ""), ("draft", "draft", "accent", "/"), ("other", "rest", "warn", "x"))
    found: list[Figure] = [
        {
            "type": "bar", "name": label, "x": names, "y": [getattr(f, part) or 0.0 for f in raced],
            "xaxis": "x3", "yaxis": "y3", "marker": {"color": c[color], "pattern": {"shape": pattern}},
            "hovertemplate": f"{label}: %{{y:.2f}} plain steps<extra></extra>",
        }
        for part, label, color, pattern in parts
    ]  # fmt: skip
    tokens = [f.tokens_per_pass for f in raced if f.tokens_per_pass is not None]
    found.append({
        "type": "scatter", "mode": "markers", "name": "tokens a round", "x": names, "y": [e.value for e in tokens],
        "xaxis": "x3", "yaxis": "y3", "error_y": _bars(tokens, c["bonus"]),
        "marker": {"symbol": "diamond", "size": 9, "color": c["bonus"]},
        "hovertemplate": "%{y:.2f} tokens a round<extra></extra>",
    })  # fmt: skip
    return found
