"""What a controller could gain that knew every verdict: the simulation of a lane, and the bound of all of them."""

from __future__ import annotations

import itertools
import random

import pytest

from spec_decode.bench import markdown
from spec_decode.bench.oracle import Recorded, bound, drafter_of, measure, play, record
from spec_decode.draft_length import Adaptive, Fixed
from spec_decode.drafters import Drafter
from spec_decode.drafters.either import EitherDrafter
from spec_decode.drafters.lookup import LookupDrafter
from spec_decode.errors import UserError
from spec_decode.events import Costs
from spec_decode.request import Request
from spec_decode.settings import Settings

COSTS = Costs(0.01, (1.0, 1.1, 1.2, 1.5, 1.55, *(1.6 + 0.2 * g for g in range(12))), 0.05, 0.1)


def recorded(seed: int, tokens: int, right: float = 0.6) -> Recorded:
    """A text whose drafted tokens are right with this probability, at every position."""
    rng = random.Random(seed)
    text = [rng.randrange(4) for _ in range(tokens)]
    drafts = {}
    for at in range(1, tokens - 1):
        ids = [t if rng.random() < right else 9 for t in text[at : at + 8]]
        drafts[2 + at] = (ids, [0.9 if a == b else 0.4 for a, b in zip(ids, text[at:], strict=False)])
    return Recorded(str(seed), "code", [7, 8], text, drafts)


class Scripted:
    """Draft lengths from a list."""

    early_stop = None

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = iter(lengths)

    def choose(self) -> int:
        return next(self.lengths)

    def observe(self, round: object, stopped_early: bool | None) -> None:
        pass


class Drafts(Drafter):
    """The recorded drafts, not ended early."""

    def __init__(self, text: Recorded) -> None:
        from spec_decode.bench.oracle import _Replayed

        self.inner = _Replayed(text, "mtp")

    def draft_on_host(self, state, length, stop):  # type: ignore[no-untyped-def]
        return self.inner.draft_on_host(state, length, None)


@pytest.mark.parametrize("seed", range(2))
def test_the_oracle_is_the_best_of_all_sequences_of_draft_lengths(seed: int) -> None:
    """Every sequence of draft lengths of a text of 6 tokens is tried."""
    text = recorded(seed, 6)
    tried = [
        play(text, Drafts(text), Scripted(list(lengths)), COSTS, 6)  # type: ignore[arg-type]
        for lengths in itertools.product(range(5), repeat=5)
    ]
    assert bound(text, Drafts(text), COSTS) == pytest.approx(max(tried))


@pytest.mark.parametrize("right", [0.0, 0.5, 0.9])
def test_no_controller_is_faster_than_the_oracle(right: float) -> None:
    text = recorded(3, 200, right)
    either = EitherDrafter(Drafts(text), LookupDrafter())
    most = bound(text, either, COSTS)
    for controller in (Fixed(1), Fixed(4), Fixed(8), Adaptive(COSTS)):
        assert play(text, either, controller, COSTS, 200) <= most + 1e-9
    assert play(text, either, Fixed(0), COSTS, 200) == pytest.approx(1.0)


def test_the_oracle_takes_a_longer_draft_where_its_pass_is_cheaper() -> None:
    cliff = Costs(0.01, (1.0, 1.6, 1.7, 1.2, *(1.25 + 0.2 * g for g in range(13))), 0.01, 0.0)
    text = recorded(5, 200, 0.5)
    most = bound(text, Drafts(text), cliff)
    assert most > 1.0
    for length in range(1, 6):
        assert play(text, Drafts(text), Fixed(length), cliff, 200) <= most + 1e-9


def test_a_simulated_lane_has_the_rounds_of_a_real_one(embedded_dir: object) -> None:
    """With a fixed draft length, a race takes as many rounds and its cost is theirs; the report holds together."""
    from spec_decode.loading.pair import load_pair
    from spec_decode.sources.local import LocalSource

    pair = load_pair(drafter="mtp", device="cpu")
    prompt = {"id": "a", "category": "chat", "prompt": "Why does bread rise? Answer in a paragraph."}
    settings = Settings(draft_length=3, max_new_tokens=64)
    race = LocalSource(pair, own="mtp").race(Request(prompt["prompt"], settings))
    for _ in race:
        pass
    rounds = race.trace.lane("speculative")[1:]
    (text,) = record(pair, [prompt], settings)
    assert text.text == race.trace.token_ids("speculative")
    cost = sum(COSTS.round(found.drafted) for found in rounds)
    simulated = play(text, drafter_of(pair, text), Fixed(3), COSTS, 64)
    # a round that ends the text keeps only the drafts up to its end, and the simulation has the whole draft
    assert simulated == pytest.approx((len(text.text) - 1) / cost, rel=0.02)
    assert bound(text, drafter_of(pair, text), COSTS) > simulated

    report = measure(pair, [prompt], settings, lambda line: None)
    assert report["texts"] == 1 and report["oracle"]["mean"] >= report["adaptive"]["mean"]
    assert report["fixed"][str(report["best_fixed"])]["mean"] == max(s["mean"] for s in report["fixed"].values())
    assert "| oracle |" in "\n".join(markdown.oracle({"oracle": report}))


def test_a_rule_whose_text_depends_on_drafts_is_refused() -> None:
    with pytest.raises(UserError, match="does not depend on drafts"):
        next(record(None, [], Settings(temperature=1.0, rule="rejection")))  # type: ignore[arg-type]
