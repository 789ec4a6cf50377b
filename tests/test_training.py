"""The training recipe end to end on a tiny Llama: generation that resumes, a loss that falls, training that resumes
bitwise exactly, and a checkpoint that transformers loads and the engine drafts with."""

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
from spec_decode.target import Target
from spec_decode.text import TextStream
from spec_decode.training import data, lists, prompts, train
from spec_decode.training.assistant import Learner, Shape, save

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = [1, 3]
WRITING = data.Writing(slots=6, length=48, prompt=12, answer=(8, 24), shard=150)


class Template(tiny.Characters):
    """One character a token, with a template of one token before the user turn and two after it."""

    chat_template = "there is one"

    def apply_chat_template(self, turns: list[dict[str, str]], **_: Any) -> str:
        return "U" + turns[0]["content"] + "~A"


def target(**changes: Any) -> Any:
    # A vocabulary that lists divide, and logits as peaked as those of a trained model
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
    """Generated in float32, for comparison with a plain pass; other tests on the CPU use int8."""
    folder = tmp_path_factory.mktemp("texts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.cpu, "quantize_linears", lambda model: None)
        written(folder, 1500)
    return folder


def test_texts_hold_the_states_of_the_target(texts_folder: Path) -> None:
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


def test_generation_resumes_without_repeating_prompts(tmp_path: Path) -> None:
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


def test_held_out_prompts_do_not_occur(tmp_path: Path) -> None:
    """Of a set of four prompts two are held out; the other two remain."""
    words = ["one red house", "two green trees and a very long and winding road", "three blue boats", "four"]

    def some(rng: random.Random) -> Iterator[prompts.Opening]:
        while True:
            yield prompts.Opening("chat", Template()(rng.choice(words))["input_ids"], None)
            # known and held-out prompts are skipped; random ones fill the slots
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
def test_generation_ends_when_no_prompts_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """More slots than prompts and fewer: each prompt occurs once, and a second call adds nothing."""
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
    """The rows of the curve without the column of seconds."""
    lines = (folder / "curve.csv").read_text().splitlines()[1:]
    return [[float(x) for i, x in enumerate(line.split(",")) if i != 4] for line in lines]


def test_training_reduces_the_loss_and_improves_first_drafts(texts_folder: Path, tmp_path: Path) -> None:
    train.train(learner(), [texts_folder], tmp_path, QUICK)
    curve = rows(tmp_path)
    assert [row[0] for row in curve] == [40, 80, 120]
    assert curve[-1][2] < 0.9 * curve[0][2]
    assert curve[-1][4] > 1.5 * curve[0][4]  # share of correct first drafts


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
    """Interrupts a run at the report after the checkpoint of step `at`."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, line: str) -> None:
        if line.startswith(f"step {self.at + 40},"):
            raise KeyboardInterrupt


def test_averaged_weights_are_swapped_in_and_out() -> None:
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
        assert parameter.tolist() == pytest.approx([expected] * 2), "settled values are a copy"


def test_a_drafter_is_initialized_from_another(tmp_path: Path) -> None:
    first = learner()
    with torch.no_grad():
        for parameter in first.assistant.parameters():
            parameter.add_(1)
    save(first, tmp_path, head=False, dtype=torch.float32)

    second = learner()
    second.adopt(tmp_path)
    theirs = dict(first.assistant.named_parameters())
    for name, mine in second.assistant.named_parameters():
        # the head is not adopted, it is the target's
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


def test_a_training_round_equals_a_draft_at_inference(texts_folder: Path) -> None:
    """The unrolled steps at one position against the engine's draft from the same state."""
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
    lead.prefill(ids[:at], cache, hidden=True)
    for layer in LAYERS:  # the recorded keys and values
        for kept, own in zip(batch.kv[layer], (cache.layers[layer].keys, cache.layers[layer].values), strict=True):
            with torch.inference_mode():
                own[:, :, :at] = kept[:, :, :at]
    drafter.start(ids[:at].tolist(), Settings(temperature=1.0), 64)
    made = tiny.drafted(drafter, 1, after=tiny.state(ids[: at + 1].tolist(), cache, batch.hidden[0, at - 1]))
    assert made.q is not None
    logits = outputs[0] @ mine.head.T
    torch.testing.assert_close(made.q[0, 0], logits.softmax(-1), rtol=1e-3, atol=1e-5)


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


def test_lists_have_equal_size_and_hold_every_token() -> None:
    rows = torch.randn(96, 16, generator=torch.Generator().manual_seed(0))
    order = lists.balanced(rows, torch.rand(96), 8, seed=0)
    assert sorted(order.tolist()) == list(range(96))
    close = torch.nn.functional.normalize(rows, dim=-1)
    within = torch.stack([(close[part] @ close[part].T).mean() for part in order.view(8, 12)]).mean()
    overall = (close @ close.T).mean()
    assert within > overall + 0.05


def test_no_training_prompt_of_the_embedded_drafter_is_held_out() -> None:
    assets = Path(__file__).parents[1] / "assets"
    kept = [entry["prompt"] for name in ("heldout", "examples") for entry in prompts.read(assets / f"{name}.jsonl")]
    held_out = prompts.HeldOut(kept)
    trained_on = prompts.read(assets / "prompts.jsonl")
    assert len({prompts.fingerprint(entry["prompt"]) for entry in trained_on}) == len(trained_on) > 2000
    assert not [entry["prompt"] for entry in trained_on if entry["prompt"] in held_out]
