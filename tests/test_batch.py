"""Batches: every row is decoded as its prompt is alone, with noise of its own, and leaves when it has ended.

False alarms: there are fewer than 16 chi-square tests here, each at 1e-6 / 16, so that a sound engine would fail this
file with probability below 1e-6 for a fresh choice of seeds. The seeds are fixed: it fails always or never.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import scipy.stats
import test_rounds
import tiny
import torch
from test_statistics import p_value
from torch import Tensor

from spec_decode import batch, decode, narrate, noise
from spec_decode.cache import RollbackCache
from spec_decode.cpu.kernels import passes
from spec_decode.cpu.llama import Int8Llama, quantize
from spec_decode.decode import Lane, decode_round, judge
from spec_decode.draft_length import Fixed
from spec_decode.drafters import Draft, Drafter
from spec_decode.drafters.either import EitherDrafter
from spec_decode.drafters.lookup import LookupDrafter
from spec_decode.drafters.matching import MatchingDrafter
from spec_decode.drafters.mtp import MTPDrafter
from spec_decode.drafters.rows import in_rows
from spec_decode.drafters.suffix import SuffixDrafter
from spec_decode.errors import UserError
from spec_decode.noise import ACCEPT, DRAFT, RESIDUAL, TARGET, row_seed_words
from spec_decode.settings import MAX_SEED, Settings
from spec_decode.target import Target
from spec_decode.text import TextStream

pytestmark = pytest.mark.usefixtures("one_thread")

FALSE_ALARM = 1e-6 / 16
SMALL = test_rounds.SMALL
PROMPTS = test_rounds.PROMPTS
EOS = 7
COUNT, LENGTH, SEED = 24, 3, 5


@cache
def made(kind: str, drafter: str) -> tuple[Target, Drafter]:
    """A target of `SMALL` tokens, one of which ends a text, and a drafter by its name, "a+b" for either of two."""
    first, _, second = drafter.partition("+")
    target, other = test_rounds.parts(kind, first if first in test_rounds.DRAFTERS else "none", SMALL)
    target = copy(target)
    target.eos = frozenset({EOS})
    matching = {"lookup": LookupDrafter(), "suffix": SuffixDrafter()}
    other = matching.get(first, other)
    return target, EitherDrafter(other, matching[second]) if second else other


def texts_of(prompts: Sequence[list[int]]) -> list[TextStream]:
    return [TextStream(tiny.Characters(), prompt) for prompt in prompts]


def alone(target: Target, drafter: Drafter | None, prompt: list[int], settings: Settings) -> list[int]:
    """What the prompt is decoded to by itself."""
    text = TextStream(tiny.Characters(), prompt)
    if drafter is None:
        rounds = decode.baseline(target, prompt, text, settings)
    else:
        rounds = decode.speculative(target, drafter, Fixed(int(settings.draft_length)), prompt, text, settings)
    return [token.id for done in rounds for token in done.emitted]


def together(
    lane: Lane, prompts: Sequence[list[int]], seeds: Sequence[int]
) -> tuple[list[list[int]], list[batch.BatchRound]]:
    """What the prompts are decoded to as rows of one batch, and its rounds."""
    prefills = batch.read(lane.target, prompts, lane.settings, lane.drafter.needs_hidden)
    ids: list[list[int]] = [[] for _ in prompts]
    rounds = list(batch.decode(lane, prefills, texts_of(prompts), seeds))
    for done in rounds:
        for row, part in done.rounds.items():
            ids[row] += [token.id for token in part.emitted]
    return ids, rounds


def settings_of(rule: str, **changes: Any) -> Settings:
    sampling = {"rule": "greedy"} if rule == "greedy" else {"rule": rule, "temperature": 0.8}
    return Settings(**{"draft_length": LENGTH, "max_new_tokens": COUNT, "seed": SEED, **sampling, **changes})


# Exact, row by row -------------------------------------------------------------------------------------------------


DRAFTERS = ["lookup", "suffix", "model", "mtp", "mtp centroids", "mtp+lookup", "model+lookup", "lookup+suffix"]


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("kind", ["gemma3", "shared"])
@pytest.mark.parametrize("rule", ["greedy", "coupled"])
def test_every_row_is_the_text_of_its_prompt_alone(kind: str, drafter: str, rule: str) -> None:
    """With the same seed, by the same drafter and by none; prompts and texts of different lengths."""
    target, other = made(kind, drafter)
    settings = settings_of(rule)
    seeds = batch.row_seeds(SEED, len(PROMPTS))
    expected = [
        alone(target, other, prompt, replace(settings, seed=seed)) for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    texts, rounds = together(batch.speculative(target, other, settings), PROMPTS, seeds)
    assert texts == expected
    assert together(batch.baseline(target, settings), PROMPTS, seeds)[0] == expected
    assert any(done.accepted for parts in rounds for done in parts.rounds.values()) or drafter.startswith("mtp")


def test_rows_end_where_their_texts_do() -> None:
    """At a token that ends a text, in the middle of a draft that is accepted, and after `max_new_tokens`."""
    target, _ = made("shared", "none")
    never = copy(target)
    never.eos = frozenset()
    settings = settings_of("coupled", max_new_tokens=16)
    seeds = batch.row_seeds(3, len(PROMPTS))
    whole = [alone(never, None, p, replace(settings, seed=seed)) for p, seed in zip(PROMPTS, seeds, strict=True)]
    ends = [text.index(EOS) + 1 if EOS in text else None for text in whole]
    assert any(end is not None and 1 < end < 16 for end in ends) and None in ends, "seeds that show both"

    class Knows(MatchingDrafter):
        """Drafts what the target says."""

        name = "knows"

        def start(self, prompt: list[int], settings: Settings, capacity: int) -> None:
            self.text, self.at = [*whole[PROMPTS.index(prompt)], *[0] * 8], 0

        def extend(self, tokens: list[int]) -> None:
            self.at += len(tokens)

        def match(self, length: int) -> tuple[int, list[int]]:
            return 1, self.text[self.at : self.at + length]

    texts, rounds = together(batch.speculative(target, Knows(), settings), PROMPTS, seeds)
    assert texts == [text[:end] for text, end in zip(whole, ends, strict=True)]
    last = {row: done for parts in rounds for row, done in parts.rounds.items()}
    cut = [row for row, end in enumerate(ends) if end and last[row].emitted[-1].role == "accepted"]
    assert cut, "a row ends within its draft"
    assert all(last[row].tokens[-1].id == EOS for row in cut), "what stood after the end is not told"


@pytest.mark.parametrize("speculative", [False, True])
def test_rows_that_have_ended_leave(speculative: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass has a row that had ended before it, and the numbers of the others stay what they were."""
    target, drafter = made("shared", "model" if speculative else "none")
    widths: list[int] = []
    verify = Target.verify

    def counted(self: Target, tokens: Tensor, cache: Any, hidden: bool = False) -> Any:
        if self is target:
            widths.append(len(tokens))
            assert len(cache.lengths) == len(tokens)
        return verify(self, tokens, cache, hidden)

    monkeypatch.setattr(Target, "verify", counted)
    settings = settings_of("coupled")
    lane = batch.speculative(target, drafter, settings) if speculative else batch.baseline(target, settings)
    seeds = batch.row_seeds(SEED, len(PROMPTS))
    texts, rounds = together(lane, PROMPTS, seeds)
    assert widths == [len(done.rounds) for done in rounds[1:]]
    assert widths[0] == len(PROMPTS) and widths[-1] < len(PROMPTS)
    for row in range(len(PROMPTS)):
        mine = [row in done.rounds for done in rounds]
        assert mine == sorted(mine, reverse=True), "once gone, gone"
        assert [done.rounds[row].index for done in rounds if row in done.rounds] == list(range(sum(mine)))
    if not speculative:
        assert widths == [sum(len(text) > n for text in texts) for n in range(1, max(map(len, texts)))]


def test_one_copy_a_round_reaches_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    copy_ = narrate.Parts.copy

    def counted(parts: narrate.Parts) -> dict[str, list[float]]:
        copies.append(parts)
        return copy_(parts)

    monkeypatch.setattr(narrate.Parts, "copy", counted)
    target, drafter = made("shared", "mtp")
    _, rounds = together(batch.speculative(target, drafter, settings_of("rejection")), PROMPTS, [1, 2, 3])
    assert len(copies) == len(rounds)


@pytest.mark.parametrize("rule", ["rejection", "greedy"])
def test_a_round_tells_of_a_row_what_it_tells_of_a_prompt_alone(rule: str) -> None:
    """Probabilities, alternatives, roles and texts, of every token."""
    target, drafter = made("shared", "model")
    settings = settings_of(rule)
    seeds = batch.row_seeds(SEED, len(PROMPTS))
    _, rounds = together(batch.speculative(target, drafter, settings), PROMPTS, seeds)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, seeds, strict=True)):
        text = TextStream(tiny.Characters(), prompt)
        told = decode.speculative(target, drafter, Fixed(LENGTH), prompt, text, replace(settings, seed=seed))
        ours = [done.rounds[row] for done in rounds if row in done.rounds]
        for one, other in zip(ours, told, strict=False):
            if one.draft_length != other.draft_length:
                break  # at its end a text alone is drafted no further than it may go
            assert [(t.id, t.text, t.role) for t in one.tokens] == [(t.id, t.text, t.role) for t in other.tokens]
            for a, b in zip(one.tokens, other.tokens, strict=True):
                assert a.p == pytest.approx(b.p, rel=1e-3, abs=1e-6) and (a.q is None) == (b.q is None)
                assert [x.id for x in a.target_top[:1]] == [x.id for x in b.target_top[:1]]
            assert (one.residual is None) == (other.residual is None)
        assert ours[0].tokens[0].id == ours[0].emitted[0].id


def test_a_row_is_told_no_fillers() -> None:
    """A row without a match has no draft, while another has one."""
    target, drafter = made("gemma3", "lookup")
    _, rounds = together(batch.speculative(target, drafter, settings_of("coupled")), PROMPTS, [1, 2, 3])
    drafted = [[done.drafted for done in parts.rounds.values()] for parts in rounds]
    assert any(0 in counts and max(counts) == LENGTH for counts in drafted)
    for parts in rounds:
        for done in parts.rounds.values():
            assert (done.drafter == "") == (done.drafted == 0)
            if done.drafted == 0:
                assert [token.role for token in done.tokens] == ["target"]


# Noise -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [True, False])
def test_the_noise_of_a_row_is_that_of_its_seed(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "_compiled", lambda x: compiled)
    seeds, positions = [0, 5, 2**40 + 1], torch.tensor([[3, 4], [3, 4], [900, 901]])
    words = row_seed_words(seeds)
    for stream, start in ((TARGET, None), (DRAFT, positions[:, :1]), (RESIDUAL, positions[:, :1])):
        together = noise.exponential(words, positions, 6, stream, start)
        flat = noise.exponential(words, positions[:, 0], 6, stream, None if start is None else start[:, 0])
        for row, seed in enumerate(seeds):
            begin = None if start is None else start[row]
            expected = noise.exponential(seed, positions[row], 6, stream, begin)
            assert torch.equal(together[row], expected) and torch.equal(flat[row], expected[0])
    accepting = noise.uniform(words, positions, ACCEPT, positions[:, :1])
    for row, seed in enumerate(seeds):
        assert torch.equal(accepting[row], noise.uniform(seed, positions[row], ACCEPT, positions[row, :1]))


def test_rows_have_seeds_of_their_own() -> None:
    assert batch.row_seeds(4, 3) == [4, 5, 6]
    assert batch.row_seeds(MAX_SEED, 2) == [MAX_SEED, 0]
    target, _ = made("shared", "none")
    prefills = batch.read(target, PROMPTS, settings_of("coupled"), False)
    with pytest.raises(ValueError, match="same seed"):
        next(batch.decode(batch.baseline(target, settings_of("coupled")), prefills, texts_of(PROMPTS), [1, 2, 1]))


VOCABULARY = 6
TRIALS = 2000  # of each prompt
# After the first, whatever comes, most often three tokens have occurred before: prompt lookup drafts then.
TWO = ([2, 3, 0, 2, 3, 1, 2, 3, 4, 2, 3, 5, 2, 3], [5, 0, 2])


@cache
def small(drafter: str) -> tuple[Target, Drafter]:
    """A target of few tokens and a drafter."""
    target, other = test_rounds.parts("dense", drafter.partition("+")[0], VOCABULARY)
    return target, EitherDrafter(other, LookupDrafter()) if "+" in drafter else other


@cache
def trials(rule: str, drafter: str, shared: bool = False) -> Tensor:
    """The first three tokens `[2, TRIALS, 3]` of as many rows of each of two prompts, all in one batch.

    shared: neighbouring rows of a prompt have the same noise, in pairs.
    """
    target, other = small(drafter)
    settings = Settings(rule=rule, temperature=1.3, draft_length=3, max_new_tokens=5)
    ids: list[list[int]] = [[] for _ in range(2 * TRIALS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spec_decode.cache.BUCKET", 32)  # there are many rows, and their texts are short
        if shared:
            patch.setattr(batch, "row_seed_words", lambda seeds: row_seed_words([s - s // 2 % 2 * 2 for s in seeds]))
        read = batch.read(target, TWO, settings, True)
        prefills = [read[i] for _ in range(TRIALS) for i in (0, 1)]
        texts, seeds = texts_of([prefill.prompt for prefill in prefills]), batch.row_seeds(0, len(prefills))
        for done in batch.decode(batch.speculative(target, other, settings), prefills, texts, seeds):
            for row, part in done.rounds.items():
                ids[row] += [token.id for token in part.emitted]
    return torch.tensor([text[:3] for text in ids]).view(TRIALS, 2, 3).transpose(0, 1)


@cache
def joint(prompt: int) -> np.ndarray:
    """P of every three tokens after a prompt `[V, V, V]`."""
    target, _ = small("mtp")

    def after(texts: Tensor) -> np.ndarray:
        with torch.inference_mode():
            logits = target.model(input_ids=texts).logits[:, -1]
        p: np.ndarray = (logits.double() / 1.3).softmax(-1).numpy()
        return p

    text = torch.tensor([TWO[prompt]])
    one = torch.arange(VOCABULARY)[:, None]
    firsts = torch.cat([text.expand(VOCABULARY, -1), one], 1)
    seconds = torch.cat([firsts.repeat_interleave(VOCABULARY, 0), one.repeat(VOCABULARY, 1)], 1)
    p, second, third = after(text)[0], after(firsts), after(seconds).reshape(VOCABULARY, VOCABULARY, VOCABULARY)
    return np.asarray(p[:, None, None] * second[:, :, None] * third)


@pytest.mark.parametrize("drafter", ["mtp", "mtp+lookup"])
@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_every_row_follows_the_target(rule: str, drafter: str) -> None:
    """The joint distribution of the first three tokens of rows with two prompts, against enumeration."""
    for prompt in (0, 1):
        assert p_value(trials(rule, drafter)[prompt], joint(prompt)) > FALSE_ALARM


def test_the_texts_of_another_prompt_are_found() -> None:
    """The test above has the power to tell the prompts apart."""
    assert p_value(trials("rejection", "mtp")[0], joint(1)) < FALSE_ALARM


def dependence(shared: bool) -> float:
    """p-value of the independence of neighbouring rows of a prompt, of their second tokens."""
    tokens = trials("rejection", "mtp", shared)[0, :, 1].view(-1, 2)
    counts = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(counts, (tokens[:, 0].numpy(), tokens[:, 1].numpy()), 1)
    marginal = joint(0).sum((0, 2))
    expected = np.outer(marginal, marginal) * len(tokens)
    return float(scipy.stats.chisquare(*_pooled(counts.ravel(), expected.ravel())).pvalue)


def _pooled(observed: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cells expected fewer than 5 times together in one."""
    rare = expected < 5
    if not rare.any():
        return observed, expected
    return np.append(observed[~rare], observed[rare].sum()), np.append(expected[~rare], expected[rare].sum())


def test_two_rows_with_the_same_prompt_are_independent() -> None:
    assert dependence(shared=False) > FALSE_ALARM
    assert dependence(shared=True) < FALSE_ALARM, "rows that share noise are found"


# On the device -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("visible")
@pytest.mark.parametrize("drafter", ["model", "mtp", "mtp centroids"])
def test_a_round_of_rows_reads_nothing_on_the_host(drafter: str) -> None:
    """And its operations are the same every round, however many tokens each row has accepted."""
    target, other = made("shared", drafter)
    settings = settings_of("rejection")
    lane = batch.speculative(target, other, settings)
    prefills = batch.read(target, PROMPTS, settings, other.needs_hidden)
    rows = in_rows(other, PROMPTS, settings, 128)
    state, passed = batch._joined(prefills, [1, 2, 3])
    judge(lane, state, Draft.none(state), passed)
    state.advance(1)
    seen: list[list[Any]] = []
    for _ in range(3):

        def a_round() -> Tensor:
            given = rows.draft(state, LENGTH).draft
            return narrate.gathered(decode_round(lane, state, LENGTH, given)).join()

        operations, _ = test_rounds.recorded(a_round)
        seen.append(operations)
        grown = int(state.lengths.max()) - state.length
        rows.extend([[0] * grown] * len(PROMPTS))
        state.advance(grown)
    test_rounds.assert_same(seen[0], seen[1])
    test_rounds.assert_same(seen[1], seen[2])


visible = test_rounds.visible


def test_selected_rows_are_what_they_were() -> None:
    """Tokens, lengths, seeds, keys and values, in the order they were asked for; the old cache is free."""
    target, _ = made("gemma3", "none")
    prefills = batch.read(target, PROMPTS, settings_of("coupled"), True)
    state, passed = batch._joined(prefills, [1, 2, 3])
    judge(batch.baseline(target, settings_of("coupled")), state, Draft.none(state), passed)
    state.advance(1)
    before = copy(state)
    kept = [(layer.keys.clone(), layer.values.clone()) for layer in state.cache.layers]
    longest = max(len(PROMPTS[2]), len(PROMPTS[0])) + 1
    chosen = state.select([2, 0], longest)
    rows = [2, 0]
    assert torch.equal(chosen.tokens, before.tokens[rows]) and torch.equal(chosen.lengths, before.lengths[rows])
    assert chosen.hidden is not None and before.hidden is not None
    assert torch.equal(chosen.hidden, before.hidden[rows])
    assert chosen.seed is not None and torch.equal(chosen.seed, row_seed_words([3, 1]))
    assert (chosen.length, chosen.cache.length) == (longest, longest - 1)
    assert torch.equal(chosen.cache.lengths, chosen.lengths - 1)
    for layer, old, (keys, values) in zip(chosen.cache.layers, before.cache.layers, kept, strict=True):
        assert torch.equal(layer.keys, keys[rows]) and torch.equal(layer.values, values[rows])
        assert old.keys is None and old.values is None


# 8 bits on the CPU -------------------------------------------------------------------------------------------------


def test_rows_of_several_texts_have_the_same_bits_as_alone() -> None:
    """In one pass of the kernel, with logits of all tokens and of the last; and one compiled version serves all."""
    target = Target(quantize(tiny.model("llama")))
    assert isinstance(target.model.model, Int8Llama)
    caches, following = [], torch.tensor([[5, 6, 7], [8, 9, 1], [2, 3, 4]])
    for prompt in PROMPTS:
        caches.append(target.new_cache(64))
        target.prefill(torch.tensor(prompt), caches[-1])
    compiled = len(passes._llama.overloads)
    joined, last = RollbackCache.join(caches), RollbackCache.join(caches)
    rows, ends = target.verify(following, joined, hidden=True), target.prefill(following, last, hidden=True)
    for row, one in enumerate(caches):
        expected = target.verify(following[row], one, hidden=True)
        assert torch.equal(rows.logits[row], expected.logits) and torch.equal(rows.hidden[row], expected.hidden)
        assert torch.equal(ends.logits[row], expected.logits[-1:])
        for ours, theirs in zip(joined.layers, one.layers, strict=True):
            assert torch.equal(ours.keys[row, :, : one.length], theirs.keys[0, :, : one.length])
            assert torch.equal(ours.values[row, :, : one.length], theirs.values[0, :, : one.length])
    assert len(passes._llama.overloads) == compiled


def test_rowwise_attention_takes_rows() -> None:
    """Models whose linear layers alone are in 8 bits."""
    target = Target(quantize(tiny.model("gemma3")))
    settings = settings_of("coupled")
    seeds = [4, 5, 6]
    prompts = [[token % tiny.VOCABULARY for token in prompt] for prompt in PROMPTS]
    expected = [alone(target, None, p, replace(settings, seed=seed)) for p, seed in zip(prompts, seeds, strict=True)]
    assert together(batch.speculative(target, LookupDrafter(), settings), prompts, seeds)[0] == expected


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("rule", ["greedy", "coupled", "rejection"])
def test_an_assistant_in_8_bits_drafts_for_rows(rule: str, ordered: bool) -> None:
    """The very drafts that it makes for each text alone."""
    model, assistant = tiny.gemma4("dense", ordered=ordered, vocab_size=SMALL)
    target = Target(model)
    drafter = MTPDrafter(assistant, target, int8=True)
    settings = settings_of(rule, max_new_tokens=12)
    seeds = batch.row_seeds(SEED, len(PROMPTS))
    texts, rounds = together(batch.speculative(target, drafter, settings), PROMPTS, seeds)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, seeds, strict=True)):
        text = TextStream(tiny.Characters(), prompt)
        told = list(decode.speculative(target, drafter, Fixed(LENGTH), prompt, text, replace(settings, seed=seed)))
        ours = [done.rounds[row] for done in rounds if row in done.rounds]
        for one, other in zip(ours, told, strict=False):
            if one.draft_length != other.draft_length:
                break
            assert [token.id for token in one.tokens] == [token.id for token in other.tokens]
        assert texts[row] == [token.id for done in told for token in done.emitted] or rule == "rejection"


# Refusals ----------------------------------------------------------------------------------------------------------


def test_what_takes_no_rows_is_refused() -> None:
    target, _ = made("shared", "none")
    for policy in ("adaptive", "rate"):
        with pytest.raises(UserError, match="choose a number from 1 to 16"):
            batch.speculative(target, LookupDrafter(), Settings(draft_length=policy))
    scripted = tiny.ScriptedDrafter(lambda tokens, length: [0] * length)
    with pytest.raises(UserError, match="The drafter scripted takes one text at a time"):
        in_rows(scripted, PROMPTS, settings_of("greedy"), 64)
    unmasked = copy(target)
    unmasked.masks = None
    with pytest.raises(UserError, match="rows of different lengths cannot share a pass"):
        batch.read(unmasked, PROMPTS, settings_of("greedy"), False)


def test_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the batch has ended, and when its reader goes away; the prompts stay for another batch."""
    target, drafter = made("shared", "model")
    settings = settings_of("greedy")
    prefills = batch.read(target, PROMPTS, settings, False)
    joined: list[RollbackCache] = []
    join = RollbackCache.join.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        RollbackCache, "join", classmethod(lambda cls, caches: joined.append(join(cls, caches)) or joined[-1])
    )
    for stop_after in (2, 100):
        rounds = batch.decode(batch.speculative(target, drafter, settings), prefills, texts_of(PROMPTS), [1, 2, 3])
        for number, _ in enumerate(rounds):
            if number == stop_after:
                break
        rounds.close()
        assert len(joined) == 2, "the target's and the drafter's"
        assert not any(layer.is_initialized for cache in joined for layer in cache.layers)
        joined.clear()
    assert all(prefill.cache.layers[0].is_initialized for prefill in prefills)
