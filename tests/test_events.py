"""Events: the figures of a round, a trace as JSON in its two versions, its schema, and what an export leaves out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from ui_fakes import FakeSource

from spec_decode.events import (
    BASELINE,
    SPECULATIVE,
    Alternative,
    Comparison,
    Costs,
    Promises,
    Residual,
    Round,
    Token,
    Trace,
)
from spec_decode.request import Request
from spec_decode.settings import Settings

SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "trace.schema.json").read_text(encoding="utf-8"))
VALID = Draft202012Validator(SCHEMA)

examples = hypothesis_settings(max_examples=60, deadline=None, derandomize=True, database=None)

text = st.text(max_size=6)  # any character, controls and quotes included
probability = st.none() | st.floats(0, 1)
seconds = st.floats(0, 1e6)
alternatives = st.lists(st.builds(Alternative, st.integers(0, 2**18), st.floats(0, 1)), max_size=2).map(tuple)
tokens = st.builds(
    Token,
    id=st.integers(0, 2**18),
    text=text,
    role=st.sampled_from(["prompt", "target", "accepted", "rejected", "correction", "bonus"]),
    p=probability,
    q=probability,
    draft_position=st.none() | st.integers(1, 16),
    target_top=alternatives,
    drafter_top=alternatives,
    compared=st.none() | st.builds(Comparison, st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)),
)
rounds = st.builds(
    Round,
    lane=st.sampled_from([BASELINE, SPECULATIVE]),
    index=st.integers(0, 9999),
    tokens=st.lists(tokens, max_size=5).map(tuple),
    draft_length=st.integers(0, 16),
    draft_seconds=seconds,
    verify_seconds=seconds,
    seconds=seconds,
    clock=seconds,
    refused=st.none() | st.integers(0, 16),
    kl=st.none() | st.floats(0, 100),
    drafter=text,
    residual=st.none() | st.builds(Residual, st.floats(0, 1), alternatives),
)
costs = st.builds(
    Costs,
    step_seconds=seconds,
    verify_ratio=st.lists(seconds, max_size=4).map(tuple),
    draft_ratio=seconds,
    draft_start=seconds,
)
names = st.dictionaries(text, text, max_size=3)
requests = st.builds(
    Request,
    prompt=st.text(min_size=1, max_size=6).filter(str.strip),
    settings=st.builds(Settings, draft_length=st.sampled_from([1, 16, "adaptive"]), seed=st.integers(0, 2**53 - 1)),
    system=st.none() | text,
    drafter=st.none() | text,
    truncate=st.booleans(),
    thinking=st.booleans(),
    prefix=st.none() | text | st.lists(st.integers(0, 99) | st.text(min_size=1, max_size=3), max_size=3).map(tuple),
    draft=st.lists(st.integers(0, 99) | st.text(min_size=1, max_size=3), max_size=3).map(tuple),
    history=st.lists(st.tuples(text, text), max_size=2).map(tuple),
)
objects = st.dictionaries(
    text, st.none() | st.booleans() | st.integers() | text | st.lists(text, max_size=2), max_size=3
)
traces = st.builds(
    Trace,
    request=requests.map(Request.to_dict),
    pair=st.builds(lambda more, target, drafter: {**more, "target": target, "drafter": drafter}, names, text, text),
    machine=objects,
    prompt_tokens=st.integers(0, 9999),
    rounds=st.lists(rounds, max_size=5).map(tuple),
    finish=st.dictionaries(st.sampled_from([BASELINE, SPECULATIVE]), st.sampled_from(["stop", "length", "cancelled"])),
    costs=st.none() | costs,
    versions=names,
    date=st.none() | st.datetimes().map(lambda at: f"{at.replace(microsecond=0).isoformat()}Z"),
    promises=st.builds(Promises, st.booleans(), st.booleans(), st.sampled_from(["probabilities", "tokens", "nothing"])),
    pieces=st.dictionaries(st.integers(0, 2**18).map(str), text, max_size=3),
    omitted=st.sampled_from([(), ("system",)]),
    notes=st.lists(text, max_size=2).map(tuple),
)


@examples
@given(traces)
def test_a_trace_survives_json_and_fits_its_schema(trace: Trace) -> None:
    text = trace.to_json()
    again = Trace.from_json(text)
    assert again == trace
    assert all(isinstance(r.tokens, tuple) for r in again.rounds)
    assert again.to_json() == text
    VALID.validate(json.loads(text))


@examples
@given(requests)
def test_a_request_survives_json(request: Request) -> None:
    assert Request.from_dict(json.loads(json.dumps(request.to_dict()))) == request


@examples
@given(rounds)
def test_a_round_survives_json(r: Round) -> None:
    assert Round.from_dict(json.loads(json.dumps(r.to_dict()))) == r


@examples
@given(costs)
def test_costs_survive_json(c: Costs) -> None:
    assert Costs.from_dict(json.loads(json.dumps(c.to_dict()))) == c


@examples
@given(rounds)
def test_the_counts_of_a_round(r: Round) -> None:
    roles = [t.role for t in r.tokens]
    assert r.accepted == roles.count("accepted")
    assert r.drafted == roles.count("accepted") + roles.count("rejected")
    kept = [t for t in r.tokens if t.role not in ("prompt", "rejected")]
    assert r.emitted == tuple(kept) and r.text == "".join(t.text for t in kept)
    assert all(t.emitted == (t in kept) for t in r.tokens)


@examples
@given(traces)
def test_lanes_partition_a_trace(trace: Trace) -> None:
    lanes = [trace.lane(BASELINE), trace.lane(SPECULATIVE)]
    assert sum(map(len, lanes)) == len(trace.rounds)
    for name, lane in zip((BASELINE, SPECULATIVE), lanes, strict=True):
        assert trace.text(name) == "".join(r.text for r in lane)
        assert len(trace.token_ids(name)) == sum(len(r.emitted) for r in lane)
    assert trace.identical == (trace.token_ids(BASELINE) == trace.token_ids(SPECULATIVE))


def small(**changes: object) -> Trace:
    token = Token(5, "a", "target", 0.5)
    first = Round(BASELINE, 0, (token,), 0, 0.0, 0.1, 0.1, 0.1)
    second = Round(SPECULATIVE, 0, (token,), 0, 0.0, 0.1, 0.1, 0.1)
    return Trace(
        **{
            "request": Request("p", system="Be brief.").to_dict(),
            "pair": {"target": "t", "drafter": "d"},
            "machine": {},
            "prompt_tokens": 1,
            "rounds": (first, second),
            **changes,
        }  # type: ignore[arg-type]
    )


def test_identical_is_about_ids() -> None:
    trace = small()
    assert trace.identical
    other = Round(SPECULATIVE, 1, (Token(6, "", "bonus"),), 1, 0.0, 0.1, 0.1, 0.2)
    assert not small(rounds=(*trace.rounds, other)).identical
    rejected = Round(SPECULATIVE, 1, (Token(6, "x", "rejected"),), 1, 0.0, 0.1, 0.1, 0.2)
    assert small(rounds=(*trace.rounds, rejected)).identical


def version_1(**changes: Any) -> dict[str, Any]:
    """As the app wrote it before there was a request."""
    first = {
        "lane": "baseline",
        "index": 0,
        "tokens": [{"id": 5, "text": "a", "role": "target", "p": 0.5, "q": None, "draft_position": None}],
        "draft_length": 0,
        "draft_seconds": 0.0,
        "verify_seconds": 0.1,
        "seconds": 0.1,
        "clock": 0.1,
        "refused": None,
        "kl": None,
    }
    return {
        "pair": {"target": "t", "drafter": "lookup", "device": "cpu", "dtype": "int8"},
        "settings": {**Settings(seed=7).to_dict(), "draft_length": "threshold"},
        "machine": {"processor": "x", "python": "3.11.2", "torch": "2.11.0", "prefill_chunks": [[384, 1024]]},
        "prompt": "p",
        "prompt_tokens": 4,
        "rounds": [first, {**first, "lane": "speculative"}],
        "finish": {"baseline": "length", "speculative": "length"},
        "costs": {"step_seconds": 0.1, "verify_ratio": [1.0, 1.1], "draft_ratio": 0.05},
        "version": 1,
        **changes,
    }


def test_a_trace_of_version_1_is_read() -> None:
    trace = Trace.from_json(json.dumps(version_1()))
    assert trace.prompt == "p" and trace.settings["seed"] == 7 and trace.prompt_tokens == 4 and trace.identical
    assert trace.settings["draft_length"] == "rate", "the policy's name of today"
    assert trace.versions == {"python": "3.11.2", "torch": "2.11.0"} and trace.date is None and trace.version == 2
    assert trace.costs == Costs(0.1, (1.0, 1.1), 0.05) and trace.promises == Promises()
    assert Trace.from_json(trace.to_json()) == trace
    VALID.validate(json.loads(trace.to_json()))
    fixed = version_1(settings=Settings(draft_length=3).to_dict())
    assert Trace.from_json(json.dumps(fixed)).settings["draft_length"] == 3


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "{",
        "[" * 100_000,
        "[]",
        "3",
        "null",
        "{}",
        '{"version": 3}',
        '{"version": true}',
        '{"version": "2"}',
        '{"version": 2}',
        '{"version": 1}',
        *(json.dumps(version_1(**bad)) for bad in ({"settings": 3}, {"machine": []}, {"date": None}, {"colour": 1})),
        json.dumps({k: v for k, v in version_1().items() if k != "prompt"}),
    ],
)
def test_what_is_no_trace_is_refused_in_a_sentence(broken: str) -> None:
    with pytest.raises(ValueError, match="not a Spec Decode trace") as caught:
        Trace.from_json(broken)
    assert "\n" not in str(caught.value)


def change(*path: str | int, to: Any = ...) -> Callable[[dict[str, Any]], None]:
    """What sets the place at `path` of a trace as JSON, or deletes it."""

    def apply(data: Any) -> None:
        *way, last = path
        for step in way:
            data = data[step]
        if to is ...:
            del data[last]
        else:
            data[last] = to

    return apply


# Where a trace may be broken, and how; the schema and the reader both refuse it.
TOKEN = ("rounds", 0, "tokens", 0)
BROKEN = [
    *(change(name) for name in ("request", "pair", "machine", "prompt_tokens", "rounds", "version")),
    *(change(*place, "surprise", to=1) for place in ((), ("rounds", 0), TOKEN, ("costs",), ("promises",))),
    *(change("request", name, to=3) for name in ("prompt", "settings")),
    change("pair", "target"),
    change("pair", "drafter", to=None),
    change("machine", to=[]),
    *(change("prompt_tokens", to=value) for value in (-1, 1.5, "4", None)),
    change("rounds", to={}),
    change("rounds", 0, to=3),
    change("rounds", 0, "lane", to="third"),
    *(change("rounds", 0, name) for name in ("lane", "index", "tokens", "draft_length", "seconds", "clock")),
    *(change("rounds", 0, name, to="x") for name in ("index", "draft_length", "seconds", "clock", "refused", "kl")),
    change("rounds", 0, "seconds", to=-0.1),
    change("rounds", 0, "drafter", to=None),
    *(change("rounds", 0, "residual", to=value) for value in ([0.5], [0.5, [], 1], [-1, []], [0.5, [[1]]], {})),
    change(*TOKEN, "id"),
    change(*TOKEN, to=[]),
    *(change(*TOKEN, "role", to=value) for value in ("drafted", None)),
    change(*TOKEN, "text", to=None),
    *(change(*TOKEN, "p", to=value) for value in (1.5, -0.1, "0.5")),
    *(change(*TOKEN, "compared", to=value) for value in ([0.5], [0.5, None], 0.5)),
    *(change(*TOKEN, "target_top", to=value) for value in (None, [[1, 2]], [["a", 0.5]], [[1]], [[1, 0.5, 0]])),
    change("finish", "baseline", to=None),
    change("costs", "step_seconds"),
    change("costs", "verify_ratio", to=[1.0, None]),
    change("versions", "python", to=3),
    *(change("date", to=value) for value in ("today", "2026-01-31T12:00:00+01:00", 7)),
    change("promises", "rejected", to="everything"),
    change("promises", "exact", to=1),
    *(change("pieces", to=value) for value in ([], {"a": "b"}, {"1": 2})),
    change("omitted", to=[7]),
    change("prompt", to=7),
    change("version", to=3),
]


@pytest.mark.parametrize("breaks", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_trace_is_refused_by_the_schema_and_by_the_reader(breaks: Callable[[dict[str, Any]], None]) -> None:
    race = FakeSource().race(Request("hello", Settings(max_new_tokens=3)))
    list(race)
    whole = json.loads(race.trace.to_json())
    VALID.validate(whole)
    assert Trace.from_json(json.dumps(whole)) == race.trace
    broken = copy.deepcopy(whole)
    breaks(broken)
    assert not VALID.is_valid(broken)
    with pytest.raises(ValueError, match="not a Spec Decode trace") as caught:
        Trace.from_json(json.dumps(broken))
    assert "\n" not in str(caught.value)


def test_the_copies_that_the_endpoint_adds_must_be_copies() -> None:
    whole = json.loads(small().to_json())
    copies = {"prompt": whole["request"]["prompt"], "settings": whole["request"]["settings"]}
    VALID.validate({**whole, **copies})
    assert Trace.from_json(json.dumps({**whole, **copies})) == small()
    with pytest.raises(ValueError, match="its prompt is not that of its request"):
        Trace.from_json(json.dumps({**whole, "prompt": "another"}))


def test_an_export_leaves_out_the_system_prompt_unless_it_is_chosen() -> None:
    trace = small()
    assert trace.exported().request["system"] is None and trace.exported().omitted == ("system",)
    assert "Be brief." not in trace.exported().to_json()
    assert trace.exported(system=True) == trace
    assert trace.exported().exported() == trace.exported()
    none = replace(trace, request=Request("p").to_dict())
    assert none.exported() == none, "nothing to leave out"


def test_an_export_names_no_directory_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    pair = {
        "target": str(tmp_path / "models" / "mine"),
        "drafter": "models/mine+lookup",
        "device": "cuda:0",
        "dtype": "bfloat16",
        "revisions": {
            "target": {"path": "~/a/b/", "commit": "abc/def"},
            "drafter": ["C:\\models\\b", "./c", "../d/e"],
        },
    }
    machine = {
        "processor": "AMD EPYC w/o SMT",
        "cores": 2,
        "home": "/root",
        "prefill_chunks": ((384, 1024), (96, 9)),
    }
    request = Request("Read /etc/passwd", drafter="models/mine").to_dict()
    out = small(pair=pair, machine=machine, request=request).exported()
    assert out.pair["target"] == "mine" and out.pair["drafter"] == "mine+lookup" and out.request["drafter"] == "mine"
    assert out.pair["revisions"] == {"target": {"path": "b", "commit": "abc/def"}, "drafter": ["b", "c", "e"]}
    assert out.pair["device"] == "cuda:0" and out.machine == {**machine, "home": "root"}
    assert out.prompt == "Read /etc/passwd", "a prompt is no path"
    hub = {"target": "google/gemma-4-E2B-it", "drafter": "mtp+lookup", "device": "cpu", "dtype": "int8"}
    assert small(pair=hub).exported().pair == hub, "names on the Hub stay whole"
    assert str(tmp_path) not in out.to_json()
