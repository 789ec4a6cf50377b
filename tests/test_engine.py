"""The race, the text stream, loading and the command line: what surrounds the decoding loop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from spec_decode import decode, models
from spec_decode.__main__ import main
from spec_decode.bench import bench, read_prompts, summarize, table
from spec_decode.cache import RollbackCache, bucket
from spec_decode.drafters.lookup import LookupDrafter
from spec_decode.drafters.model import check_same_vocabulary
from spec_decode.errors import ModelError, OutOfMemory, PromptError, UserError
from spec_decode.events import BASELINE, SPECULATIVE, Costs, Trace
from spec_decode.race import Race
from spec_decode.settings import Settings
from spec_decode.target import Target
from spec_decode.text import TextStream, encode_chat

PROMPT = "one two three, one two three, one two"


@pytest.fixture
def pair():
    return tiny.PairOf(Target(tiny.model("llama")), LookupDrafter())


# The race


def test_the_lane_that_is_behind_goes_next(pair):
    race = Race(pair, PROMPT, Settings(max_new_tokens=30))
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


def test_stop_takes_effect_within_one_round(pair):
    race = Race(pair, PROMPT, Settings(max_new_tokens=200))
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
    race = Race(pair, PROMPT, Settings(max_new_tokens=4))
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
        first = Race(pair, PROMPT, settings)
        list(first)
        assert first.trace.costs == loaded and (pair.learned is not None) == teaches
        second = Race(pair, PROMPT, settings)
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
    race = Race(pair, PROMPT, Settings(max_new_tokens=30))
    with pytest.raises(OutOfMemory, match="memory"):
        list(race)
    assert len(race.rounds) == 5
    assert set(race.trace.finish.values()) == {"cancelled"}
    assert list(Race(pair, PROMPT, Settings(max_new_tokens=5)))  # the pair still works


def test_prompts_that_do_not_fit(pair):
    settings = Settings(max_new_tokens=500)
    with pytest.raises(PromptError, match="empty"):
        Race(pair, "  \n", settings)
    with pytest.raises(PromptError, match="37 tokens long and 12 fit") as caught:
        Race(pair, PROMPT, settings)
    assert (caught.value.tokens, caught.value.limit) == (37, 12)
    assert len(Race(pair, PROMPT, settings, truncate=True).ids) == 12


def test_a_trace_replays_the_race(pair):
    race = Race(pair, PROMPT, Settings(max_new_tokens=12, temperature=0.7, rule="threshold"))
    list(race)
    again = Trace.from_json(race.trace.to_json())
    assert again == race.trace
    assert all(r.kl is not None and r.refused is not None for r in again.lane(SPECULATIVE)[1:])


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


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 9))
def test_lookup_agrees_with_a_search(tokens, length):
    drafter = LookupDrafter()
    drafter.start(tokens[:20], Settings(), 100)
    drafter.extend(tokens[20:], None)  # type: ignore[arg-type]
    expected: list[int] = []
    for n in (4, 3, 2):
        ends = [e for e in range(n, len(tokens)) if tokens[e - n : e] == tokens[-n:]]
        if len(tokens) >= n and ends:
            grown = list(tokens)
            for i in range(length):
                grown.append(grown[ends[-1] + i])
            expected = grown[len(tokens) :]
            break
    assert drafter.draft(length).ids.tolist() == expected


# Loading


@pytest.fixture
def checkpoint(tmp_path, smol_tokenizer) -> Path:
    model = tiny.model("llama", vocab_size=len(smol_tokenizer), eos_token_id=2)
    model.save_pretrained(tmp_path / "model")
    smol_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_any_directory_makes_a_pair(checkpoint):
    pair = models.load_pair(str(checkpoint), str(checkpoint), device="cpu")
    race = Race(pair, PROMPT, Settings(max_new_tokens=6, draft_length=3))
    list(race)
    assert race.trace.identical
    assert all(r.accepted == r.drafted for r in race.trace.lane(SPECULATIVE))
    assert pair.costs is not None and pair.costs.verify_ratio[0] == 1
    pair.use_drafter("lookup")
    assert pair.info["drafter"] == "lookup"


def test_int8_of_any_architecture_keeps_rows_apart():
    from spec_decode import cpu

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
    assert set(report["pair"]) == {"target", "drafter", "device", "dtype"}
    for lane in ("baseline", "speculative"):
        assert {"text", "token_ids", "prefill_seconds", "seconds", "tokens_per_second"} <= set(report[lane])
        assert len(report[lane]["token_ids"]) == 8
    assert {"rounds", "drafted", "accepted", "acceptance_rate", "tokens_per_pass"} <= set(report["speculative"])
    emitted = [i for r in report["speculative"]["rounds"] for i in r["emitted"]]
    assert emitted == report["speculative"]["token_ids"]
    assert Trace.from_json(trace.read_text()).token_ids(BASELINE) == report["baseline"]["token_ids"]


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


def test_bench_reports_every_prompt_and_the_medians(checkpoint, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"id": "a", "category": "x", "prompt": "one two"}\n\n{"id": "b", "category": "y", "prompt": "three"}\n'
    )
    pair = models.load_pair(str(checkpoint), device="cpu")
    rows = list(bench(pair, read_prompts(file), Settings(max_new_tokens=6), ["transformers"]))
    summary = summarize(rows)
    assert [row["id"] for row in rows] == ["a", "b"]
    assert summary["identical"] == 2 and set(summary["categories"]) == {"x", "y"}
    assert all(row["peers"]["transformers"]["tokens_per_second"] > 0 for row in rows)
    text = table(rows, summary, pair.costs)
    assert "**median**" in text and "2 of 2" in text


def test_bench_refuses_what_it_cannot_use(tmp_path, pair):
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n')
    for path in (tmp_path / "bad.jsonl", tmp_path / "none.jsonl"):
        with pytest.raises(UserError):
            read_prompts(path)
    with pytest.raises(UserError, match="Unknown peer"):
        list(bench(pair, [], Settings(), ["abacus"]))


def test_llama_cpp_is_a_peer_of_the_embedded_target_alone(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    pair = models.load_pair(str(checkpoint), device="cpu")
    with pytest.raises(ModelError, match="embedded target alone"):
        list(bench(pair, [], Settings(), ["llama.cpp"]))
    pair.name = "embedded"
    with pytest.raises(ModelError, match="pip install xllamacpp"):
        list(bench(pair, [], Settings(), ["llama.cpp"]))
