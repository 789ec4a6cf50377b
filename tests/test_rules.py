"""The table of rules, and what a round tells of how its rule decided."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tiny
import torch
from test_decode import Drawing, Model, speak

from spec_decode import noise, rules
from spec_decode.draft_length import Fixed
from spec_decode.drafters.model import ModelDrafter
from spec_decode.events import Comparison, Round
from spec_decode.rules import RULES
from spec_decode.sampling import distribution
from spec_decode.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 7
generator = torch.Generator().manual_seed(5)
TARGET = 2 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)  # logits by the last token
DRAFTER = (TARGET + torch.randn(VOCABULARY, VOCABULARY, generator=generator)).softmax(-1)
SAMPLING = [name for name, rule in RULES.items() if rule.samples]


def test_the_table_needs_no_torch() -> None:
    code = "import sys, spec_decode.rules, spec_decode.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_rule_has_a_function_and_says_what_it_is() -> None:
    for name, rule in RULES.items():
        assert rule.name == name and callable(rules._function(name))
        assert rule.summary.endswith(".") and rule.compares.count(",") == 1
        assert ("lossy" in rule.label) is not rule.exact
        assert rule.exact or rule.lenient, "only a lossy rule drifts, and by its lenience"
        assert not rule.same_text or rule.noise != "round", "noise of a round is not the baseline's"


@pytest.mark.parametrize("name", RULES)
def test_at_temperature_zero_an_exact_rule_is_the_greedy_one(name: str) -> None:
    rule = RULES[name]
    deciding = Settings(rule=name).deciding
    assert deciding is (RULES["greedy"] if rule.exact else rule)
    assert Settings(rule=name).same_text is rule.exact
    if rule.samples:
        assert Settings(rule=name, temperature=0.5).deciding is rule
        assert Settings(rule=name, temperature=0.5).same_text is rule.same_text
        assert Settings(rule=name, temperature=0.5).draws_q is (rule.noise == "round")
    assert not Settings(rule=name).draws_q


def raced(name: str, temperature: float, rounds: int = 60) -> tuple[Settings, list[tuple[list[int], Round]]]:
    """Rounds of a drafter that draws three tokens, each with the text before it."""
    settings = Settings(rule=name, temperature=temperature, max_new_tokens=4 * rounds, seed=3, lenience=0.6)
    text, seen = [1, 2], []
    for r in speak(Model(lambda ids: TARGET[ids[-1]]), Drawing(DRAFTER), Fixed(3), list(text), settings):
        seen.append((list(text), r))
        text += [token.id for token in r.emitted]
        if len(seen) > rounds:
            break
    return settings, seen


@pytest.mark.parametrize(("name", "temperature"), [("greedy", 0.0), *((name, 0.8) for name in SAMPLING)])
def test_alternatives_are_the_likeliest_of_target_and_drafter(name: str, temperature: float) -> None:
    settings, seen = raced(name, temperature)
    p_of = TARGET.softmax(-1) if temperature == 0 else distribution(TARGET, settings)
    for before, r in seen:
        text = list(before)
        for token in r.tokens:
            if token.draft_position is None:
                text = [*before, *(t.id for t in r.emitted[:-1])]
            expected = p_of[text[-1]].topk(5)
            assert [alternative.id for alternative in token.target_top] == expected.indices.tolist()
            assert [alternative.p for alternative in token.target_top] == pytest.approx(expected.values.tolist())
            if token.draft_position is None:
                assert token.drafter_top == ()
            else:
                own = DRAFTER[text[-1]].topk(5)
                assert [alternative.id for alternative in token.drafter_top] == own.indices.tolist()
                assert [alternative.p for alternative in token.drafter_top] == pytest.approx(own.values.tolist())
                text.append(token.id)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_draft_model_tells_its_alternatives(temperature: float) -> None:
    drafter = ModelDrafter(Model(lambda ids: DRAFTER[ids[-1]].log()), "small", VOCABULARY)  # type: ignore[arg-type]
    settings = Settings(temperature=temperature, max_new_tokens=40, seed=1)
    q_of = DRAFTER if temperature == 0 else distribution(DRAFTER.log(), settings)
    text, drafted = [1, 2], 0
    for r in speak(Model(lambda ids: TARGET[ids[-1]]), drafter, Fixed(3), list(text), settings):
        before = list(text)
        for token in r.tokens[: r.drafted]:
            expected = q_of[before[-1]].topk(5)
            assert [alternative.id for alternative in token.drafter_top] == expected.indices.tolist()
            assert [alternative.p for alternative in token.drafter_top] == pytest.approx(expected.values.tolist())
            before.append(token.id)
            drafted += 1
        text += [token.id for token in r.emitted]
    assert drafted > 10


@pytest.mark.parametrize(("name", "temperature"), [("greedy", 0.0), *((name, 0.8) for name in SAMPLING)])
def test_what_was_compared_decides(name: str, temperature: float) -> None:
    """A token was accepted exactly if its numbers say so; there are none for what verification did not reach."""
    rule = RULES[name]
    _, seen = raced(name, temperature)
    told: list[Comparison] = []
    for _, r in seen[1:]:
        drafted = r.tokens[: r.drafted]
        for i, token in enumerate(drafted):
            if name != "block":  # which judges a draft as a whole
                assert (token.compared is None) is (i > r.accepted)
            if token.compared is None:
                continue
            value, bound = token.compared
            told.append(token.compared)
            if rule.noise == "round":
                assert 0 < value < 1 and 0 <= bound <= 1
            passed = value < bound if rule.noise == "round" else value >= bound
            assert passed is (token.role == "accepted") or name == "block"
        if name == "block":
            passes = [
                i for i, token in enumerate(drafted, 1) if token.compared and token.compared[0] < token.compared[1]
            ]
            assert r.accepted == max(passes, default=0)
        assert r.tokens[-1].compared is None
    assert len(set(told)) > (len(told) // 2 if rule.noise != "none" else 2), "numbers of their own"


@pytest.mark.parametrize("name", [name for name in SAMPLING if RULES[name].noise == "round"])
def test_the_numbers_are_those_of_the_noise_and_the_residual_what_was_drawn_from(name: str) -> None:
    settings, seen = raced(name, 0.8)
    p_of = distribution(TARGET, settings)
    corrections = 0
    for before, r in seen[1:]:
        if not r.drafted:
            continue
        places = torch.arange(len(before), len(before) + r.drafted)
        drawn = noise.uniform(settings.seed, places, noise.ACCEPT, places[:1]).tolist()
        told = [token.compared.value for token in r.tokens if token.compared]
        assert told == pytest.approx(drawn[: len(told)])
        assert (r.residual is None) is (r.accepted == r.drafted)
        if r.residual and name == "rejection":
            last = [*before, *(t.id for t in r.emitted)][len(before) + r.accepted - 1]
            rest = (p_of[last] - DRAFTER[last]).clamp_min(0)
            mass = float(rest.sum())
            assert r.residual.mass == pytest.approx(mass, rel=1e-4)
            expected = (rest / mass).topk(5)
            found = [alternative.p for alternative in r.residual.top]
            assert found == pytest.approx([x for x in expected.values.tolist() if x > 0], rel=1e-4)
            assert r.tokens[-1].id in [alternative.id for alternative in r.residual.top] or len(found) == 5
            corrections += 1
    assert corrections > 5 or name != "rejection"


def test_a_round_names_the_drafter_of_its_draft() -> None:
    drafter = tiny.ScriptedDrafter(lambda tokens, n: [0] * n if len(tokens) % 2 else [])
    rounds = list(speak(Model(lambda ids: TARGET[ids[-1]]), drafter, Fixed(2), [1], Settings(max_new_tokens=20)))
    assert {r.drafter for r in rounds if r.drafted} == {"scripted"}
    assert {r.drafter for r in rounds if not r.drafted} == {""}
