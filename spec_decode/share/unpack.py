"""The JSON of a trace in a file: plain, compressed by gzip, or within a saved replay.

In: bytes. Out: text, not yet known to be a trace. Nothing in a file is executed, and no file makes more than `LARGEST`
bytes of text. assets/reading.js reads the same in the browser.
"""

from __future__ import annotations

import json
import zlib
from base64 import b64decode

LARGEST = 64_000_000  # bytes of a trace
VERSION = 1  # of a saved replay
OPEN = '<script type="application/json" id="sd-replay">'
CLOSE = "</script>"

_GZIP = b"\x1f\x8b"


def trace_text(data: bytes) -> str:
    """The JSON text.

    Raises:
        ValueError: in one sentence: it is damaged, too large, or a page that holds no replay.
    """
    if data[:2] == _GZIP:
        data = inflated(data)
    if len(data) > LARGEST:
        raise ValueError(f"it has {len(data):,} bytes, and at most {LARGEST:,} are read")
    text = data.decode("utf-8")
    return _of_page(text) if text.lstrip("\ufeff \t\r\n").startswith("<") else text


def inflated(data: bytes) -> bytes:
    """What was compressed by gzip, of at most `LARGEST` bytes.

    Raises:
        ValueError: it is damaged or larger.
    """
    unpacker = zlib.decompressobj(31)
    try:
        plain = unpacker.decompress(data, LARGEST + 1)
    except zlib.error as error:
        raise ValueError(f"it is damaged ({error})") from error
    if len(plain) > LARGEST:
        raise ValueError(f"it has more than {LARGEST:,} bytes after decompression")
    if not unpacker.eof:
        raise ValueError("it is damaged (it ends before its data do)")
    return plain


def _of_page(text: str) -> str:
    start = text.find(OPEN)
    end = text.find(CLOSE, start)
    if start < 0 or end < 0:
        raise ValueError("this page holds no replay of Spec Decode")
    try:
        saved = json.loads(text[start + len(OPEN) : end])
        version, packed = saved["spec_decode_replay"], saved["trace"]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise ValueError("the replay in this page is damaged") from error
    if type(version) is not int or version != VERSION:
        raise ValueError(f"the replay in this page is not of version {VERSION}")
    if not isinstance(packed, str):
        raise ValueError("the replay in this page is damaged")
    try:
        return inflated(b64decode(packed, validate=True)).decode("utf-8")
    except ValueError as error:
        raise ValueError(f"the replay in this page cannot be read: {error}") from error
