"""MTP drafters on tiny random models of the real Gemma 4 classes: exact with every rule, and drafting as transformers
does from the same state."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.stats
import tiny
import torch
from transformers import GenerationConfig
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

from spec_decode import decode
from spec_decode.cpu import kernels
from spec_decode.cpu.kernels.sharing import team
from spec_decode.draft_length import Adaptive, EarlyStop, Fixed, bin_of
from spec_decode.drafters import Draft
from spec_decode.drafters.mtp import MTPDrafter
from spec_decode.errors import ModelError
from spec_decode.noise import DRAFT, exponential
from spec_decode.sampling import distribution
from spec_decode.settings import Settings
from spec_decode.state import State
from spec_decode.target import Target
from spec_decode.text import TextStream

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = [(7 * i * i + 3 * i) % tiny.VOCABULARY for i in range(5 * tiny.WINDOW)]
FALSE_ALARM = 1e-6  # for one comparison; the family of all in this file stays below 1e-5


class WatchedMTP(MTPDrafter):
    """Remembers every draft and the sequence it continued."""

    def start(self, prompt: list[int], settings: Settings, capacity: int) -> None:
        super().start(prompt, settings, capacity)
        self.sequence = list(prompt)
        self.drafts: list[tuple[list[int], Draft]] = []

    def extend(self, tokens: list[int]) -> None:
        super().extend(tokens)
        self.sequence += tokens

    def draft_on_host(self, state: State, length: int, stop: EarlyStop | None) -> Draft | None:
        made = super().draft_on_host(state, length, stop)
        assert made is not None
        self.drafts.append((list(self.sequence), made))
        return made


def pair(kind: str, ordered: bool = False, **changes: Any) -> tuple[Target, WatchedMTP]:
    model, assistant = tiny.gemma4(kind, ordered=ordered, **changes)
    target = Target(model)
    return target, WatchedMTP(assistant, target)


def race(target: Target, drafter: MTPDrafter, lengths: Any, prompt: list[int], settings: Settings) -> tuple[list, list]:
    def stream() -> TextStream:
        return TextStream(tiny.Characters(), prompt)

    def ids(rounds: Any) -> list[int]:
        return [token.id for r in rounds for token in r.emitted]

    baseline = ids(decode.baseline(target, prompt, stream(), settings))
    return baseline, ids(decode.speculative(target, drafter, lengths, prompt, stream(), settings))


@pytest.mark.parametrize("ordered", [False, True], ids=["head", "centroids"])
@pytest.mark.parametrize("kind", tiny.GEMMA4)
def test_greedy_equals_generate(kind: str, ordered: bool) -> None:
    target, drafter = pair(kind, ordered)
    prompt = torch.tensor([LONG])
    generated = target.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20
    )[0, len(LONG) :].tolist()
    for length in (1, 2, 3, 5, 8):
        baseline, speculative = race(target, drafter, Fixed(length), LONG, Settings(max_new_tokens=20))
        assert baseline == speculative == generated, length


# Vocabulary and seed with which a pair of random models agrees now and then, so that rounds end in every way.
AGREEABLE = [
    ("dense", False, 8, 3),
    ("dense", True, 8, 0),
    ("shared", False, 8, 3),
    ("shared", True, 8, 4),
    ("k_eq_v", False, 16, 8),
    ("k_eq_v", True, 16, 1),
    ("moe", False, 8, 9),
    ("moe", True, 8, 1),
    ("unified", False, 16, 8),
    ("unified", True, 16, 1),
]


@pytest.mark.parametrize(("kind", "ordered", "vocabulary", "seed"), AGREEABLE)
def test_greedy_drafts_are_those_of_transformers(kind: str, ordered: bool, vocabulary: int, seed: int) -> None:
    """After every round, rollbacks included, against a state that transformers computes from nothing."""
    target, drafter = pair(kind, ordered, vocab_size=vocabulary, seed=seed)
    prompt = [token % vocabulary for token in LONG]
    race(target, drafter, Fixed(4), prompt, Settings(max_new_tokens=30))
    accepted = 0
    for sequence, draft in drafter.drafts:
        with torch.no_grad():
            read = target.model(
                input_ids=torch.tensor([sequence[:-1]]),
                output_hidden_states=True,
                return_shared_kv_states=True,
                use_cache=False,
            )
        drafter.model.generation_config.num_assistant_tokens = 4
        generator = SinglePositionMultiTokenCandidateGenerator(
            drafter.model, target.model.get_input_embeddings(), GenerationConfig(max_length=1000)
        )
        theirs, _ = generator.get_candidates(
            torch.tensor([sequence]), {}, read, is_first_iteration=False, n_last_matches=0
        )
        ours = tiny.ids(draft)
        assert theirs[0, len(sequence) :].tolist()[: len(ours)] == ours
        accepted += drafter.sequence[len(sequence) : len(sequence) + 1] == ours[:1]
    assert 0 < accepted < len(drafter.drafts)


@pytest.mark.parametrize("ordered", [False, True], ids=["head", "centroids"])
@pytest.mark.parametrize("kind", tiny.GEMMA4)
def test_coupled_lanes_are_identical(kind: str, ordered: bool) -> None:
    target, drafter = pair(kind, ordered)
    for seed, (temperature, top_p, top_k) in enumerate([(0.3, 1.0, 0), (0.7, 0.9, 0), (1.0, 1.0, 20), (1.5, 1.0, 0)]):
        settings = Settings(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_new_tokens=16)
        for lengths in (Fixed(1), Fixed(4), Adaptive(None)):
            baseline, speculative = race(target, drafter, lengths, LONG, settings)
            assert baseline == speculative


@pytest.mark.parametrize("kind", tiny.GEMMA4)
def test_keys_and_values_are_read_in_place(kind: str) -> None:
    """Of the last layer of each kind that has its own, in the cache's own memory."""
    target, drafter = pair(kind)
    drafter.start(LONG, Settings(), len(LONG))
    state = tiny.read(target, LONG, 1)
    cache, shared = state.cache, drafter._shared(state)
    assert set(shared) == {"sliding_attention", "full_attention"}
    for place, name in ((2, "sliding_attention"), (3, "full_attention")):
        layer = cache.layers[place]
        assert target.kinds[place] == name
        assert [part.data_ptr() for part in shared[name]] == [layer.keys.data_ptr(), layer.values.data_ptr()]


def test_tokens_outside_the_chosen_centroids_have_no_probability() -> None:
    target, drafter = pair("dense", ordered=True)
    race(target, drafter, Fixed(3), LONG, Settings(temperature=1.0, rule="rejection", max_new_tokens=12))
    size = tiny.VOCABULARY // 8
    for _, draft in drafter.drafts:
        assert draft.q is not None
        assert ((draft.q > 0).sum(-1) == 3 * size).all()
        torch.testing.assert_close(draft.q.sum(-1), torch.ones(draft.ids.shape))


@pytest.mark.parametrize(("int8", "ordered"), [(False, False), (False, True), (True, False)])
def test_coupled_drafts_are_drawn_with_the_targets_noise_of_their_positions(int8: bool, ordered: bool) -> None:
    """A target with the same distributions would draw the same tokens there."""
    model, assistant = tiny.gemma4("dense", ordered=ordered)
    target = Target(model)
    drafter = MTPDrafter(assistant, target, int8=int8)
    for seed in range(3):
        drafter.start(LONG, Settings(temperature=2.0, rule="coupled", seed=seed), len(LONG) + 20)
        made = tiny.drafted(drafter, 6, after=tiny.read(target, LONG, 7))
        assert made.q is not None
        first = len(LONG) + 1
        noise = exponential(seed, torch.arange(first, first + 6), tiny.VOCABULARY)
        assert tiny.ids(made) == (made.q[0] / noise).argmax(-1).tolist()


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("int8", [False, True])
def test_drafts_of_independent_rules_are_drawn_with_noise_of_their_round(int8: bool, ordered: bool) -> None:
    model, assistant = tiny.gemma4("dense", ordered=ordered)
    target = Target(model)
    drafter = MTPDrafter(assistant, target, int8=int8)
    places = torch.arange(len(LONG) + 1, len(LONG) + 7)
    for seed in range(3):
        drafter.start(LONG, Settings(temperature=2.0, rule="rejection", seed=seed), len(LONG) + 20)
        made = tiny.drafted(drafter, 6, after=tiny.read(target, LONG, 7))
        assert made.q is not None
        noise = exponential(seed, places, tiny.VOCABULARY, DRAFT, places[:1])
        assert tiny.ids(made) == (made.q[0] / noise).argmax(-1).tolist()


SMALL, TRIALS = 8, 1200
PROMPT = [1, 2, 3, 4] * tiny.WINDOW


def joint_of_two(target: Target, settings: Settings) -> torch.Tensor:
    """The exact distribution `[SMALL, SMALL]` of the first two tokens."""
    prompts = torch.tensor([[*PROMPT, token] for token in range(SMALL)])
    with torch.inference_mode():
        logits = target.model(input_ids=prompts, use_cache=False).logits
    return distribution(logits[0, -2], settings)[:, None] * distribution(logits[:, -1], settings)


def chance(target: Target, drafter: MTPDrafter, length: int, temperature: float, trials: int = TRIALS) -> float:
    """p-value of the first two tokens' joint distribution under the rejection rule; one draft covers the second."""
    counts = torch.zeros(SMALL, SMALL)
    settings = Settings(temperature=temperature, rule="rejection", max_new_tokens=length + 2)
    for seed in range(trials):
        settings = Settings(temperature=temperature, rule="rejection", max_new_tokens=length + 2, seed=seed)
        rounds = decode.speculative(
            target, drafter, Fixed(length), PROMPT, TextStream(tiny.Characters(), PROMPT), settings
        )
        first, second = next(rounds).emitted[0].id, next(rounds).emitted[0].id
        rounds.close()
        counts[first, second] += 1
    expected = joint_of_two(target, settings).double().flatten() * trials
    observed = counts.double().flatten()
    rare = expected < 5  # one class of all that are too rare for chi-square
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    kept = expected > 0
    assert observed[~kept].sum() == 0
    return float(scipy.stats.chisquare(observed[kept].numpy(), expected[kept].numpy() / expected.sum() * trials).pvalue)


@pytest.mark.parametrize(
    ("kind", "ordered", "length"),
    [
        ("shared", True, 2),
        ("k_eq_v", True, 1),
        *(pytest.param(*case, marks=pytest.mark.long) for case in [("dense", False, 1), ("moe", False, 1)]),
        pytest.param("unified", False, 2, marks=pytest.mark.long),
    ],
)
def test_rejection_is_exact(kind: str, ordered: bool, length: int) -> None:
    target, drafter = pair(kind, ordered, vocab_size=SMALL)
    assert chance(target, drafter, length, 1.0) > FALSE_ALARM


def test_rejection_of_argmax_drafts_is_not_exact() -> None:
    """The test of the test: drafts that were not drawn from q, judged as if they were, must be found out."""

    class Argmax(MTPDrafter):
        def draft_on_host(self, state: State, length: int, stop: EarlyStop | None) -> Draft:
            drawn = super().draft(state, length)
            assert drawn.q is not None
            return Draft(drawn.q.argmax(-1), drawn.q)

    model, assistant = tiny.gemma4("dense", vocab_size=SMALL)
    target = Target(model)
    assert chance(target, Argmax(assistant, target), 1, 1.0, 2 * TRIALS) < FALSE_ALARM


def test_a_drafter_of_another_target_is_refused() -> None:
    target = Target(tiny.gemma4("dense")[0])
    with pytest.raises(ModelError, match="made for a target 48 wide, and this one is 32"):
        MTPDrafter(tiny.gemma4("dense", hidden_size=48)[1], target)
    with pytest.raises(ModelError, match="knows 64 tokens and the target 96"):
        MTPDrafter(tiny.gemma4("dense", vocab_size=64)[1], target)
    with pytest.raises(ModelError, match="sliding_attention keys and values"):
        MTPDrafter(tiny.gemma4("dense")[1], Target(tiny.model("llama")))


def test_the_assistant_may_name_the_layers_it_reads() -> None:
    """Any target will do, an ordinary Llama here, as long as heads agree."""
    assistant = tiny.gemma4("dense", global_head_dim=8)[1]
    assistant.config.target_kv_layers = {"full_attention": 3, "sliding_attention": 1}
    target = Target(tiny.model("llama"))
    drafter = MTPDrafter(assistant, target)
    assert drafter.sources == {"full_attention": 3, "sliding_attention": 1}
    baseline, speculative = race(target, drafter, Fixed(3), LONG, Settings(temperature=1.0, max_new_tokens=20))
    assert baseline == speculative


@pytest.mark.parametrize("ordered", [False, True], ids=["head", "centroids"])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("rule", ["greedy", "coupled", "rejection"])
def test_the_int8_step_is_the_assistants_own_forward(ordered: bool, activation: str, rule: str) -> None:
    """With weights that 8 bits hold exactly: what is fed back and what it would draw from, beyond the window."""
    model, assistant = tiny.gemma4("dense", ordered=ordered, hidden_activation=activation)
    for module in assistant.modules():
        if isinstance(module, torch.nn.Linear):
            weights = kernels.Weights([module.weight.detach().numpy()])
            rounded = weights.values[0, :, : module.in_features] * weights.scales[0][:, None]
            module.weight.data.copy_(torch.from_numpy(rounded))
    target = Target(model)
    fused, plain = MTPDrafter(assistant, target, int8=True), MTPDrafter(assistant, target)
    state = tiny.read(target, LONG, 7)
    drafts = []
    for drafter in (fused, plain):
        drafter.start(LONG, Settings(temperature=float(rule != "greedy"), rule=rule), len(LONG) + 8)
        drafts.append(tiny.drafted(drafter, 4, after=state))
    assert tiny.ids(drafts[0]) == tiny.ids(drafts[1])
    for draft in drafts:
        assert draft.top is not None and draft.top[0].shape == draft.top[1].shape == (1, 4, 5)
        if rule == "greedy":
            assert draft.top[0][0, :, 0].tolist() == tiny.ids(draft)
    torch.testing.assert_close(drafts[0].top[1], drafts[1].top[1], rtol=0.05, atol=2e-3)  # type: ignore[index]
    torch.testing.assert_close(drafts[0].confidence, drafts[1].confidence, rtol=0.02, atol=1e-3)
    if rule == "rejection":
        torch.testing.assert_close(drafts[0].q, drafts[1].q, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_ends_after_the_token_that_the_early_stop_names(int8: bool, temperature: float) -> None:
    model, assistant = tiny.gemma4("dense", ordered=True)
    target = Target(model)
    drafter = MTPDrafter(assistant, target, int8=int8)
    drafter.start(LONG, Settings(temperature=temperature), len(LONG) + 8)
    state = tiny.read(target, LONG, 7)
    whole = tiny.drafted(drafter, 5, after=state)
    assert whole.confidence is not None and whole.stopped_early is None
    for length in range(1, 6):
        ended = tiny.drafted(drafter, 5, EarlyStop([1.0], [0.5] * length + [1.0]), state)
        assert tiny.ids(ended) == tiny.ids(whole)[:length] and ended.stopped_early is (length < 5)
    bins, chances = 64, [1.0] * 64
    at = bin_of(float(whole.confidence[0, 2]), bins)
    chances[at] = 0.1
    expected = next(i for i, q in enumerate(whole.confidence[0].tolist(), 1) if bin_of(q, bins) == at)
    ended = tiny.drafted(drafter, 5, EarlyStop(chances, [0.5]), state)
    assert tiny.ids(ended) == tiny.ids(whole)[:expected] and ended.stopped_early


@pytest.mark.parametrize("rule", ["greedy", "coupled"])
def test_a_draft_is_the_same_however_many_threads_make_it(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, up to the longest, with more threads than there are cores, so that some come late."""
    model, assistant = tiny.gemma4("dense", ordered=True)
    target = Target(model)
    drafter = MTPDrafter(assistant, target, int8=True)
    drafter.start(LONG, Settings(temperature=float(rule == "coupled"), rule=rule), len(LONG) + 8)
    state = tiny.read(target, LONG, 7)
    monkeypatch.setattr(team, "threads", 1)
    alone = tiny.drafted(drafter, 16, after=state)
    for threads in (2, 3, 7):
        monkeypatch.setattr(team, "threads", threads)
        for length in (1, 5, 16) * 5:
            made = tiny.drafted(drafter, length, after=state)
            assert torch.equal(made.ids, alone.ids[:, :length])
            assert made.confidence is not None and alone.confidence is not None
            assert torch.equal(made.confidence, alone.confidence[:, :length])


def test_broken_weights_draft_nonsense_and_no_more() -> None:
    """A drafter whose numbers are NaN still names tokens that there are, and reads no memory but its own."""
    model, assistant = tiny.gemma4("dense", ordered=True)
    assistant.model.norm.weight.data.fill_(torch.nan)
    target = Target(model)
    drafter = MTPDrafter(assistant, target, int8=True)
    drafter.start(LONG, Settings(), len(LONG) + 8)
    ids = tiny.drafted(drafter, 6, after=tiny.read(target, LONG, 7)).ids
    assert ids.shape == (1, 6) and ids.min() >= 0 and ids.max() < tiny.VOCABULARY
