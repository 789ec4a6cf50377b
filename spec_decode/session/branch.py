"""What a visitor tries on a finished race: another token at a position, or a draft of their own.

In: what the page asks, as data of any kind, and the `Engine`. Out: the `Request` of a branch, or the answer to one
round with a person's draft, as JSON. Nothing is kept between two questions, and the device is not held while a person
thinks: the page holds the request of its race and the ids of the text, and sends both with every question.

A branch keeps the seed under rules whose noise depends on the position alone, so that it shows what the forced token
changes and nothing else. Under rules that draw independently it gets a seed of its own: whoever chooses a token or a
draft has seen what the noise of the race did, and a choice that knows the noise it is judged by is no longer accepted
with the probability that makes the rule exact (`drafters.person`).
"""

from __future__ import annotations

import secrets
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..drafters.kinds import PERSON
from ..errors import SettingsError, UserError
from ..events import SPECULATIVE, Round
from ..request import Request
from ..settings import MAX_DRAFT_LENGTH, MAX_SEED, Settings
from .device import Engine, Limits, Status
from .feed import dumps, encode_round

MOST = 20_000  # characters of a conversation that is read again for every question
TYPED = 8_000  # characters that a visitor may type at once

RECORDED = (
    "This is a recording, and there is no model here to ask. Race your own prompt to try another token or to draft."
)
FOREIGN = "This source cannot go on from a given text."
LONG = f"Branches are offered for conversations of up to {MOST:,} characters."
CUT = "The prompt was cut to fit; race one that fits whole to try another token or to draft."
UNREADABLE = "This is no branch that can be raced."
TAKEN_BACK = "The round was stopped before it was over."


def offer(status: Status, request: Request) -> dict[str, Any]:
    """What the page is told at the end of a race: its "request", from which branches are made, or None and in
    "unbranched" a sentence why there are none."""
    why = RECORDED if status.recording else "" if status.branches else FOREIGN
    why = why or _refused(request)
    return {"request": None if why else request.to_dict(), "unbranched": why}


def branch(asked: object, limits: Limits) -> Request:
    """The request of a branch, for a server with these limits.

    Args:
        asked: {"request": of the race it branches from, "prefix": ids of the text it keeps and what is forced after
            them, as an id or as text}, and for a draft of a whole text "draft": text and "length": γ.

    Raises:
        UserError: it cannot be raced.
    """
    request, left = _read(asked, limits)
    settings = replace(_unused(request.settings), max_new_tokens=left)
    if request.draft:
        settings = replace(settings, draft_length=asked.get("length"))  # type: ignore[attr-defined]  # `_read` knows
    return replace(request, settings=settings)


def one_round(engine: Engine, visitor: str, asked: object, gone: Callable[[], bool] = lambda: False) -> str:
    """One round after a given text with what a person drafted, at most `MAX_DRAFT_LENGTH` tokens of it. Takes the
    device for as long as the text is read and the round runs.

    Args:
        asked: as of `branch`, with an "id" that the answer repeats.
        gone: whether nobody waits for the answer any more; asked before the device is taken and between steps.

    Returns:
        JSON {"answer": id, "round": as `encode_round` makes it, "ended": "stop" or "length" where the text ends with
        it, else None}, or {"answer": id, "problem": a sentence}.
    """
    name = str(asked.get("id"))[:64] if isinstance(asked, dict) else ""
    try:
        request, left = _read(asked, engine.limits)
        if not request.draft:
            raise SettingsError("draft", "Type what comes next.")
        if left < 2:
            raise _at_the_limit(request.settings)
        settings = _unused(request.settings)
        most = min(left, MAX_DRAFT_LENGTH + 1)
        settings = replace(settings, draft_length=MAX_DRAFT_LENGTH, max_new_tokens=most)
        made, pieces, finish = _raced(engine, visitor, replace(request, settings=settings), gone)
    except UserError as error:
        return dumps({"answer": name, "problem": str(error)})
    except Exception as error:  # the page must outlive whatever a library throws
        traceback.print_exc(file=sys.stderr)
        return dumps({"answer": name, "problem": f"The round broke off ({type(error).__name__}: {error})."})
    ended = finish if finish == "stop" or (finish == "length" and most == left) else None
    head = dumps({"answer": name, "ended": ended})[:-1]
    return f'{head},"round":{encode_round(made, pieces)}}}'


def _raced(
    engine: Engine, visitor: str, request: Request, gone: Callable[[], bool]
) -> tuple[Round, dict[str, str], str | None]:
    """The round with the person's draft, the texts of its alternatives, and why the lane ended with it, None where it
    goes on."""
    if gone():
        raise SettingsError("draft", TAKEN_BACK)
    race = engine.open(visitor, request)
    try:
        limit, began = engine.limits.seconds, time.perf_counter()
        fast: list[Round] = []
        done = False
        # The round after it, or the end, says whether the text goes on.
        while not done and len(fast) < 3 and not gone():
            rounds, done = race.advance(0.0)
            fast += [r for r in rounds if r.lane == SPECULATIVE]
            if limit is not None and time.perf_counter() - began > limit:
                race.stop("time")
        if gone() or len(fast) < 2:
            raise SettingsError("draft", TAKEN_BACK)
        if fast[1].drafter != PERSON:
            raise SettingsError("draft", "No tokens can be made of this text; type what comes next.")
        return fast[1], race.pieces(fast[1:2]), None if len(fast) > 2 else race.trace.finish.get(SPECULATIVE)
    finally:
        engine.close(visitor, race)


def _read(asked: object, limits: Limits) -> tuple[Request, int]:
    """The request with its prefix and draft, and how many tokens its race may still write.

    Raises:
        UserError: it is none, or more than is allowed.
    """
    if not isinstance(asked, dict):
        raise SettingsError("branch", UNREADABLE)
    request = Request.from_dict(asked.get("request"))
    if why := _refused(request):
        raise SettingsError("request", why)
    limits.check(request.settings)
    prefix, draft = asked.get("prefix", ()), asked.get("draft") or ""
    typed = [draft, *(part for part in prefix if isinstance(part, str))] if isinstance(prefix, (list, tuple)) else []
    if not typed or not all(isinstance(text, str) for text in typed):
        raise SettingsError("branch", UNREADABLE)
    if sum(map(len, typed)) > TYPED:
        raise SettingsError("draft", f"At most {TYPED:,} characters can be typed at once.")
    left = request.settings.max_new_tokens - len(prefix)
    if left < 1:
        raise _at_the_limit(request.settings)
    return replace(request, prefix=tuple(prefix), draft=(draft,) if draft else ()), left


def _refused(request: Request) -> str:
    """Why no branches are made of this request; empty where they are."""
    if request.truncate:
        return CUT
    texts = (request.prompt, request.system or "", *(text for turn in request.history for text in turn))
    return LONG if sum(map(len, texts)) > MOST else ""


def _at_the_limit(settings: Settings) -> SettingsError:
    most = f"its race writes at most {settings.max_new_tokens:,} tokens"
    return SettingsError("max_new_tokens", f"The text ends there: {most}. Race again with more of them.")


def _unused(settings: Settings) -> Settings:
    """The settings with noise that nobody has seen, where the rule asks for it."""
    return replace(settings, seed=secrets.randbelow(MAX_SEED + 1)) if settings.deciding.noise == "round" else settings
