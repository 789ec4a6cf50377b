"""What a round says of itself: ids, probabilities, roles, text and seconds, from targets whose answers are known."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from spec_decode import decode
from spec_decode.draft_length import EarlyStop, Fixed
from spec_decode.drafters import Draft, Drafter
from spec_decode.drafters.model import ModelDrafter
from spec_decode.drafters.person import PersonDrafter
from spec_decode.errors import UserError
from spec_decode.events import Round
from spec_decode.noise import DRAFT, exponential
from spec_decode.prove.table import SilentText, TableCache
from spec_decode.sampling import TOP, distribution, exponential_argmax, likeliest
from spec_decode.settings import Settings
from spec_decode.state import State
from spec_decode.target import Pass, Target
from spec_decode.text import TextStream

pytestmark = pytest.mark.usefixtures("one_thread")

Says = Callable[[list[int]], Tensor]


class Model:
    """A `Target` whose logits `[V]` are a function of the text before."""

    device = torch.device("cpu")

    def __init__(self, says: Says, eos: frozenset[int] = frozenset()) -> None:
        self.says, self.eos = says, eos

    def new_cache(self, capacity: int) -> TableCache:
        return TableCache()

    def prefill(self, tokens: Tensor, cache: TableCache, hidden: bool = False) -> Pass:
        return Pass(self.verify(tokens, cache).logits[..., -1:, :], None, cache)  # type: ignore[arg-type]

    def read(self, tokens: Tensor, cache: TableCache, hidden: bool = False) -> Iterator[Pass]:
        yield self.prefill(tokens, cache)

    def verify(self, tokens: Tensor, cache: TableCache, hidden: bool = False) -> Pass:
        start = cache.length
        cache.ids += tokens.view(-1).tolist()
        logits = torch.stack([self.says(cache.ids[: i + 1]) for i in range(start, cache.length)])
        return Pass(logits.view(*tokens.shape, -1), None, cache)  # type: ignore[arg-type]


def surely(token: int, vocabulary: int) -> Tensor:
    """Logits of a model that says `token` and nothing else."""
    return torch.full((vocabulary,), -30.0).index_fill_(0, torch.tensor([token]), 0.0)


def speak(
    target: Model, drafter: Any, lengths: Any, prompt: list[int], settings: Settings, tokenizer: Any = None
) -> Iterator[Round]:
    text = TextStream(tokenizer or tiny.Characters(), prompt)
    return decode.speculative(target, drafter, lengths, prompt, text, settings)  # type: ignore[arg-type]


# Probabilities and roles -------------------------------------------------------------------------------------------


class Drawing(tiny.ScriptedDrafter):
    """Draws from a q that depends on the last token, by torch's own generator."""

    def __init__(self, q: Tensor) -> None:
        super().__init__(None)
        self.q, self.generator = q, torch.Generator().manual_seed(1)

    def draft_on_host(self, state: State, length: int, stop: EarlyStop | None) -> Draft:
        ids, last = [], self.tokens[-1]
        for _ in range(length):
            last = int(torch.multinomial(self.q[last], 1, generator=self.generator))
            ids.append(last)
        before = torch.tensor([self.tokens[-1], *ids[:-1]])
        q = self.q[before][None]
        return Draft(torch.tensor([ids]), q, self.q[before, torch.tensor(ids)][None], top=likeliest(q, TOP))


@pytest.mark.parametrize("rule", ["greedy", "coupled", "rejection", "threshold"])
def test_every_token_tells_its_own_probabilities(rule: str) -> None:
    """p and q of each token, drafted, refused or the target's own, are those after the text it stands in; its role
    and place say how it came about."""
    generator = torch.Generator().manual_seed(3)
    base = 1.5 * torch.randn(5, 5, generator=generator)  # [last token, V]
    logits = base + 0.7 * torch.randn(7, 5, 5, generator=generator)  # and of the length of the text, so that none loops
    settings = Settings(
        temperature=0.0 if rule == "greedy" else 0.8,
        rule=rule,
        max_new_tokens=200,
        top_p=1 if rule == "greedy" else 0.9,
    )
    p = logits.softmax(-1) if rule == "greedy" else distribution(logits, settings)
    q = base.softmax(-1)
    sequence, roles = [1, 2], set()
    for r in speak(Model(lambda text: logits[len(text) % 7, text[-1]]), Drawing(q), Fixed(3), list(sequence), settings):
        drafted = [token for token in r.tokens if token.draft_position is not None]
        own = r.tokens[-1]
        assert [token.draft_position for token in drafted] == list(range(1, len(drafted) + 1))
        assert [token.role for token in drafted] == ["accepted"] * r.accepted + ["rejected"] * (r.drafted - r.accepted)
        last = sequence[-1]
        for i, token in enumerate(drafted, len(sequence)):
            assert token.p == pytest.approx(float(p[i % 7, last, token.id]), rel=1e-5)
            assert token.q == pytest.approx(float(q[last, token.id]), rel=1e-5)
            last = token.id
        expected = "target" if not drafted else "bonus" if r.accepted == len(drafted) else "correction"
        assert own.role == expected and own.q is None and own.draft_position is None
        before = drafted[r.accepted - 1].id if r.accepted else sequence[-1]
        assert own.p == pytest.approx(float(p[(len(sequence) + r.accepted) % 7, before, own.id]), rel=1e-5)
        sequence += [token.id for token in r.emitted]
        roles |= {(token.role, r.accepted) for token in r.tokens}
    assert {("bonus", 3), ("correction", 0), ("correction", 1), ("rejected", 2)} <= roles


def test_the_lossy_rule_tells_what_it_let_through() -> None:
    """At temperature 0 a draft with 0.3 beside a best token with 0.4 passes a lenience of 0.7 and no stricter one; a
    token of 0.2 passes neither. KL of a certain token is −log p, and the bonus counts as a position without any."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()

    def second(lenience: float, script: list[int]) -> Round:
        settings = Settings(rule="threshold", lenience=lenience, max_new_tokens=10)
        rounds = speak(Model(lambda text: logits), tiny.ScriptedDrafter(lambda *_: script), Fixed(3), [0], settings)
        next(rounds)
        return next(rounds)

    r = second(0.7, [0, 1, 1])
    assert (r.accepted, r.refused) == (3, 2)
    assert r.kl == pytest.approx((math.log(1 / 0.4) + 2 * math.log(1 / 0.3)) / 4, rel=1e-4)
    r = second(0.7, [1, 2, 1])
    assert (r.accepted, r.refused) == (1, 1)
    assert r.kl == pytest.approx((math.log(1 / 0.3) + math.log(1 / 0.4)) / 2, rel=1e-4)
    r = second(0.8, [1, 0, 0])
    assert (r.accepted, r.refused) == (0, 0)


@pytest.mark.parametrize("rule", ["greedy", "coupled", "rejection"])
def test_a_draft_model_tells_what_it_drew_from(rule: str) -> None:
    """q is its distribution after the settings, the confidence its probability of the id, drawn with the target's noise
    or that of the round; a vocabulary smaller than the target's has nothing to say of the tokens beyond."""
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(3))
    settings = Settings(temperature=0.0 if rule == "greedy" else 0.6, rule=rule, seed=0)
    drafter = ModelDrafter(Model(lambda text: logits[text[-1]]), "small", 5)  # type: ignore[arg-type]
    drafter.start([0, 1], settings, 50)
    made = tiny.drafted(drafter, 16, after=tiny.state([0, 1]))
    before = torch.tensor([1, *tiny.ids(made)[:-1]])
    q = logits.softmax(-1) if rule == "greedy" else distribution(logits, settings)
    assert made.confidence is not None
    torch.testing.assert_close(made.confidence, q[before, made.ids[0]][None])
    if rule == "greedy":
        assert tiny.ids(made) == logits.argmax(-1)[before].tolist()
        assert made.q is None
    else:
        assert made.q is not None
        torch.testing.assert_close(made.q, torch.nn.functional.pad(q[before], (0, 2))[None])
        places = torch.arange(2, 18)
        noise = exponential(0, places, 5) if rule == "coupled" else exponential(0, places, 5, DRAFT, places[:1])
        assert torch.equal(made.ids[0], exponential_argmax(made.q[0], noise))


@pytest.mark.parametrize("bad", [0, 1, 2, 3])
@pytest.mark.parametrize("rule", ["greedy", "coupled", "rejection"])
def test_a_verified_row_that_is_not_finite_is_refused(bad: int, rule: str) -> None:
    """Wherever it stands in the pass, when the drafts before it are accepted."""

    def says(text: list[int]) -> Tensor:
        logits = surely(text[-1] + 1, 9)
        return logits.fill_(torch.nan) if len(text) == 2 + bad else logits

    settings = Settings(rule=rule, temperature=float(rule != "greedy"), max_new_tokens=6)
    drafter = tiny.ScriptedDrafter(lambda tokens, n: [tokens[-1] + 1 + i for i in range(n)])
    rounds = speak(Model(says), drafter, Fixed(3), [0], settings)
    assert [token.id for token in next(rounds).emitted] == [1]
    with pytest.raises(UserError, match="not finite"):
        next(rounds)
    assert drafter.closed


# Text --------------------------------------------------------------------------------------------------------------


class Bytes:
    """A tokenizer of one byte a token: a character is up to four of them."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace")


SPOKEN = list("naïve 🦜 — café".encode())


@pytest.mark.parametrize("draft", ["right", "wrong", "half"])
@pytest.mark.parametrize("end", ["length", "stop"])
def test_the_text_is_that_of_the_ids_wherever_it_ends(draft: str, end: str) -> None:
    """Cut after any token, inside a character too, and whatever was refused in between; in both lanes."""
    prompt = list(b"Say: ")

    def says(text: list[int]) -> Tensor:
        said = len(text) - len(prompt)
        return surely(SPOKEN[said] if said < limit else 0, 256)

    def script(tokens: list[int], n: int) -> list[int]:
        right = (SPOKEN + [7] * 20)[len(tokens) - len(prompt) :][:n]
        wrong = {"right": n, "wrong": 0, "half": len(tokens) % (n + 1)}[draft]
        return right[:wrong] + [0xF0, 0x9F, 0x41, 0xC3][: n - wrong]

    for limit in range(1, len(SPOKEN) + 1):
        stop = frozenset({SPOKEN[limit - 1]}) if end == "stop" else frozenset()
        cut = min(SPOKEN.index(i) for i in stop) + 1 if stop else limit
        settings = Settings(max_new_tokens=40 if stop else limit)
        target = Model(says, stop)
        lanes = [
            list(decode.baseline(target, prompt, TextStream(Bytes(), prompt), settings)),  # type: ignore[arg-type]
            list(speak(target, tiny.ScriptedDrafter(script), Fixed(4), prompt, settings, Bytes())),
        ]
        for rounds in lanes:
            assert [token.id for r in rounds for token in r.emitted] == SPOKEN[:cut]
            assert "".join(r.text for r in rounds) == Bytes().decode(SPOKEN[:cut])


# Seconds -----------------------------------------------------------------------------------------------------------


def test_seconds_are_of_the_work_they_are_named_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves 7 s in the prefill, 3 in a draft, 5 in a pass, 1 in decoding text and 100 outside."""
    now = [50.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    class Slow(Model):
        def prefill(self, tokens: Tensor, cache: TableCache, hidden: bool = False) -> Pass:
            spend(2.0)  # and the 5 of the pass
            return super().prefill(tokens, cache)

        def verify(self, tokens: Tensor, cache: TableCache, hidden: bool = False) -> Pass:
            spend(5.0)
            return super().verify(tokens, cache)

    class SlowDrafter(tiny.ScriptedDrafter):
        def draft_on_host(self, state: State, length: int, stop: EarlyStop | None) -> Draft:
            spend(3.0)
            return super().draft_on_host(state, length, stop)

    class Alternating(Fixed):
        def choose(self) -> int:
            self.length = 2 - self.length
            return self.length

    target = Slow(lambda text: surely((text[-1] + 1) % 8, 8))
    drafter = SlowDrafter(lambda tokens, n: [0] * n)
    rounds = []
    for r in speak(target, drafter, Alternating(0), [0], Settings(max_new_tokens=6)):
        spend(100.0)
        rounds.append(r)
    assert [r.draft_length for r in rounds[:3]] == [0, 2, 0]
    clock = 0.0
    for r in rounds:
        draft, verify = 3.0 if r.draft_length else 0.0, 5.0 if r.index else 7.0
        assert (r.draft_seconds, r.verify_seconds) == (draft, verify)
        assert r.seconds == draft + verify
        clock += r.seconds
        assert r.clock == clock


# The controller ----------------------------------------------------------------------------------------------------


def test_the_controller_is_told_every_round_but_the_prefill() -> None:
    """Once each, as it was yielded, and before it chooses again; what it says of going on reaches the drafter."""

    class Watching(Fixed):
        early_stop = EarlyStop([0.0], [0.5])

        def __init__(self) -> None:
            super().__init__(2)
            self.seen: list[Any] = []

        def choose(self) -> int:
            self.seen.append("choose")
            return super().choose()

        def observe(self, round: Round, stopped_early: bool | None = None) -> None:
            self.seen += [round, stopped_early]

    class Asking(tiny.ScriptedDrafter):
        def draft_on_host(self, state: State, length: int, stop: EarlyStop | None) -> Draft:
            assert stop is Watching.early_stop and length <= 2
            return replace(super().draft_on_host(state, length, stop), stopped_early=length == 1)

    lengths = Watching()
    drafter = Asking(lambda tokens, n: [(tokens[-1] + 1) % 8] * n)
    target = Model(lambda text: surely((text[-1] + 1) % 8, 8))
    rounds = list(speak(target, drafter, lengths, [0], Settings(max_new_tokens=7)))
    assert len(rounds) > 3
    said = [(r, None if r.draft_length == 0 else r.draft_length == 1) for r in rounds[1:]]
    assert lengths.seen == [x for r, stopped in said for x in ("choose", r, stopped)]


class Taking:
    """A controller that goes through a list of draft lengths again and again."""

    early_stop = None

    def __init__(self, *lengths: int) -> None:
        self.lengths, self.rounds = lengths, 0

    def choose(self) -> int:
        self.rounds += 1
        return self.lengths[self.rounds % len(self.lengths)]

    def observe(self, round: Round, stopped_early: bool | None) -> None:
        pass


@pytest.mark.parametrize("lengths", [(3, 0), (3, 0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("person", [0, 20])
def test_a_draft_model_on_a_device_reads_what_it_did_not_draft(lengths: tuple[int, ...], person: int) -> None:
    """The target itself as drafter is always right, also after rounds without a draft, and after a person's."""

    class OnDevice(ModelDrafter):
        def draft_on_host(self, state: State, length: int, stop: EarlyStop | None) -> None:
            return None

    target, same = (Target(tiny.model("llama")) for _ in range(2))
    drafter: Drafter = OnDevice(same, "same", tiny.VOCABULARY)
    if person:
        drafter = PersonDrafter(list(range(person)), drafter)
    settings, prompt = Settings(max_new_tokens=40), list(range(3, 30))
    text: Any = SilentText()
    rounds = [
        r for r in decode.speculative(target, drafter, Taking(*lengths), prompt, text, settings) if r.drafter == "same"
    ]
    assert rounds and all(r.accepted == r.drafted > 0 for r in rounds)
