"""A link that holds a prompt and its settings: JSON, compressed, in the fragment of an address, which no server gets.

In: a `Request`, or a fragment. Out: the fragment, or the `Request`, validated as the form's is. The fragment is
`#race=1.` and the JSON by raw DEFLATE (RFC 1951) in base64url without padding (RFC 4648, section 5); `&run=1` after it
asks to run the race. assets/link.js writes the same, and docs/sharing.md has the fields.
"""

from __future__ import annotations

import json
import re
import zlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from ..request import Request
from ..settings import Settings
from ..trace_format import portable

VERSION = 1
LONGEST = 8000  # characters of a fragment; longer addresses are cut by some programs
LARGEST = 200_000  # bytes of its JSON
SETTINGS = tuple(name for name in Settings.names() if name != "synthetic_acceptance")
FIELDS = ("prompt", "settings", "drafter", "system", "thinking")
TOO_LONG = (
    f"The prompt is too long for a link, which holds about {LONGEST:,} characters after compression; save a replay "
    "instead."
)

_FRAGMENT = re.compile(r"(?:^|[#&])race=([^&]*)")
_VALUE = re.compile(r"(\d{1,4})\.([A-Za-z0-9_-]+)")


class LinkError(UserError, ValueError):
    """A link that cannot be made or read; the message is one sentence."""


def write(request: Request, system: bool = False, run: bool = False) -> str:
    """The fragment of this request, without the sign #.

    Args:
        system: put the system prompt into it. It is left out otherwise, and of a drafter in a directory of this machine
            all but the last component.
        run: ask to run the race when the link is opened.

    Raises:
        LinkError: it would be too long, or the request has a part that no form has.
    """
    if request.prefix or request.draft or request.history or request.settings.synthetic_acceptance is not None:
        raise LinkError(
            "A link holds a prompt and settings; this race has a forced prefix, a draft, a history or a synthetic "
            "acceptance, which only a trace keeps."
        )
    usual = Settings(temperature=request.settings.temperature).to_dict()
    given = request.settings.to_dict()
    data: dict[str, Any] = {"prompt": request.prompt}
    if changed := {name: given[name] for name in SETTINGS if given[name] != usual[name]}:
        data["settings"] = changed
    if request.settings.temperature:
        data.setdefault("settings", {})["temperature"] = request.settings.temperature
    data |= {"drafter": portable(request.drafter)} if request.drafter else {}
    data |= {"system": request.system} if request.system and system else {}
    data |= {"thinking": True} if request.thinking else {}
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()) + packer.flush()
    text = f"race={VERSION}.{urlsafe_b64encode(packed).decode().rstrip('=')}{'&run=1' if run else ''}"
    if len(text) > LONGEST:
        raise LinkError(TOO_LONG)
    return text


def read(fragment: str) -> Request | None:
    """The request that a fragment holds, with or without the sign #; None where it holds none.

    Raises:
        LinkError: it is damaged, too long, of another version, or asks for what cannot be.
    """
    found = _FRAGMENT.search(fragment[: 2 * LONGEST])
    if not found:
        return None
    if len(fragment) > LONGEST:
        raise LinkError(f"This link is too long: {len(fragment):,} characters, and at most {LONGEST:,} are read.")
    value = _VALUE.fullmatch(found[1])
    if not value:
        raise _damaged("it was cut or changed on its way")
    if int(value[1]) != VERSION:
        raise LinkError(f"This link is of version {int(value[1])}, and version {VERSION} can be read here.")
    try:
        packed = urlsafe_b64decode(value[2] + "=" * (-len(value[2]) % 4))
        unpacker = zlib.decompressobj(-15)
        plain = unpacker.decompress(packed, LARGEST)
        if unpacker.unconsumed_tail:
            raise LinkError(f"This link holds more than {LARGEST:,} bytes, and no more are read.")
        if not unpacker.eof or unpacker.unused_data:
            raise _damaged("it was cut or changed on its way")
        return parse(plain.decode("utf-8"))
    except (ValueError, zlib.error) as error:
        raise error if isinstance(error, LinkError) else _damaged("it was cut or changed on its way") from error


def offered(drafter: str | None, drafters: Sequence[str]) -> str | None:
    """Which of these drafters a link means, where it is one of them."""
    return next((name for name in drafters if drafter in (name, portable(name))), None) if drafter else None


def parse(text: str) -> Request:
    """The request in the JSON that a link holds, at most `LARGEST` characters of it.

    Raises:
        LinkError: it is damaged, too long, or asks for what cannot be.
    """
    if len(text) > LARGEST:
        raise LinkError(f"The prompt and its settings take more than {LARGEST:,} characters, and no more are read.")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged("it is not JSON") from error
    if not isinstance(data, dict) or not isinstance(settings := data.get("settings", {}), dict):
        raise _damaged("it holds no object")
    if unknown := sorted(data.keys() - set(FIELDS)) + sorted(settings.keys() - set(SETTINGS)):
        raise _damaged(f"it names {unknown[0][:40]!r}, which nothing here is called")
    try:
        return Request.from_dict(data)
    except UserError as error:
        raise LinkError(f"This link cannot be used: {error}") from error


def _damaged(why: str) -> LinkError:
    return LinkError(f"This link is damaged: {why}.")
