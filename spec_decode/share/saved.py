"""A saved replay: one HTML file that shows a race, and needs neither a network nor a server.

In: a `Trace`. Out: HTML with the scripts and styles of the page, both panes, the inspector, the timeline, figures drawn
as SVG, and the whole trace. `shell` is the file without a trace, which the page fetches to fill it in the browser
(assets/share.js), so that there is one template and no upload. A Content-Security-Policy in the file allows its own
script and styles by their hashes and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from functools import cache
from html import escape
from typing import Any

from .. import __version__
from ..events import Trace
from ..glossary import TERMS
from ..paths import ASSETS
from ..recording import packed
from ..rules import TABLE
from ..session import caption
from ..session.curves import Curves, final
from ..session.feed import dumps
from ..session.tally import Tally
from ..settings import Settings
from .link import TOO_LONG
from .unpack import CLOSE, OPEN, VERSION

# of the view, then those that any page shares that opens files, then the boot of the file
VIEW = ("trace.js", "explain.js", "view.js", "card.js", "inspector.js", "timeline.js", "player.js")
READING = ("about.js", "reading.js", "image.js")
SCRIPTS = (*VIEW, *READING, "charts.js", "saved.js")
STYLES = ("app.css", "share.css", "saved.css")
TITLE = "Spec Decode replay"
# of the final score board, what the browser does not work out of the rounds
EXTRAS = ("interval", "end_to_end", "end_to_end_interval", "verdict", "looping", "parting")


def tables() -> dict[str, Any]:
    """What the browser has to know to show any trace: rules, sentences, defaults, the picture of the share image."""
    return {
        "version": __version__,
        "rules": {
            rule.name: {name: getattr(rule, name) for name in ("exact", "same_text", "samples", "lenient", "synthetic")}
            for rule in TABLE
        },
        "undrawn": caption.UNDRAWN,
        "settings": Settings().to_dict(),
        "sentences": {
            name: getattr(caption, name) for name in ("LOSSY", "INDEPENDENT", "SYNTHETIC", "NOT_EXACT", "NOT_SAME")
        },
        "shown": caption.SHOWN,
        "too_long": TOO_LONG,
        "extras": EXTRAS,
        "image": _asset("image.svg"),
    }


@cache
def shell() -> str:
    """The file without a trace: it shows whatever file is dropped on it."""
    script, style = "\n".join(map(_asset, SCRIPTS)), "".join(map(_asset, STYLES))
    return _filled(
        _asset("replay.html"),
        {
            "title": TITLE,
            "policy": f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data: blob:; "
            "base-uri 'none'; form-action 'none'",
            "style": style,
            "view": _asset("token_view.html"),
            "figures": _asset("figures.html"),
            "tables": dumps({**tables(), "terms": TERMS}),
            "open": OPEN,
            "close": CLOSE,
            "script": script,
        },
    )


def page(trace: Trace) -> str:
    """The file with this trace, which is written as it is: `Trace.exported` leaves out what must stay here."""
    before, after = shell().split(OPEN, 1)
    title = f"<title>{TITLE}</title>"
    named = f"<title>{escape(_short(trace.prompt))} · {TITLE}</title>"
    return before.replace(title, named, 1) + OPEN + dumps(data(trace)) + after


def data(trace: Trace) -> dict[str, Any]:
    """What the file holds: the trace, and what the browser does not work out of it."""
    tally, curves = Tally(), Curves()
    for r in trace.rounds:
        tally.add(r)
        curves.add(r)
    stats = tally.to_dict(trace)
    return {
        "spec_decode_replay": VERSION,
        "stats": {name: stats[name] for name in EXTRAS},
        "figures": json.loads(json.dumps(curves.live() | {"final": final(trace)})),
        "trace": b64encode(packed(trace)).decode("ascii"),
    }


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:59].rstrip() + "…"


@cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _filled(template: str, parts: dict[str, str]) -> str:
    before, *pieces = template.split("{{")
    for piece in pieces:  # what is filled in is not searched for places again
        name, after = piece.split("}}", 1)
        before += parts[name] + after
    return before
