"""Both lanes emit the target's own tokens: on tiny models of real classes, and on the embedded target."""

from __future__ import annotations

import pytest
import tiny
import torch

from spec_decode import decode
from spec_decode.draft_length import Adaptive, Fixed
from spec_decode.drafters.lookup import LookupDrafter
from spec_decode.drafters.model import ModelDrafter
from spec_decode.loading import pair as models
from spec_decode.loading.pair import load_model, load_tokenizer
from spec_decode.settings import Settings
from spec_decode.target import Target
from spec_decode.text import TextStream, encode_chat

KINDS = ["llama", "gemma3", "qwen2", "qwen3"]
PROMPT = [(7 * i * i + 3 * i) % tiny.VOCABULARY for i in range(3 * tiny.WINDOW)] + [5, 6, 7, 8, 9, 5, 6, 7]


def _ids(rounds) -> list[int]:
    return [token.id for r in rounds for token in r.emitted]


def _stream(prompt):
    return TextStream(tiny.Characters(), prompt)


def _drafter(name: str, target: Target):
    if name == "lookup":
        return LookupDrafter()
    if name == "itself":
        return ModelDrafter(target, "itself", tiny.VOCABULARY)
    if name == "stranger":
        return ModelDrafter(Target(tiny.model("llama", seed=9, num_hidden_layers=1)), "stranger", tiny.VOCABULARY)
    return tiny.ScriptedDrafter(lambda tokens, n: [(tokens[-1] + 1 + i) % tiny.VOCABULARY for i in range(n)])


@pytest.fixture(scope="module", params=KINDS)
def target(request) -> Target:
    return Target(tiny.model(request.param))


@pytest.mark.parametrize("drafter", ["lookup", "itself", "stranger", "scripted"])
def test_greedy_equals_generate(target, drafter):
    prompt = torch.tensor([PROMPT])
    generated = target.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20
    )[0, len(PROMPT) :].tolist()
    settings = Settings(max_new_tokens=20)
    assert _ids(decode.baseline(target, PROMPT, _stream(PROMPT), settings)) == generated
    for length in range(1, 9):
        rounds = list(
            decode.speculative(target, _drafter(drafter, target), Fixed(length), PROMPT, _stream(PROMPT), settings)
        )
        assert _ids(rounds) == generated, (drafter, length)
        if drafter == "itself":
            assert all(r.accepted == r.drafted for r in rounds)


@pytest.mark.parametrize("drafter", ["lookup", "itself", "stranger", "scripted"])
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(0.3, 1.0, 0), (0.7, 0.9, 0), (1.0, 1.0, 20), (1.5, 0.95, 50), (1.0, 1.0, 0)]
)
def test_coupled_lanes_are_identical(target, drafter, temperature, top_p, top_k):
    for seed, lengths in ((1, Fixed(1)), (2, Fixed(3)), (3, Fixed(8)), (4, Adaptive(None))):
        settings = Settings(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_new_tokens=16)
        base = _ids(decode.baseline(target, PROMPT, _stream(PROMPT), settings))
        rounds = list(decode.speculative(target, _drafter(drafter, target), lengths, PROMPT, _stream(PROMPT), settings))
        assert _ids(rounds) == base
        if drafter == "itself":  # the same model with the same noise draws the same tokens
            assert all(r.accepted == r.drafted for r in rounds)


def test_different_seeds_give_different_texts():
    target = Target(tiny.model("llama"))
    texts = {
        tuple(
            _ids(decode.baseline(target, PROMPT, _stream(PROMPT), Settings(temperature=1.0, seed=s, max_new_tokens=20)))
        )
        for s in range(4)
    }
    assert len(texts) == 4


@pytest.mark.parametrize("rule", ["greedy", "coupled", "rejection", "threshold"])
@pytest.mark.parametrize("limit", [1, 2, 3, 5, 17])
def test_output_never_overshoots(rule, limit):
    target = Target(tiny.model("llama"))
    settings = Settings(rule=rule, temperature=0 if rule == "greedy" else 0.8, max_new_tokens=limit)
    for drafter in ("itself", "scripted"):
        rounds = list(
            decode.speculative(target, _drafter(drafter, target), Fixed(8), PROMPT, _stream(PROMPT), settings)
        )
        assert sum(len(r.emitted) for r in rounds) == limit


def test_end_of_sequence_inside_an_accepted_draft_cuts_there():
    model = tiny.model("llama")
    target = Target(model)
    text = _ids(decode.baseline(target, PROMPT, _stream(PROMPT), Settings(max_new_tokens=24)))
    end = next(i for i in range(6, 24) if text[i] not in text[:i])  # first seen where a long draft covers it
    target.eos = frozenset({text[end]})
    base = _ids(decode.baseline(target, PROMPT, _stream(PROMPT), Settings(max_new_tokens=24)))
    assert base == text[: end + 1]
    for length in range(1, 9):
        perfect = tiny.ScriptedDrafter(lambda tokens, n: (text[len(tokens) - len(PROMPT) :] + [0] * n)[:n])
        rounds = list(
            decode.speculative(target, perfect, Fixed(length), PROMPT, _stream(PROMPT), Settings(max_new_tokens=24))
        )
        assert _ids(rounds) == base
        assert rounds[-1].tokens[-1].id == text[end]  # nothing after the end is shown
        assert perfect.tokens == PROMPT + base


def test_the_draft_model_computes_nothing_twice():
    target, small = Target(tiny.model("llama")), Target(tiny.model("llama", seed=9))
    seen: list[tuple[int, int]] = []
    forward = small._forward

    def counting(tokens, cache, hidden, keep):
        seen.extend((cache.length + i, int(token)) for i, token in enumerate(tokens))
        return forward(tokens, cache, hidden, keep)

    small._forward = counting  # type: ignore[method-assign]
    settings = Settings(max_new_tokens=30)
    drafter = ModelDrafter(small, "small", tiny.VOCABULARY)
    rounds = list(decode.speculative(target, drafter, Fixed(4), PROMPT, _stream(PROMPT), settings))
    text = PROMPT + _ids(rounds)
    right = [entry for entry in seen if text[entry[0]] == entry[1]]
    # A token of the final text is read at most once, whatever was drafted and rolled back around it.
    assert len(right) == len(set(right))


def test_closing_a_lane_frees_its_cache_and_drafter():
    target, drafter = Target(tiny.model("llama")), tiny.ScriptedDrafter(lambda tokens, n: [1] * n)
    caches = []
    make = target.new_cache
    target.new_cache = lambda capacity: caches.append(make(capacity)) or caches[-1]  # type: ignore[method-assign, func-returns-value]
    lane = decode.speculative(target, drafter, Fixed(2), PROMPT, _stream(PROMPT), Settings(max_new_tokens=50))
    next(lane)
    next(lane)
    assert caches[0].layers[0].keys is not None
    lane.close()
    assert drafter.closed
    assert all(layer.keys is None for layer in caches[0].layers)


def test_a_pass_that_is_not_finite_is_refused_in_one_sentence():
    from spec_decode.errors import UserError

    model = tiny.model("llama")
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        list(decode.baseline(Target(model), PROMPT, _stream(PROMPT), Settings(max_new_tokens=3)))


# The embedded target, in the precision it runs in and in float32.

CHAT = "Write the list again in capital letters: apple, banana, cherry, date, elderberry."


@pytest.fixture(scope="module")
def embedded_parts(embedded_dir):
    tokenizer = load_tokenizer(str(embedded_dir))
    return Target(load_model(str(embedded_dir), torch.device("cpu"), "int8")), tokenizer


@pytest.mark.parametrize("start", [3, 59, 63, 64, 127, 250, 511])
def test_embedded_rows_do_not_depend_on_their_neighbours(embedded_parts, start):
    target, _ = embedded_parts
    cache = target.new_cache(start + 17)
    target.prefill(torch.arange(300, 300 + start), cache)
    more = torch.arange(900, 917)
    alone = torch.cat([target.verify(token[None], cache).logits for token in more])
    for rows in (2, 5, 9, 17):
        cache.rollback(start)
        assert torch.equal(target.verify(more[:rows], cache).logits, alone[:rows])  # bit for bit


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_embedded_lanes_are_identical(embedded_parts, temperature):
    target, tokenizer = embedded_parts
    prompt = encode_chat(tokenizer, CHAT)
    settings = Settings(temperature=temperature, top_p=0.95, max_new_tokens=20, seed=5)
    base = _ids(decode.baseline(target, prompt, TextStream(tokenizer, prompt), settings))
    drafters = [LookupDrafter(), ModelDrafter(target, "itself", target.vocabulary)]
    for length in range(1, 9):
        drafter = drafters[length % 2] if temperature else drafters[0]
        rounds = decode.speculative(target, drafter, Fixed(length), prompt, TextStream(tokenizer, prompt), settings)
        assert _ids(rounds) == base, length


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_embedded_pair_as_it_ships_is_exact_and_worth_it(embedded_dir, monkeypatch, temperature):
    """With the drafter in assets: the same text, and drafts that are right often enough to mean something."""
    monkeypatch.setattr(models, "measure_costs", lambda *_, **__: None)
    pair = models.load_pair(device="cpu")
    assert pair.drafter.name == "mtp+lookup"
    prompt = encode_chat(pair.tokenizer, "Write a Python function that reverses a string.")
    settings = Settings(temperature=temperature, max_new_tokens=24, seed=2)
    base = _ids(decode.baseline(pair.target, prompt, TextStream(pair.tokenizer, prompt), settings))
    for drafter in (pair.drafter, pair.drafter.other):
        text = TextStream(pair.tokenizer, prompt)
        rounds = list(decode.speculative(pair.target, drafter, Fixed(4), prompt, text, settings))
        assert _ids(rounds) == base
        assert len(rounds) < 0.85 * len(base), "fewer passes than tokens"


def test_embedded_float32_equals_generate(embedded_dir):
    tokenizer = load_tokenizer(str(embedded_dir))
    target = Target(load_model(str(embedded_dir), torch.device("cpu"), "float32"))
    prompt = encode_chat(tokenizer, CHAT)
    ids = torch.tensor([prompt])
    generated = target.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=14, pad_token_id=0
    )[0, len(prompt) :].tolist()
    settings = Settings(max_new_tokens=14)
    assert _ids(decode.baseline(target, prompt, TextStream(tokenizer, prompt), settings)) == generated
    for length in range(1, 9):
        drafter = LookupDrafter() if length % 2 else ModelDrafter(target, "itself", target.vocabulary)
        rounds = decode.speculative(target, drafter, Fixed(length), prompt, TextStream(tokenizer, prompt), settings)
        assert _ids(rounds) == generated, length
