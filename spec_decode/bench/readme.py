"""The README's tables of figures, written from the files in docs/benchmarks.

In: a text with markers, and JSON reports of `bench`. Out: the same text, the lines between the markers written anew. A
marker names a file, a table and, for a table of one condition, its label:

    <!-- benchmark: cpu.json categories adaptive -->
    …
    <!-- end of benchmark -->

Imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import markdown

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
FOLDER = ROOT / "docs" / "benchmarks"
END = "<!-- end of benchmark -->"
_MARKER = re.compile(r"<!-- benchmark: (?P<file>\S+) (?P<table>\S+)(?: (?P<label>.+?))? -->\n")

# Tables of a whole report, and those of one condition.
WHOLE: dict[str, Callable[[dict[str, Any]], Iterable[str]]] = {
    "ran": markdown.ran,
    "headline": markdown.headline,
    "sentences": markdown.sentences,
    "rounds": markdown.rounds,
    "latency": markdown.latency,
    "acceptance": markdown.acceptance,
    "machine": markdown.machine,
    "peers": markdown.peers,
    "oracle": markdown.oracle,
}
OF_ONE: dict[str, Callable[[dict[str, Any]], Iterable[str]]] = {"categories": markdown.categories}


def update(readme: Path = README, folder: Path = FOLDER) -> bool:
    """Writes the tables of a file anew, and returns whether that changed it.

    Raises:
        UserError: there is no such file (in an installed package there is none), or as `written`.
    """
    try:
        before = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot read {readme}: {error.strerror}; run this in a checkout.") from error
    after = written(before, folder)
    if after != before:
        readme.write_text(after, encoding="utf-8")
    return after != before


def written(text: str, folder: Path = FOLDER) -> str:
    """The text with every table as its file has it.

    Raises:
        UserError: a marker has no end, or names a file, table or condition that does not exist.
    """
    parts, at = [], 0
    while found := _MARKER.search(text, at):
        end = text.find(END, found.end())
        if end < 0 or _MARKER.search(text, found.end(), end):
            raise UserError(f"The marker {found.group().strip()} has no end.")
        parts += [text[at : found.end()], "\n".join(_table(found, folder)), "\n"]
        at = end
    return "".join([*parts, text[at:]])


def _table(marker: re.Match[str], folder: Path) -> Iterable[str]:
    said, table, label = marker.group().strip(), marker["table"], marker["label"]
    try:
        report = json.loads((folder / marker["file"]).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"The marker {said} names no report: {error}.") from error
    if table in WHOLE and label is None:
        return WHOLE[table](report)
    if table not in OF_ONE:
        raise UserError(f"The marker {said} names no table; there are {', '.join([*WHOLE, *OF_ONE])}.")
    for condition in report["conditions"]:
        if condition["label"] == label:
            return OF_ONE[table](condition)
    told = ", ".join(repr(condition["label"]) for condition in report["conditions"])
    raise UserError(f"The marker {said} names no condition; there are {told}.")
