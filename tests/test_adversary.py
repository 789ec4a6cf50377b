"""Is the output exact when the controller is an adversary, who has seen everything that past rounds gave away?

The engine itself decodes (`decode.speculative`), 10,000 seeds, on a "model" that is a table of logits. The
controller looks at every drafted token (those that verification never visited included), at every confidence and at the
seconds of all past rounds. After a rejection it drafts where the refused draft went on with token 0. The clock is fake
and advances by what was drafted, so that seconds tell as much as tokens do.

False alarms: three chi-square tests at 1e-9 each, on fixed seeds. Noise that is keyed by position alone, and not by the
round's start as well, fails the first of them with a quarter of the seeds (`test_noise_met_again_is_caught`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch

from spec_decode import clock, decode, noise
from spec_decode.draft_length import EarlyStop
from spec_decode.drafters import Draft
from spec_decode.drafters.model import ModelDrafter
from spec_decode.events import DRAFTED, Round
from spec_decode.prove.table import SilentText, TableTarget
from spec_decode.sampling import distribution
from spec_decode.settings import Settings
from spec_decode.state import State

FALSE_ALARM = 1e-9
SEEDS = 10_000  # twice as many as convict noise that is met again
PROMPT = [1, 0]
TOKENS = 4
# Logits of the next token given the last two, `[2, 2, 2]`: p(0) between 0.29 and 0.73. The drafter's q is the same
# everywhere, q(0) = 0.62, so that noise met again gives the same token again.
TARGET = torch.tensor([[[0.5, -0.5], [-0.3, 0.3]], [[-0.5, 0.4], [0.2, -0.2]]])
DRAFTER = torch.tensor([0.25, -0.25]).expand(2, 2, 2)


class Clock:
    """Stands still but for what is added to it."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class TimedDrafter(ModelDrafter):
    """Takes a second for every token it drafts, and half a second more for token 1."""

    def __init__(self, model: TableTarget, clock: Clock, one_hot: bool) -> None:
        super().__init__(model, "timed", 2)  # type: ignore[arg-type]
        self.clock, self.one_hot = clock, one_hot

    def draft_on_host(self, state: State, length: int, stop: EarlyStop | None) -> Draft | None:
        made = super().draft_on_host(state, length, stop)
        assert made is not None
        self.clock.now += made.ids.shape[1] + 0.5 * int(made.ids.sum())
        return replace(made, q=None) if self.one_hot else made


class Adversary:
    """Chooses what to draft by all that past rounds tell of the noise."""

    def __init__(self) -> None:
        self.rounds: list[Round] = []

    @property
    def early_stop(self) -> EarlyStop | None:
        """Ends a draft after an unlikely token, or never: the seconds of all past rounds decide."""
        seconds = sum(round.draft_seconds for round in self.rounds)
        return EarlyStop([0.0, 1.0], [0.5]) if seconds % 1 else None

    def choose(self) -> int:
        if not self.rounds:
            return 3
        last = self.rounds[-1]
        drafted = [token for token in last.tokens if token.role in DRAFTED]
        unseen = drafted[last.accepted + 1 :]  # refused, and verification never visited them
        if unseen:
            return 3 if unseen[0].id == 0 else 0
        confidences = sum(token.q or 0.0 for round in self.rounds for token in round.tokens)
        return 0 if last.draft_seconds % 1 and confidences % 1 < 0.5 else 3

    def observe(self, round: Round, stopped_early: bool | None) -> None:
        self.rounds.append(round)


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Clock:
    made = Clock()
    monkeypatch.setattr(decode, "time", made)
    monkeypatch.setattr(clock, "time", made)
    return made


def texts(made: Clock, one_hot: bool, seeds: int, rule: str) -> Iterator[list[int]]:
    """The first tokens that `decode` emits, for each seed."""
    # A one-hot drafter is sure of its argmax whatever the noise.
    sure = torch.zeros_like(DRAFTER).scatter_(-1, DRAFTER.argmax(-1, keepdim=True), 50.0)
    for seed in range(seeds):
        # Room for three tokens more, so that the end of the text cuts no draft short.
        settings = Settings(temperature=1.0, rule=rule, max_new_tokens=TOKENS + 3, seed=seed)
        drafter = TimedDrafter(TableTarget(sure if one_hot else DRAFTER), made, one_hot)
        lane = decode.speculative(TableTarget(TARGET), drafter, Adversary(), PROMPT, SilentText(), settings)  # type: ignore[arg-type]
        ids: list[int] = []
        while len(ids) < TOKENS:
            ids += [token.id for token in next(lane).emitted]
        lane.close()  # type: ignore[attr-defined]
        yield ids[:TOKENS]


def p_value(made: Clock, one_hot: bool, seeds: int, rule: str = "rejection") -> float:
    """Chi-square of tokens 1 to 4 against their joint distribution, on 15 degrees of freedom."""
    observed = np.zeros((2,) * TOKENS)
    for ids in texts(made, one_hot, seeds, rule):
        observed[tuple(ids)] += 1
    p = distribution(TARGET, Settings(temperature=1.0)).double().numpy()
    expected = np.empty_like(observed)
    for cell in np.ndindex(expected.shape):
        text = (*PROMPT, *cell)
        expected[cell] = seeds * np.prod([p[text[i - 2], text[i - 1], text[i]] for i in range(2, len(text))])
    return float(scipy.stats.chisquare(observed.ravel(), expected.ravel() * seeds / expected.sum()).pvalue)


@pytest.mark.parametrize(
    "one_hot", [pytest.param(False, id="sampled"), pytest.param(True, id="one-hot", marks=pytest.mark.long)]
)
def test_rejection_is_exact_whatever_the_controller_has_seen(fake_clock: Clock, one_hot: bool) -> None:
    assert p_value(fake_clock, one_hot, SEEDS) > FALSE_ALARM


def test_block_verification_is_exact_whatever_the_controller_has_seen(fake_clock: Clock) -> None:
    assert p_value(fake_clock, False, SEEDS, "block") > FALSE_ALARM


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_noise_met_again_is_caught(fake_clock: Clock, monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    """The same test with noise that forgets where its round started."""
    keys = noise.position_keys
    monkeypatch.setattr(
        noise, "position_keys", lambda seed, positions, stream, start=None: keys(seed, positions, stream)
    )
    assert p_value(fake_clock, False, SEEDS // 2, rule) < FALSE_ALARM
