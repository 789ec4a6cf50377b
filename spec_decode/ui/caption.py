"""What was run, in words: the caption that a result carries, whatever the form says afterwards.

In: a prompt, its settings and `Pair.info`. Out: strings for the token view, which writes them as text.
"""

from __future__ import annotations

from typing import Any

from ..settings import Settings

SHOWN = 300  # characters of the prompt; it goes along with every batch, and the trace has the whole


def caption(
    prompt: str, settings: Settings, pair: dict[str, Any], system: str | None = None, thinking: bool = False
) -> dict[str, Any]:
    """{"prompt": text, cut after `SHOWN` characters, "settings": [one string each]}; a setting that had no effect, such
    as the seed of a greedy race, is left out."""
    names = [str(pair[key]) for key in ("target", "drafter") if pair.get(key)]
    place = [str(pair[key]) for key in ("device", "dtype") if pair.get(key)]
    said = [f"{' + '.join(names)} on {', '.join(place)}", f"draft length {settings.draft_length}"]
    lenient = "" if settings.exact else f" (lossy, lenience {settings.lenience:g})"
    said += [f"rule {settings.rule}{lenient}", f"temperature {settings.temperature:g}"]
    if settings.temperature:
        said += [f"top-p {settings.top_p:g}"] if settings.top_p != 1 else []
        said += [f"top-k {settings.top_k}"] if settings.top_k else []
        said += [f"seed {settings.seed}"]
    said += [f"at most {settings.max_new_tokens:,} new tokens"]
    said += ["thinking first"] if thinking else []
    said += [f"system prompt: {_cut(system.strip(), 120)}"] if system and system.strip() else []
    return {"prompt": _cut(prompt.strip(), SHOWN), "settings": said}


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length].rstrip()}… ({len(text):,} characters)"
