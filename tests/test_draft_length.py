"""Draft-length controllers: deterministic given the rounds, near the known optimum, responsive to change."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from spec_decode.draft_length import Adaptive, Controller, Fixed, Rate, controller
from spec_decode.events import SPECULATIVE, Costs, Round, Token
from spec_decode.metrics import predicted_speedup
from spec_decode.settings import Settings

CHEAP = Costs(0.03, tuple(1 + 0.03 * g for g in range(17)), 0.02)
EXPENSIVE = Costs(0.03, tuple(1 + 0.6 * g for g in range(17)), 0.5)


def finished(drafted: int, accepted: int, seconds: float) -> Round:
    tokens = [Token(1, "", "accepted" if i < accepted else "rejected", draft_position=i + 1) for i in range(drafted)]
    own = Token(2, "", "target" if not drafted else "bonus" if accepted == drafted else "correction")
    return Round(SPECULATIVE, 1, (*tokens, own), drafted, 0.0, seconds, seconds, seconds)


def seconds(costs: Costs, length: int) -> float:
    return costs.step_seconds * costs.round(length)


def drive(chooser: Controller, costs: Costs, acceptance: float, rounds: int, seed: int = 0) -> list[int]:
    """The draft lengths chosen when each draft is accepted with probability `acceptance`."""
    rng, chosen = random.Random(seed), []
    for _ in range(rounds):
        length = chooser.choose()
        accepted = next((i for i in range(length) if rng.random() >= acceptance), length)
        chooser.observe(finished(length, accepted, seconds(costs, length)), None)
        chosen.append(length)
    return chosen


def test_settings_name_the_controller() -> None:
    assert isinstance(controller(Settings(draft_length="adaptive"), CHEAP), Adaptive)
    assert isinstance(controller(Settings(draft_length="adaptive"), None), Adaptive)
    for name in ("rate", "threshold"):  # the old name
        assert isinstance(controller(Settings(draft_length=name), None), Rate)
    for length in (1, 16):
        assert drive(controller(Settings(draft_length=length), None), CHEAP, 0.5, 5) == [length] * 5
    assert isinstance(controller(Settings(draft_length=3), None), Fixed)


@pytest.mark.parametrize(("acceptance", "length"), [(1.0, 6), (0.0, 2)])
def test_rate_follows_the_acceptance_rate(acceptance: float, length: int) -> None:
    assert drive(Rate(), CHEAP, acceptance, 60)[-20:] == [length] * 20


def test_rate_steps_at_its_two_rates() -> None:
    for accepted, expected in ((7, 2), (8, 4), (9, 4), (10, 6)):
        chooser = Rate()
        chooser.observe(finished(10, accepted, 0.1), None)
        assert chooser.choose() == expected
    chooser = Rate()
    before = chooser.choose()
    chooser.observe(finished(0, 0, 0.1), None)  # a plain step has no drafts
    assert chooser.choose() == before


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("costs", [CHEAP, EXPENSIVE], ids=["cheap", "expensive"])
def test_adaptive_comes_near_the_best_fixed_length(acceptance: float, costs: Costs) -> None:
    """The expected tokens per second of later rounds are within 10 % of the best draft length's."""
    best = max(predicted_speedup([acceptance], costs, g) for g in range(17))
    chosen = drive(Adaptive(costs), costs, acceptance, 600)[200:]
    tokens = sum((1 - acceptance ** (g + 1)) / (1 - acceptance) for g in chosen)
    assert tokens * costs.step_seconds / sum(seconds(costs, g) for g in chosen) > 0.9 * best


def test_adaptive_stops_drafting_if_no_draft_is_accepted() -> None:
    """Nearly all rounds are plain steps, and probes become rarer but do not end."""
    chosen = drive(Adaptive(EXPENSIVE), EXPENSIVE, 0.0, 2000)
    assert sum(g > 0 for g in chosen[:500]) > 0
    late = chosen[1000:]
    assert sum(g > 0 for g in late) <= 5
    assert sum(g > 0 for g in chosen[200:]) > 0


def test_adaptive_detects_that_acceptance_has_risen() -> None:
    chooser = Adaptive(CHEAP)
    drive(chooser, CHEAP, 0.0, 300)
    chosen = drive(chooser, CHEAP, 1.0, 600)
    assert chosen[-1] >= 8


def test_adaptive_uses_the_longest_draft_if_all_are_accepted_and_drafts_are_cheap() -> None:
    assert drive(Adaptive(CHEAP), CHEAP, 1.0, 100)[-1] == 16


def test_adaptive_is_independent_of_a_constant_factor_of_speed() -> None:
    slow = Costs(0.12, CHEAP.verify_ratio, CHEAP.draft_ratio)
    best = max(predicted_speedup([0.9], slow, g) for g in range(17))
    chosen = drive(Adaptive(CHEAP), slow, 0.9, 600)[200:]
    assert sum(predicted_speedup([0.9], slow, g) for g in chosen) / len(chosen) > 0.9 * best


def test_adaptive_avoids_lengths_that_take_longer_than_modelled() -> None:
    """The modelled cost of long drafts is low; beyond 3 tokens the observed cost is five plain steps."""
    cliff = Costs(0.03, tuple(1 + 0.03 * g if g <= 3 else 5.0 for g in range(17)), 0.02)
    chosen = drive(Adaptive(CHEAP), cliff, 0.9, 600)[300:]
    assert sum(g <= 3 for g in chosen) > 0.8 * len(chosen)


def test_adaptive_returns_to_plain_steps_when_drafts_take_longer_than_modelled() -> None:
    """Drafts cost much more than modelled, a plain step does not."""
    chosen = drive(Adaptive(CHEAP), EXPENSIVE, 0.4, 600)[300:]
    assert sum(chosen) / len(chosen) < 0.5


def test_controllers_are_deterministic() -> None:
    for make in (lambda: Adaptive(CHEAP), Rate):
        assert drive(make(), CHEAP, 0.6, 200) == drive(make(), CHEAP, 0.6, 200)


@pytest.mark.parametrize("longest", [2, 5, 16])
def test_adaptive_stays_in_range(longest: int) -> None:
    chooser = Adaptive(Costs(0.03, (1.0, 1.1), 0.01), longest)
    assert all(0 <= g <= longest for g in drive(chooser, CHEAP, 0.8, 200))
    chooser.observe(finished(0, 0, 0.0), None)  # an empty draft, and a clock of low resolution
    assert 0 <= chooser.choose() <= longest


def drive_gated(
    chooser: Adaptive,
    costs: Costs,
    rounds: int,
    calibration: float = 1.0,
    scale: float = 1.0,
    seed: int = 0,
    power: float = 1.0,
) -> tuple[float, float, list[int]]:
    """Tokens, seconds and lengths of drafts that the controller may end early.

    Confidences are `scale` · u ** `power` with u uniform on [0, 1]; a draft of confidence c is accepted with
    probability `calibration` · c.
    """
    rng, tokens, spent, lengths = random.Random(seed), 0, 0.0, []
    for _ in range(rounds):
        length, confidences = chooser.choose(), []
        stop = chooser.early_stop
        while len(confidences) < length:
            confidences.append(scale * rng.random() ** power)
            if not stop.go_on(confidences):
                break
        accepted = next((i for i, c in enumerate(confidences) if rng.random() >= calibration * c), len(confidences))
        roles = ["accepted"] * accepted + ["rejected"] * (len(confidences) - accepted)
        drafted = [
            Token(1, "", role, q=c, draft_position=i + 1)  # type: ignore[arg-type]
            for i, (role, c) in enumerate(zip(roles, confidences, strict=True))
        ]
        own = Token(2, "", "target" if not confidences else "bonus" if accepted == len(confidences) else "correction")
        duration = seconds(costs, len(confidences))
        done = Round(SPECULATIVE, 1, (*drafted, own), length, 0.0, duration, duration, duration)
        chooser.observe(done, len(confidences) < length if length else None)
        tokens, spent = tokens + accepted + 1, spent + duration
        lengths.append(len(confidences))
    return tokens, spent, lengths


STEEP = Costs(0.006, (1.0, 1.03, 1.18, 1.29, 1.38, *(1.62 + 0.22 * g for g in range(12))), 0.04, 0.1)
MIDDLE = Costs(0.01, tuple(1 + 0.1 * g for g in range(17)), 0.07)


def test_early_stopping_is_faster_than_every_fixed_length() -> None:
    tokens, spent, lengths = drive_gated(Adaptive(MIDDLE), MIDDLE, 3000)
    best = max(predicted_speedup([0.5], MIDDLE, g) for g in range(17))
    assert tokens / spent * MIDDLE.step_seconds > 1.03 * best
    assert len(set(lengths)) > 3


def test_overconfident_drafts_are_corrected_by_estimated_acceptance() -> None:
    """Every draft is accepted with 0.3 times the probability that its confidence predicts."""
    tokens, spent, lengths = drive_gated(Adaptive(MIDDLE), MIDDLE, 3000, calibration=0.3)
    assert tokens / spent * MIDDLE.step_seconds > 0.98
    assert sum(lengths[-500:]) / 500 < 1


@pytest.mark.parametrize("scale", [0.1, 0.3])
def test_a_drafter_of_low_confidence_costs_little(scale: float) -> None:
    tokens, spent, _ = drive_gated(Adaptive(MIDDLE), MIDDLE, 600, scale=scale)
    assert tokens / spent * MIDDLE.step_seconds > 0.97


def test_drafts_after_a_rejection_are_no_evidence() -> None:
    """Their acceptance is unknown, so no estimate changes: of their positions or of their confidences."""

    def estimates(confidences: list[float]) -> tuple[list[float], list[float]]:
        chooser = Adaptive(MIDDLE)
        for _ in range(5):
            roles = ["accepted", *["rejected"] * (len(confidences) - 1)]
            drafted = [
                Token(1, "", role, q=c, draft_position=i + 1)  # type: ignore[arg-type]
                for i, (role, c) in enumerate(zip(roles, confidences, strict=True))
            ]
            duration = seconds(MIDDLE, 3)
            done = Round(SPECULATIVE, 1, (*drafted, Token(2, "", "correction")), 4, 0.0, duration, duration, duration)
            chooser.observe(done, False)
        return chooser.expected_tokens(), chooser.early_stop.chances.tolist()

    tokens, chances = estimates([0.9, 0.6])
    assert estimates([0.9, 0.6, 0.95, 0.1]) == (tokens, chances)
    assert tokens[3:] != Adaptive(MIDDLE).expected_tokens()[3:]
    untouched = Adaptive(MIDDLE).early_stop.chances.tolist()
    assert [now != then for now, then in zip(chances, untouched, strict=True)] == [i in (4, 7) for i in range(8)]


@pytest.mark.parametrize("unit", [0.25, 4.0])
def test_costs_measured_while_the_machine_was_busy_do_not_keep_drafts_short(unit: float) -> None:
    """With a plain step measured `unit` times too long, drafts are as good as with the true figure."""

    def rate(costs: Costs) -> float:
        runs = [drive_gated(Adaptive(costs), STEEP, 150, seed=seed, power=0.2) for seed in range(6)]
        return sum(tokens for tokens, _, _ in runs) / sum(spent for _, spent, _ in runs)

    assert rate(replace(STEEP, step_seconds=unit * STEEP.step_seconds)) > 0.95 * rate(STEEP)


def test_underestimated_costs_of_drafts_do_not_make_drafts_too_long() -> None:
    low = replace(STEEP, verify_ratio=(1.0, *(0.7 + 0.4 * v for v in STEEP.verify_ratio[1:])), draft_start=0.0)
    rates = []
    for costs in (low, STEEP):
        runs = [drive_gated(Adaptive(costs), STEEP, 150, seed=seed, power=0.2) for seed in range(6)]
        rates.append(sum(tokens for tokens, _, _ in runs) / sum(spent for _, spent, _ in runs))
    assert rates[0] > 0.95 * rates[1]


def test_no_draft_is_longer_than_the_longest() -> None:
    chooser = Adaptive(CHEAP, longest=3)
    stop = chooser.early_stop
    assert stop.go_on([1.0, 1.0])
    assert not stop.go_on([1.0, 1.0, 1.0])
    assert not stop.go_on([0.01])


def test_drafting_resumes_when_confidence_rises() -> None:
    chooser = Adaptive(MIDDLE)
    drive_gated(chooser, MIDDLE, 200, scale=0.05)
    assert sum(drive_gated(chooser, MIDDLE, 100, scale=0.05)[2]) < 20
    lengths = drive_gated(chooser, MIDDLE, 250)[2]
    assert next(i for i, length in enumerate(lengths) if length) <= 64
    best = max(predicted_speedup([0.5], MIDDLE, g) for g in range(17))
    late = drive_gated(chooser, MIDDLE, 500)
    assert late[0] / late[1] * MIDDLE.step_seconds > 0.97 * best
