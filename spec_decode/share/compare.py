"""A recorded race against the same race run again: what is the same, and what differs.

In: two traces. Out: rows of text, the same that assets/compare.js shows on the page.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..events import BASELINE, SPECULATIVE, Trace
from ..metrics import LaneCounts, ratio

SHOWN = 12  # hexadecimal digits of a checksum


@dataclass(frozen=True)
class Row:
    """One property of both runs. `same` is None for figures that are measured, which never agree to the digit."""

    name: str
    recorded: str
    here: str
    same: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(recorded: Trace, here: Trace) -> list[Row]:
    """The rows, what was produced first, then how fast, then what ran."""
    rows = [
        _text("baseline text", recorded.token_ids(BASELINE), here.token_ids(BASELINE)),
        _text("speculative text", recorded.token_ids(SPECULATIVE), here.token_ids(SPECULATIVE)),
    ]
    runs = [{lane: LaneCounts(t.lane(lane)) for lane in (BASELINE, SPECULATIVE)} for t in (recorded, here)]
    for name, show in {
        "acceptance rate": lambda c: _percent(c[SPECULATIVE].acceptance_rate),
        "tokens per target pass": lambda c: _number(c[SPECULATIVE].tokens_per_pass, 2),
    }.items():
        a, b = map(show, runs)
        rows.append(Row(name, a, b, a == b))
    for name, measure in {
        "baseline tokens/s": lambda c: _number(c[BASELINE].tokens_per_second, 1),
        "speculative tokens/s": lambda c: _number(c[SPECULATIVE].tokens_per_second, 1),
        "speedup": lambda c: _number(
            ratio(c[SPECULATIVE].tokens_per_second, c[BASELINE].tokens_per_second), 2, unit="×"
        ),
    }.items():
        a, b = map(measure, runs)
        rows.append(Row(name, a, b))
    left = {"drafter", *recorded.omitted, *here.omitted}
    same = _asked(recorded, left) == _asked(here, left)
    rows.append(Row("prompt and settings", "as recorded", "the same" if same else "differ", same))
    for name, what in {
        "pair": lambda t: _join(t.pair, "target", "drafter", by=" + "),
        "device": lambda t: _join(t.pair, "device", "dtype", by=", "),
        "target revision": lambda t: _revision(t, "target"),
        "drafter revision": lambda t: _revision(t, "drafter"),
        "Spec Decode": lambda t: t.versions.get("spec_decode", "not known"),
        "machine": lambda t: str(t.machine.get("gpu") or t.machine.get("processor") or "not known"),
    }.items():
        a, b = what(recorded), what(here)
        rows.append(Row(name, a, b, None if "not known" in (a, b) else a == b))
    return rows


def _text(name: str, recorded: list[int], here: list[int]) -> Row:
    both = min(len(recorded), len(here))
    first = next((i for i in range(both) if recorded[i] != here[i]), both)
    said = "the same" if recorded == here else f"differs from token {first + 1}"
    return Row(name, f"{len(recorded)} tokens", f"{len(here)} tokens, {said}", recorded == here)


def _asked(trace: Trace, left: set[str]) -> dict[str, Any]:
    return {name: value for name, value in trace.request.items() if name not in left and value not in (None, [], "")}


def _revision(trace: Trace, model: str) -> str:
    found = trace.pair.get("revisions")
    entry = found.get(model) if isinstance(found, dict) else None
    if not isinstance(entry, dict):
        return "not known"
    if isinstance(entry.get("revision"), str):
        return str(entry["revision"])
    sums = entry.get("sha256")
    first = next(iter(sums.values()), None) if isinstance(sums, dict) else None
    return f"sha256 {first[:SHOWN]}" if isinstance(first, str) else "not known"


def _join(pair: dict[str, Any], *names: str, by: str) -> str:
    return by.join(str(pair[name]) for name in names if pair.get(name)) or "not known"


def _number(x: float | None, digits: int, unit: str = "") -> str:
    return "–" if x is None else f"{x:.{digits}f}{unit}"


def _percent(x: float | None) -> str:
    return "–" if x is None else f"{100 * x:.1f} %"


def table(rows: list[Row]) -> str:
    """The rows as lines of text: a mark, the name, the recorded value, the value here."""
    marks = {True: "=", False: "≠", None: " "}
    widths = [max(len(getattr(row, name)) for row in rows) for name in ("name", "recorded")]
    lines = [f"  {'':{widths[0]}}  {'recorded':{widths[1]}}  here"]
    lines += [f"{marks[r.same]} {r.name:{widths[0]}}  {r.recorded:{widths[1]}}  {r.here}" for r in rows]
    return "\n".join(lines)
