"""The drafter recipe end to end on a tiny Llama: data that goes on where it stopped, a loss that falls, a run that
resumes bit by bit, and a checkpoint that transformers loads and the engine drafts with."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from transformers import Gemma4AssistantForCausalLM

from spec_decode import decode
from spec_decode.cache import ARGUMENT
from spec_decode.draft_length import Fixed
from spec_decode.drafters.mtp import MTPDrafter
from spec_decode.errors import UserError
from spec_decode.settings import Settings
from spec_decode.target import Pass, Target
from spec_decode.text import TextStream
from spec_decode.training import data, lists, prompts, train
from spec_decode.training.assistant import Learner, Shape, save

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = [1, 3]
WRITING = data.Writing(slots=6, length=48, prompt=12, answer=(8, 24), shard=150)


class Template(tiny.Characters):
    """One character a token, and turns that begin and end with one."""

    chat_template = "there is one"

    def apply_chat_template(self, turns: list[dict[str, str]], **_: Any) -> str:
        return "U" + turns[0]["content"] + "~A"


def target(**changes: Any) -> Any:
    # A vocabulary that lists divide and a model as certain of its words as a trained one
    model = tiny.model("llama", **{"initializer_range": 0.5, "eos_token_id": None, **changes})
    model.generation_config.eos_token_id = None
    return model


def openings(rng: random.Random) -> Iterator[prompts.Opening]:
    while True:
        yield prompts.Opening("chat", [rng.randrange(80) for _ in range(rng.randrange(4))], 3)


def written(folder: Path, tokens: int, seed: int = 0) -> int:
    return data.write(target(), Template(), openings, LAYERS, folder, tokens, WRITING, seed=seed)


@pytest.fixture(scope="module")
def texts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written in float32, so that it can be compared; elsewhere on the CPU in int8."""
    folder = tmp_path_factory.mktemp("texts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.cpu, "quantize_linears", lambda model: None)
        written(folder, 1500)
    return folder


def test_texts_are_what_the_target_says(texts_folder: Path) -> None:
    """Ids, hidden states, keys, values and likely tokens of a text, against one plain pass over it."""
    texts = data.Texts([texts_folder])
    model = target()
    for chosen in (0, len(texts) // 2, len(texts) - 1):
        batch = texts.batch([chosen], LAYERS)
        assert batch.ids[0, : int(batch.turns)].tolist() == [ord("U") - 32]
        after = batch.ids[0, int(batch.answers) - 2 : int(batch.answers)]
        assert after.tolist() == [ord("~") - 32, ord("A") - 32]
        with torch.no_grad():
            out = model(input_ids=batch.ids, output_hidden_states=True, use_cache=True)
        logs = out.logits.log_softmax(-1)[0]
        near = {"rtol": 2e-3, "atol": 5e-3}  # kept in float16
        torch.testing.assert_close(batch.hidden, out.hidden_states[-1], **near)
        for layer in LAYERS:
            torch.testing.assert_close(batch.kv[layer][0], out[ARGUMENT].layers[layer].keys, **near)
            torch.testing.assert_close(batch.kv[layer][1], out[ARGUMENT].layers[layer].values, **near)
        torch.testing.assert_close(batch.top_logs[0], logs.gather(-1, batch.top_ids[0]), rtol=2e-3, atol=1e-2)


def test_greedy_answers_are_greedy(texts_folder: Path) -> None:
    texts = data.Texts([texts_folder])
    checked = 0
    for i, temperature in enumerate(texts.temperatures):
        if temperature == 0:
            batch = texts.batch([i], [])
            begin, end = int(batch.answers), int(batch.lengths)
            assert batch.ids[0, begin:end].tolist() == batch.top_ids[0, begin - 1 : end - 1, 0].tolist()
            checked += end - begin
    assert checked > 100


def test_writing_goes_on_without_repeating_itself(tmp_path: Path) -> None:
    have = written(tmp_path, 400)
    before = [path.read_bytes() for path in data.shards(tmp_path)]
    assert written(tmp_path, 400) == have
    more = written(tmp_path, 900)
    assert more >= 900
    after = data.shards(tmp_path)
    assert [path.read_bytes() for path in after[: len(before)]] == before and len(after) > len(before)
    keys = data.Texts([tmp_path]).keys
    assert len(keys) == len(set(keys)) > 10
    total = 0
    for path in after:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            assert about["tokens"] == len(file.get_tensor("ids")) == int(file.get_tensor("offsets")[-1])
            total += about["tokens"]
    assert total == more


def test_held_out_prompts_are_kept_out(tmp_path: Path) -> None:
    """Of a set of four prompts two are held out; the other two remain."""
    words = ["one red house", "two green trees and a very long and winding road", "three blue boats", "four"]

    def some(rng: random.Random) -> Iterator[prompts.Opening]:
        while True:
            yield prompts.Opening("chat", Template()(rng.choice(words))["input_ids"], None)
            # what is known or barred is passed over; strangers keep the slots busy
            yield prompts.Opening("chat", [rng.randrange(80) for _ in range(9)], None)

    held = prompts.HeldOut(["One red house!", "see two green trees and a very long and winding road ahead"])
    writing = data.Writing(slots=6, length=90, prompt=60, answer=(8, 24), shard=150)
    data.write(target(), Template(), some, LAYERS, tmp_path, 600, writing, held)
    texts = data.Texts([tmp_path])
    seen = []
    for i in range(len(texts)):
        batch = texts.batch([i], [])
        seen.append(Template().decode(batch.ids[0, int(batch.turns) : int(batch.answers) - 2].tolist()))
    assert seen.count(words[2]) == seen.count(words[3]) == 1
    assert words[0] not in seen and words[1] not in seen


@pytest.mark.parametrize("number", [2, 20])
def test_writing_ends_when_there_are_no_more_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """More slots than prompts and fewer: each is written once, and asking again adds nothing."""
    monkeypatch.setattr(data, "MANY", 100)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"number {i}"}) + "\n" for i in range(number)))

    def some(rng: random.Random) -> Iterator[prompts.Opening]:
        return prompts.given(Template(), file, rng)

    for _ in range(2):
        have = data.write(target(), Template(), some, LAYERS, tmp_path / "texts", 100_000, WRITING)
        texts = data.Texts([tmp_path / "texts"])
        assert len(texts) == len(set(texts.keys)) == number
        assert sum(map(texts.length, range(number))) == have


def learner(**shape: Any) -> Learner:
    torch.manual_seed(0)
    return Learner(target(), Shape(**{"intermediate": 64, "layers": tuple(LAYERS), **shape}))


QUICK = train.Training(steps=120, texts=4, rate=1e-2, warmup=5, unroll=3, vocabulary=96, check=40, validation=0.2)


def rows(folder: Path) -> list[list[float]]:
    """Of the curve, without its column of seconds."""
    lines = (folder / "curve.csv").read_text().splitlines()[1:]
    return [[float(x) for i, x in enumerate(line.split(",")) if i != 4] for line in lines]


def test_it_learns(texts_folder: Path, tmp_path: Path) -> None:
    train.train(learner(), [texts_folder], tmp_path, QUICK)
    curve = rows(tmp_path)
    assert [row[0] for row in curve] == [40, 80, 120]
    assert curve[-1][2] < 0.9 * curve[0][2]
    assert curve[-1][4] > 1.5 * curve[0][4]  # first drafts that are right


def test_resuming_is_exact(texts_folder: Path, tmp_path: Path) -> None:
    whole, halves = learner(), learner()
    train.train(whole, [texts_folder], tmp_path / "whole", QUICK)
    stop = Stop(at=80)
    with pytest.raises(KeyboardInterrupt):
        train.train(halves, [texts_folder], tmp_path / "halves", QUICK, stop)
    resumed = learner()
    train.train(resumed, [texts_folder], tmp_path / "halves", QUICK)
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")
    for (name, mine), theirs in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


class Stop:
    """Interrupts a run in the step after a checkpoint, as its next report is due."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, line: str) -> None:
        if line.startswith(f"step {self.at + 40},"):
            raise KeyboardInterrupt


def test_the_average_stands_in_and_leaves_again() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    average = train.Average([parameter], horizon=4)
    values, expected = [1.0, 2.0, 4.0, 8.0] * 10, 0.0
    for n, value in enumerate(values, 1):
        parameter.data.fill_(value)
        average.update()
        expected += (value - expected) / min(4, 1 + n / 8)
    with average.instead():
        assert parameter.tolist() == pytest.approx([expected] * 2)
    assert parameter.tolist() == [8.0, 8.0]
    average.settle()
    assert parameter.tolist() == pytest.approx([expected] * 2)
    with torch.no_grad():
        parameter.zero_()
    with average.instead():
        assert parameter.tolist() == pytest.approx([expected] * 2), "it no longer follows what it gave away"


def test_a_drafter_goes_on_from_another(tmp_path: Path) -> None:
    first = learner()
    with torch.no_grad():
        for parameter in first.assistant.parameters():
            parameter.add_(1)
    save(first, tmp_path, head=False, dtype=torch.float32)

    second = learner()
    second.adopt(tmp_path)
    theirs = dict(first.assistant.named_parameters())
    for name, mine in second.assistant.named_parameters():
        # the head is the target's
        assert torch.equal(mine, theirs[name]) == ("embed_tokens" not in name), name

    elsewhere = learner(layers=(2, 3))
    before = {name: value.clone() for name, value in elsewhere.assistant.named_parameters()}
    elsewhere.adopt(tmp_path)
    for name, mine in elsewhere.assistant.named_parameters():
        own = "embed_tokens" in name or "layers.0.self_attn" in name
        assert torch.equal(mine, (before if own else theirs)[name]), name

    with pytest.raises(UserError, match="has another shape"):
        learner(intermediate=32).adopt(tmp_path)
    with pytest.raises(UserError, match="holds no drafter"):
        learner().adopt(tmp_path / "nowhere")


def test_a_round_is_what_inference_does(texts_folder: Path) -> None:
    """The unrolled steps at one place, against the engine drafting from the same state."""
    mine = learner()
    model = target()
    texts = data.Texts([texts_folder])
    batch = texts.batch([3], LAYERS)
    at = int(batch.answers) + 2
    process = train.rounds(mine, batch, 2, torch.tensor([[at]]), torch.tensor([[True]]))
    outputs = [x[0, 0] for x, _, _, _ in process]

    lead = Target(model)
    mine.assistant.config.shares_target_head = True
    drafter = MTPDrafter(mine.assistant.eval(), lead)
    ids = batch.ids[0]
    cache = lead.new_cache(64)
    seen = lead.prefill(ids[:at], cache, hidden=True)
    for layer in LAYERS:  # as the texts hold them
        for kept, own in zip(batch.kv[layer], (cache.layers[layer].keys, cache.layers[layer].values), strict=True):
            with torch.inference_mode():
                own[:, :, :at] = kept[:, :, :at]
    seen = Pass(seen.logits, batch.hidden[0, at - 1 : at], cache)
    drafter.start(ids[:at].tolist(), Settings(temperature=1.0), 64)
    drafter.extend([int(ids[at])], seen)
    made = drafter.draft(1)
    logits = outputs[0] @ mine.head.T
    torch.testing.assert_close(made.probabilities[0], logits.softmax(-1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("head", [True, False], ids=["whole", "without head"])
@pytest.mark.parametrize("centroids", [0, 12])
def test_a_checkpoint_loads_and_drafts(texts_folder: Path, tmp_path: Path, head: bool, centroids: int) -> None:
    mine = learner(chosen=4)
    train.train(mine, [texts_folder], tmp_path / "work", QUICK)
    if centroids:
        lists.sort_vocabulary(mine.eval(), data.Texts([texts_folder]), centroids, 4, QUICK)
        assert sorted(mine.assistant.masked_embedding.token_ordering.tolist()) == list(range(tiny.VOCABULARY))
    save(mine, tmp_path / "drafter", head, torch.float32)
    loaded = Gemma4AssistantForCausalLM.from_pretrained(tmp_path / "drafter")
    if head:
        assert torch.equal(loaded.lm_head.weight, mine.head)
    lead = Target(target())
    drafter = MTPDrafter(loaded.eval(), lead)
    assert drafter.sources == {"sliding_attention": 1, "full_attention": 3}
    texts, settings = data.Texts([texts_folder]), Settings(max_new_tokens=40)
    passes = tokens = 0
    for i in range(6):
        batch = texts.batch([i], [])
        prompt = batch.ids[0, : int(batch.answers)].tolist()
        plain = decode.baseline(lead, prompt, TextStream(tiny.Characters(), prompt), settings)
        made = list(
            decode.speculative(lead, drafter, Fixed(3), prompt, TextStream(tiny.Characters(), prompt), settings)
        )
        emitted = [token.id for r in made for token in r.emitted]
        assert emitted == [token.id for r in plain for token in r.emitted]
        passes, tokens = passes + len(made), tokens + len(emitted)
    assert passes < tokens


def test_lists_are_of_equal_size_and_hold_every_token() -> None:
    rows = torch.randn(96, 16, generator=torch.Generator().manual_seed(0))
    order = lists.balanced(rows, torch.rand(96), 8, seed=0)
    assert sorted(order.tolist()) == list(range(96))
    close = torch.nn.functional.normalize(rows, dim=-1)
    within = torch.stack([(close[part] @ close[part].T).mean() for part in order.view(8, 12)]).mean()
    anyhow = (close @ close.T).mean()
    assert within > anyhow + 0.05


def test_no_prompt_that_the_embedded_drafter_learnt_from_is_held_out() -> None:
    assets = Path(__file__).parents[1] / "assets"
    kept = [entry["prompt"] for name in ("heldout", "examples") for entry in prompts.read(assets / f"{name}.jsonl")]
    held_out = prompts.HeldOut(kept)
    learnt = prompts.read(assets / "prompts.jsonl")
    assert len({prompts.fingerprint(entry["prompt"]) for entry in learnt}) == len(learnt) > 2000
    assert not [entry["prompt"] for entry in learnt if entry["prompt"] in held_out]
