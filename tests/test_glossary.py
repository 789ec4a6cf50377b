"""The glossary: complete, one sentence a term, and what the page marks is in it."""

from __future__ import annotations

import re
from pathlib import Path

from spec_decode.drafters.kinds import KINDS
from spec_decode.glossary import HINTS, page, terms
from spec_decode.rules import RULES
from spec_decode.ui.terms import TERMS, marked

ASSETS = Path(__file__).resolve().parents[1] / "assets"
NEEDED = (
    "target, drafter, draft, draft length, γ, round, target pass, plain step, acceptance rate, tokens per target pass, "
    "per-position acceptance, baseline, speculative lane, lane, race, speedup, end-to-end speedup, predicted speedup, "
    "tokens per second, time to first token, coupled sampling, rejection sampling, block verification, greedy, "
    "temperature, KV cache, prefill, residual distribution, correction, bonus token, MTP, lookup, suffix, break-even"
)


def test_every_term_is_there_once_with_one_sentence() -> None:
    names = [name for term in terms() for name in (term.name, *term.also)]
    assert len(names) == len(set(names)) and set(NEEDED.split(", ")) <= set(names)
    assert set(TERMS) == {*names, *HINTS}
    for term in terms():
        said = term.definition
        assert len(said) <= 230 and said.endswith(".") and said[0].isupper() and "|" not in said, term.name
        assert len(re.findall(r"[.?!](?=\s|$)", said)) == 1, f"{term.name} takes one sentence"


def test_a_rule_or_a_drafter_is_defined_where_it_is() -> None:
    assert TERMS["coupled"] == RULES["coupled"].summary
    for kind in KINDS:
        if kind.by_name:
            assert TERMS[kind.name] == kind.description


def test_the_longest_of_two_terms_is_marked() -> None:
    for text in ("draft length", "target pass", "tokens per target pass", "bonus token"):
        assert marked(text) == f'<button type="button" class="sd-term">{text}</button>'
    assert marked("redraft, rounds, a-round, mtp-x") == "redraft, rounds, a-round, mtp-x"


def test_what_the_page_marks_is_explained() -> None:
    found = set()
    for file in ASSETS.glob("*.html"):
        found.update(re.findall(r'class="sd-term">([^<]+)<', file.read_text(encoding="utf-8")))
    script = (ASSETS / "tour.js").read_text(encoding="utf-8")
    found.update(re.findall(r'\bterm\("([^"]+)"\)', script))
    assert len(found) > 10 and found <= set(TERMS)


def test_the_page_of_the_documents_has_every_term_in_order() -> None:
    rows = [line.split(" | ") for line in page().splitlines() if line.startswith("| ")][2:]
    assert sorted(row[0][2:] for row in rows) == sorted(term.name for term in terms())
    assert [row[0].lower() for row in rows] == sorted(row[0].lower() for row in rows)
