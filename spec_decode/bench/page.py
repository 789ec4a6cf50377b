"""The report of a benchmark as one HTML file that needs no network: text, tables and figures, light and dark.

In: the object of `summary.report`. Out: HTML with Plotly's script, the figures' data and the styles inside it. Colours
are roles, which the page's script fills in, so that figures follow light, dark and paper. Imports no torch.
"""

from __future__ import annotations

import html
import importlib.util
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from ..paths import ASSETS
from . import markdown as text

Report = dict[str, Any]
Figure = dict[str, Any]

MANY = 8  # conditions, beyond which a figure of all would not be read
_ROW, _HEAD = 34, 96  # pixels of a row of a figure, and of its axis and legend


def page(report: Report, advice: Sequence[str] = (), why: Sequence[dict[str, Figure]] = ()) -> str:
    """The file.

    Args:
        advice: the advisor's paragraphs, as Markdown.
        why: the figures that stand with them, the speedup model against the measurements: each a Plotly figure as JSON
            in its "light" and its "dark" form, with colours of their own.
    """
    drawn = {
        text.PAYS: list(why),
        text.SPEEDUP: [speedups(report), *sweeps(report)],
        text.CATEGORIES: [by_category(report)] if len(report["conditions"]) <= MANY else [],
        text.ROUNDS: [times(report)],
    }
    render = MarkdownIt("commonmark", {"html": False}).enable("table").render
    figures: list[Figure] = []
    body = []
    for head, lines in text.sections(report, advice):
        plots = ""
        for figure in drawn.get(head, []):
            height = figure.get("light", figure)["layout"].get("height", 360)
            plots += f'<div class="plot" id="plot-{len(figures)}" style="height: {height}px"></div>'
            figures.append(figure)
        inner = render("\n".join(lines)).replace("<table>", '<div class="wide" tabindex="0"><table>')
        inner = inner.replace("</table>", "</table></div>")
        if head == text.PROMPTS:
            inner = f"<details><summary>All {len(report['prompts'])} rows</summary>{inner}</details>"
        body.append(f"<section><h2>{html.escape(head)}</h2>{plots}{inner}</section>")
    parts = {
        "title": html.escape(text.title(report)),
        "ran": render("\n".join(text.ran(report))),
        "body": "\n".join(body),
        "figures": json.dumps(figures, ensure_ascii=False).replace("</", "<\\/"),
        "plotly": plotly(),
    }
    template = (ASSETS / "report.html").read_text(encoding="utf-8")
    before, *pieces = template.split("{{")
    for piece in pieces:  # what is filled in is not searched for places again
        name, after = piece.split("}}", 1)
        before += parts[name] + after
    return before


def plotly() -> str:
    """Plotly's script, as the package plotly ships it.

    Raises:
        ModuleNotFoundError: the package is missing.
    """
    spec = importlib.util.find_spec("plotly")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("The report needs the package plotly: pip install plotly")
    script = (Path(spec.origin).parent / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    return script.replace("</script", "<\\/script")


def speedups(report: Report) -> Figure:
    """Every condition's median speedup with its interval, and its worst prompt."""
    told = [c for c in report["conditions"] if c["speedup"]][::-1]
    names, found = [c["label"] for c in told], [c["speedup"] for c in told]
    medians = _dots("median over prompts, 95 % interval", "accent", names, found)
    worst = {
        "type": "scatter",
        "mode": "markers",
        "name": "worst prompt",
        "x": [s["worst"] for s in found],
        "y": names,
        "text": [s["worst_prompt"] for s in found],
        "hovertemplate": "%{text}: %{x:.2f}×<extra></extra>",
        "marker": {"symbol": "x-thin", "size": 9, "line": {"width": 2, "color": "warn"}},
    }
    return {"data": [medians, worst], "layout": _layout("speedup over the baseline", len(names))}


def sweeps(report: Report) -> list[Figure]:
    """The speedup over context length, and over turns, where they were varied; a line for what else differs."""
    found = []
    for axis, name in (("context", "context, tokens"), ("turn", "turn of the conversation")):
        lines: dict[str, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
        for c in report["conditions"]:
            value = c["condition"][axis]
            if value is not None and c["speedup"]:
                rest = ", ".join(part for part in c["label"].split(", ") if part != f"{axis} {value}")
                lines[rest].append((value, c["speedup"]))
        if len({value for line in lines.values() for value, _ in line}) < 2:
            continue
        data = []
        for i, (label, points) in enumerate(lines.items()):
            values, estimates = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            trace = _dots(label, f"series{i % MANY}", list(values), list(estimates))
            trace |= {"mode": "lines+markers", "x": trace["y"], "y": trace["x"], "error_y": trace.pop("error_x")}
            trace["hovertemplate"] = f"{html.escape(label)}: %{{y:.2f}}×<extra></extra>"
            data.append(trace)
        layout = _layout(name, 8, reference="y")
        layout["yaxis"] = {"title": {"text": "speedup"}, "automargin": True}
        layout["xaxis"] |= {"type": "log" if axis == "context" else "linear", "tickvals": sorted({
            value for line in lines.values() for value, _ in line
        })}  # fmt: skip
        layout["xaxis"]["ticktext"] = [f"{value:,}" for value in layout["xaxis"]["tickvals"]]
        found.append({"data": data, "layout": layout})
    return found


def by_category(report: Report) -> Figure:
    """The median speedup of every category, a series for each condition."""
    told = report["conditions"]
    names = sorted({name for c in told for name in c["categories"]}, reverse=True)
    data = []
    for i, c in enumerate(told):
        there = [name for name in names if c["categories"].get(name, {}).get("speedup")]
        trace = _dots(c["label"], f"series{i}", there, [c["categories"][name]["speedup"] for name in there])
        trace["hovertemplate"] = f"%{{y}}, {html.escape(c['label'])}: %{{x:.2f}}×<extra></extra>"
        del trace["error_x"]  # of several conditions in a row they would cover each other; the tables have them
        data.append(trace)
    return {"data": data, "layout": _layout("speedup over the baseline, median", len(names))}


def times(report: Report) -> Figure:
    """Milliseconds of a round: draft, target pass and verification, the rest."""
    lanes = list(text.lanes(report))
    lanes.reverse()
    kinds = (
        ("draft", "draft", "series0"),
        ("verify", "target pass and verification", "series1"),
        ("other", "other", "base"),
    )
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": [label for label, _ in lanes],
            "x": [1e3 * (lane[f"{kind}_seconds"] or 0.0) for _, lane in lanes],
            "marker": {"color": color},
            "hovertemplate": f"{name}: %{{x:.2f}} ms<extra></extra>",
        }
        for kind, name, color in kinds
    ]
    layout = _layout("ms of a round, median over prompts", len(lanes), reference=None)
    return {"data": data, "layout": layout | {"barmode": "stack", "bargap": 0.35}}


def _dots(name: str, color: str, places: list[Any], estimates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians with their intervals."""
    high = [(e["high"] or e["median"]) - e["median"] for e in estimates]
    low = [e["median"] - (e["low"] or e["median"]) for e in estimates]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [e["median"] for e in estimates],
        "y": places,
        "error_x": {"type": "data", "symmetric": False, "array": high, "arrayminus": low, "thickness": 1.6, "width": 4},
        "marker": {"size": 9, "color": color},
        "hovertemplate": "%{y}: %{x:.2f}×<extra></extra>",
    }


def _layout(axis: str, rows: int, reference: str | None = "x") -> dict[str, Any]:
    """reference: the axis on which a line stands at 1, where both lanes are equally fast."""
    line = {"type": "line", "line": {"dash": "dot", "width": 1, "color": "muted"}}
    ends = {"x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "paper"}
    if reference == "y":
        ends = {"y0": 1, "y1": 1, "x0": 0, "x1": 1, "xref": "paper"}
    return {
        "height": _HEAD + _ROW * max(rows, 2),
        "xaxis": {"title": {"text": axis}, "automargin": True},
        "yaxis": {"automargin": True, "type": "category"},
        "shapes": [line | ends] if reference else [],
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
    }
