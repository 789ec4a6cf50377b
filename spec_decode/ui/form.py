"""From the form to `Settings`, and from a `SettingsError` back to the control it belongs to.

In: the raw values of the controls, as the browser sent them. Out: `Settings`, or a message for one control.
"""

from __future__ import annotations

from typing import Any

from ..errors import SettingsError
from ..settings import Settings
from .engine import Limits
from .terms import TERMS

# control → its line of help; the order is the order of the form's inputs
HELP: dict[str, str] = {
    "policy": "Adaptive picks the fastest length each round from measured costs.",
    "draft_length": "Tokens guessed a round, when fixed.",
    "temperature": "0 is greedy decoding.",
    "top_p": "1 keeps every token.",
    "top_k": "0 keeps every token.",
    "max_new_tokens": "Each lane ends after so many.",
    "seed": "The same seed gives the same noise.",
    "rule": "How a guess is accepted.",
    "lenience": "1 is exact; smaller is faster and further from the target.",
}
CONTROLS = tuple(HELP)

RULE_HELP: dict[str, str] = {
    "auto": "Greedy at temperature 0. Above, coupled: both lanes draw with the same noise.",
    "greedy": "Accept while the guess is the target's top token. Same text in both lanes.",
    "rejection": "Exact in distribution: the lanes may show different, equally likely texts.",
    "coupled": TERMS["coupled"],
    "threshold": "Lossy: lets guesses through that the target would refuse. The drift is measured.",
}


def drafter_help(name: str | None) -> str:
    """The line of help beneath the choice of a drafter, for the one that is chosen."""
    parts = [TERMS[part] for part in (name or "").split("+") if part in TERMS]
    return " ".join(parts) or "Who guesses the next tokens."


def settings_from_form(values: dict[str, Any]) -> Settings:
    """The settings of these raw values, one for each name in `CONTROLS`.

    Raises:
        SettingsError: a value cannot be used; `field` is the name of the control.
    """
    data = {name: values[name] for name in CONTROLS if name not in ("policy", "draft_length")}
    policy = values["policy"]
    if data["rule"] != "threshold":
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
