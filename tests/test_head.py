"""The head of the page: what a browser's tab and a preview of a shared link show."""

from __future__ import annotations

import io
import re
import socket
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import gradio
import httpx
import pytest
from PIL import Image
from ui_fakes import FakeSource, fake_load

from spec_decode.ui import Engine, build, launch_options
from spec_decode.ui.head import rewritten

PROXIED = {"host": "127.0.0.1:7860", "x-forwarded-host": "me-spec-decode.hf.space", "x-forwarded-proto": "https"}


class Tags(HTMLParser):
    """The title, the metas and the links of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.titles: list[str] = []
        self.metas: list[tuple[str, str]] = []
        self.links: dict[str, list[str]] = {}
        self._in_title = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self._in_title = tag == "title"
        if tag == "meta" and "content" in given:
            self.metas.append((given.get("property") or given.get("name", ""), given["content"]))
        if tag == "link":
            self.links.setdefault(given.get("rel", ""), []).append(given["href"])

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.titles.append(data)
            self._in_title = False


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    page = build(Engine(fake_load(FakeSource())))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    page.launch(server_port=port, prevent_thread_lock=True, **launch_options())
    yield page
    page.close()


@pytest.fixture
def client(page: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=page.local_url) as client:
        yield client


def test_a_shared_link_previews_as_this_app(client: httpx.Client) -> None:
    for path in ("/", "/?__theme=dark"):
        tags = Tags(client.get(path).text)
        metas = dict(tags.metas)
        assert tags.titles == ["Spec Decode"]
        assert len(metas) == len(tags.metas), "no tag is there twice"
        assert metas["og:title"] == metas["twitter:title"] == "Spec Decode"
        assert "speculative decoding" in metas["description"] == metas["og:description"] == metas["twitter:description"]
        assert metas["twitter:card"] == "summary_large_image" and metas["og:image:alt"]
        assert not [value for _, value in tags.metas if "gradio" in value.lower() or not value]


def test_addresses_are_absolute_behind_a_proxy_and_beneath_a_path(client: httpx.Client, page: Any) -> None:
    for headers, root in [
        ({}, page.local_url.rstrip("/")),
        (PROXIED, "https://me-spec-decode.hf.space"),
        ({"host": "example.org"}, "http://example.org"),
    ]:
        metas = dict(Tags(client.get("/", headers=headers).text).metas)
        assert metas["og:url"] == f"{root}/"
        assert metas["og:image"] == metas["twitter:image"] == f"{root}/preview.png"
    page.app.root_path = "/race"
    try:
        metas = dict(Tags(client.get("/", headers=PROXIED).text).metas)
    finally:
        page.app.root_path = ""
    assert metas["og:image"] == "https://me-spec-decode.hf.space/race/preview.png"
    bad = client.get("/", headers={"x-forwarded-host": 'x"><script>alert(1)</script>'})
    assert "<script>alert" not in bad.text


def test_the_preview_and_the_icons_are_pictures_of_the_size_they_claim(client: httpx.Client) -> None:
    tags = Tags(client.get("/").text)
    metas = dict(tags.metas)
    preview = client.get(metas["og:image"])
    picture = Image.open(io.BytesIO(preview.content))
    claimed = (int(metas["og:image:width"]), int(metas["og:image:height"]))
    assert picture.size == claimed == (1200, 630) and len(preview.content) < 200_000
    assert preview.headers["content-type"] == metas["og:image:type"] == "image/png"
    for rel in ("icon", "apple-touch-icon"):
        for href in tags.links[rel]:
            icon = client.get(urljoin("/", href))
            assert icon.status_code == 200 and icon.headers["content-type"].startswith("image/")
    touch = Image.open(io.BytesIO(client.get(urljoin("/", tags.links["apple-touch-icon"][0])).content))
    assert min(touch.size) >= 180
    assert client.get("/favicon.ico").content == client.get("/icon.png").content
    manifest = client.get("/manifest.json").json()
    assert manifest["name"] == "Spec Decode" and all("pwa_icon" in icon["src"] for icon in manifest["icons"])


def test_only_pages_are_rewritten(client: httpx.Client) -> None:
    page = client.get("/")
    assert int(page.headers["content-length"]) == len(page.content) or "content-encoding" in page.headers
    assert page.text.count("</head>") == 1 and "<gradio-app" in page.text and "window.gradio_config" in page.text
    assert re.search(r"<meta charset[^>]*>", page.text.encode()[:1024].decode("utf-8", "ignore"))
    assert client.head("/").status_code == 200
    assert client.get("/robots.txt").text.startswith("User-agent")
    assert rewritten("<p>no head</p>", "http://x") == "<p>no head</p>"


def test_the_page_is_compressed_for_those_who_ask_and_begins_with_the_status_of_now(
    client: httpx.Client, page: Any
) -> None:
    plain = client.get("/", headers={"accept-encoding": "identity"})
    packed = client.get("/", headers={"accept-encoding": "gzip, br"})
    assert packed.headers["content-encoding"] == "gzip" and "accept-encoding" in packed.headers["vary"].lower()
    assert "content-encoding" not in plain.headers and int(plain.headers["content-length"]) == len(plain.content)
    assert int(packed.headers["content-length"]) < 0.5 * len(plain.content)
    assert packed.text.count("<gradio-app") == plain.text.count("<gradio-app") == 1
    (status,) = (c["id"] for c in page.config["components"] if c["props"].get("elem_id") == "sd-status")
    page.current = {**page.current, status: lambda: "the engine as it is now"}
    assert "the engine as it is now" in client.get("/").text, "not as it was when the page was built"


def test_the_page_of_a_share_link_is_rewritten_too() -> None:
    share = Path(gradio.__file__).parent / "templates" / "frontend" / "share.html"
    tags = Tags(rewritten(share.read_text(encoding="utf-8"), "https://abc.gradio.live"))
    metas = dict(tags.metas)
    assert tags.titles == ["Spec Decode"] and len(metas) == len(tags.metas)
    assert metas.pop("og:image") == metas.pop("twitter:image") == "https://abc.gradio.live/preview.png"
    assert metas.pop("og:url") == "https://abc.gradio.live/"
    assert not [value for value in metas.values() if "gradio" in value.lower()]
