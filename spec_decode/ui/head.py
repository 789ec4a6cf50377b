"""The head of the page as link previews and browsers read it: title, description, icons, Open Graph tags.

Gradio's template names Gradio there, twice, and what `launch(head=...)` adds is put in by a script, which no preview
runs. So our tags replace Gradio's in the HTML that is sent. Addresses in Open Graph tags must be absolute, so they are
made from each request, by Gradio's own rule (forwarded host and scheme, root path).
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Awaitable, Callable
from html import escape

from gradio.route_utils import get_root_url
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..paths import ASSETS

TITLE = "Spec Decode"
DESCRIPTION = (
    "Watch, measure and trust speculative decoding: the same model with and without a drafter, side by side, with "
    "the same text and every number measured live."
)
PREVIEW_ALT = "Two lanes of the same tokens; the one with a drafter is ahead."
PREVIEW_SIZE = (1200, 630)
FILES = {"preview.png": "image/png", "icon.png": "image/png", "icon.svg": "image/svg+xml"}

_FOREIGN = re.compile(
    r"""\s*<(?:meta\s[^>]*?(?:property|name)=["'](?:og:|twitter:|description["'])[^>]*>|title>[^<]*</title>)""", re.I
)


def routes() -> list[Route]:
    """The icon and the preview image, at the root of the app."""
    return [Route(f"/{name}", _sender(name, kind)) for name, kind in FILES.items()]


def _sender(name: str, kind: str) -> Callable[[Request], Awaitable[FileResponse]]:
    async def send(_: Request) -> FileResponse:
        return FileResponse(ASSETS / name, media_type=kind, headers={"cache-control": "max-age=86400"})

    return send


def tags(root: str) -> str:
    """The tags of a page that the world sees at `root`, an absolute address without a slash at its end."""
    image = f"{root}/preview.png"
    width, height = PREVIEW_SIZE
    metas = [
        ("name", "description", DESCRIPTION),
        ("property", "og:site_name", TITLE),
        ("property", "og:title", TITLE),
        ("property", "og:description", DESCRIPTION),
        ("property", "og:type", "website"),
        ("property", "og:url", f"{root}/"),
        ("property", "og:image", image),
        ("property", "og:image:type", FILES["preview.png"]),
        ("property", "og:image:width", str(width)),
        ("property", "og:image:height", str(height)),
        ("property", "og:image:alt", PREVIEW_ALT),
        ("name", "twitter:card", "summary_large_image"),
        ("name", "twitter:title", TITLE),
        ("name", "twitter:description", DESCRIPTION),
        ("name", "twitter:image", image),
        ("name", "twitter:image:alt", PREVIEW_ALT),
    ]
    lines = [f"<title>{escape(TITLE)}</title>"]
    lines += [f'<meta {kind}="{key}" content="{escape(value)}" />' for kind, key, value in metas]
    lines += [
        '<link rel="icon" type="image/svg+xml" href="./icon.svg" />',
        '<link rel="icon" type="image/png" sizes="512x512" href="./icon.png" />',
        '<link rel="apple-touch-icon" href="./icon.png" />',
    ]
    return "".join(f"\n\t\t{line}" for line in lines)


def rewritten(html: str, root: str) -> str:
    """This page of Gradio's with our tags in its head instead of Gradio's."""
    head, end, rest = html.partition("</head>")
    head = _FOREIGN.sub("", head)
    start = re.search(r"<meta\s+charset[^>]*>", head) or re.search(r"<head[^>]*>", head)
    if not end or not start:
        return html
    return head[: start.end()] + tags(root) + head[start.end() :] + end + rest


class Head:
    """ASGI middleware that gives every HTML page of the app our head, and compresses it; what is not HTML passes as it
    is."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            return await self.app(scope, receive, send)
        held: list[Message] = []  # the start of an HTML response, and then its body

        async def change(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                if headers.get("content-type", "").startswith("text/html") and "content-encoding" not in headers:
                    held.append(message)
                    return
            if held and message["type"] == "http.response.body":
                held.append(message)
                if not message.get("more_body"):
                    await self._finish(scope, held, send)
                return
            await send(message)

        return await self.app(scope, receive, change)

    async def _finish(self, scope: Scope, held: list[Message], send: Send) -> None:
        start, *parts = held
        body = b"".join(part.get("body", b"") for part in parts)
        if b"<gradio-app" in body:
            request = Request(scope)
            app_root = getattr(scope.get("app"), "root_path", "") or scope.get("root_path", "")
            root = get_root_url(request, request.url.path, app_root)
            body = rewritten(body.decode(), root).encode()
            headers = MutableHeaders(raw=start["headers"])
            headers.add_vary_header("accept-encoding")
            if "gzip" in request.headers.get("accept-encoding", ""):  # Gradio compresses its scripts, but not its pages
                body = gzip.compress(body)
                headers["content-encoding"] = "gzip"
            headers["content-length"] = str(len(body))
        await send(start)
        await send({"type": "http.response.body", "body": body})
