"""Files that pretend to hold a race: mutated traces and saved replays, from a seed."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from spec_decode import recording
from spec_decode.events import BASELINE, SPECULATIVE, Trace
from spec_decode.share import saved
from spec_decode.sources.replay import read

STRIKE = '<img src=x onerror="window.owned=1"></script><script>window.owned=1</script>'
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1e308, -0.5, 2**31, "", STRIKE, "javascript:window.owned=1", "\ud800", "\u0000", [], {}, [[]],
    [0, 1, 2], {"__proto__": {"owned": 1}}, {"toString": 1}, "constructor", "{{7*7}}", "${window.owned=1}", "nan",
)  # fmt: skip
KEYS = ("__proto__", "constructor", "toString", "onerror", STRIKE, "version", "extra")


def short() -> Trace:
    """The first rounds of a shipped recording, with all that a trace can hold."""
    trace = read(recording.scenes()[1].path())
    rounds = tuple(r for lane in (BASELINE, SPECULATIVE) for r in trace.lane(lane)[:6])
    known = {str(i) for r in rounds for i in r.alternatives}
    return replace(trace, rounds=rounds, pieces={k: v for k, v in trace.pieces.items() if k in known})


def mutated(count: int, seed: int) -> Iterator[bytes]:
    """So many files: changed values, keys and bytes, cut and compressed, as a trace or within a saved replay."""
    noise, trace = random.Random(seed), short()
    text, page = trace.to_json(), saved.page(trace)
    for _ in range(count):
        kind = noise.random()
        if kind < 0.6:
            data = json.loads(text)
            for _ in range(noise.choice((1, 1, 1, 2, 5))):
                _change(data, noise)
            out = json.dumps(data, ensure_ascii=noise.random() < 0.5).encode("utf-8", "surrogatepass")
        elif kind < 0.8:
            before, rest = page.split(saved.OPEN, 1)
            block, after = rest.split(saved.CLOSE, 1)
            held = json.loads(block)
            _change(held, noise)
            block = json.dumps(held).replace("<", "\\u003c")
            out = (before + saved.OPEN + block + saved.CLOSE + after).encode("utf-8", "surrogatepass")
        else:
            out = text.encode()
        if noise.random() < 0.25:
            out = gzip.compress(out, 1, mtime=0)
        if noise.random() < 0.3:
            out = _damaged(out, noise)
        yield out


def _change(data: Any, noise: random.Random) -> None:
    """One value or key, somewhere."""
    here = data
    while True:
        steps = list(here.keys()) if isinstance(here, dict) else list(range(len(here)))
        if not steps:
            return
        step = noise.choice(steps)
        if isinstance(here[step], (dict, list)) and here[step] and noise.random() < 0.8:
            here = here[step]
            continue
        act = noise.random()
        if act < 0.7:
            here[step] = noise.choice(VALUES)
        elif act < 0.85:
            del here[step]
        elif isinstance(here, dict):
            here[noise.choice(KEYS)] = noise.choice(VALUES)
        else:
            here.append(noise.choice(VALUES))
        return


def _damaged(data: bytes, noise: random.Random) -> bytes:
    if noise.random() < 0.3:
        return data[: noise.randrange(len(data))]
    out = bytearray(data)
    for _ in range(noise.choice((1, 3, 20))):
        out[noise.randrange(len(out))] = noise.randrange(256)
    return bytes(out)
