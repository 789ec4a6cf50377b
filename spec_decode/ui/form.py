"""From the form to `Settings`, and from a `SettingsError` back to the control it belongs to.

In: the raw values of the controls, as the browser sent them. Out: `Settings`, or a message for one control.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import SettingsError
from ..rules import RULES
from ..session.device import Limits
from ..settings import Settings
from ..trace_format import portable
from .terms import TERMS

# control → its line of help; the order is the order of the form's inputs
HELP: dict[str, str] = {
    "policy": "Adaptive picks the fastest length each round from measured costs.",
    "draft_length": "Tokens drafted a round, when fixed.",
    "temperature": "0 is greedy decoding.",
    "top_p": "1 keeps every token.",
    "top_k": "0 keeps every token.",
    "max_new_tokens": "Each lane ends after so many.",
    "seed": "The same seed gives the same noise.",
    "rule": "How drafted tokens are verified.",
    "lenience": "1 is exact; smaller is faster and further from the target.",
}
CONTROLS = tuple(HELP)

RULE_HELP: dict[str, str] = {
    "auto": "Greedy at temperature 0. Above, coupled: both lanes draw with the same noise.",
    **{rule.name: rule.summary for rule in RULES.values()},
}


def lenient(rule: object) -> bool:
    """Whether the rule of this name reads the lenience."""
    return isinstance(rule, str) and rule in RULES and RULES[rule].lenient


def drafter_help(name: str | None) -> str:
    """The line of help beneath the choice of a drafter, for the one that is chosen."""
    parts = [TERMS[part] for part in (name or "").split("+") if part in TERMS]
    return " ".join(parts) or "What drafts (guesses) the next tokens."


def named(drafters: Sequence[str]) -> list[tuple[str, str]]:
    """Choices of drafters, (label, value) each: a local path goes by its last component."""
    return [(portable(name), name) for name in drafters]


def settings_from_form(values: dict[str, Any]) -> Settings:
    """The settings of these raw values, one for each name in `CONTROLS`.

    Raises:
        SettingsError: a value cannot be used; `field` is the name of the control.
    """
    data = {name: values[name] for name in CONTROLS if name not in ("policy", "draft_length")}
    policy = values["policy"]
    if not lenient(data["rule"]):
        data["lenience"] = 0.3  # not in use, and not a reason to refuse a race
    return Settings(draft_length=values["draft_length"] if policy == "fixed" else policy, **data)


def problem(values: dict[str, Any], limits: Limits | None = None) -> SettingsError | None:
    """What is wrong with these values, if anything, on a server with these limits."""
    try:
        settings = settings_from_form(values)
        (limits or Limits()).check(settings)
    except SettingsError as error:
        return error
    return None
