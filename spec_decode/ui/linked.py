"""What a link asks the form for: the values of its controls, the drafter, the switch for thinking.

In: the fragment of the page's address, or the request that it holds. Out: values of controls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..request import Request
from ..rules import RULES, default
from ..share import link
from .form import CONTROLS

ADDRESS = "() => [location.hash.slice(0, 20000)]"  # the fragment, as the argument of an event


def wanted(fragment: object, drafters: Sequence[str], thinking: bool) -> tuple[str, bool]:
    """The drafter and the switch for thinking that the link in a page's address asks for; where it asks for nothing
    that is offered, the first of `drafters`, and `thinking` as it stands."""
    try:
        request = link.read(fragment) if isinstance(fragment, str) else None
    except link.LinkError:
        request = None
    if request is None:
        return drafters[0], thinking
    return link.offered(request.drafter, drafters) or drafters[0], request.thinking


def form_values(request: Request) -> dict[str, Any]:
    """The values of the controls for this request, by their names."""
    settings = request.settings
    values = {name: getattr(settings, name) for name in CONTROLS if name not in ("policy", "draft_length", "rule")}
    values["rule"] = "auto" if settings.rule == default(settings.temperature).name else settings.rule
    if not RULES[str(settings.rule)].lenient:
        del values["lenience"]
    if isinstance(settings.draft_length, int):
        return values | {"policy": "fixed", "draft_length": settings.draft_length}
    return values | {"policy": settings.draft_length}
