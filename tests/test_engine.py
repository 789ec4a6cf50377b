"""The race, the text stream, loading and the command line: what surrounds the decoding loop."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import spec_decode
from spec_decode import decode
from spec_decode import target as target_module
from spec_decode.__main__ import main
from spec_decode.bench.datasets import read_prompts
from spec_decode.cache import RollbackCache, bucket
from spec_decode.cpu import llama as cpu
from spec_decode.decode import Prefill
from spec_decode.draft_length import Fixed
from spec_decode.drafters.lookup import LookupDrafter
from spec_decode.drafters.model import ModelDrafter, check_same_vocabulary
from spec_decode.drafters.mtp import MTPDrafter
from spec_decode.errors import ModelError, OutOfMemory, PromptError, UserError
from spec_decode.events import BASELINE, SPECULATIVE, Costs, Reading, Trace
from spec_decode.loading import pair as models
from spec_decode.request import Request
from spec_decode.settings import Settings
from spec_decode.sources.local import LocalSource, Race
from spec_decode.target import ANYWHERE, BUCKET, CHUNKS, Target, choose_chunks
from spec_decode.text import TextStream, encode_chat

PROMPT = "one two three, one two three, one two"
SCHEMA = Path(__file__).parents[1] / "docs" / "trace.schema.json"
VALID = Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


@pytest.fixture
def pair():
    return tiny.PairOf(Target(tiny.model("llama")), LookupDrafter())


# The race


def test_the_lane_that_is_behind_goes_next(pair):
    race = Race(pair, Request(PROMPT, Settings(max_new_tokens=30)))
    clocks = {BASELINE: 0.0, SPECULATIVE: 0.0}
    live = set(clocks)
    order = list(race)
    last = {lane: max(r.index for r in order if r.lane == lane) for lane in clocks}
    for r in order:
        assert all(clocks[r.lane] <= clocks[lane] for lane in live)
        assert r.clock == pytest.approx(clocks[r.lane] + r.seconds)
        clocks[r.lane] = r.clock
        if r.index == last[r.lane]:
            live.discard(r.lane)
    assert race.trace.identical
    assert race.trace.finish == {BASELINE: "length", SPECULATIVE: "length"}


def test_a_lane_says_why_it_ended(pair):
    """One by its limit; with an end-of-sequence token before that, both by the token."""
    race = Race(pair, Request(PROMPT, Settings(max_new_tokens=12)))
    list(race)
    assert race.trace.finish == {BASELINE: "length", SPECULATIVE: "length"}
    text = race.trace.token_ids(BASELINE)
    pair.target.eos = frozenset({text[8]})
    race = Race(pair, Request(PROMPT, Settings(max_new_tokens=12)))
    list(race)
    assert race.trace.token_ids(SPECULATIVE) == text[: text.index(text[8]) + 1]
    assert race.trace.finish == {BASELINE: "stop", SPECULATIVE: "stop"}


def test_stop_takes_effect_within_one_round(pair):
    race = Race(pair, Request(PROMPT, Settings(max_new_tokens=200)))
    seen = []
    for r in race:
        seen.append(r)
        if len(seen) == 7:
            race.stop()
    assert len(seen) == 7
    assert race.trace.finish == {BASELINE: "cancelled", SPECULATIVE: "cancelled"}
    assert list(race.trace.rounds) == seen


def test_a_reader_that_dawdles_is_on_no_clock(pair, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(decode, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    race = Race(pair, Request(PROMPT, Settings(max_new_tokens=4)))
    for _ in race:
        now[0] += 100.0
    assert [r.clock for r in race.rounds] == [0.0] * len(race.rounds)


def test_a_race_teaches_the_next_what_rounds_cost():
    """Only under rules whose texts do not depend on draft lengths: the next race may have the same seed, and the draft
    lengths of rejection must not know of noise still to be used."""
    loaded = Costs(1.0, (1.0,) * 17, 0.0, doubt=0.3)  # a step takes no second here, and wider passes cost more
    for settings, teaches in (
        (Settings(max_new_tokens=40, draft_length=2), True),
        (Settings(max_new_tokens=40, draft_length=2, temperature=1.0), True),
        (Settings(max_new_tokens=40, draft_length=2, temperature=1.0, rule="rejection"), False),
        (Settings(max_new_tokens=40, draft_length=2, temperature=1.0, rule="threshold"), False),
    ):
        pair = tiny.PairOf(Target(tiny.model("llama")), LookupDrafter())
        pair.costs = loaded
        first = Race(pair, Request(PROMPT, settings))
        list(first)
        assert first.trace.costs == loaded and (pair.learned is not None) == teaches
        second = Race(pair, Request(PROMPT, settings))
        list(second)
        assert second.trace.costs == second.costs
        if teaches:
            assert 0 < second.costs.step_seconds < 0.5
        else:
            assert second.costs == loaded
        assert pair.costs == loaded, "what was measured at load stays"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_running_out_of_memory_ends_the_race_and_nothing_else(pair, monkeypatch, error):
    forward, passes = pair.target.model.forward, []

    def failing(*args, **kwargs):
        passes.append(1)
        if len(passes) == 6:
            raise error
        return forward(*args, **kwargs)

    monkeypatch.setattr(pair.target.model, "forward", failing)
    race = Race(pair, Request(PROMPT, Settings(max_new_tokens=30)))
    with pytest.raises(OutOfMemory, match="memory"):
        list(race)
    assert len(race.rounds) == 6  # two that share the prefill, and four
    assert set(race.trace.finish.values()) == {"cancelled"}
    assert list(Race(pair, Request(PROMPT, Settings(max_new_tokens=5))))  # the pair still works


def test_prompts_that_do_not_fit(pair):
    settings = Settings(max_new_tokens=500)
    with pytest.raises(PromptError, match="37 tokens long and 12 fit") as caught:
        Race(pair, Request(PROMPT, settings))
    assert (caught.value.tokens, caught.value.limit) == (37, 12)
    assert len(Race(pair, Request(PROMPT, settings, truncate=True)).ids) == 12


@pytest.mark.parametrize("rule", ["rejection", "coupled", "threshold"])
def test_a_trace_holds_the_race_and_fits_its_schema(pair, rule):
    race = Race(pair, Request(PROMPT, Settings(max_new_tokens=12, temperature=0.7, rule=rule)))
    list(race)
    again = Trace.from_json(race.trace.to_json())
    assert again == race.trace
    VALID.validate(json.loads(race.trace.to_json()))
    if rule == "threshold":
        assert all(r.kl is not None and r.refused is not None for r in again.lane(SPECULATIVE)[1:])
    shown = {a.id for r in again.rounds for t in r.tokens for a in (*t.target_top, *t.drafter_top)}
    assert shown and shown <= {int(i) for i in again.pieces}
    assert all(text == pair.tokenizer.decode([int(i)]) for i, text in again.pieces.items())


def test_a_trace_says_what_ran(pair):
    begun = datetime.now(UTC).replace(microsecond=0)
    request = Request(PROMPT, Settings(max_new_tokens=3), system="Be brief.", drafter="lookup")
    trace = Race(pair, request).trace
    assert Request.from_dict(trace.request) == request
    assert trace.pair == pair.info and trace.promises == LocalSource.promises
    assert set(trace.versions) == {"spec_decode", "python", "torch", "transformers"}
    assert trace.versions["spec_decode"] == spec_decode.__version__ and trace.versions["torch"] == torch.__version__
    assert begun <= datetime.fromisoformat(trace.date) <= datetime.now(UTC)
    pair.revisions = {"target": "abc", "drafter": None}
    assert Race(pair, request).trace.pair == {**pair.info, "revisions": {"target": "abc", "drafter": None}}


# What a request may force


@pytest.mark.parametrize("prefix", ["four, ", tuple(ord(c) - 32 for c in "four, ")])
def test_a_forced_prefix_is_read_and_shown_and_the_text_goes_on_from_it(pair, prefix):
    settings = Settings(max_new_tokens=10)
    plain, forced = (
        Race(pair, Request(text, settings, prefix=p)) for text, p in ((PROMPT + "four, ", None), (PROMPT, prefix))
    )
    assert forced.ids == plain.ids == [ord(c) - 32 for c in PROMPT + "four, "]
    for race in (plain, forced):
        list(race)
    for lane in (BASELINE, SPECULATIVE):
        assert forced.trace.token_ids(lane) == plain.trace.token_ids(lane), "the text that the prefix leads to"
        first, *others = forced.trace.lane(lane)
        given = [t for t in first.tokens if t.role == "prompt"]
        assert "".join(t.text for t in given) == "four, " and first.tokens[: len(given)] == tuple(given)
        assert not any(t.role == "prompt" for r in others for t in r.tokens)
    assert forced.trace.prompt_tokens == len(PROMPT) + 6
    assert Trace.from_json(forced.trace.to_json()) == forced.trace


def test_a_forced_prefix_may_end_within_a_character(smol_tokenizer):
    """The rest of the character comes with the first new token, whole."""
    ids = smol_tokenizer("🦜", add_special_tokens=False)["input_ids"]
    stream = TextStream(smol_tokenizer, [])
    assert [stream.push(i) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert [lane.push(ids[-1]) for lane in (stream.fork(), stream)] == ["🦜", "🦜"]


def test_a_forced_prefix_must_be_known_and_fit(pair):
    with pytest.raises(PromptError, match="forced prefix holds token 96, and the target knows 96 tokens"):
        Race(pair, Request(PROMPT, prefix=(1, tiny.VOCABULARY)))
    settings = Settings(max_new_tokens=470)
    assert len(Race(pair, Request(PROMPT, settings, prefix="four")).ids) == 41
    with pytest.raises(PromptError, match="37 tokens long and 36 fit beside 470 new tokens and a forced prefix of 6"):
        Race(pair, Request(PROMPT, settings, prefix="four, "))
    cut = Race(pair, Request(PROMPT, settings, prefix="four, ", truncate=True))
    assert len(cut.ids) == 42 and cut.ids[-6:] == [ord(c) - 32 for c in "four, "]


def test_a_forced_prefix_may_mix_ids_and_texts(pair):
    ids = [ord(c) - 32 for c in "four, "]
    assert Race(pair, Request(PROMPT, prefix=(ids[0], "our", ids[4], " "))).ids[-6:] == ids
    with pytest.raises(PromptError, match="The person's draft holds token 96, and the target knows 96 tokens"):
        Race(pair, Request(PROMPT, draft=("a", tiny.VOCABULARY)))


# The source


class Switching(tiny.PairOf):
    """Keeps the names of the drafters it was asked for; `broken` is none."""

    can_think = False

    def __init__(self):
        super().__init__(Target(tiny.model("llama")), LookupDrafter())
        self.info["drafter"], self.asked = "its own", []

    def use_drafter(self, name):
        if name == "broken":
            raise ModelError("The drafter has another tokenizer than the target.")
        self.asked.append(name)


def test_a_source_loads_the_drafter_that_a_request_names_and_no_other():
    pair = Switching()
    source = LocalSource(pair, own="/models/a-drafter", drafters=("lookup", "broken", "its own"))
    assert source.drafters == ("its own", "lookup", "broken")
    for name in (None, "its own", "lookup", "lookup", None):
        source.race(Request(PROMPT, drafter=name))
    assert pair.asked == ["lookup", "/models/a-drafter"], "its own comes back by the name it was loaded by"
    with pytest.raises(ModelError, match="Unknown drafter '/models/a-drafter'; choose one of its own, lookup, broken"):
        source.race(Request(PROMPT, drafter="/models/a-drafter"))
    with pytest.raises(ModelError, match="another tokenizer"):
        source.race(Request(PROMPT, drafter="broken"))
    source.race(Request(PROMPT))
    assert pair.asked == ["lookup", "/models/a-drafter"], "a drafter that cannot be loaded leaves the one before"


# The prompt

KINDS = ["llama", "gemma3", "qwen2", "qwen3", "int8 llama", "int8 gemma3", *tiny.GEMMA4, "embedded"]
LONG = [(7 * i * i + 3 * i) % tiny.VOCABULARY for i in range(75)]


@pytest.fixture(scope="module")
def embedded_target(embedded_dir) -> Target:
    return Target(models.load_model(str(embedded_dir), torch.device("cpu"), "int8"))


def make(kind: str, request: pytest.FixtureRequest) -> Target:
    if kind == "embedded":
        return request.getfixturevalue("embedded_target")
    if kind in tiny.GEMMA4:
        return Target(tiny.gemma4(kind)[0])
    model = tiny.model(kind.removeprefix("int8 "))
    return Target(cpu.quantize(model) if kind.startswith("int8") else model)


def held(prefill: Prefill) -> list[torch.Tensor]:
    """All that a lane begins with."""
    layers = [layer for layer in prefill.cache.layers if layer.is_initialized]
    return [prefill.passed.logits, prefill.passed.hidden, *(x for layer in layers for x in (layer.keys, layer.values))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_lane_begins_with_the_bits_it_would_have_computed(kind, request, one_thread):
    target = make(kind, request)
    target.chunks = ((32, ANYWHERE),)
    shared, own = (Prefill(target, LONG, len(LONG) + 30, hidden=True) for _ in range(2))
    assert [reading.read for reading in shared] == [32, 64] == [reading.read for reading in own]
    twin = shared.copy()
    assert twin.cache.length == own.cache.length == len(LONG) and twin.seconds == shared.seconds
    for ours, theirs, alone in zip(held(shared), held(twin), held(own), strict=True):
        assert torch.equal(ours, alone) and torch.equal(theirs, alone)
        assert ours.data_ptr() != theirs.data_ptr()
    before = [x.clone() for x in held(shared)]
    target.verify(torch.tensor([3, 4, 5]), twin.cache)
    assert all(torch.equal(a, b) for a, b in zip(before, held(shared), strict=True)), "lanes write to each other"
    after = target.verify(torch.tensor([3, 4, 5]), shared.cache).logits
    assert torch.equal(after, target.verify(torch.tensor([3, 4, 5]), own.cache).logits)


@pytest.mark.parametrize("kind", ["int8 llama", "embedded"])
def test_where_rows_do_not_mix_a_prompt_is_the_same_however_it_is_cut(kind, request, one_thread):
    target = make(kind, request)
    whole = target.new_cache(len(LONG))
    expected = target.prefill(torch.tensor(LONG), whole, hidden=True)
    for chunks in (((8, ANYWHERE),), ((74, 0), (32, ANYWHERE)), ((32, 40), (8, 50), (1, 0))):
        target.chunks = chunks
        prefill = Prefill(target, LONG, len(LONG), hidden=True)
        list(prefill)
        assert torch.equal(prefill.passed.logits, expected.logits)
        assert torch.equal(prefill.passed.hidden, expected.hidden)
        for ours, theirs in zip(prefill.cache.layers, whole.layers, strict=True):
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("drafter", ["lookup", "model", "mtp"])
def test_the_target_reads_a_prompt_once_for_both_lanes(drafter, monkeypatch, one_thread):
    settings = Settings(max_new_tokens=20, draft_length=3)
    model, assistant = tiny.gemma4("dense")
    pair = tiny.PairOf(target := Target(model), LookupDrafter())
    if drafter == "model":
        pair.drafter = ModelDrafter(Target(tiny.model("llama", seed=3)), "other", tiny.VOCABULARY)
    if drafter == "mtp":
        pair.drafter = MTPDrafter(assistant, target)
    race, widths = Race(pair, Request(PROMPT, settings)), []
    forward = model.forward

    def counting(*args, **kwargs):
        widths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counting)
    list(race)
    assert widths[0] == len(race.ids) and max(widths[1:]) <= 4
    stream = [TextStream(pair.tokenizer, race.ids) for _ in range(2)]
    alone = [
        list(decode.baseline(target, race.ids, stream[0], settings)),
        list(decode.speculative(target, pair.drafter, Fixed(3), race.ids, stream[1], settings)),
    ]
    for lane, rounds in zip((BASELINE, SPECULATIVE), alone, strict=True):
        assert [r.tokens for r in race.trace.lane(lane)] == [r.tokens for r in rounds], lane


def test_a_prefill_counts_for_each_lane_as_its_own_and_a_drafters_for_the_drafter(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(decode, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    target, helper = Target(tiny.model("llama")), Target(tiny.model("llama", seed=3))
    for model, seconds in ((target, 1.0), (helper, 0.25)):
        model.chunks = ((16, ANYWHERE),)

        def read(*args, read=model.read, seconds=seconds):
            for passed in read(*args):
                now[0] += seconds
                yield passed

        monkeypatch.setattr(model, "read", read)
    pair = tiny.PairOf(target, ModelDrafter(helper, "h", tiny.VOCABULARY))
    race = Race(pair, Request(PROMPT, Settings(max_new_tokens=2)))
    copy = Prefill.copy

    def slow_copy(self):
        now[0] += 50.0
        return copy(self)

    monkeypatch.setattr(Prefill, "copy", slow_copy)
    assert len(race.ids) == 37  # three chunks
    steps = []
    for step in race.steps():
        steps.append(step)
        now[0] += 100.0  # what the reader of steps does is on no clock, nor is copying
    assert [s for s in steps if isinstance(s, Reading)] == [Reading(16, 37), Reading(32, 37)] * 2
    first = {lane: race.trace.lane(lane)[0] for lane in (BASELINE, SPECULATIVE)}
    assert first[BASELINE].clock == first[BASELINE].seconds == 3.0
    assert first[SPECULATIVE].clock == first[SPECULATIVE].seconds == 3.75
    assert first[SPECULATIVE].draft_seconds == pytest.approx(0.75, abs=0.2)
    assert first[BASELINE].draft_seconds == pytest.approx(0.0, abs=0.2)
    assert all(r.verify_seconds == pytest.approx(3.0, abs=0.5) for r in first.values())
    assert race.rounds == [s for s in steps if not isinstance(s, Reading)]


@pytest.mark.parametrize("passes", [0, 1, 2, 4])
def test_stop_takes_effect_within_one_chunk_of_a_prompt(passes, monkeypatch):
    target, helper = Target(tiny.model("llama")), Target(tiny.model("llama", seed=3))
    target.chunks = helper.chunks = ((16, ANYWHERE),)
    done = []
    for model in (target.model, helper.model):

        def counting(*args, forward=model.forward, **kwargs):
            done.append(1)
            if len(done) == passes:
                race.stop()
            return forward(*args, **kwargs)

        monkeypatch.setattr(model, "forward", counting)
    race = Race(tiny.PairOf(target, ModelDrafter(helper, "h", tiny.VOCABULARY)), Request(PROMPT))
    if not passes:
        race.stop()
    assert all(r.lane == BASELINE for r in race)  # which has its first token before the drafter begins to read
    assert len(done) == passes
    assert set(race.trace.finish.values()) == {"cancelled"}


def test_why_a_race_was_stopped_stands_in_its_trace(pair):
    race = Race(pair, Request(PROMPT, Settings(max_new_tokens=30)))
    for _ in race:
        race.stop("time")
    race.stop()
    assert race.trace.finish == {BASELINE: "time", SPECULATIVE: "time"}


@pytest.mark.parametrize(
    ("row", "position", "once", "chosen", "measured"),
    [
        # 384 rows take 0.5 s at the start and 0.8 s after 1,000 positions; 1,536 would take 2 s, and are not timed
        (0.0013, 7e-7, 0.01, ((384, 1024), (96, 9728), (24, ANYWHERE), (6, ANYWHERE)), [6, 24, 96, 384]),
        (0.00001, 1e-9, 0.002, tuple((size, ANYWHERE) for size in reversed(CHUNKS)), list(CHUNKS)),
        (0.0005, 0.0, 0.6, ((384, ANYWHERE), (96, ANYWHERE), (24, ANYWHERE), (6, ANYWHERE)), [6, 24, 96, 384]),
        (0.2, 0.0, 0.0, ((6, ANYWHERE),), [6]),  # nothing is fast enough
    ],
)
def test_the_size_of_a_chunk_is_measured(row, position, once, chosen, measured, monkeypatch):
    now, seen = [0.0], []
    target = Target(tiny.model("llama"))
    target.context = 16_000
    prefill = target.prefill

    def timed(tokens, cache):
        seen.append(len(tokens))
        now[0] += once + len(tokens) * (row + position * cache.length)
        return prefill(tokens[:1], cache)

    monkeypatch.setattr(target_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(target, "prefill", timed)
    assert choose_chunks(target) == target.chunks
    assert list(dict.fromkeys(seen)) == [1, *measured]
    assert target.chunks == chosen

    # what the choice is for: no chunk of a prompt takes longer than it may, where one that small can be had
    for before in range(0, target.context, BUCKET):
        size = target._chunk(before)
        took = once + size * (row + position * before)
        assert took <= target_module.AIM * 1.05 or size == CHUNKS[0]


def test_a_prompt_is_read_in_the_chunks_of_its_positions():
    target = Target(tiny.model("llama"))
    target.chunks = ((32, 0), (8, 40), (4, 50))
    prefill = Prefill(target, LONG, len(LONG))
    read = [0, *(reading.read for reading in prefill), len(LONG)]
    assert [end - start for start, end in pairwise(read)] == [32, 8, 8, 4, 4, 4, 4, 4, 4, 3]


# Text


@given(st.text(max_size=60))
def test_pieces_of_text_add_up(smol_tokenizer, text):
    prompt = smol_tokenizer("Say:")["input_ids"]
    ids = smol_tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = smol_tokenizer.decode(prompt + ids, skip_special_tokens=True)[len("Say:") :]
    stream = TextStream(smol_tokenizer, prompt)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == whole
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in whole


def test_a_character_of_several_tokens_appears_once_and_whole(smol_tokenizer):
    ids = smol_tokenizer("🦜", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    stream = TextStream(smol_tokenizer, [])
    assert [stream.push(i) for i in ids] == [""] * (len(ids) - 1) + ["🦜"]


def test_a_rejected_draft_leaves_the_stream_alone(smol_tokenizer):
    ids = smol_tokenizer("naïve 🦜 café", add_special_tokens=False)["input_ids"]
    stream, text = TextStream(smol_tokenizer, []), ""
    for i in ids:
        aside = stream.fork()
        aside.push(77)
        aside.push(ids[0])
        text += stream.push(i)
    assert text == "naïve 🦜 café"


@pytest.fixture(scope="session")
def smol_tokenizer(embedded_dir):
    return models.load_tokenizer(str(embedded_dir))


def test_chat_template_and_system_prompt(smol_tokenizer):
    text = smol_tokenizer.decode(encode_chat(smol_tokenizer, "Hi.", "Be brief."))
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"


# Cache and lookup


def test_rollback_moves_a_pointer_and_copies_nothing():
    cache = RollbackCache(tiny.model("gemma3").config, 700)
    assert cache.capacity == 1024
    states = torch.randn(1, 2, 600, 8)
    cache.update(states, states, 0)
    cache.advance(600)
    where = cache.layers[0].keys.data_ptr()
    cache.rollback(590)
    keys, _ = cache.update(states[:, :, :3], states[:, :, :3], 0)
    assert cache.layers[0].keys.data_ptr() == where == keys.data_ptr()
    assert keys.shape[2] == bucket(593) == 1024
    assert torch.equal(keys[0, :, 590:593], states[0, :, :3])
    with pytest.raises(ValueError, match="cannot roll back"):
        cache.rollback(591)


def test_buckets_are_the_smallest_that_hold_the_length():
    assert [bucket(n) for n in (0, 1, 511, 512, 513, 1024, 1025)] == [0, 512, 512, 512, 1024, 1024, 1536]
    for capacity in (1, 512, 513):
        assert RollbackCache(tiny.model("llama").config, capacity).capacity == bucket(capacity)


def test_what_a_drafter_reads_of_the_cache_keeps_its_shape_from_round_to_round():
    """Up to the bucket that holds the cursor, in place, with zeros where nothing was written."""
    cache = RollbackCache(tiny.model("llama").config, 1000)
    states = torch.randn(1, 2, 700, 8)
    for tokens, shape in ((1, 512), (499, 512), (12, 512), (1, 1024)):
        cache.update(states[:, :, :tokens], states[:, :, :tokens], 2)
        cache.advance(tokens)
        keys, values = cache.read(2)
        assert keys.shape[2] == values.shape[2] == shape
        assert keys.data_ptr() == cache.layers[2].keys.data_ptr()
        assert not keys[:, :, cache.length :].any() and keys[:, :, : cache.length].all()


def test_cropping_counts_from_the_end_and_once_for_all_layers():
    """As transformers' assisted generation does it."""
    cache = RollbackCache(tiny.model("llama").config, 20)
    states = torch.randn(1, 2, 9, 8)
    for layer in range(4):
        cache.update(states, states, layer)
    cache.advance(9)
    for layer in cache.layers:
        layer.crop(-3)
    assert cache.get_seq_length() == cache.length == 6
    assert cache.get_mask_sizes(2, 0) == (512, 0)
    cache.rollback(0)
    assert cache.length == 0


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 9))
def test_lookup_agrees_with_a_search(tokens, length):
    drafter = LookupDrafter()
    drafter.start(tokens[:20], Settings(), 100)
    drafter.extend(tokens[20:])
    expected: list[int] = []
    for n in (4, 3, 2):
        ends = [e for e in range(n, len(tokens)) if tokens[e - n : e] == tokens[-n:]]
        if len(tokens) >= n and ends:
            grown = list(tokens)
            for i in range(length):
                grown.append(grown[ends[-1] + i])
            expected = grown[len(tokens) :]
            break
    assert tiny.ids(tiny.drafted(drafter, length)) == expected


@pytest.mark.parametrize(
    ("text", "draft"),
    [
        ("abcdX cdY abcd", "X c"),  # four tokens that match, rather than the two seen last
        ("abcdX abcdY abcd", "Y a"),  # of equal matches the latest
        ("abcX bcY zabc", "X b"),  # three
        ("bcX zbc", "X z"),  # two
        ("cX zc", ""),  # one is too few
        ("ababab", "aba"),  # round and round
    ],
)
def test_lookup_prefers_the_longest_match_and_then_the_latest(text, draft):
    drafter = LookupDrafter()
    drafter.start([ord(c) for c in text[:3]], Settings(), 100)
    drafter.extend([ord(c) for c in text[3:]])
    assert "".join(chr(i) for i in tiny.ids(tiny.drafted(drafter, 3))) == draft


# Loading


@pytest.fixture
def checkpoint(tmp_path, smol_tokenizer) -> Path:
    model = tiny.model("llama", vocab_size=len(smol_tokenizer), eos_token_id=2)
    model.save_pretrained(tmp_path / "model")
    smol_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_any_directory_makes_a_pair(checkpoint):
    pair = models.load_pair(str(checkpoint), str(checkpoint), device="cpu")
    race = Race(pair, Request(PROMPT, Settings(max_new_tokens=6, draft_length=3)))
    list(race)
    assert race.trace.identical
    assert all(r.accepted == r.drafted for r in race.trace.lane(SPECULATIVE))
    assert pair.costs is not None and pair.costs.verify_ratio[0] == 1
    assert race.trace.machine["prefill_chunks"] == pair.target.chunks
    assert {size for size, _ in pair.target.chunks} <= set(CHUNKS)
    pair.use_drafter("lookup")
    assert pair.info["drafter"] == "lookup"


def test_int8_of_any_architecture_keeps_rows_apart():
    for kind in ("gemma3", "qwen3", "llama"):
        target = Target(cpu.quantize(tiny.model(kind)))
        tokens = torch.arange(1, 60)
        cache = target.new_cache(100)
        target.prefill(tokens[:40], cache)
        together = target.verify(tokens[40:49], cache).logits.clone()
        cache.rollback(40)
        alone = torch.cat([target.verify(token[None], cache).logits for token in tokens[40:49]])
        assert torch.equal(together, alone), kind


def test_a_foreign_tokenizer_is_refused_by_its_first_differences():
    class Words:
        def __init__(self, *words):
            self.words = words

        def get_vocab(self):
            return {word: i for i, word in enumerate(self.words)}

    check_same_vocabulary(Words("a", "b"), Words("a", "b"))
    with pytest.raises(
        ModelError, match="id 1 is 'b' for the target, 'x' for the drafter; id 2 is 'c' for the target, None"
    ):
        check_same_vocabulary(Words("a", "b", "c"), Words("a", "x"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"target": "no-such-org-9/no-such-model"}, "is not on this disk and the Hugging Face Hub cannot be reached"),
        ({"target": "not a name at all!"}, "There is no model"),
        ({"device": "toaster"}, "Unknown device"),
        ({"dtype": "int3"}, "Unknown dtype"),
    ],
)
def test_what_cannot_be_loaded_says_so_in_one_sentence(arguments, sentence):
    with pytest.raises(ModelError, match=sentence) as caught:
        models.load_pair(**{"device": "cpu", **arguments})
    assert "\n" not in str(caught.value)


def test_a_directory_that_is_no_checkpoint(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json that can be used"):
        models.load_pair(str(tmp_path), device="cpu")


# Command line


def test_race_prints_the_object_of_the_design(checkpoint, tmp_path, capsys):
    trace = tmp_path / "trace.json"
    command = ["race", "--target", str(checkpoint), "--device", "cpu", "--prompt", PROMPT, "--max-new-tokens", "8"]
    assert main([*command, "--json", "--trace", str(trace), "--temperature", "0.8", "--rule", "coupled"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["identical"] is True
    assert {"target", "drafter", "device", "dtype"} <= set(report["pair"])
    for lane in ("baseline", "speculative"):
        assert {"text", "token_ids", "prefill_seconds", "seconds", "tokens_per_second"} <= set(report[lane])
        assert len(report[lane]["token_ids"]) == 8
    assert {"rounds", "drafted", "accepted", "acceptance_rate", "tokens_per_pass"} <= set(report["speculative"])
    emitted = [i for r in report["speculative"]["rounds"] for i in r["emitted"]]
    assert emitted == report["speculative"]["token_ids"]
    written = Trace.from_json(trace.read_text())
    assert written.token_ids(BASELINE) == report["baseline"]["token_ids"]
    VALID.validate(json.loads(trace.read_text()))
    assert written.pair["target"] == "model" and str(checkpoint.parent) not in trace.read_text()
    assert main(["race", "--replay", str(trace), "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out)
    assert {**replayed, "pair": None} == {**report, "pair": None}, "the recorded seconds too"
    assert report["pair"]["target"] == report["pair"]["revisions"]["target"]["id"] == str(checkpoint)
    assert replayed["pair"]["target"] == replayed["pair"]["revisions"]["target"]["id"] == "model"
    assert replayed["pair"]["drafter"] == report["pair"]["drafter"] == "lookup"


@pytest.mark.parametrize(("flags", "kept"), [([], False), (["--keep-system"], True)])
def test_the_system_prompt_is_in_the_trace_where_it_was_chosen(checkpoint, tmp_path, capsys, flags, kept):
    trace = tmp_path / "trace.json"
    command = ["race", "--target", str(checkpoint), "--device", "cpu", "--prompt", PROMPT, "--max-new-tokens", "2"]
    assert main([*command, "--system", "Be brief.", "--trace", str(trace), *flags]) == 0
    written = Trace.from_json(trace.read_text())
    assert ("Be brief." in trace.read_text()) is kept
    assert written.request["system"] == ("Be brief." if kept else None) and written.omitted == (
        () if kept else ("system",)
    )


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--temperature", "hot"], 2, "Temperature must be a number"),
        (["--draft-length", "99"], 2, "Draft length must be a whole number from 1 to 16"),
        (["--temperature", "1", "--rule", "greedy"], 2, "needs temperature 0"),
        (["--trace", "/no/such/folder/t.json"], 2, "its folder does not exist"),
        (["--target", "no-such-org-9/x"], 1, "cannot be reached"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(options, code, sentence, capsys):
    assert main(["race", "--prompt", "x", "--device", "cpu", *options]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert sentence in lines[-1]
    assert lines[-1].startswith("spec_decode: ")


def test_help_needs_no_torch():
    code = """
import sys
from spec_decode.__main__ import main
try:
    main(["race", "--help"])
except SystemExit:
    assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# The benchmark


def test_bench_refuses_prompts_that_it_cannot_read(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n')
    for path in (tmp_path / "bad.jsonl", tmp_path / "none.jsonl"):
        with pytest.raises(UserError):
            read_prompts(path)
