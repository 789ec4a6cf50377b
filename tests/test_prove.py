"""`python -m spec_decode prove` and the lab behind the page: the test itself, its power, its false alarms, its words.

False alarms: texts of `decode` come from fixed seeds, so a sound engine passes always or never. For a fresh choice of
seeds a sound engine would fail `test_an_exact_rule_agrees` with probability 1 % (the family-wise rate of its tests) and
`test_small_runs_of_an_exact_rule_are_rarely_refuted` with probability below 1e-4.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from test_ui_app import ready
from ui_fakes import FakeSource, fake_load

import app
from spec_decode import decode
from spec_decode.__main__ import main
from spec_decode.errors import SettingsError
from spec_decode.prove import experiment, trials
from spec_decode.prove.chi_square import chi_square, detectable, groups, holm, survival
from spec_decode.prove.experiment import AGREES, CANNOT_TELL, REFUTED, Experiment, judged, progress, words
from spec_decode.prove.setup import CLAIMED, DRAFTERS, LEVEL, POWER, SEEDS, WRONG, Setup, setup, suite
from spec_decode.rules import RULES
from spec_decode.session import lab
from spec_decode.settings import Settings
from spec_decode.ui import Engine, Limits, build

pytestmark = pytest.mark.usefixtures("one_thread")
SOME = 1500


def counts(cells: list[int], size: int) -> np.ndarray:
    return np.bincount(cells, minlength=size)


def effect(seen: np.ndarray, due: np.ndarray) -> float:
    """Cohen's w."""
    return float(np.sqrt(((seen - due) ** 2 / due).sum()))


@pytest.fixture(scope="module")
def exact() -> list[int]:
    """The cells of the default number of texts of the rejection rule with drawn drafts."""
    torch.set_num_threads(1)
    return list(trials.drawn(Setup()))


@pytest.fixture(scope="module")
def wrong() -> list[int]:
    torch.set_num_threads(1)
    return list(trials.drawn(setup(WRONG, seeds=SOME)))


# The statistic


@pytest.mark.parametrize("freedom", [1, 7, 26, 80])
def test_the_distribution_functions_are_those_of_scipy(freedom: int) -> None:
    for x in (0.1, 5.0, 40.0, 300.0, 1200.0):
        assert survival(x, freedom) == pytest.approx(scipy.stats.chi2.sf(x, freedom), rel=1e-9, abs=1e-300)
        for size in (0.5, 30.0, 400.0):
            assert survival(x, freedom, size) == pytest.approx(scipy.stats.ncx2.sf(x, freedom, size), abs=1e-9)


def test_the_smallest_effect_is_seen_as_often_as_is_said() -> None:
    w = detectable(6000, 26, 5e-4, POWER)
    edge = scipy.stats.chi2.isf(5e-4, 26)
    assert scipy.stats.ncx2.sf(edge, 26, 6000 * w**2) == pytest.approx(POWER, abs=1e-6)
    assert detectable(6000, 0, 5e-4, POWER) == np.inf


def test_rare_cells_are_pooled_by_what_is_expected_alone() -> None:
    expected = np.array([0.0, 1.0, 2.0, 3.0, 50.0, 4.0, 40.0])
    group = groups(expected)
    assert group[0] == -1 and len({*group[[1, 2, 3]]}) == 1
    assert np.bincount(group[1:], expected[1:]).min() >= 5
    assert chi_square(np.array([1, 0, 0, 0, 0, 0, 0]), expected).p_value == 0, "a text of probability 0"
    observed = np.array([0, 1, 2, 3, 55, 4, 35])
    fit, merged = chi_square(observed, expected), np.bincount(group[1:], observed[1:])
    theirs = scipy.stats.chisquare(merged, np.bincount(group[1:], expected[1:]))
    assert fit.statistic == pytest.approx(theirs.statistic) and fit.p_value == pytest.approx(theirs.pvalue)
    assert chi_square(np.array([3]), np.array([3.0])) == (0.0, 0, 1.0)


def test_holm_refutes_step_by_step() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([0.2]) == [0.2]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.5}, {"top_p": 0.7}])
def test_the_probability_of_every_text_is_the_product_of_its_steps(sampling: dict[str, float]) -> None:
    asked = Setup(**sampling)  # type: ignore[arg-type]
    chances, names = trials.probabilities(asked), trials.cells(asked)
    p_of = trials.distribution(trials.TARGET, asked.settings(0)).double()
    assert len(names) == 27 and chances.sum() == pytest.approx(1, abs=1e-12)
    for name, chance in zip(names, chances, strict=True):
        text = [*trials.PROMPT, *(ord(letter) - ord("A") for letter in name)]
        steps = [float(p_of[text[i - 2], text[i - 1], text[i]]) for i in range(len(trials.PROMPT), len(text))]
        assert chance == pytest.approx(np.prod(steps), rel=1e-5)
    assert trials.probabilities(Setup()).min() * SEEDS > 5, "nothing is pooled at the default size"


# Rules


def test_an_exact_rule_agrees(exact: list[int]) -> None:
    found = progress(Setup(), counts(exact, 27), trials.probabilities(Setup()))
    (result,) = judged([found], [Setup()])
    assert result.verdict == AGREES and result.smallest < 0.05
    assert "agree" in words(result)


@pytest.mark.parametrize(
    "asked",
    [
        Setup("rejection", "model+lookup", seeds=SOME),
        Setup("rejection", "argmax", "adaptive", seeds=SOME),
        Setup("block", "model", 4, temperature=1.5, seeds=SOME),
        Setup("block", "lookup", 2, top_p=0.8, seeds=SOME),
        Setup("coupled", "model", 1, temperature=0.7, seeds=SOME),
        Setup("coupled", "suffix", "rate", seeds=SOME),
    ],
    ids=lambda asked: f"{asked.rule}-{asked.drafter}-{asked.draft_length}",
)
def test_exact_rules_agree_with_every_drafter(asked: Setup) -> None:
    test = Experiment(asked)
    for _ in test.run():
        pass
    assert test.result(LEVEL / 6, bias=0.2).verdict == AGREES


@pytest.mark.parametrize("name", DRAFTERS)
def test_every_drafter_drafts_and_greedy_texts_are_the_targets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[Any] = []
    speculative = decode.speculative

    def recorded(*given: Any) -> Iterator[Any]:
        for done in speculative(*given):
            rounds.append(done)
            yield done

    monkeypatch.setattr(trials.decode, "speculative", recorded)
    for rule in ("greedy", "rejection"):
        asked = setup(rule, name, seeds=60)
        rounds.clear()
        cells = list(trials.drawn(asked))
        assert rule != "greedy" or not any(cells)
        assert 0 < sum(done.accepted for done in rounds) < sum(done.drafted for done in rounds)


def test_a_greedy_rule_that_errs_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = setup("greedy", "lookup", seeds=100)
    assert (asked.temperature, experiment.smallest_bias(asked, LEVEL)) == (0, pytest.approx(1 - 0.1 ** (1 / 100)))
    monkeypatch.setattr("spec_decode.verification.greedy.argmax", lambda logits: logits.argmin(-1))
    test = Experiment(asked)
    for _ in test.run():
        pass
    result = test.result(LEVEL)
    assert result.verdict == REFUTED and "not the target’s argmax" in words(result)


def test_the_wrong_rule_is_refuted_by_a_hundred_texts(wrong: list[int]) -> None:
    """So at the default size it is refuted with probability 1 up to rounding."""
    asked = setup(WRONG, seeds=100)
    chances = trials.probabilities(asked)
    for part in np.array_split(wrong, SOME // 100):
        (result,) = judged([progress(asked, counts(part, 27), chances)], [asked], LEVEL / 20)
        assert result.verdict == REFUTED
    w = effect(counts(wrong, 27) / SOME, chances)
    edge = scipy.stats.chi2.isf(LEVEL / 20, 26)
    assert scipy.stats.ncx2.sf(edge, 26, SEEDS * (0.5 * w) ** 2) > 1 - 1e-9, "even if it were half as wrong"


def test_the_same_argmax_drafts_without_the_claim_are_exact(wrong: list[int]) -> None:
    """What is wrong is q, not the draft."""
    right, chances = Setup("rejection", "argmax", seeds=SOME), trials.probabilities(Setup())
    assert progress(right, counts(list(trials.drawn(right)), 27), chances).fit.p_value > 1e-4
    assert chi_square(counts(wrong, 27), chances * SOME).p_value < 1e-100


def test_no_race_can_choose_the_wrong_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert WRONG not in RULES and CLAIMED not in DRAFTERS
    with pytest.raises(SettingsError):
        Settings(rule=WRONG, temperature=1.0)
    with pytest.raises(SystemExit):
        main(["race", "--prompt", "hello", "--rule", WRONG])
    assert "invalid choice" in capsys.readouterr().err


# What the test promises


def test_small_runs_of_an_exact_rule_are_rarely_refuted(exact: list[int]) -> None:
    """55 runs of 100 texts at 5 %: above 10 refutations is less likely than 1e-4."""
    chances = trials.probabilities(Setup())
    runs = np.array_split(exact, 55)
    refuted = [chi_square(counts(part, 27), chances * len(part)).p_value <= 0.05 for part in runs]
    assert sum(refuted) <= 10


@pytest.mark.parametrize("count", [200, 1000, SEEDS])
@pytest.mark.parametrize("level", [0.05, 0.01])
def test_the_false_positive_rate_is_the_level(count: int, level: float) -> None:
    """Of 4,000 tests of counts drawn from the exact distribution itself; three standard errors are allowed for, and a
    twentieth of the level for what chi-square is only approximately."""
    chances, random = trials.probabilities(Setup()), np.random.default_rng(1)
    drawn = random.multinomial(count, chances / chances.sum(), 4000)
    refuted = np.mean([chi_square(seen, chances * count).p_value <= level for seen in drawn])
    error = 3 * np.sqrt(level * (1 - level) / 4000)
    assert 1.05 * level + error > refuted > 0.5 * level - error


@pytest.mark.parametrize("direction", ["wrong", "one cell", "spread"])
def test_a_bias_of_the_smallest_size_is_refuted_as_often_as_is_said(direction: str, wrong: list[int]) -> None:
    """A bias planted in the direction of the broken rule, in that of one text, and in a random one."""
    asked = Setup(seeds=3000)
    chances = trials.probabilities(asked)
    random = np.random.default_rng(2)
    towards = {
        "wrong": counts(wrong, 27) / SOME,
        "one cell": np.eye(27)[int(chances.argmax())],
        "spread": chances * np.exp(0.3 * random.standard_normal(27)),
    }[direction]
    change = towards / towards.sum() - chances
    smallest = experiment.smallest_bias(asked, LEVEL / 20)
    change *= 2 * smallest / effect(chances + change, chances)
    planted = chances + change
    assert planted.min() > 0 and effect(planted, chances) == pytest.approx(2 * smallest)
    assert np.abs(change).sum() / 2 <= smallest + 1e-12, "no bias of that distance has a smaller effect"
    drawn = random.multinomial(3000, planted / planted.sum(), 1000)
    refuted = np.mean([chi_square(seen, chances * 3000).p_value <= LEVEL / 20 for seen in drawn])
    assert refuted == pytest.approx(POWER, abs=0.05)


def test_a_test_that_was_stopped_tells_nothing(wrong: list[int]) -> None:
    asked = setup(WRONG)
    (result,) = judged([progress(asked, counts(wrong, 27), trials.probabilities(asked))], [asked])
    assert result.progress.fit.p_value < 1e-100 and result.verdict == CANNOT_TELL
    assert words(result).startswith("Stopped after 1,500 of 5,500")


def test_family_wise_one_refutation_needs_more_than_the_level(exact: list[int]) -> None:
    """A p-value at the level refutes alone, and not among others."""
    asked, chances = Setup(seeds=27_000), np.full(27, 1000.0)
    edge = scipy.stats.chi2.isf(0.005, 26)
    seen = chances.copy()
    seen[0], seen[1] = 1000 + np.sqrt(edge * 500), 1000 - np.sqrt(edge * 500)
    found = progress(asked, seen.round().astype(int), chances / 27_000)
    fine = progress(asked, chances.astype(int), chances / 27_000)
    assert judged([found], [asked])[0].verdict == REFUTED
    assert [each.verdict for each in judged([found, fine, fine], [asked] * 3)] == [AGREES] * 3


# The command


def run(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    code = main(["prove", *options, "--processes", "1"])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--rule", "greedy", "--drafter", "lookup", "--seeds", "50")
    assert code == 0 and "agrees" in out
    code, out, _ = run(capsys, "--rule", "wrong", "--seeds", "200")
    assert code == 3 and "refuted" in out and "family-wise" in out and "degrees of freedom" in out
    code, out, _ = run(capsys, "--rule", "threshold", "--drafter", "argmax", "--seeds", "200")
    assert code == 3 and "It is a lossy rule and claims no more." in out
    code, out, _ = run(capsys, "--rule", "rejection", "--drafter", "lookup", "--seeds", "60")
    assert code == 4 and "More seeds would tell." in out
    code, out, _ = run(capsys, "--rule", "rejection,wrong", "--drafter", "", "--seeds", "60", "--json")
    report = json.loads(out)
    assert code == 3 and report["verdict"] == "refuted"
    assert [test["verdict"] for test in report["tests"]] == [CANNOT_TELL] * len(DRAFTERS) + [REFUTED]
    assert sum(cell["observed"] for cell in report["tests"][0]["cells"]) == 60


@pytest.mark.parametrize(
    "options",
    [
        ["--rule", "x"],
        ["--drafter", "x"],
        ["--rule", "greedy", "--temperature", "0.5"],
        ["--rule", "wrong", "--drafter", "lookup"],
        ["--rule", "wrong", "--temperature", "0"],
        ["--temperature", "warm"],
        ["--draft-length", "17"],
        ["--top-p", "2"],
        ["--seeds", "0"],
        ["--seed", "-1"],
        ["--level", "2"],
        ["--bias", "nan"],
        ["--processes", "0"],
    ],
    ids=" ".join,
)
def test_bad_input_is_told_in_a_line(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prove", *options]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1


def test_by_default_every_exact_rule_is_tested_with_every_drafter() -> None:
    tested = {(asked.rule, asked.drafter) for asked in suite()}
    assert tested == {(rule.name, name) for rule in RULES.values() if rule.exact for name in DRAFTERS}


@pytest.mark.slow  # every process loads PyTorch
def test_two_processes_count_what_one_does() -> None:
    asked = [setup("greedy", "lookup", seeds=30), Setup("rejection", "lookup", seeds=experiment.CHUNK + 40)]
    told: list[tuple[int, int]] = []
    alone = experiment.run(asked, 1, lambda done, of: told.append((done, of)))
    assert experiment.run(asked, 2) == alone and told[-1] == (570, 570)


@pytest.mark.parametrize("command", [["prove", "--help"], ["prove", "--rule", "x"]])
def test_help_and_refusals_need_no_torch(command: list[str]) -> None:
    code = (
        "import sys; from spec_decode.__main__ import main\n"
        f"try: main({command!r})\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


# The lab of the page


def test_the_lab_shows_counts_and_then_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "SLICE", 0.02)
    engine = ready(FakeSource())
    views = [json.loads(view) for view in lab.run(engine, setup(WRONG, seeds=200))]
    assert [view["count"] for view in views] == sorted(view["count"] for view in views) and views[0]["count"] == 0
    assert {view["phase"] for view in views[:-1]} == {"running"} and len(views) > 3
    last = views[-1]
    assert (last["phase"], last["verdict"], sum(last["observed"])) == ("done", REFUTED, 200)
    assert last["small"] and last["freedom"] > 0 and "do not follow" in last["words"]


def test_the_lab_is_bounded_and_can_be_switched_off() -> None:
    engine = ready(FakeSource(), limits=Limits(seconds=0.3))
    *_, last = [json.loads(view) for view in lab.run(engine, Setup(seeds=lab.MOST))]
    assert last["phase"] == "done" and last["verdict"] == CANNOT_TELL and last["count"] < lab.MOST
    with pytest.raises(SettingsError, match="at most"):
        next(lab.run(engine, Setup(seeds=lab.MOST + 1)))
    with pytest.raises(SettingsError, match="switched off"):
        next(lab.run(ready(FakeSource(), limits=Limits(lab=False, measure=False)), Setup(seeds=10)))


def test_what_breaks_in_the_lab_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(trials, "drawn", lambda setup: iter([99]))
    *_, last = [json.loads(view) for view in lab.run(ready(FakeSource()), Setup(seeds=10))]
    assert last["phase"] == "failed" and "IndexError" in last["words"]
    assert "IndexError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "there"),
    [
        ([], True),
        (["--no-lab"], False),
        (["--host", "0.0.0.0"], False),
        (["--host", "0.0.0.0", "--lab"], True),
        (["--share"], False),
    ],
    ids=str,
)
def test_strangers_have_no_lab_unless_the_flags_say_so(flags: list[str], there: bool) -> None:
    assert app.parse(flags).limits.lab is there


def test_without_the_lab_and_measuring_the_page_has_no_tabs() -> None:
    blocks = build(Engine(fake_load(FakeSource()), limits=Limits(lab=False, measure=False)))
    assert not [block for block in blocks.blocks.values() if type(block).__name__ in ("Tabs", "Tab")]
