"""The predicted speedup: later races with fixed draft lengths fall into the band."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from spec_decode import metrics
from spec_decode.draft_length import Adaptive, Controller, Fixed
from spec_decode.events import BASELINE, SPECULATIVE, Costs, Round, Token, Trace
from spec_decode.prediction import LENGTHS, predict
from spec_decode.settings import Settings

COSTS = Costs(0.006, (1.0, 1.03, 1.18, 1.29, 1.38, *(1.62 + 0.22 * g for g in range(12))), 0.04, 0.1, doubt=0.03)


class World:
    """A text with runs of tokens that are easy to draft, and a drafter that gives confidences.

    Whether a token is drafted correctly depends mostly on the token; in a round with another beginning it is an
    independent draw with probability 0.2. Drafts are deterministic given the beginning of the round, as with a model.
    Tokens that are easy to draft are likely under the target, more or less.
    """

    def __init__(self, seed: int, tokens: int = 180, ease: float = 0.0, empty: float = 0.0) -> None:
        noise = np.random.default_rng(seed)
        steps = noise.normal(size=tokens + 20)
        for i in range(1, len(steps)):
            steps[i] = 0.6 * steps[i - 1] + 0.8 * steps[i]
        self.tokens = tokens
        self.probability = 1 / (1 + np.exp(-(0.7 + ease + 1.5 * steps)))
        self.usual = noise.random(len(steps)) < self.probability
        self.p = 1 / (1 + np.exp(-(1.5 + 2.5 * steps + 0.5 * noise.normal(size=len(steps)))))
        self.seed, self.empty = seed, noise.random(tokens) < empty
        # By beginning of a round and position in its draft: whether the token is right, and the confidence.
        at = np.minimum(np.arange(tokens)[:, None] + np.arange(17), tokens)
        independent, right = noise.random(at.shape) >= 0.8, noise.random(at.shape) < self.probability[at]
        self.right = np.where(independent, right, self.usual[at]).tolist()
        self.confidence = np.clip(self.probability[at] + 0.15 * noise.normal(size=at.shape), 0.02, 0.99).tolist()

    def race(
        self,
        length: int | str,
        costs: Costs = COSTS,
        measured: Costs | None = None,
        run: int = 0,
        rule: str | None = None,
    ) -> Trace:
        """A race whose rounds have the costs `costs` with some noise; `measured` are the costs at load time."""
        noise = np.random.default_rng((self.seed, run, len(str(length)), length if isinstance(length, int) else 99))
        chooser: Controller = Adaptive(measured or costs) if length == "adaptive" else Fixed(int(length))
        pace = costs.step_seconds * np.exp(0.01 * noise.standard_normal())
        # The state of the machine, most of which lasts from one race to the next, and each length's own difference.
        state = 0.8 * np.random.default_rng(self.seed + 1000).standard_normal() + 0.6 * noise.standard_normal()
        slower = np.exp(0.04 * state * np.minimum(np.arange(17), 4) / 4 + 0.02 * noise.standard_normal(17))
        rounds = {BASELINE: [], SPECULATIVE: []}  # type: dict[str, list[Round]]

        def emit(lane: str, tokens: tuple[Token, ...], asked: int, ratio: float, draft: float = 0.0) -> Round:
            before = rounds[lane][-1].clock if rounds[lane] else 0.0
            seconds = pace * ratio * np.exp(0.05 * noise.standard_normal()) * (1.5 if noise.random() < 0.02 else 1.0)
            done = Round(
                lane, len(rounds[lane]), tokens, asked, pace * draft, seconds - pace * draft, seconds, before + seconds
            )
            rounds[lane].append(done)
            return done

        for i in range(self.tokens):
            emit(BASELINE, (Token(i, "x", "target"),), 0, 1.0)
        emit(SPECULATIVE, (Token(0, "x", "target"),), 0, 1.0)
        at = 1
        while at < self.tokens:
            asked = min(chooser.choose(), self.tokens - at - 1)
            made: list[tuple[bool, float]] = []
            while len(made) < asked and not self.empty[at]:
                made.append((self.right[at][len(made)], self.confidence[at][len(made)]))
                stop = chooser.early_stop
                if stop is not None and not stop.go_on([confidence for _, confidence in made]):
                    break
            accepted = next((i for i, (right, _) in enumerate(made) if not right), len(made))
            tokens = [
                Token(
                    at + i if i < accepted else 99_999,
                    "x",
                    "accepted" if i < accepted else "rejected",
                    float(self.p[at + i]) if i < accepted else None,
                    q,
                    i + 1,
                )
                for i, (_, q) in enumerate(made)
            ]
            own = "target" if not made else "bonus" if accepted == len(made) else "correction"
            tokens.append(Token(at + accepted, "x", own, float(self.p[at + accepted])))  # type: ignore[arg-type]
            n = len(made)
            stopped = None if chooser.early_stop is None or not made else n < asked
            chooser.observe(
                emit(SPECULATIVE, tuple(tokens), asked, costs.round(n) * slower[n], costs.draft(n)), stopped
            )
            at += accepted + 1
        order = sorted((*rounds[BASELINE], *rounds[SPECULATIVE]), key=lambda r: r.clock)
        settings = Settings(draft_length=length, temperature=0.8 if rule else 0, rule=rule)
        finish = {BASELINE: "length", SPECULATIVE: "length"}
        request = {"prompt": "p", "settings": settings.to_dict()}
        return Trace(request, {"device": "cpu"}, {}, 9, tuple(order), finish, measured or costs)


@cache
def worlds(number: int = 14) -> list[World]:
    return [World(seed, ease=0.5 * (seed % 5 - 2)) for seed in range(number)]


@cache
def later(seed: int) -> list[float]:
    return [metrics.speedup(worlds(seed + 1)[seed].race(length, run=1)) or 0.0 for length in LENGTHS]


def judge(source: int | str, measured: Costs | None = None) -> tuple[float, float, float]:
    """Of later races: the share inside the band, the median width, and the median of the prediction's error."""
    inside, widths, errors = [], [], []
    for seed, world in enumerate(worlds()):
        found = predict(world.race(source, measured=measured))
        assert found is not None
        for low, middle, high, speedup in zip(found.low, found.median, found.high, later(seed), strict=True):
            inside.append(low <= speedup <= high)
            widths.append((high - low) / middle)
            errors.append(middle / speedup - 1)
    return float(np.mean(inside)), float(np.median(widths)), float(np.median(errors))


@pytest.mark.parametrize("source", ["adaptive", 2, 4])
def test_later_races_fall_into_the_band(source: int | str) -> None:
    inside, width, error = judge(source)
    assert inside >= 0.9 and width <= (0.2 if source == "adaptive" else 0.25) and abs(error) < 0.03


def test_the_targets_probabilities_tell_what_an_adaptive_race_left_undrafted() -> None:
    def judged(p: bool) -> tuple[float, float]:
        """The root mean square of the errors, in the logarithm, and the median width."""
        errors, widths = [], []
        for seed, world in enumerate(worlds(28)):
            trace = world.race("adaptive")
            told = (replace(r, tokens=tuple(t if p else replace(t, p=None) for t in r.tokens)) for r in trace.rounds)
            found = predict(replace(trace, rounds=tuple(told)))
            assert found is not None
            errors += list(np.log(np.array(found.median) / later(seed)))
            widths += list((np.array(found.high) - found.low) / found.median)
        return float(np.sqrt(np.mean(np.square(errors)))), float(np.median(widths))

    (error, width), (blind_error, blind_width) = judged(True), judged(False)
    assert error < blind_error and width < 0.98 * blind_width


def test_wrong_costs_of_a_busy_machine_widen_the_band_where_nothing_was_observed() -> None:
    """Load-time figures that are wrong by up to 2×, with the `doubt` that belongs to them."""
    wrong = Costs(0.013, (1.0, 1.77, 1.77, 2.1, *(2.3 + 0.3 * g for g in range(13))), 0.1, 0.3, doubt=0.3)
    inside, width, _ = judge(4, wrong)
    assert inside >= 0.9 and width > 0.2
    for seed, world in enumerate(worlds()):
        trace = world.race(4, measured=wrong)
        acceptance = metrics.per_position_acceptance(trace.lane(SPECULATIVE))
        assert metrics.predicted_speedup(acceptance, wrong, 4) < 0.7 * later(seed)[3], "from load-time costs alone"
        found = predict(trace)
        assert found is not None and found.median[3] == pytest.approx(later(seed)[3], rel=0.12)
        assert (found.high[3] - found.low[3]) / found.median[3] < 0.2


def test_a_best_length_is_named_where_the_band_separates_it() -> None:
    steep = replace(COSTS, verify_ratio=tuple(1 + 0.9 * g for g in range(17)))
    only = predict(World(3, ease=-0.5).race(2, steep))
    assert only is not None and only.best == 1 == int(np.argmax(only.median)) + 1
    flat = predict(World(3).race("adaptive"))
    assert flat is not None and flat.best is None
    for seed, world in enumerate(worlds()):
        found = predict(world.race(4))
        if found and found.best:
            assert later(seed)[found.best - 1] > 0.93 * max(later(seed))


def test_the_band_is_wider_for_a_rule_that_draws_independently() -> None:
    def widths(rule: str | None) -> float:
        found = [predict(world.race(4, rule=rule)) for world in worlds()[:6]]
        return float(np.mean([(f.high[3] - f.low[3]) / f.median[3] for f in found if f]))

    assert widths("rejection") > 1.5 * widths("coupled")


def test_rounds_with_an_empty_draft_are_plain_steps() -> None:
    """As with lookup where nothing matches: half of the rounds draft nothing and cost a plain step."""
    inside = []
    for seed in range(6):
        world = World(seed, empty=0.5)
        found = predict(world.race(3))
        assert found is not None
        for length in (1, 3, 6, 8):
            measured = metrics.speedup(world.race(length, run=1)) or 0.0
            inside.append(found.low[length - 1] <= measured <= found.high[length - 1])
    assert np.mean(inside) >= 0.85


@pytest.mark.parametrize(
    "change",
    [
        lambda t: replace(t, costs=None),
        lambda t: replace(t, rounds=()),
        lambda t: replace(t, rounds=tuple(r for r in t.rounds if r.lane == SPECULATIVE)),
        lambda t: replace(t, rounds=tuple(r for r in t.rounds if not r.drafted)),
    ],
)
def test_no_prediction_without_costs_or_drafts(change: Callable[[Trace], Trace]) -> None:
    assert predict(change(World(1).race(2))) is None


def test_the_band_of_a_short_race_is_wide() -> None:
    trace = World(1).race(2)
    few = predict(replace(trace, rounds=trace.rounds[:14], finish={BASELINE: "cancelled", SPECULATIVE: "cancelled"}))
    whole = predict(trace)
    assert few is not None and whole is not None
    assert (few.high[7] - few.low[7]) / few.median[7] > 1.5 * (whole.high[7] - whole.low[7]) / whole.median[7]


def test_a_round_costs_what_the_drafter_of_its_tokens_costs() -> None:
    """Every other stretch of 16 tokens is copied. Lookup drafts there, at no cost and without error; elsewhere a model
    drafts one token a round, at half a step, and is wrong. With draft length 1 a copied stretch takes eight rounds
    instead of one, so a larger share of the rounds has free drafts."""
    costs = Costs(0.01, tuple(1 + 0.05 * g for g in range(17)), 0.0, 0.5)

    def race(length: int) -> Trace:
        rounds: list[Round] = []
        clock, at = 0.0, 0
        for index in range(321):
            clock += 0.01
            rounds.append(Round(BASELINE, index, (Token(index, "x", "target"),), 0, 0.0, 0.01, 0.01, clock))
        clock, index = 0.0, 0
        while at < 321:
            copied = at % 32 >= 16
            n = 0 if at == 0 else min(length, 15 - at % 16, 320 - at) if copied else 1
            drafter = "" if n == 0 else "lookup" if copied else "mtp"
            draft = 0.005 if drafter == "mtp" else 0.0
            seconds = 0.01 * costs.verify_ratio[n] + draft
            role = "accepted" if copied else "rejected"
            drafted = [Token(1, "x", role, None, 0.5, i + 1) for i in range(n)]  # type: ignore[arg-type]
            clock += seconds
            tokens = (*drafted, Token(2, "x", "bonus" if copied else "correction"))
            rounds.append(
                Round(SPECULATIVE, index, tokens, length, draft, seconds - draft, seconds, clock, drafter=drafter)
            )
            at += n + 1 if copied else 1
            index += 1
        rounds.sort(key=lambda r: r.clock)
        request = {"prompt": "p", "settings": Settings(draft_length=length).to_dict()}
        return Trace(
            request, {"device": "cpu"}, {}, 9, tuple(rounds), {BASELINE: "length", SPECULATIVE: "length"}, costs
        )

    predicted = predict(race(15), (1,))
    measured = metrics.speedup(race(1))
    assert predicted is not None and measured is not None
    assert predicted.median[0] == pytest.approx(measured, rel=0.05)
