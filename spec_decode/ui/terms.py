"""The terms that the page explains, those of the glossary, and the buttons that show their sentences.

In HTML of ours a term is a button (`marked` makes them, assets/*.html write them out) that shows its sentence when it
is hovered, tapped or pressed; assets/token_view.js looks the sentence up here, by the button's text.
Gradio's help lines hold plain text only, so those of the settings say the sentence itself (`form.drafter_help`,
`form.RULE_HELP`).
"""

from __future__ import annotations

import re
from html import escape

from ..glossary import TERMS as TERMS

_KNOWN = re.compile(r"(?<![\w-])(" + "|".join(map(re.escape, TERMS)) + r")(?![\w-])")


def marked(text: str) -> str:
    """This plain text as HTML, with each term in it a button that explains it."""
    parts = _KNOWN.split(text)
    return "".join(
        f'<button type="button" class="sd-term">{escape(part)}</button>' if i % 2 else escape(part)
        for i, part in enumerate(parts)
    )
