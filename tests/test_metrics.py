"""Metrics: against figures worked out by hand, and the closed form of the speedup model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from spec_decode import metrics
from spec_decode.events import BASELINE, SPECULATIVE, Costs, Round, Token, Trace
from spec_decode.metrics import Lane

FREE = Costs(step_seconds=0.02, verify_ratio=(1.0,) * 17, draft_ratio=0.0)


def make(lane: str, pattern: list[tuple[int, int]], pace: float, prefill: float = 0.5) -> list[Round]:
    """A prefill of `prefill` seconds, then a round of `pace` seconds for each (drafted, accepted)."""
    rounds = [Round(lane, 0, (Token(0, "a", "target"),), 0, 0.0, prefill, prefill, prefill)]
    for i, (drafted, accepted) in enumerate(pattern, 1):
        own = "target" if not drafted else "bonus" if accepted == drafted else "correction"
        tokens = [
            Token(10 * i + j, "b", "accepted" if j < accepted else "rejected", draft_position=j + 1)
            for j in range(drafted)
        ]
        tokens.append(Token(i, "c", own))  # type: ignore[arg-type]
        rounds.append(Round(lane, i, tuple(tokens), drafted, 0.1, 0.2, pace, prefill + i * pace))
    return rounds


def race(baseline: list[Round], speculative: list[Round], costs: Costs | None = None) -> Trace:
    request = {"prompt": "p", "settings": {"seed": 1}}
    return Trace(request, {"target": "t"}, {"cpu": "x"}, 4, (*baseline, *speculative), costs=costs)


# drafted, accepted: 13 of 20 accepted in 6 rounds, two of them without a full draft.
PATTERN = [(4, 4), (4, 2), (4, 0), (4, 3), (0, 0), (4, 4)]


def test_rates_by_hand() -> None:
    rounds = make(SPECULATIVE, PATTERN, pace=0.25)
    assert metrics.time_to_first_token(rounds) == 0.5
    assert metrics.tokens_per_second(rounds) == pytest.approx((13 + 6) / 1.5)
    assert metrics.acceptance_rate(rounds) == pytest.approx(13 / 20)
    assert metrics.tokens_per_pass(rounds) == pytest.approx(1 + 13 / 6)
    assert metrics.tokens_per_pass_histogram(rounds) == {1: 2, 3: 1, 4: 1, 5: 2}
    # Draft 1 was tried 5 times and kept 4; draft 2: 4 of 4; draft 3: 3 of 4; draft 4: 2 of 3.
    assert metrics.per_position_acceptance(rounds) == pytest.approx([4 / 5, 1, 3 / 4, 2 / 3])


def test_prefill_is_not_in_the_rate() -> None:
    slow, fast = (make(BASELINE, [(0, 0)] * 4, 0.1, prefill) for prefill in (9.0, 0.01))
    assert metrics.tokens_per_second(slow) == pytest.approx(10)
    assert metrics.tokens_per_second(fast) == pytest.approx(10)


def test_nothing_to_divide_by() -> None:
    only = make(BASELINE, [], 0.1)
    assert metrics.tokens_per_second([]) is metrics.tokens_per_second(only) is None
    assert metrics.tokens_per_second(make(BASELINE, [(0, 0)], 0.0)) is None
    assert metrics.time_to_first_token([]) is None
    assert metrics.acceptance_rate([]) is metrics.acceptance_rate(make(BASELINE, [(0, 0)], 1.0)) is None
    assert metrics.tokens_per_pass([]) is metrics.tokens_per_pass(only) is None
    assert metrics.tokens_per_pass_histogram(only) == {}
    assert metrics.per_position_acceptance(only) == []
    assert metrics.speedup(race([], [])) is None


def test_a_round_that_ended_the_text_early() -> None:
    """An end-of-sequence token inside the accepted draft: no token of the target's own, and no rejections."""
    tokens = (Token(1, "x", "accepted", draft_position=1), Token(2, "", "accepted", draft_position=2))
    rounds = [*make(SPECULATIVE, [], 1.0), Round(SPECULATIVE, 1, tokens, 4, 0.1, 0.2, 0.5, 1.0)]
    assert metrics.tokens_per_second(rounds) == pytest.approx(4)
    assert metrics.acceptance_rate(rounds) == 1
    assert metrics.per_position_acceptance(rounds) == [1, 1]
    assert metrics.tokens_per_pass_histogram(rounds) == {2: 1}


@pytest.mark.parametrize("a", [0.0, 0.3, 0.8, 0.99])
@pytest.mark.parametrize("length", [0, 1, 4, 16])
def test_expected_tokens_are_the_closed_form(a: float, length: int) -> None:
    """(1 − a^{γ+1}) / (1 − a) where every position is accepted alike (arXiv:2211.17192)."""
    expected = (1 - a ** (length + 1)) / (1 - a)
    for known in (1, 2, 16):
        assert metrics.expected_tokens_per_pass([a] * known, length) == pytest.approx(expected)
    assert metrics.predicted_speedup([a], FREE, length) == pytest.approx(expected)
    costs = Costs(0.02, (1.0, *(1.25,) * 16), 0.05)
    v = 1.25 if length else 1.0
    assert metrics.predicted_speedup([a], costs, length) == pytest.approx(expected / (length * 0.05 + v))
    start = 0.1 if length else 0.0
    slow = replace(costs, draft_start=0.1)
    assert metrics.predicted_speedup([a], slow, length) == pytest.approx(expected / (length * 0.05 + v + start))


def test_expected_tokens_by_hand() -> None:
    assert metrics.expected_tokens_per_pass([], 5) == 1
    assert metrics.expected_tokens_per_pass([1.0], 5) == 6
    assert metrics.expected_tokens_per_pass([0.8, 0.5], 3) == pytest.approx(1 + 0.8 + 0.4 + 0.2)
    assert metrics.predicted_speedup([0.5], Costs(1.0, (1.0, 1.2), 0.1), 3) == pytest.approx(1.875 / 1.5)


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 6).flatmap(lambda d: st.tuples(st.just(d), st.integers(0, d))), min_size=1, max_size=30))
def test_figures_agree_with_each_other(pattern: list[tuple[int, int]]) -> None:
    rounds = make(SPECULATIVE, pattern, 0.5)
    histogram = metrics.tokens_per_pass_histogram(rounds)
    assert sum(histogram.values()) == len(pattern)
    mean = sum(k * v for k, v in histogram.items()) / len(pattern)
    assert metrics.tokens_per_pass(rounds) == pytest.approx(mean)
    assert metrics.tokens_per_second(rounds) == pytest.approx(mean / 0.5)
    acceptance = metrics.per_position_acceptance(rounds)
    assert all(0 <= a <= 1 for a in acceptance)
    if len({drafted for drafted, _ in pattern}) == 1:  # one draft length: the model reproduces its own rounds
        assert metrics.expected_tokens_per_pass(acceptance, pattern[0][0]) == pytest.approx(mean)


def autocorrelated(noise: np.random.Generator, races: int, n: int, coefficient: float) -> np.ndarray:
    """AR(1) of variance 1, `[races, n]`."""
    steps = noise.normal(size=(races, n)) * np.sqrt(1 - coefficient**2)
    steps[:, 0] = noise.normal(size=races)
    for i in range(1, n):
        steps[:, i] += coefficient * steps[:, i - 1]
    return steps


def simulated(
    coefficient: float, races: int, tokens: int = 128, length: int = 4
) -> tuple[float, list[tuple[Lane, Lane]]]:
    """The true speedup, and races of `tokens` tokens whose round times and acceptance are autocorrelated."""
    noise = np.random.default_rng(7)

    def chances(latent: np.ndarray) -> np.ndarray:
        return np.asarray(1 / (1 + np.exp(-0.6 - latent)))

    p = chances(noise.normal(size=200_000))
    truth = (1 + sum((p**i).mean() for i in range(1, length + 1))) / 1.4
    alone = 0.006 * np.exp(0.1 * autocorrelated(noise, races, tokens - 1, coefficient))
    rounds = 0.006 * 1.4 * np.exp(0.1 * autocorrelated(noise, races, tokens, coefficient))
    p = chances(autocorrelated(noise, races, tokens, coefficient))
    emitted = 1 + np.logical_and.accumulate(noise.random((length, races, tokens)) < p).sum(0)
    made = []
    for i in range(races):
        n = int(np.searchsorted(emitted[i].cumsum(), tokens - 1)) + 1
        made.append(
            (Lane(np.ones(tokens - 1), alone[i], 1, 0.1), Lane(emitted[i, :n].astype(float), rounds[i, :n], 1, 0.1))
        )
    return truth, made


@pytest.mark.parametrize("coefficient", [0.0, 0.5, 0.7])
def test_the_interval_holds_the_true_speedup(coefficient: float) -> None:
    """Of 400 simulated races with autocorrelated rounds at least 90 % (nominally 95 %), and not by being endless."""
    truth, races = simulated(coefficient, 400)
    found = [metrics.speedup_with_interval(*race) for race in races]
    assert all(e is not None for e in found)
    assert 0.90 <= np.mean([e.low <= truth <= e.high for e in found if e]) <= 0.99
    # the shortest interval that could know: twice the scatter of the estimates either side
    scatter = np.std(np.log([e.value for e in found if e]))
    assert np.median([np.log(e.high / e.low) for e in found if e]) < 1.6 * 4 * scatter


def test_rounds_taken_one_by_one_would_claim_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same simulation tells a bootstrap of single rounds from one of blocks."""
    truth, races = simulated(0.7, 400)
    monkeypatch.setattr(metrics, "BLOCKS", 10_000)
    found = [metrics.speedup_with_interval(*race) for race in races]
    assert np.mean([e.low <= truth <= e.high for e in found if e]) < 0.88


def test_the_interval_by_hand() -> None:
    base, fast = make(BASELINE, [(0, 0)] * 12, 0.1, 2.0), make(SPECULATIVE, [(2, 2), (2, 0)] * 3, 0.1, 3.0)
    e = metrics.speedup_with_interval(Lane.of(base), Lane.of(fast))
    assert e is not None
    assert e.value == pytest.approx(2.0) and 0.1 < e.low < 2 < e.high < 20
    assert e.end_to_end == pytest.approx((13 / 3.6) / (13 / 3.2))
    assert e.end_to_end_low < e.end_to_end < e.end_to_end_high
    assert e.end_to_end_high / e.end_to_end_low < e.high / e.low, "the prefill is not drawn again"
    assert metrics.speedup_with_interval(Lane.of(base[:2]), Lane.of(fast)) is None
    assert metrics.speedup_with_interval(Lane.of([]), Lane.of(fast)) is None
    steady = metrics.speedup_with_interval(Lane.of(base), Lane.of(make(SPECULATIVE, [(1, 1)] * 6, 0.1)))
    assert steady is not None and steady.low == pytest.approx(steady.high) == pytest.approx(2.0)


def test_the_verdict() -> None:
    def says(pattern: list[tuple[int, int]], pace: float) -> str | None:
        fast = make(SPECULATIVE, pattern, pace)
        drafted = sum(r.drafted for r in fast)
        return metrics.verdict(drafted, metrics.speedup_with_interval(Lane.of(base), Lane.of(fast)))

    base = make(BASELINE, [(0, 0)] * 60, 0.1)
    mixed = [(4, 4), (4, 0), (4, 2)] * 10
    assert says(mixed, 0.1) == "faster" and says(mixed, 0.9) == "slower" and says(mixed, 0.3) == "no difference"
    assert says([(0, 0)] * 60, 0.05) == "nothing drafted", "however fast it was"
    assert says([(0, 0)], 0.1) is None


def test_looping_texts_of_the_embedded_model_are_told_from_its_others() -> None:
    """Ten of its answers of up to 200 tokens at temperature 0, as token ids. Three are caught in a loop; of the others
    two say a sentence again, one is code, one a list."""
    texts = [json.loads(line) for line in (Path(__file__).parent / "texts.jsonl").read_text("utf-8").splitlines()]
    assert [metrics.repeated_share(text["ids"]) >= metrics.LOOPING for text in texts] == [t["loops"] for t in texts]


def test_a_looping_text_is_told_from_lists_and_code() -> None:
    """Words for tokens: what is judged is how much is said again, not what it is made of."""
    sentence = "it is not very polite and it does not sound like something that one would say to a friend".split()
    story = [f"w{i}" for i in range(160)]
    looping = {
        "a sentence over and over": story[:60] + sentence * 8,
        "the last line of a poem": story[:110] + ["a", "lost", "soul", ",", "\n"] * 24,
        "one token": ["\n"] * 60,
    }
    names = "Ada Alan Grace Edsger Barbara Donald Tony John Margaret Dennis Ken Niklaus".split()
    entry = '{{ " name " : " {0} " , " city " : " city of {0} " , " age " : {1} }} ,'
    other = {
        "a story": story,
        "JSON": " ".join(entry.format(name, 30 + i) for i, name in enumerate(names)).split(),
        "SQL": " ".join(
            f"INSERT INTO people ( id , name ) VALUES ( {i} , ' {n} ' ) ;" for i, n in enumerate(names)
        ).split(),
        "a sentence said twice": story[:100] + sentence + story[100:] + sentence,
        "code": Path(metrics.__file__).read_text(encoding="utf-8").split()[:400],
        "tests": Path(__file__).read_text(encoding="utf-8").split(),
    }

    def share(words: list[str]) -> float:
        known: dict[str, int] = {}
        return metrics.repeated_share(known.setdefault(word, len(known)) for word in words)

    assert {name: share(words) >= metrics.LOOPING for name, words in looping.items()} == dict.fromkeys(looping, True)
    assert {name: share(words) >= metrics.LOOPING for name, words in other.items()} == dict.fromkeys(other, False)
    assert metrics.repeated_share([]) == metrics.repeated_share([1] * 5) == 0
    assert metrics.repeated_share(range(1000)) == 0


def test_the_report() -> None:
    trace = race(make(BASELINE, [(0, 0)] * 3, 0.1), make(SPECULATIVE, [(2, 1)], 0.15))
    report = metrics.race_report(trace)
    assert report["pair"] == {"target": "t"} and report["settings"] == {"seed": 1}
    assert report["baseline"]["token_ids"] == [0, 1, 2, 3] and report["baseline"]["text"] == "accc"
    assert report["baseline"]["prefill_seconds"] == 0.5
    assert report["baseline"]["seconds"] == pytest.approx(0.8)
    assert report["baseline"]["tokens_per_second"] == pytest.approx(10)
    speculative = report["speculative"]
    assert speculative["rounds"][1] == {
        "drafted": [10, 11],
        "accepted": 1,
        "emitted": [10, 1],
        "draft_seconds": 0.1,
        "verify_seconds": 0.2,
    }
    assert (speculative["drafted"], speculative["accepted"]) == (2, 1)
    assert speculative["acceptance_rate"] == 0.5 and speculative["tokens_per_pass"] == 2
    assert report["speedup"] == pytest.approx((2 / 0.15) / 10) and report["identical"] is False
    empty = metrics.race_report(race([], []))
    assert empty["speedup"] is empty["speedup_interval"] is empty["end_to_end_speedup"] is empty["verdict"] is None


def test_the_report_says_how_sure_it_is_and_whether_the_text_loops() -> None:
    report = metrics.race_report(race(make(BASELINE, [(0, 0)] * 30, 0.1), make(SPECULATIVE, [(2, 1), (2, 2)] * 6, 0.1)))
    low, high = report["speedup_interval"]
    assert report["speedup"] == pytest.approx(2.5) and low < 2.5 < high
    low, high = report["end_to_end_interval"]
    assert low < report["end_to_end_speedup"] < high and report["end_to_end_speedup"] < report["speedup"]
    assert report["verdict"] == "faster" and report["looping"] is False
    assert report["baseline"]["repeated_share"] == report["speculative"]["repeated_share"] == 0
    again = [replace(r, tokens=(replace(r.tokens[0], id=5),)) for r in make(BASELINE, [(0, 0)] * 60, 0.1)]
    report = metrics.race_report(race(again, make(SPECULATIVE, PATTERN, 0.1)))
    assert report["looping"] is True and report["baseline"]["repeated_share"] > 0.9
