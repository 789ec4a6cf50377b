"""The JSON of a trace as plain data: its versions, the types of its fields, and what stays on this machine.

In: text, or the dictionaries of a `Trace`. Out: the same in the fields of `VERSION`, checked, so that a replay does not
fail in the middle. Knows nothing of the classes in `events`. docs/trace.schema.json says the same for other programs.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from math import isfinite
from typing import Any

from .drafters import kinds

VERSION = 2

Fits = Callable[[Any], bool]


def refused(why: object) -> ValueError:
    """The error for what is no trace."""
    return ValueError(f"not a Spec Decode trace: {why}")


def read(text: str) -> dict[str, Any]:
    """The fields of a trace of format version 1 or 2, as those of version 2.

    The endpoint `/race` repeats "prompt" and "settings" of the request beside it; the copies are dropped.

    Raises:
        ValueError: in one sentence: the text is not JSON, the version is unknown, or a field is of the wrong type.
            Fields that are missing or unknown are left to who makes a `Trace` of it.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refused(f"it is not JSON ({error})") from error
    version = data.get("version") if isinstance(data, dict) else None
    if type(version) is not int or version not in (1, VERSION):
        raise ValueError("not a Spec Decode trace of version 1 or 2")
    try:
        data = _upgraded(data) if version == 1 else _without_copies(data)
        _check("trace", data, _TRACE)
    except KeyError as error:
        raise refused(f"there is no {error}") from error
    except (TypeError, AttributeError, OverflowError) as error:
        raise refused(error) from error
    return data


def portable(value: Any) -> Any:
    """`value` with each string in it that names a directory or file of this machine reduced to its last component."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(portable(item) for item in value)
    if isinstance(value, str) and (_PATH.match(value) or _exists(value)):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


_PATH = re.compile(r"[/~]|\.{1,2}[\\/]|[A-Za-z]:[\\/]|\\\\")  # of Unix, relative, of Windows, of a Windows network


def _exists(name: str) -> bool:
    try:
        return any(map(os.path.exists, (name, kinds.split(name)[0])))
    except ValueError:  # it holds a NUL
        return False


def _upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """The fields of a trace of version 1, which had no request."""
    if foreign := {"request", "versions", "date", "promises", "pieces", "omitted", "notes"} & data.keys():
        raise refused(f"version 1 has no field {min(foreign)!r}")
    settings, machine = data.pop("settings"), data["machine"]
    if settings.get("draft_length") == "threshold":  # the policy's name until it meant the rule alone
        settings = {**settings, "draft_length": "rate"}
    request = {"prompt": data.pop("prompt"), "settings": settings, "system": None, "drafter": None}
    request |= {"truncate": False, "thinking": False, "prefix": None, "draft": []}
    versions = {name: str(machine[name]) for name in ("python", "torch", "transformers") if name in machine}
    return {**data, "request": request, "versions": versions, "version": VERSION}


def _without_copies(data: dict[str, Any]) -> dict[str, Any]:
    request = data["request"]
    for name in {"prompt", "settings"} & data.keys():
        if data.pop(name) != request[name]:
            raise refused(f"its {name} is not that of its request")
    return data


def _number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and isfinite(x)


def _positive(x: Any) -> bool:
    return _number(x) and x >= 0


def _count(x: Any) -> bool:
    return type(x) is int and x >= 0


def _probability(x: Any) -> bool:
    return _number(x) and 0 <= x <= 1


def _text(x: Any) -> bool:
    return isinstance(x, str)


def _date(x: Any) -> bool:
    return isinstance(x, str) and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", x, re.ASCII) is not None


def _truth(x: Any) -> bool:
    return isinstance(x, bool)


def _one_of(*values: str) -> Fits:
    return lambda x: isinstance(x, str) and x in values


def _none_or(fits: Fits) -> Fits:
    return lambda x: x is None or fits(x)


def _all(fits: Fits) -> Fits:
    return lambda x: isinstance(x, list) and all(map(fits, x))


def _row(*kinds: Fits) -> Fits:
    """A list of as many values, the first of the first kind and so on."""
    return lambda x: isinstance(x, list) and len(x) == len(kinds) and all(f(v) for f, v in zip(kinds, x, strict=True))


def _object(**kinds: Fits) -> Fits:
    """An object that holds these fields at least."""
    return lambda x: isinstance(x, dict) and all(name in x and fits(x[name]) for name, fits in kinds.items())


def _names(x: Any) -> bool:
    return isinstance(x, dict) and all(map(_text, x.values()))


def _checked(what: str, kinds: dict[str, Fits]) -> Fits:
    """As `_check`, for an object within another."""

    def fits(x: Any) -> bool:
        if not isinstance(x, dict):
            return False
        _check(what, x, kinds)
        return True

    return fits


def _check(what: str, data: dict[str, Any], kinds: dict[str, Fits]) -> None:
    for name, fits in kinds.items():
        if name in data and not fits(data[name]):
            raise refused(f"the {name} of a {what} cannot be used")


_ALTERNATIVES = _all(_row(_count, _probability))
_TOKEN: dict[str, Fits] = {
    "id": _count,
    "text": _text,
    "role": _one_of("prompt", "target", "accepted", "rejected", "correction", "bonus"),
    "p": _none_or(_probability),
    "q": _none_or(_probability),
    "draft_position": _none_or(_count),
    "target_top": _ALTERNATIVES,
    "drafter_top": _ALTERNATIVES,
    "compared": _none_or(_row(_number, _number)),
}
_ROUND: dict[str, Fits] = {
    "lane": _one_of("baseline", "speculative"),
    "index": _count,
    "tokens": _all(_checked("token", _TOKEN)),
    "draft_length": _count,
    "draft_seconds": _positive,
    "verify_seconds": _positive,
    "seconds": _positive,
    "clock": _positive,
    "refused": _none_or(_count),
    "kl": _none_or(_number),
    "drafter": _text,
    "residual": _none_or(_row(_positive, _ALTERNATIVES)),
}
_COSTS: dict[str, Fits] = {
    "step_seconds": _positive,
    "verify_ratio": _all(_positive),
    "draft_ratio": _positive,
    "draft_start": _positive,
    "other_ratio": _positive,
    "doubt": _positive,
    "errors": _all(_positive),
}
_PROMISES: dict[str, Fits] = {
    "exact": _truth,
    "same_text": _truth,
    "rejected": _one_of("probabilities", "tokens", "nothing"),
}
_TRACE: dict[str, Fits] = {
    "request": _object(prompt=_text, settings=_object()),
    "pair": _object(target=_text, drafter=_text),
    "machine": _object(),
    "prompt_tokens": _count,
    "rounds": _all(_checked("round", _ROUND)),
    "finish": _names,
    "costs": _none_or(_checked("trace's costs", _COSTS)),
    "versions": _names,
    "date": _none_or(_date),
    "promises": _checked("trace's promises", _PROMISES),
    "pieces": lambda x: _names(x) and all(key.isascii() and key.isdecimal() for key in x),
    "omitted": _all(_text),
    "notes": _all(_text),
}
