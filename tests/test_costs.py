"""Cost of a round: a prior from load time, updated with the rounds of a race."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from spec_decode.costs import isotonic, learned, round_costs
from spec_decode.events import BASELINE, SPECULATIVE, Costs, Round, Token

TRUE = Costs(0.006, tuple(1 + 0.12 * g for g in range(17)), 0.05, 0.1)
WRONG = Costs(0.020, (1.0, 1.77, 1.6, *(2.0 + 0.3 * g for g in range(14))), 0.1, 0.4, doubt=0.3)


def lanes(
    lengths: list[int],
    costs: Costs = TRUE,
    scatter: float = 0.05,
    spikes: float = 0.0,
    slow: float = 1.0,
    seed: int = 1,
) -> list[Round]:
    """Alternating rounds of both lanes after a prefill each. A share `spikes` of them takes three times as long; the
    second half is `slow` times slower."""
    noise = np.random.default_rng(seed)
    clocks = {BASELINE: 0.1, SPECULATIVE: 0.1}
    rounds = [Round(lane, 0, (Token(0, "a", "target"),), 0, 0.0, 0.1, 0.1, 0.1) for lane in clocks]
    for index, drafted in enumerate(lengths, 1):
        pace = costs.step_seconds * (slow if index > len(lengths) / 2 else 1.0)
        for lane, count in ((SPECULATIVE, drafted), (BASELINE, 0)):
            factor = np.exp(scatter * noise.standard_normal()) * (3.0 if noise.random() < spikes else 1.0)
            draft = pace * factor * costs.draft(count) if lane == SPECULATIVE else 0.0
            seconds = pace * factor * (costs.round(count) if lane == SPECULATIVE else 1.0)
            clocks[lane] += seconds
            tokens = tuple(Token(9, "x", "rejected", draft_position=i + 1) for i in range(count))
            own = Token(1, "y", "correction" if count else "target")
            rounds.append(Round(lane, index, (*tokens, own), count, draft, seconds - draft, seconds, clocks[lane]))
    return rounds


@hypothesis_settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(0.1, 10)), min_size=1, max_size=20))
def test_isotonic_is_isotonic_regression(pairs: list[tuple[float, float]]) -> None:
    values, weights = (np.array(column) for column in zip(*pairs, strict=True))
    expected = scipy.optimize.isotonic_regression(values, weights=weights).x
    assert isotonic(values, weights) == pytest.approx(expected, abs=1e-9)


def test_a_race_corrects_costs_that_were_measured_on_a_busy_machine() -> None:
    """The prior of γ = 1 is 2.27; its rounds took 1.27."""
    found = round_costs(WRONG, lanes([1, 2, 4] * 30)).ratios
    for length in (1, 2, 4):
        assert found[length] == pytest.approx(TRUE.round(length), rel=0.04)
    assert found[3] == pytest.approx(TRUE.round(3), rel=0.08), "it did not occur, but its neighbours did"
    assert found[8] < 0.75 * WRONG.round(8), "what drafting adds was too high in the prior"


def test_few_rounds_have_little_weight_and_many_outweigh_the_prior() -> None:
    certain = replace(WRONG, doubt=0.0)
    errors = [abs(round_costs(certain, lanes([1] * n)).ratios[1] / TRUE.round(1) - 1) for n in (2, 12, 60, 400)]
    assert errors[0] > 0.3 and errors[0] > errors[1] > errors[2] and max(errors[2:]) < 0.07
    vague = replace(TRUE, doubt=0.3)
    lasting = [learned(vague, lanes([1] * n)).errors[1] for n in (4, 12, 60)]
    assert lasting[0] > lasting[1] > lasting[2]


def test_the_more_races_there_were_the_less_one_moves_the_costs() -> None:
    """A neighbour slows the rounds of one race by 15 %; costs measured at load time alone move further."""
    slow = replace(TRUE, verify_ratio=(1.0, *(1.15 * v for v in TRUE.verify_ratio[1:])))
    odd = lanes([1, 2] * 40, slow)
    known = TRUE
    for seed in range(8):
        known = learned(known, lanes([1, 2, 4, 8] * 20, seed=seed))
    assert known.round(8) == pytest.approx(TRUE.round(8), rel=0.02)
    moved, fresh = (learned(prior, odd).round(8) / prior.round(8) - 1 for prior in (known, replace(TRUE, doubt=0.05)))
    assert 0 < moved < 0.4 * fresh
    after = round_costs(known, odd).ratios[2] / known.round(2) - 1
    assert after > 1.5 * (learned(known, odd).round(2) / known.round(2) - 1), "the next race may still be slow"


def test_the_cost_of_a_draft_is_a_line_that_races_correct() -> None:
    """At load time a token of a draft seemed to cost twice as much."""
    prior = replace(TRUE, draft_ratio=2 * TRUE.draft_ratio)
    for found in (learned(prior, lanes([1, 3, 5] * 40)), learned(learned(prior, lanes([2] * 90)), lanes([6] * 90))):
        assert found.draft(8) == pytest.approx(TRUE.draft(8), rel=0.1)


def test_costs_grow_with_the_draft_on_a_cpu_and_need_not_elsewhere() -> None:
    cheap = Costs(0.006, (1.0, 1.5, 1.1, *(1.6 + 0.1 * g for g in range(14))), 0.0)
    rounds = lanes([1, 2, 3] * 40, cheap)
    assert (np.diff(round_costs(cheap, rounds).ratios) >= 0).all()
    passes, drafts = round_costs(cheap, rounds).draws(50, np.random.default_rng(0))
    assert (np.diff(passes + drafts[""], axis=1) >= 0).all()
    free = round_costs(cheap, rounds, monotone=False).ratios
    assert free[2] == pytest.approx(1.1, rel=0.03) and free[1] == pytest.approx(1.5, rel=0.03)


def test_pauses_and_changes_of_speed_cancel() -> None:
    for trouble in ({"spikes": 0.1}, {"slow": 2.0}, {"spikes": 0.05, "slow": 0.5}):
        found = round_costs(TRUE, lanes([1, 3] * 60, **trouble)).ratios  # type: ignore[arg-type]
        assert found[[1, 3]] == pytest.approx([TRUE.round(1), TRUE.round(3)], rel=0.03)


def test_a_race_without_rounds_leaves_the_prior() -> None:
    assert round_costs(TRUE, []).ratios == pytest.approx([TRUE.round(g) for g in range(17)])
    assert [learned(TRUE, []).round(g) for g in range(17)] == pytest.approx([TRUE.round(g) for g in range(17)])


def test_the_posterior_is_the_prior_of_the_next_race() -> None:
    expensive = Costs(0.006, TRUE.verify_ratio, TRUE.draft_ratio, TRUE.draft_start, other_ratio=0.08)
    rounds = lanes([0, 1, 2, 4] * 40, expensive)
    found = learned(WRONG, rounds)
    assert found.step_seconds == pytest.approx(0.006, rel=0.03)
    for length in (1, 2, 4):
        assert found.round(length) == pytest.approx(expensive.round(length), rel=0.05)
    assert found.verify_ratio[0] == 1 and found.other_ratio == pytest.approx(0.08, abs=0.04)
    assert found.draft(1) == pytest.approx(expensive.draft(1), rel=0.3)
    again = learned(found, rounds)
    assert [again.round(g) for g in (1, 2, 4)] == pytest.approx([found.round(g) for g in (1, 2, 4)], rel=0.03)


def test_with_two_drafters_a_draft_costs_what_the_named_one_takes() -> None:
    """Every other draft is found in the text, at no cost: the next race may ask MTP each time."""
    rounds = []
    for r in lanes([2, 2, 4, 4] * 30):
        if r.drafted and r.index % 2:
            r = replace(r, drafter="lookup", draft_seconds=0.0, seconds=r.seconds - r.draft_seconds)
        elif r.drafted:
            r = replace(r, drafter="mtp")
        rounds.append(r)
    prior = replace(TRUE, draft_ratio=2 * TRUE.draft_ratio, draft_start=2 * TRUE.draft_start)
    assert learned(prior, rounds, drafter="mtp").draft(2) == pytest.approx(TRUE.draft(2), rel=0.1)
    assert round_costs(prior, rounds).draft[2] == pytest.approx(TRUE.draft(2) / 2, rel=0.25), "of this race, both"


def test_races_in_which_the_other_drafter_made_all_drafts_leave_its_cost() -> None:
    """Lookup costs nothing; what MTP costs is not known from its drafts."""
    free = replace(TRUE, draft_ratio=0.0, draft_start=0.0)
    rounds = [replace(r, drafter="lookup") for r in lanes([1, 2, 4] * 30, free)]
    found = TRUE
    for _ in range(3):
        found = learned(found, rounds, drafter="mtp")
    assert found.draft(3) == pytest.approx(TRUE.draft(3))
    expensive = [replace(r, drafter="mtp") for r in lanes([1, 2, 4] * 30, replace(TRUE, draft_ratio=0.1))]
    assert learned(TRUE, expensive, drafter="mtp").draft(3) > 1.2 * TRUE.draft(3)
