"""The draft kernel: what it tells of each step, how its phases are counted, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from spec_decode.cpu.assistant import Drafted, FusedAssistant
from spec_decode.cpu.kernels import TOP, drafts
from spec_decode.cpu.kernels.sharing import team
from spec_decode.drafters.mtp import MTPDrafter
from spec_decode.settings import MAX_DRAFT_LENGTH
from spec_decode.target import Target

PROMPT = list(range(3, 40))
STOP = SimpleNamespace(chances=np.array([0.5], np.float32), least=np.array([-1.0], np.float32))


class Begun:
    """An assistant that has begun a round after `PROMPT`."""

    def __init__(self, ordered: bool = True, **changes: int) -> None:
        model, assistant = tiny.gemma4("dense", ordered=ordered, **changes)
        target = Target(model)
        drafter = MTPDrafter(assistant, target, int8=True)
        assert drafter.fused is not None
        self.fused: FusedAssistant = drafter.fused
        self.tokens = drafter.ordering
        cache = target.new_cache(64)
        prompt = torch.tensor([token % model.config.vocab_size for token in PROMPT])
        passed = target.prefill(prompt, cache, hidden=True)
        assert passed.hidden is not None
        self.hidden = passed.hidden[-1:]
        self.fused.begin(cache, drafter.sources, tiny.WINDOW)

    def draft(self, length: int, temperature: float = 0.0, stop: SimpleNamespace | None = None) -> Drafted:
        keys = np.arange(2 * length, dtype=np.uint32).reshape(length, 2)
        return self.fused.draft(1, self.hidden, length, stop, temperature, keys)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.0])
def test_the_likeliest_tokens_are_those_of_the_listed_logits(
    temperature: float, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step by step, each after the token that was drafted, against NumPy's softmax and stable sort."""
    monkeypatch.setattr(team, "threads", threads)
    begun = Begun()
    made = begun.draft(4, temperature)
    assert made.top_ids.shape == made.top_p.shape == (4, TOP)
    assert (made.top_ids.dtype, made.top_p.dtype) == (np.int64, np.float32)
    hidden, token = begun.hidden, 1
    assert begun.tokens is not None
    for i in range(4):
        _, hidden, lists, logits = begun.fused.step(token, hidden)
        ids = begun.tokens[torch.from_numpy(lists)].flatten().numpy()
        p = torch.softmax(torch.from_numpy(logits).double() / (temperature or 1.0), -1).numpy()
        best = np.argsort(-logits, kind="stable")[:TOP]
        assert made.top_ids[i].tolist() == ids[best].tolist()
        np.testing.assert_allclose(made.top_p[i], p[best], rtol=1e-5, atol=1e-30)
        token = int(made.ids[i])
        np.testing.assert_allclose(made.confidence[i], p[ids.tolist().index(token)], rtol=1e-5, atol=1e-30)
        assert temperature > 0 or token == made.top_ids[i, 0]


def test_of_fewer_than_five_tokens_the_rest_is_minus_one() -> None:
    """Three lists of one token each."""
    made = Begun(vocab_size=8).draft(3, 1.0)
    assert (made.top_ids[:, :3] >= 0).all() and (made.top_ids[:, 3:] == -1).all()
    assert (made.top_p[:, 3:] == 0).all()
    np.testing.assert_allclose(made.top_p.sum(1), 1, rtol=1e-6)


def test_a_draft_that_ends_early_tells_of_its_own_steps_alone() -> None:
    begun = Begun()
    whole = begun.draft(5, 0.8)
    stop = SimpleNamespace(chances=np.array([1.0], np.float32), least=np.array([0.5, 0.5, 1.0], np.float32))
    ended = begun.draft(5, 0.8, stop)
    assert [len(part) for part in ended] == [2] * 4
    assert all(np.array_equal(part, all_of_it[:2]) for part, all_of_it in zip(ended, whole, strict=True))


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("counted", [-1, 1])
def test_a_wrong_number_of_phases_is_noticed(ordered: bool, counted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "threads", 1)
    begun, phases = Begun(ordered), drafts.assistant_phases
    right = phases(2, ordered)
    monkeypatch.setattr(drafts, "assistant_phases", lambda layers, lists: phases(layers, lists) + counted)
    with pytest.raises(AssertionError, match=f"_assistant has {right} phases a step, not {right + counted}"):
        begun.fused.step(1, begun.hidden)


def test_a_draft_longer_than_its_scratch_is_refused() -> None:
    begun = Begun()
    assert len(begun.draft(MAX_DRAFT_LENGTH).ids) == MAX_DRAFT_LENGTH
    with pytest.raises(ValueError, match=f"at most {MAX_DRAFT_LENGTH} tokens, not {MAX_DRAFT_LENGTH + 1}"):
        begun.draft(MAX_DRAFT_LENGTH + 1)


def test_one_compiled_version_serves_every_draft() -> None:
    """Of every length and temperature, with a table and without, after any prompt."""
    begun = Begun()
    begun.draft(2)
    before = len(drafts._assistant.overloads)
    for length, temperature, stop in ((1, 0.0, None), (5, 0.7, STOP), (16, 1.0, None)):
        begun.draft(length, temperature, stop)
    Begun().draft(3)
    begun.fused.step(1, begun.hidden)
    assert len(drafts._assistant.overloads) == before


def test_the_cache_can_go_after_the_round() -> None:
    begun = Begun()
    begun.draft(2)
    begun.fused.end()
    assert begun.fused.held is None and not begun.fused.buffers and not begun.fused.target
