"""Events: what a round says of itself, and that a trace survives JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from spec_decode.events import BASELINE, SPECULATIVE, Costs, Round, Token, Trace, emitted_tokens

examples = hypothesis_settings(max_examples=60, deadline=None, derandomize=True, database=None)

text = st.text(max_size=6)  # any character, controls and quotes included
probability = st.none() | st.floats(0, 1)
seconds = st.floats(0, 1e6)
tokens = st.builds(
    Token,
    id=st.integers(0, 2**18),
    text=text,
    role=st.sampled_from(["prompt", "target", "accepted", "rejected", "correction", "bonus"]),
    p=probability,
    q=probability,
    draft_position=st.none() | st.integers(1, 16),
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
)
costs = st.builds(
    Costs,
    step_seconds=seconds,
    verify_ratio=st.lists(seconds, max_size=4).map(tuple),
    draft_ratio=seconds,
    draft_start=seconds,
)
objects = st.dictionaries(
    text, st.none() | st.booleans() | st.integers() | text | st.lists(text, max_size=2), max_size=3
)
traces = st.builds(
    Trace,
    pair=objects,
    settings=objects,
    machine=objects,
    prompt=text,
    prompt_tokens=st.integers(0, 9999),
    rounds=st.lists(rounds, max_size=5).map(tuple),
    finish=st.dictionaries(st.sampled_from([BASELINE, SPECULATIVE]), st.sampled_from(["stop", "length", "cancelled"])),
    costs=st.none() | costs,
)


@examples
@given(traces)
def test_a_trace_survives_json(trace: Trace) -> None:
    again = Trace.from_json(trace.to_json())
    assert again == trace
    assert all(isinstance(r.tokens, tuple) for r in again.rounds)
    assert again.to_json() == trace.to_json()


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
        assert len(trace.token_ids(name)) == emitted_tokens(lane)
    assert trace.identical == (trace.token_ids(BASELINE) == trace.token_ids(SPECULATIVE))


def small(**changes: object) -> Trace:
    token = Token(5, "a", "target", 0.5)
    first = Round(BASELINE, 0, (token,), 0, 0.0, 0.1, 0.1, 0.1)
    second = Round(SPECULATIVE, 0, (token,), 0, 0.0, 0.1, 0.1, 0.1)
    return Trace(
        **{
            "pair": {},
            "settings": {},
            "machine": {},
            "prompt": "p",
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


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "{}",
        '{"version": 2}',
        '{"version": 1}',
        '{"version": 1, "rounds": 3}',
        '{"version": 1, "rounds": [3]}',
        '{"version": 1, "rounds": [{}]}',
        '{"version": 1, "rounds": [{"tokens": [{"id": 1}]}]}',
        '{"version": 1, "rounds": [], "costs": [1]}',
        '{"version": 1, "rounds": [], "costs": {"step_seconds": 1}}',
        '{"version": 1, "rounds": [], "colour": "red"}',
    ],
)
def test_what_is_no_trace_is_refused(broken: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Trace.from_json(broken)


def test_an_unknown_or_missing_field_is_refused() -> None:
    whole = json.loads(small().to_json())
    for name in ("pair", "prompt", "prompt_tokens"):
        with pytest.raises(ValueError, match="not a Spec Decode trace"):
            Trace.from_json(json.dumps({k: v for k, v in whole.items() if k != name}))
    whole["rounds"][0]["surprise"] = 1
    with pytest.raises(ValueError, match="surprise"):
        Trace.from_json(json.dumps(whole))
