"""Where lanes part that should show the same text: at which token, and with which logit gap in each lane."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch

from spec_decode.__main__ import _describe
from spec_decode.drafters.mtp import MTPDrafter
from spec_decode.events import BASELINE, SPECULATIVE, Alternative, Round, Token, Trace
from spec_decode.metrics import race_report
from spec_decode.parting import parting
from spec_decode.request import Request
from spec_decode.session.tally import Tally
from spec_decode.settings import Settings
from spec_decode.sources.local import Race
from spec_decode.target import Target

pytestmark = pytest.mark.usefixtures("one_thread")


def lane(name: str, *tokens: tuple[int, float, dict[int, float]]) -> list[Round]:
    """A round for each token, its probability, and the alternatives there."""
    return [
        Round(
            name, i, (Token(id, chr(97 + id), "target", p, target_top=tuple(Alternative(*a) for a in top.items())),),
            0, 0.0, 0.1, 0.1, 0.1 * (i + 1),
        )
        for i, (id, p, top) in enumerate(tokens)
    ]  # fmt: skip


def trace(slow: list[Round], fast: list[Round], **settings: Any) -> Trace:
    request = Request("x", Settings(**settings)).to_dict()
    finish = dict.fromkeys((BASELINE, SPECULATIVE), "length")
    return Trace(
        request, {"target": "t", "drafter": "d", "device": "cpu", "dtype": "float32"}, {}, 1, (*slow, *fast), finish
    )


SLOW = lane(BASELINE, (1, 0.9, {1: 0.9}), (2, 0.42, {2: 0.42, 3: 0.40}), (5, 0.9, {5: 0.9}))
FAST = lane(SPECULATIVE, (1, 0.9, {1: 0.9}), (3, 0.415, {3: 0.415, 2: 0.405}), (6, 0.9, {6: 0.9}))


def test_place_tokens_and_gaps() -> None:
    found = parting(trace(SLOW, FAST))
    assert found is not None and found["position"] == 1
    assert [found[name]["id"] for name in (BASELINE, SPECULATIVE)] == [2, 3]
    assert found[BASELINE]["text"] == "c" and found[SPECULATIVE]["text"] == "d"
    gaps = math.log(0.42 / 0.40), math.log(0.415 / 0.405)
    assert [found[name]["logit_gap"] for name in (BASELINE, SPECULATIVE)] == pytest.approx(gaps)
    assert found["logit_shift"] == pytest.approx(sum(gaps))
    sampled = parting(trace(SLOW, FAST, temperature=0.5))
    assert sampled and sampled[BASELINE]["logit_gap"] == pytest.approx(gaps[0] / 2), "temperature is taken out"


def test_nothing_parts_where_texts_agree_or_may_differ() -> None:
    assert parting(trace(SLOW, lane(SPECULATIVE, (1, 0.9, {}), (2, 0.4, {})))) is None, (
        "one is the beginning of the other"
    )
    assert parting(trace(SLOW, FAST, temperature=1, rule="rejection")) is None
    assert parting(trace(SLOW, FAST, rule="rejection")) is not None, "which is the greedy rule at temperature 0"
    assert parting(trace(SLOW, FAST, rule="threshold")) is None
    assert parting(trace(SLOW, FAST, synthetic_acceptance=0.5)) is None


def test_a_token_that_was_not_recorded_leaves_no_gap() -> None:
    found = parting(trace(SLOW, lane(SPECULATIVE, (1, 0.9, {}), (7, 0.4, {7: 0.4}))))
    assert found is not None and found[BASELINE]["logit_gap"] is None and found["logit_shift"] is None


def test_reports_and_the_page_tell() -> None:
    made = trace(SLOW, FAST)
    report = race_report(made)
    assert report["parting"] == parting(made)
    assert "lanes differ from token 2 ('c' and 'd'; logit gaps 0.04879, 0.02439)" in _describe(report)
    tally = Tally()
    for r in made.rounds:
        tally.add(r)
    assert tally.to_dict(made)["parting"] == report["parting"] and tally.to_dict()["same"] == 1


def test_lanes_whose_passes_round_otherwise_part_at_a_near_tie() -> None:
    """A target whose logits depend a little on how many tokens its pass has, as in bfloat16 on a GPU: lanes part where
    the gap is smaller than that noise, and both gaps are told from each lane's own pass."""
    model, assistant = tiny.gemma4("dense", initializer_range=0.05)
    head, size = model.lm_head, 0.02
    draw = torch.randn(tiny.VOCABULARY, generator=torch.Generator().manual_seed(2))

    def shaken(_: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        return out + size * draw if out.shape[-2] > 1 else out

    head.register_forward_hook(shaken)
    target = Target(model)
    made = tiny.PairOf(target, MTPDrafter(deepcopy(assistant), target))
    near, parted = 2 * size * float(draw.abs().max()), 0
    for words in ("one", "another beginning", "and a third"):
        for sampling in ({}, {"temperature": 0.7}):
            race = Race(made, Request(words, Settings(max_new_tokens=60, draft_length=3, **sampling)))  # type: ignore[arg-type]
            list(race)
            found = parting(race.trace)
            if found is None or found["logit_shift"] is None:
                continue
            parted += 1
            assert abs(found["logit_shift"]) <= near + 1e-4
            if not sampling:
                assert all(0 <= found[name]["logit_gap"] <= near for name in (BASELINE, SPECULATIVE))
            ids = {name: race.trace.token_ids(name) for name in (BASELINE, SPECULATIVE)}
            at = found["position"]
            assert ids[BASELINE][:at] == ids[SPECULATIVE][:at]
            assert [ids[name][at] for name in ids] == [found[name]["id"] for name in ids]
    assert parted > 1
    assert replace(race.trace, rounds=()).identical
