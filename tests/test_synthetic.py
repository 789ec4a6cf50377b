"""Synthetic acceptance: verdicts with the probability asked for, the work of a rule, and marked wherever it shows.

False alarms: each chi-square is tested at 1e-6; there are five, with fixed seeds.
"""

from __future__ import annotations

import json
from math import isclose
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import test_rounds
import tiny
import torch

from spec_decode import noise, sampling
from spec_decode.__main__ import _describe, main
from spec_decode.drafters import Draft, NoDrafter
from spec_decode.drafters.mtp import MTPDrafter
from spec_decode.errors import SettingsError
from spec_decode.events import Trace
from spec_decode.loading import pair as loading
from spec_decode.metrics import acceptance_rate, per_position_acceptance, race_report
from spec_decode.noise import RoundNoise
from spec_decode.request import Request
from spec_decode.rules import RULES, SYNTHETIC
from spec_decode.session.caption import about
from spec_decode.settings import Settings
from spec_decode.sources.local import Race
from spec_decode.sources.replay import ReplaySource
from spec_decode.target import Target
from spec_decode.verification import Case

pytestmark = pytest.mark.usefixtures("one_thread")

FALSE_ALARM = 1e-6
ROWS, LENGTH, VOCABULARY = 20_000, 4, 5
COUNT = 60  # tokens of a race


def case(acceptance: float, temperature: float, seed: int = 3) -> Case:
    """Rounds that start at as many places, each with noise of its own."""
    logits = torch.randn(1, 1, VOCABULARY, generator=torch.Generator().manual_seed(1)).expand(ROWS, LENGTH + 1, -1)
    draft = torch.arange(LENGTH).expand(ROWS, -1)
    made = RoundNoise(seed, 7 * torch.arange(ROWS), LENGTH + 1, VOCABULARY)
    return Case(draft, logits, logits.softmax(-1), None, made, temperature, 1.0, acceptance)


def p_value(counts: torch.Tensor, p: list[float]) -> float:
    return float(scipy.stats.chisquare(counts.numpy(), [x * int(counts.sum()) for x in p]).pvalue)


@pytest.mark.parametrize("acceptance", [0.3, 0.8])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_accepted_lengths_are_geometric_and_cut_at_the_draft_length(acceptance: float, temperature: float) -> None:
    verdict = SYNTHETIC.verify(case(acceptance, temperature))
    lengths = [acceptance**n * (1 - acceptance) for n in range(LENGTH)] + [acceptance**LENGTH]
    counts = torch.bincount(verdict.accepted, minlength=LENGTH + 1)
    assert p_value(counts, lengths) > FALSE_ALARM
    off = [(acceptance - 0.03) ** n * (1.03 - acceptance) for n in range(LENGTH)] + [(acceptance - 0.03) ** LENGTH]
    assert p_value(counts, off) < FALSE_ALARM, "an acceptance that is 0.03 off is found"


def test_the_token_after_them_is_the_targets_own() -> None:
    greedy = SYNTHETIC.verify(case(0.5, 0.0))
    given = case(0.5, 1.0)
    assert (greedy.token == given.logits[0, 0].argmax()).all()
    sampled = SYNTHETIC.verify(given)
    counts = torch.bincount(sampled.token, minlength=VOCABULARY)
    assert p_value(counts, given.p[0, 0].double().div(given.p[0, 0].double().sum()).tolist()) > FALSE_ALARM


def test_a_seed_repeats_the_verdicts_and_another_does_not() -> None:
    first, again, other = (SYNTHETIC.verify(case(0.6, 0.0, seed)).accepted for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(("acceptance", "accepted"), [(0.0, 0), (1.0, LENGTH)])
def test_never_and_always(acceptance: float, accepted: int) -> None:
    assert (SYNTHETIC.verify(case(acceptance, 1.0)).accepted == accepted).all()
    given = case(0.5, 1.0)
    with pytest.raises(ValueError, match="probability of acceptance"):
        SYNTHETIC.verify(Case(given.draft, given.logits, given.p, None, given.noise))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_its_rounds_do_the_work_of_a_rules_and_read_nothing(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operators of a whole round: a handful more or fewer than under rejection, or than greedily with the uniform noise
    of the verdicts added. The same operators whatever the verdicts are."""
    for module in (noise, sampling):
        monkeypatch.setattr(module, "_compiled", lambda x: False)
    target, made = test_rounds.parts("shared", "mtp")
    counts = {}
    for name, options in {"real": {"rule": "rejection"}, "synthetic": {"synthetic_acceptance": 0.5}}.items():
        settings = Settings(temperature=temperature, seed=3, **options)  # type: ignore[arg-type]
        lane, state = test_rounds.begun(target, made, settings, test_rounds.PROMPT)
        several = test_rounds.rounds(lane, state, LENGTH)
        found = [next(several) for _ in range(4)]
        for operations, _ in found[1:]:
            test_rounds.assert_same(found[0][0], operations)
        counts[name] = len(found[0][0])
        accepted = {int(outcome.verdict.accepted) for _, outcome in found}
    assert len(accepted) > 1, "verdicts differ and operators do not"
    places = torch.arange(40, 40 + LENGTH)[None]
    extra, _ = test_rounds.recorded(lambda: noise.uniform(3, places, noise.ACCEPT, places[:, :1]))
    expected = counts["real"] + (0 if temperature else len(extra))
    assert abs(counts["synthetic"] - expected) <= 12


def pair() -> tiny.PairOf:
    model, assistant = tiny.gemma4("shared", ordered=True)
    target = Target(model)
    return tiny.PairOf(target, MTPDrafter(assistant, target))


def raced(**settings: Any) -> Trace:
    race = Race(pair(), Request("Some words to begin with", Settings(max_new_tokens=COUNT, draft_length=3, **settings)))  # type: ignore[arg-type]
    list(race)
    return race.trace


def test_a_race_has_the_acceptance_that_was_asked_for_and_the_baseline_its_own_text() -> None:
    trace = raced(synthetic_acceptance=0.8, seed=1)
    assert trace.token_ids("baseline") == raced(synthetic_acceptance=0.0).token_ids("speculative"), "the target's own"
    assert len(trace.token_ids("speculative")) == COUNT
    assert all(isclose(found, 0.8, abs_tol=0.3) for found in per_position_acceptance(trace.lane("speculative"))[:2])
    assert (acceptance_rate(raced(synthetic_acceptance=0.0).lane("speculative")) or 0) == 0
    assert acceptance_rate(raced(synthetic_acceptance=1.0).lane("speculative")) == 1
    other = raced(synthetic_acceptance=0.8, seed=1)
    assert trace.token_ids("speculative") == other.token_ids("speculative")


@pytest.mark.parametrize("acceptance", [0.0, 0.8])
def test_nothing_claims_that_the_text_is_exact_or_the_same(acceptance: float) -> None:
    """Not even where nothing was accepted, and the texts are the same."""
    trace = Trace.from_json(raced(synthetic_acceptance=acceptance).to_json())
    assert trace.settings["rule"] == "synthetic" and trace.settings["synthetic_acceptance"] == acceptance
    assert not trace.promises.exact and not trace.promises.same_text
    report = race_report(trace)
    assert report["identical"] is False and report["synthetic_acceptance"] == acceptance and report["parting"] is None
    said = _describe(report)
    assert "identical" not in said and f"Synthetic acceptance {acceptance:g}: only the times" in said
    source = ReplaySource(trace)
    what = about(source.recording.request, source.info, source.promises, source.recording)
    assert what["synthetic"] and not what["exact"] and not what["same_text"]
    assert (
        "Acceptance is synthetic" in what["why"] and f"synthetic acceptance {acceptance:g}" in what["ran"]["settings"]
    )


def test_a_rule_and_synthetic_acceptance_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingsError, match="takes the place of a rule"):
        Settings(rule="rejection", temperature=1, synthetic_acceptance=0.5)
    for wrong in (-0.1, 1.1, "x", float("nan"), True):
        with pytest.raises(SettingsError, match="Synthetic acceptance must be a number from 0 to 1"):
            Settings(synthetic_acceptance=wrong)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="Unknown rule 'synthetic'"):
        Settings(rule="synthetic")
    made = Settings(synthetic_acceptance=0.8)
    assert Settings(**made.to_dict()) == made and made.deciding is SYNTHETIC and "synthetic" not in RULES
    for command in (["race", "--prompt", "x"], ["bench", "--prompts", "x"]):
        assert main([*command, "--synthetic-acceptance", "0.8", "--rule", "greedy"]) == 2
        assert "takes the place of a rule" in capsys.readouterr().err


def test_race_and_bench_mark_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(loading, "load_pair", lambda **_: pair())
    options = ["--synthetic-acceptance", "0.7", "--max-new-tokens", "20", "--draft-length", "3"]
    assert main(["race", "--prompt", "Some words", "--json", *options]) == 0
    assert json.loads(capsys.readouterr().out)["synthetic_acceptance"] == 0.7
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.json"
    prompts.write_text(json.dumps({"id": "a", "category": "b", "prompt": "Some words"}) + "\n")
    assert main(["bench", "--prompts", str(prompts), "--json", str(out), *options]) == 0
    printed = capsys.readouterr().out
    assert "synthetic acceptance 0.7: verdicts were drawn, not made; texts mean nothing" in printed
    report = json.loads(out.read_text())
    assert report["conditions"][0]["condition"]["synthetic_acceptance"] == 0.7
    assert report["conditions"][0]["identical"] is None and report["prompts"][0]["identical"] is None


def test_a_plain_step_is_none_of_its_business() -> None:
    target, _ = test_rounds.parts("llama", "none")
    lane, state = test_rounds.begun(target, NoDrafter(), Settings(synthetic_acceptance=0.5), test_rounds.PROMPT)
    outcome = test_rounds.decode_round(lane, state, 0, Draft.none(state))
    assert int(outcome.verdict.accepted) == 0 and outcome.verdict.compared.shape == (1, 0, 2)
