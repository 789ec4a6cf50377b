"""Draft-length controllers: deterministic given the rounds, right where the answer is known, alert to change."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from spec_decode.draft_length import Adaptive, Controller, Fixed, Threshold, controller
from spec_decode.events import SPECULATIVE, Costs, Round, Token
from spec_decode.metrics import predicted_speedup
from spec_decode.settings import Settings

CHEAP = Costs(0.03, tuple(1 + 0.03 * g for g in range(17)), 0.02)
DEAR = Costs(0.03, tuple(1 + 0.6 * g for g in range(17)), 0.5)


def finished(drafted: int, accepted: int, seconds: float) -> Round:
    tokens = [Token(1, "", "accepted" if i < accepted else "rejected", draft_position=i + 1) for i in range(drafted)]
    own = Token(2, "", "target" if not drafted else "bonus" if accepted == drafted else "correction")
    return Round(SPECULATIVE, 1, (*tokens, own), drafted, 0.0, seconds, seconds, seconds)


def seconds(costs: Costs, length: int) -> float:
    return costs.step_seconds * costs.round(length)


def drive(chooser: Controller, costs: Costs, chance: float, rounds: int, seed: int = 0) -> list[int]:
    """The draft lengths chosen when each draft is accepted with probability `chance`."""
    rng, chosen = random.Random(seed), []
    for _ in range(rounds):
        length = chooser.choose()
        accepted = next((i for i in range(length) if rng.random() >= chance), length)
        chooser.observe(finished(length, accepted, seconds(costs, length)))
        chosen.append(length)
    return chosen


def test_settings_name_the_controller() -> None:
    assert isinstance(controller(Settings(draft_length="adaptive"), CHEAP), Adaptive)
    assert isinstance(controller(Settings(draft_length="adaptive"), None), Adaptive)
    assert isinstance(controller(Settings(draft_length="threshold"), None), Threshold)
    for length in (1, 16):
        assert drive(controller(Settings(draft_length=length), None), CHEAP, 0.5, 5) == [length] * 5
    assert isinstance(controller(Settings(draft_length=3), None), Fixed)


@pytest.mark.parametrize(("chance", "length"), [(1.0, 6), (0.0, 2)])
def test_threshold_follows_the_rate(chance: float, length: int) -> None:
    assert drive(Threshold(), CHEAP, chance, 60)[-20:] == [length] * 20


def test_threshold_steps_at_its_two_rates() -> None:
    for accepted, expected in ((7, 2), (8, 4), (9, 4), (10, 6)):
        chooser = Threshold()
        chooser.observe(finished(10, accepted, 0.1))
        assert chooser.choose() == expected
    chooser = Threshold()
    before = chooser.choose()
    chooser.observe(finished(0, 0, 0.1))  # a plain step says nothing
    assert chooser.choose() == before


@pytest.mark.parametrize("chance", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("costs", [CHEAP, DEAR], ids=["cheap", "dear"])
def test_adaptive_comes_near_the_best_fixed_length(chance: float, costs: Costs) -> None:
    """Tokens per second of its later rounds, in expectation, are within 10 % of the best draft length's."""
    best = max(predicted_speedup([chance], costs, g) for g in range(17))
    chosen = drive(Adaptive(costs), costs, chance, 600)[200:]
    tokens = sum((1 - chance ** (g + 1)) / (1 - chance) for g in chosen)
    assert tokens * costs.step_seconds / sum(seconds(costs, g) for g in chosen) > 0.9 * best


def test_adaptive_gives_up_a_drafter_that_is_never_right() -> None:
    """Nearly all rounds are plain steps, and what exploring costs goes on shrinking."""
    chosen = drive(Adaptive(DEAR), DEAR, 0.0, 2000)
    assert sum(g > 0 for g in chosen[:500]) > 0
    late = chosen[1000:]
    assert sum(g > 0 for g in late) <= 5
    assert sum(g > 0 for g in chosen[200:]) > 0  # but never ends


def test_adaptive_notices_a_drafter_that_became_good() -> None:
    chooser = Adaptive(CHEAP)
    drive(chooser, CHEAP, 0.0, 300)
    chosen = drive(chooser, CHEAP, 1.0, 600)
    assert chosen[-1] >= 8


def test_adaptive_drafts_far_when_all_is_accepted_and_it_costs_nothing() -> None:
    assert drive(Adaptive(CHEAP), CHEAP, 1.0, 100)[-1] == 16


def test_adaptive_is_not_misled_by_a_machine_that_is_slower_throughout() -> None:
    slow = Costs(0.12, CHEAP.verify_ratio, CHEAP.draft_ratio)
    best = max(predicted_speedup([0.9], slow, g) for g in range(17))
    chosen = drive(Adaptive(CHEAP), slow, 0.9, 600)[200:]
    assert sum(predicted_speedup([0.9], slow, g) for g in chosen) / len(chosen) > 0.9 * best


def test_adaptive_leaves_drafts_that_take_longer_than_modelled() -> None:
    """The model promises cheap long drafts; beyond 3 tokens they take five times as long."""
    cliff = Costs(0.03, tuple(1 + 0.03 * g if g <= 3 else 5.0 for g in range(17)), 0.02)
    chosen = drive(Adaptive(CHEAP), cliff, 0.9, 600)[300:]
    assert sum(g <= 3 for g in chosen) > 0.8 * len(chosen)


def test_adaptive_returns_to_plain_steps_when_drafts_take_longer_than_modelled() -> None:
    """Every draft costs twice what was measured, a plain step does not."""
    chosen = drive(Adaptive(CHEAP), DEAR, 0.4, 600)[300:]
    assert sum(chosen) / len(chosen) < 0.5


def test_controllers_are_deterministic() -> None:
    for make in (lambda: Adaptive(CHEAP), Threshold):
        assert drive(make(), CHEAP, 0.6, 200) == drive(make(), CHEAP, 0.6, 200)


@pytest.mark.parametrize("longest", [2, 5, 16])
def test_adaptive_stays_in_range(longest: int) -> None:
    chooser = Adaptive(Costs(0.03, (1.0, 1.1), 0.01), longest)
    assert all(0 <= g <= longest for g in drive(chooser, CHEAP, 0.8, 200))
    chooser.observe(finished(0, 0, 0.0))  # a drafter may have nothing to say, and a clock may not have moved
    assert 0 <= chooser.choose() <= longest


def drive_gated(
    chooser: Adaptive,
    costs: Costs,
    rounds: int,
    honest: float = 1.0,
    scale: float = 1.0,
    seed: int = 0,
    power: float = 1.0,
) -> tuple[float, float, list[int]]:
    """Tokens, seconds and lengths of drafts whose confidences c are spread evenly over [0, `scale`], or
    for a `power` below 1 lie nearer its end, and which are accepted with probability `honest` · c."""
    rng, tokens, spent, lengths = random.Random(seed), 0, 0.0, []
    for _ in range(rounds):
        length, sure = chooser.choose(), []
        while len(sure) < length:
            sure.append(scale * rng.random() ** power)
            if not chooser.go_on(sure):
                break
        accepted = next((i for i, c in enumerate(sure) if rng.random() >= honest * c), len(sure))
        roles = ["accepted"] * accepted + ["rejected"] * (len(sure) - accepted)
        drafted = [
            Token(1, "", role, q=c, draft_position=i + 1)  # type: ignore[arg-type]
            for i, (role, c) in enumerate(zip(roles, sure, strict=True))
        ]
        own = Token(2, "", "target" if not sure else "bonus" if accepted == len(sure) else "correction")
        took = seconds(costs, len(sure))
        chooser.observe(Round(SPECULATIVE, 1, (*drafted, own), length, 0.0, took, took, took))
        tokens, spent = tokens + accepted + 1, spent + took
        lengths.append(len(sure))
    return tokens, spent, lengths


STEEP = Costs(0.006, (1.0, 1.03, 1.18, 1.29, 1.38, *(1.62 + 0.22 * g for g in range(12))), 0.04, 0.1)
MIDDLE = Costs(0.01, tuple(1 + 0.1 * g for g in range(17)), 0.07)


def test_confidence_beats_every_fixed_length() -> None:
    tokens, spent, lengths = drive_gated(Adaptive(MIDDLE), MIDDLE, 3000)
    best = max(predicted_speedup([0.5], MIDDLE, g) for g in range(17))
    assert tokens / spent * MIDDLE.step_seconds > 1.03 * best
    assert len(set(lengths)) > 3


def test_confidence_that_promises_too_much_is_seen_through() -> None:
    """Every draft is half as good as it says, and a quarter of the time not worth making."""
    tokens, spent, lengths = drive_gated(Adaptive(MIDDLE), MIDDLE, 3000, honest=0.3)
    assert tokens / spent * MIDDLE.step_seconds > 0.98
    assert sum(lengths[-500:]) / 500 < 1


@pytest.mark.parametrize("scale", [0.1, 0.3])
def test_a_drafter_that_is_never_sure_costs_next_to_nothing(scale: float) -> None:
    tokens, spent, _ = drive_gated(Adaptive(MIDDLE), MIDDLE, 600, scale=scale)
    assert tokens / spent * MIDDLE.step_seconds > 0.97


def test_what_was_drafted_behind_a_refusal_teaches_nothing() -> None:
    """Nobody knows whether it would have been accepted: neither its position nor its confidence is judged."""

    def learnt(confidences: list[float]) -> tuple[list[float], list[float]]:
        chooser = Adaptive(MIDDLE)
        for _ in range(5):
            assert isinstance(chooser.go_on([0.99]), bool)
            roles = ["accepted", *["rejected"] * (len(confidences) - 1)]
            drafted = [
                Token(1, "", role, q=c, draft_position=i + 1)  # type: ignore[arg-type]
                for i, (role, c) in enumerate(zip(roles, confidences, strict=True))
            ]
            took = seconds(MIDDLE, 3)
            chooser.observe(Round(SPECULATIVE, 1, (*drafted, Token(2, "", "correction")), 4, 0.0, took, took, took))
        return [chooser.expected_tokens(n) for n in range(17)], chooser.go_on.chances.tolist()

    tokens, chances = learnt([0.9, 0.6])
    assert learnt([0.9, 0.6, 0.95, 0.1]) == (tokens, chances)
    assert tokens[3:] != [Adaptive(MIDDLE).expected_tokens(n) for n in range(3, 17)]
    untouched = Adaptive(MIDDLE).go_on.chances.tolist()
    assert [now != then for now, then in zip(chances, untouched, strict=True)] == [i in (4, 7) for i in range(8)]


@pytest.mark.parametrize("unit", [0.25, 4.0])
def test_costs_measured_while_the_machine_was_busy_do_not_keep_drafts_short(unit: float) -> None:
    """A plain step took `unit` times as long when costs were measured; drafts are as good as with the true figure."""

    def rate(costs: Costs) -> float:
        runs = [drive_gated(Adaptive(costs), STEEP, 150, seed=seed, power=0.2) for seed in range(6)]
        return sum(tokens for tokens, _, _ in runs) / sum(spent for _, spent, _ in runs)

    assert rate(replace(STEEP, step_seconds=unit * STEEP.step_seconds)) > 0.95 * rate(STEEP)


def test_drafts_that_looked_cheaper_than_they_are_do_not_run_too_long() -> None:
    low = replace(STEEP, verify_ratio=(1.0, *(0.7 + 0.4 * v for v in STEEP.verify_ratio[1:])), draft_start=0.0)
    rates = []
    for costs in (low, STEEP):
        runs = [drive_gated(Adaptive(costs), STEEP, 150, seed=seed, power=0.2) for seed in range(6)]
        rates.append(sum(tokens for tokens, _, _ in runs) / sum(spent for _, spent, _ in runs))
    assert rates[0] > 0.95 * rates[1]


def test_go_on_never_goes_beyond_the_longest() -> None:
    chooser = Adaptive(CHEAP, longest=3)
    assert chooser.go_on([1.0, 1.0])
    assert not chooser.go_on([1.0, 1.0, 1.0])
    assert not chooser.go_on([0.01])


def test_a_drafter_that_grows_sure_is_taken_up_again() -> None:
    chooser = Adaptive(MIDDLE)
    drive_gated(chooser, MIDDLE, 200, scale=0.05)
    assert sum(drive_gated(chooser, MIDDLE, 100, scale=0.05)[2]) < 20
    lengths = drive_gated(chooser, MIDDLE, 250)[2]
    assert next(i for i, length in enumerate(lengths) if length) <= 64
    best = max(predicted_speedup([0.5], MIDDLE, g) for g in range(17))
    late = drive_gated(chooser, MIDDLE, 500)
    assert late[0] / late[1] * MIDDLE.step_seconds > 0.97 * best
