"""The reports of a run, and the header of its raw measurements: the same for the command line and for the page.

In: a benchmark, or what its file holds. Out: a header; the report as an object, as JSON, Markdown and HTML. Imports no
torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..events import Trace
from .advice import Advice, advise
from .chart import Figure, both
from .markdown import markdown
from .model import explain, setups
from .page import page
from .record import Contents
from .summary import report

if TYPE_CHECKING:
    from .method import Bench

# Of the machine, what measurements of one file must agree in; threads and the like are chosen anew at every load.
FIXED = ("processor", "cores", "cpu_capability", "gpu")


def header(bench: Bench, traces: Mapping[str, Trace], instruments: dict[str, Any], command: str) -> dict[str, Any]:
    """What a file says of its measurements.

    Args:
        traces: of a race with each drafter.
        instruments: {"bandwidth", "missing"}, as docs/bench.schema.json has them.
        command: what began the run.
    """
    trace = next(iter(traces.values()))
    revisions = {name: found.pair.get("revisions", {}).get("drafter") for name, found in traces.items()}
    told = json.dumps(bench.prompts, ensure_ascii=False, sort_keys=True).encode()
    plan = bench.grid.to_dict() | {"prompts": len(bench.prompts), "sha256": hashlib.sha256(told).hexdigest()}
    machine = trace.machine
    return {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "pair": {**trace.pair, "drafters": revisions},
        "machine": {name: machine[name] for name in FIXED if name in machine},
        "setup": {name: value for name, value in machine.items() if name not in FIXED},
        "versions": trace.versions,
        "plan": plan,
        "planned": len(bench.grid.order(len(bench.prompts))),
        "instruments": instruments,
    }


class Reports:
    """What a file of measurements says, in every form; each is made when it is first asked for.

    Args:
        raw: the name of the file.
    """

    def __init__(self, contents: Contents, raw: str) -> None:
        self._contents, self._raw = contents, raw

    @cached_property
    def advice(self) -> tuple[Advice, ...]:
        """The advisor's paragraphs, one a setup."""
        return advise(self._contents.measurements)

    @cached_property
    def why(self) -> list[dict[str, Figure]]:
        """The figure that stands with each paragraph, in every theme."""
        device = str(self._contents.header.get("pair", {}).get("device", "cpu"))
        return [both(explain(races, device)) for races in setups(self._contents.measurements).values()]

    @cached_property
    def figures(self) -> dict[str, Any]:
        """The report as an object, by the schema docs/bench.schema.json."""
        return {**report(self._contents, self._raw), "advice": [found.to_dict() for found in self.advice]}

    @property
    def _paragraphs(self) -> list[str]:
        alone = len(self.advice) == 1
        return [found.text if alone else f"**{found.title}.** {found.text}" for found in self.advice]

    @property
    def markdown(self) -> str:
        """The report as Markdown."""
        return markdown(self.figures, self._paragraphs)

    @property
    def json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.figures, indent=1, ensure_ascii=False) + "\n"

    @property
    def html(self) -> str:
        """The report as one HTML file."""
        return page(self.figures, self._paragraphs, self.why)
