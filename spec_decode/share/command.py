"""The command line of recorded races: `python -m spec_decode replay FILE`.

In: parsed flags. Out: a report, and what was asked for: a saved replay, a share image, a link, the same race run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import flags
from ..errors import UserError
from ..events import Trace
from ..request import Request


def add_command(commands: Any, tell: Callable[[dict[str, Any]], str], progress: Callable[[str], None]) -> None:
    """Adds the command. `tell` says what a report holds, `progress` how far loading is."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "replay", help="a recorded race: report, saved replay, share image, link, or the same race run again"
    )
    parser.add_argument("file", metavar="FILE", help="a trace, plain or compressed, or a saved replay")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", metavar="OUT", help="write one HTML file that shows the race without a network")
    parser.add_argument("--card", metavar="OUT", help="write the share image as SVG")
    parser.add_argument("--trace", metavar="OUT", help="write the trace as JSON, in the current format")
    parser.add_argument("--link", metavar="ADDRESS", help="print a link to the page at this address, with the settings")
    parser.add_argument(
        "--keep-system", action="store_true", help="put the system prompt into what is written, if it is known"
    )
    parser.add_argument("--rerun", action="store_true", help="run the race again here, and compare")
    flags.add(parser)
    parser.set_defaults(run=lambda arguments: run(arguments, tell, progress))


def run(arguments: argparse.Namespace, tell: Callable[[dict[str, Any]], str], progress: Callable[[str], None]) -> None:
    """Does what the flags ask for.

    Raises:
        UserError: the file is no trace, or cannot be written, or its race cannot be run here.
    """
    from ..metrics import race_report
    from ..sources.replay import ReplaySource, read
    from . import compare, image, link, saved

    trace = read(arguments.file)
    source = ReplaySource(trace)
    shared = trace.exported(system=arguments.keep_system)
    printed: dict[str, Any] = race_report(trace)
    text = tell(printed)
    if arguments.html:
        _write(arguments.html, saved.page(shared))
    if arguments.card:
        _write(arguments.card, image.svg(image.words(shared)))
    if arguments.trace:
        _write(arguments.trace, shared.to_json())
    if arguments.link:
        address = arguments.link.partition("#")[0]
        fragment = link.write(source.recording.request, system=arguments.keep_system)
        printed["link"] = f"{address}#{fragment}"
        text += f"\n{printed['link']}"
    if arguments.rerun:
        here = _raced(arguments, source.recording.request, progress)
        rows = compare.compare(trace, here)
        printed = {"recorded": printed, "here": race_report(here), "comparison": [row.to_dict() for row in rows]}
        text += f"\n\n{compare.table(rows)}"
        if "system" in trace.omitted:
            text += "\nThe recording left its system prompt out, so the texts may differ for that alone."
    print(json.dumps(printed, ensure_ascii=False) if arguments.json else text)


def _raced(arguments: argparse.Namespace, request: Request, progress: Callable[[str], None]) -> Trace:
    from ..loading.pair import load_pair
    from ..sources.local import LocalSource

    choice = flags.read(arguments)
    source = LocalSource(load_pair(**choice, progress=progress), own=choice["drafter"])
    if request.drafter and request.drafter not in source.drafters:  # a name is a download, or a path of that machine
        request = replace(request, drafter=None)
    race = source.race(request)
    for _ in race.steps():
        pass
    race.close()
    return race.trace


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}.") from error
