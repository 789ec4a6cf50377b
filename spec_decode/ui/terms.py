"""The terms that the page explains, one sentence each, and the buttons that show the sentences.

In HTML of ours a term is a button (`marked` makes them, assets/*.html write them out) that shows its sentence when it
is hovered, tapped or pressed; assets/token_view.js looks the sentence up here, by the button's text.
Gradio's help lines hold plain text only, so those of the settings say the sentence itself (`form.drafter_help`,
`form.RULE_HELP`).
"""

from __future__ import annotations

import re
from html import escape

from ..drafters.kinds import KINDS
from ..rules import RULES

TERMS: dict[str, str] = {
    **{kind.name: kind.description for kind in KINDS if kind.by_name},
    "coupled": RULES["coupled"].summary,
    "KL": "Kullback–Leibler divergence: how far the distribution that tokens are drawn from is from the target’s own, "
    "in nats; 0 is exact.",
    "int8": "Weights are held as 8-bit integers with a scale, half the memory of 16-bit numbers; both lanes run the "
    "same weights.",
    "nf4": "Weights are held in 4 bits each (NormalFloat), a quarter of the memory of 16-bit numbers; both lanes run "
    "the same weights.",
    "γ": "Draft length: how many tokens the drafter proposes before one target pass verifies them all.",
    "larger pairs": "Start the app with another pair: python app.py --pair gemma-4-E4B, or --target and --drafter with "
    "any two models that share a tokenizer; python -m spec_decode models lists what fits this machine.",
}

_KNOWN = re.compile(r"(?<![\w-])(" + "|".join(map(re.escape, TERMS)) + r")(?![\w-])")


def marked(text: str) -> str:
    """This plain text as HTML, with each term in it a button that explains it."""
    parts = _KNOWN.split(text)
    return "".join(
        f'<button type="button" class="sd-term">{escape(part)}</button>' if i % 2 else escape(part)
        for i, part in enumerate(parts)
    )
