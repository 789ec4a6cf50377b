"""The glossary: every term that the page explains and the documents use, with a definition of one sentence.

In: assets/glossary.jsonl, and for names of rules and drafters the tables that define them. Out: `Term`s, and
docs/glossary.md as text. Imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache

from .drafters.kinds import KINDS
from .paths import ASSETS
from .rules import RULES

PAGE = """# Glossary

The words of the page, the documents and the code. Written by `python tests/test_docs.py` from assets/glossary.jsonl,
which the page reads too.

| term | also | definition |
| --- | --- | --- |
"""


@dataclass(frozen=True)
class Term:
    """A term, its other names, and its definition: one sentence, at most 230 characters."""

    name: str
    definition: str
    also: tuple[str, ...] = ()


@cache
def terms() -> tuple[Term, ...]:
    """Every term, in the order of the file. A line of it is {"term", "also": [names], "says": sentence}; a term that is
    a rule or a kind of drafter has its name there ("rule" or "drafter") in place of a sentence, so that no sentence
    stands in two places."""
    rows = map(json.loads, (ASSETS / "glossary.jsonl").read_text(encoding="utf-8").splitlines())
    return tuple(Term(row["term"], _definition(row), tuple(row.get("also", ()))) for row in rows)


def _definition(row: dict[str, str]) -> str:
    if "rule" in row:
        return RULES[row["rule"]].summary
    if "drafter" in row:
        return next(kind.description for kind in KINDS if kind.name == row["drafter"])
    return row["says"]


def page() -> str:
    """docs/glossary.md, in alphabetical order."""
    rows = sorted(terms(), key=lambda term: term.name.lower())
    return PAGE + "".join(f"| {term.name} | {', '.join(term.also)} | {term.definition} |\n" for term in rows)


# what is no term, but asks for a sentence where it stands
HINTS = {
    "larger pairs": "Start the app with another pair: python app.py --pair gemma-4-E4B, or --target and --drafter with "
    "any two models that share a tokenizer; python -m spec_decode models lists what fits this machine.",
}

# The longest first: of two names that begin at one place in a text, the longer is meant.
TERMS: dict[str, str] = dict(
    sorted(
        [*((name, term.definition) for term in terms() for name in (term.name, *term.also)), *HINTS.items()],
        key=lambda named: -len(named[0]),
    )
)
