"""`Target.padded`: the bits of a token do not depend on the pass it is read in, so both lanes of a race have the same.

The test that it can fail: without padding some of the same passes differ.
"""

from __future__ import annotations

from typing import Any

import pytest
import test_rounds
import tiny
import torch
from test_graphs import LANES, Recording
from test_graphs import race as raced
from torch import Tensor

from spec_decode import noise, sampling
from spec_decode.cache import PADDED_ROUND
from spec_decode.drafters.mtp import MTPDrafter
from spec_decode.events import BASELINE, SPECULATIVE
from spec_decode.settings import Settings
from spec_decode.target import Target

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ["llama", "gemma3", "qwen3", *tiny.GEMMA4]
TEXT = torch.tensor([(7 * i * i + 3 * i) % tiny.VOCABULARY for i in range(540)])


def target(kind: str, dtype: torch.dtype, padded: bool) -> tuple[Target, Any]:
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}
    if kind in tiny.GEMMA4:
        model, assistant = tiny.gemma4(kind, **shape)
    else:
        model, assistant = tiny.model(kind, **shape), None
    made = Target(model.to(dtype))
    made.padded = padded
    made.batched_experts = True  # as on an accelerator
    return made, assistant and assistant.to(dtype)


def logits(made: Target, start: int, counts: list[int]) -> Tensor:
    """Of the text from `start` on, read in passes over these numbers of tokens."""
    cache, at, found = made.new_cache(start + sum(counts)), start, []
    made.prefill(TEXT[:start], cache)
    for count in counts:
        found.append(made.verify(TEXT[at : at + count], cache, hidden=True).logits)
        at += count
    return torch.cat(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_has_the_same_bits_in_every_pass(kind: str, dtype: torch.dtype) -> None:
    """Alone, in drafts of every length, and at every place of the longest; across the end of a bucket too."""
    made, _ = target(kind, dtype, True)
    start = 500
    alone = logits(made, start, [1] * 34)
    for counts in ([17, 17], [5] * 6 + [4], [1, 16, 17], [2, 9, 6, 13, 4]):
        assert torch.equal(logits(made, start, counts), alone), counts


def test_without_it_the_same_passes_differ() -> None:
    made, _ = target("llama", torch.bfloat16, False)
    assert not torch.equal(logits(made, 500, [17, 17]), logits(made, 500, [1] * 34))


@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "recorded"])
@pytest.mark.parametrize("rule", ["greedy", "coupled"])
@pytest.mark.parametrize("kind", ["shared", "moe", "unified"])
def test_lanes_of_a_race_have_the_same_probabilities(kind: str, rule: str, recorded: bool) -> None:
    """To the last bit, in bfloat16, in eager and in recorded rounds."""
    made, assistant = target(kind, torch.bfloat16, True)
    settings = Settings(
        temperature=0.0 if rule == "greedy" else 0.8, max_new_tokens=60, draft_length=4, seed=3, rule=rule
    )
    recording = Recording() if recorded else None
    rounds = raced(made, MTPDrafter(assistant, made), settings, TEXT[:490].tolist(), recording)
    emitted = {lane: [(t.id, t.p, t.target_top) for r in rounds[lane] for t in r.emitted] for lane in LANES}
    assert len(emitted[BASELINE]) == 60 and emitted[BASELINE] == emitted[SPECULATIVE]
    if recording:
        assert recording.made and not any(recorder.refused for recorder in recording.recorders.values())


@pytest.mark.parametrize("kind", ["shared", "moe"])
def test_padded_rounds_read_nothing_and_do_the_same_operations(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (noise, sampling):
        monkeypatch.setattr(module, "_compiled", lambda x: False)
    made, assistant = target(kind, torch.bfloat16, True)
    lane, state = test_rounds.begun(made, MTPDrafter(assistant, made), Settings(), TEXT[:490].tolist())
    for length in (0, 4):
        several = test_rounds.rounds(lane, state, length)
        first, second, third = (next(several)[0] for _ in range(3))
        test_rounds.assert_same(first, second)
        test_rounds.assert_same(first, third)


def test_a_padded_pass_leaves_what_a_plain_one_leaves() -> None:
    """The same probabilities to rounding, and the cache as long as the text."""
    made, _ = target("shared", torch.float32, True)
    plain, _ = target("shared", torch.float32, False)
    torch.testing.assert_close(logits(made, 40, [5, 3]), logits(plain, 40, [5, 3]), rtol=1e-3, atol=1e-4)
    cache = made.new_cache(40)
    made.prefill(TEXT[:40], cache)
    passed = made.verify(TEXT[40:43], cache, hidden=True)
    assert cache.length == 43 and cache.lengths.tolist() == [43]
    assert passed.logits.shape == (3, tiny.VOCABULARY) and passed.hidden is not None and len(passed.hidden) == 3
    assert cache.capacity >= 40 + PADDED_ROUND and cache.copy().whole
