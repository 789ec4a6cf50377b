"""Attention over grouped keys and values, against transformers' own, and the choice by measurement."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import test_rounds
import tiny
import torch
from torch import Tensor

from spec_decode import attention, decode
from spec_decode.attention import GROUPED
from spec_decode.draft_length import Fixed
from spec_decode.loading.rollback import check_rollback
from spec_decode.settings import Settings
from spec_decode.target import Target
from spec_decode.text import TextStream

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = test_rounds.KINDS
PROMPT = test_rounds.PROMPT


def pair(kind: str, seed: int = 0) -> tuple[Target, Target]:
    """The same model twice, with transformers' attention and with ours."""
    made = []
    for name in ("sdpa", GROUPED):
        model = tiny.gemma4(kind, seed)[0] if kind in tiny.GEMMA4 else tiny.model(kind, seed)
        model.set_attn_implementation(name)
        made.append(Target(model))
    return made[0], made[1]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str) -> None:
    """At the start of a text, beyond the window, across a bucket, in a pass of one token and of several."""
    theirs, ours = pair(kind)
    assert ours.masks is not None and set(ours.masks.groups.values()) <= {2, 4} and ours.masks.groups
    tokens = torch.arange(520) % tiny.VOCABULARY
    for start, count in ((1, 1), (5, 3), (40, 5), (509, 5), (514, 1)):
        logits = []
        for target in (theirs, ours):
            cache = target.new_cache(520)
            target.prefill(tokens[:start], cache)
            logits.append(target.verify(tokens[start : start + count], cache).logits)
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    check_rollback(ours, kind)
    assert ours.masks is not None, "masks that a class does not take as they are would be dropped"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "rule": "rejection"}])
def test_texts_are_those_of_transformers(kind: str, options: dict[str, Any]) -> None:
    """Token for token in float32, both lanes."""
    settings = Settings(max_new_tokens=24, draft_length=3, seed=4, **options)
    told = []
    for name in ("sdpa", GROUPED):
        target, drafter = test_rounds.parts(kind, "mtp")
        for model in (target.model, drafter.model):  # type: ignore[attr-defined]
            attention.use(model, name, [target])
        text = TextStream(tiny.Characters(), PROMPT)
        lanes = (
            decode.baseline(target, PROMPT, text.fork(), settings),
            decode.speculative(target, drafter, Fixed(3), PROMPT, text, settings),
        )
        told.append([[token.id for done in lane for token in done.emitted] for lane in lanes])
        attention.use(target.model, "sdpa", [target])
        attention.use(drafter.model, "sdpa")  # type: ignore[attr-defined]
    assert told[0] == told[1]


def test_every_row_has_its_own_mask() -> None:
    theirs, ours = pair("gemma3")
    logits = []
    for target in (theirs, ours):
        cache = target.new_cache(80, rows=2)
        tokens = torch.tensor([PROMPT[:30], PROMPT[7:37]])
        target.verify(tokens, cache)
        cache.keep(torch.tensor([30, 21]))
        logits.append(target.verify(tokens[:, :4], cache).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_keys_and_values_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.append((key, value))
        return plain(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    for target, in_place in zip(pair("llama"), (False, True), strict=True):
        cache = target.new_cache(80)
        target.prefill(torch.tensor(PROMPT), cache)
        seen.clear()
        target.verify(torch.tensor(PROMPT[:5]), cache)
        buffers = {part.data_ptr() for layer in cache.layers for part in (layer.keys, layer.values)}
        assert {key.data_ptr() for key, _ in seen} < buffers or not in_place
        assert all((part.data_ptr() in buffers) == in_place for both in seen for part in both)


class Clock:
    """Seconds that each pass takes, by the attention in use; the clock is read twice a pass."""

    def __init__(self, target: Target, seconds: dict[str, float]) -> None:
        self.target, self.seconds = target, seconds
        self.now, self.reads = 0.0, 0

    def __call__(self) -> float:
        self.reads += 1
        if self.reads % 2 == 0:
            self.now += self.seconds[self.target.config._attn_implementation]
        return self.now


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({"sdpa": 3.0, GROUPED: 2.0, "eager": 2.5}, GROUPED),
        ({"sdpa": 2.0, GROUPED: 3.0, "eager": 1.0}, "eager"),
        ({"sdpa": 2.0, GROUPED: 1.99, "eager": 2.0}, "sdpa"),  # within the scatter of a measurement
    ],
)
def test_the_fastest_is_chosen(seconds: dict[str, float], best: str) -> None:
    for kind in ("llama", "shared", "k_eq_v"):
        target = pair(kind)[0]
        taken = attention.choose(target, clock=Clock(target, seconds))
        assert taken == pytest.approx({name: 2 * value for name, value in seconds.items()})
        assert target.config._attn_implementation == best
        assert target.masks is not None and bool(target.masks.groups) == (best == GROUPED)
        check_rollback(target, kind)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """An attention that fails, and one that computes something else."""

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel for heads of 512")

    def wrong(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        return attention.grouped(module, query, key, value, None, **options)

    for name, function in (("fails", fails), ("wrong", wrong)):
        attention.AttentionInterface.register(name, function)
        attention.AttentionMaskInterface.register(name, attention.sdpa_mask)
    yield ["fails", "wrong"]
    for name in ("fails", "wrong"):
        del attention.AttentionInterface._global_mapping[name]
        del attention.AttentionMaskInterface._global_mapping[name]


def test_one_that_fails_or_differs_is_left_out(broken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spec_decode.masks._TAKE_MASKS", ("sdpa", *broken))
    target = pair("llama")[0]
    clock = Clock(target, {"sdpa": 3.0, "fails": 0.1, "wrong": 0.1})
    assert set(attention.choose(target, ("sdpa", *broken), clock)) == {"sdpa"}
    assert target.config._attn_implementation == "sdpa" and target.masks is not None


def test_where_transformers_makes_the_masks_nothing_is_chosen() -> None:
    target = pair("llama")[0]
    target.masks = None
    assert attention.choose(target) == {} and target.config._attn_implementation == "sdpa"
