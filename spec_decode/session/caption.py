"""What is run, for the page: its caption, whatever the form says afterwards, and what may be claimed of both texts.

In: a request, the names of a pair, what its source promises. Out: strings for the token view, which writes them as
text.
"""

from __future__ import annotations

from typing import Any

from ..drafters.kinds import KINDS, PERSON
from ..events import Promises, Trace
from ..request import Request
from ..settings import Settings
from ..sources import Recording
from ..trace_format import portable

SHOWN = 300  # characters of the prompt; it goes along with every batch, and the trace has the whole
LOSSY = (
    "The {} rule is lossy: it accepts drafted tokens that the target would refuse, so the texts may differ and the "
    "speedup is not free."
)
INDEPENDENT = (
    "The {} rule is exact in distribution: the lanes draw separately, so they may show different, equally likely texts."
)
SYNTHETIC = (
    "Acceptance is synthetic: each drafted token was accepted with probability {:g}, whatever the target says. Only "
    "the times mean something; the speculative text does not."
)
NOT_EXACT = "This source does not promise that its texts follow the target’s own distribution."
NOT_SAME = "This source does not promise that both lanes write the same text."
UNDRAWN = [PERSON, *(kind.name for kind in KINDS if not kind.model_types)]  # drafters whose tokens have no q


def about(
    request: Request, pair: dict[str, Any], promises: Promises, recording: Recording | None = None
) -> dict[str, Any]:
    """What the token view has to know of a race. It claims no more than the rule and the source promise together; "why"
    is a sentence on what they do not. "undrawn" names the drafters whose tokens are drawn from no distribution, so that
    q is one-hot for a rule that asks for it; "given" says that the output was made to begin with a text, or that a
    person drafts."""
    settings = request.settings
    exact, same_text = settings.exact and promises.exact, settings.same_text and promises.same_text
    return {
        "ran": caption(request, pair, recording),
        "recorded": str(recording) if recording else "",
        "rule": settings.rule,
        "deciding": settings.deciding.name,
        "temperature": settings.temperature,
        "lenience": settings.lenience,
        "undrawn": UNDRAWN,
        "exact": exact,
        "same_text": same_text,
        "synthetic": settings.synthetic,
        "why": _why(settings, promises),
        "rejected": promises.rejected,
        "limit": settings.max_new_tokens,
        "given": request.prefix is not None or bool(request.draft),
    }


def head(trace: Trace) -> dict[str, Any]:
    """What the page keeps of a finished race beside its rounds: {"request", "pair", "machine", "versions", "date"}. The
    request is the visitor's own and stays whole; of local paths in the rest the last component is left."""
    told = trace.exported()
    return {
        "request": trace.request,
        "pair": told.pair,
        "machine": told.machine,
        "versions": told.versions,
        "date": told.date,
    }


def _why(settings: Settings, promises: Promises) -> str:
    if settings.synthetic_acceptance is not None:
        return SYNTHETIC.format(settings.synthetic_acceptance)
    if not settings.exact:
        return LOSSY.format(settings.rule)
    if not promises.exact:
        return NOT_EXACT
    if not settings.same_text:
        return INDEPENDENT.format(settings.rule)
    return "" if promises.same_text else NOT_SAME


def caption(request: Request, pair: dict[str, Any], recording: Recording | None = None) -> dict[str, Any]:
    """{"prompt": text, cut after `SHOWN` characters, "settings": [one string each]}; a setting that had no effect, such
    as the seed of a greedy race, is left out."""
    said = [on_place(pair), *_settings(request.settings)]
    said += ["thinking first"] if request.thinking else []
    said += ["from a given text"] if request.prefix else []
    said += ["a person drafts"] if request.draft else []
    if request.system and request.system.strip():
        said.append(f"system prompt: {_cut(request.system.strip(), 120)}")
    said += [str(recording)] if recording else []
    return {"prompt": _cut(request.prompt.strip(), SHOWN), "settings": said}


def on_place(pair: dict[str, Any]) -> str:
    """The names of a pair and what it runs on, in one line; of local paths the last component is left."""
    told = portable(pair)
    names, place = (
        by.join(str(told[key]) for key in keys if told.get(key))
        for by, keys in ((" + ", ("target", "drafter")), (", ", ("device", "dtype")))
    )
    return f"{names} on {place}"


def _settings(settings: Settings) -> list[str]:
    said = [f"draft length {settings.draft_length}"]
    lenient = "" if settings.exact else f" (lossy, lenience {settings.lenience:g})"
    rule = f"rule {settings.rule}{lenient}"
    if settings.synthetic_acceptance is not None:
        rule = f"synthetic acceptance {settings.synthetic_acceptance:g}"
    said += [rule, f"temperature {settings.temperature:g}"]
    if settings.temperature:
        said += [f"top-p {settings.top_p:g}"] if settings.top_p != 1 else []
        said += [f"top-k {settings.top_k}"] if settings.top_k else []
        said += [f"seed {settings.seed}"]
    return [*said, f"at most {settings.max_new_tokens:,} new tokens"]


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length].rstrip()}… ({len(text):,} characters)"
