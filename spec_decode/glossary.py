"""The terms that pages explain, one sentence each. Knows nothing of pages.

In: the tables of drafters and rules. Out: `TERMS`, sentences by term.
"""

from __future__ import annotations

from .drafters.kinds import KINDS
from .rules import RULES

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
