"""What a CUDA graph of a round relies on: `decode_round` reads nothing on the host, and its operations depend on the
draft length and the bucket alone. And rows: each is decoded as it is alone.

Operations are recorded with a dispatch mode on the CPU. Kernels of our own, which PyTorch does not see, are off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from spec_decode import decode, noise, sampling
from spec_decode.cache import RollbackCache, bucket
from spec_decode.decode import Lane, Outcome, Prefill, decode_round, judge
from spec_decode.draft_length import Fixed
from spec_decode.drafters import Draft, Drafter, NoDrafter
from spec_decode.drafters.model import ModelDrafter
from spec_decode.drafters.mtp import MTPDrafter
from spec_decode.events import SPECULATIVE
from spec_decode.loading.rollback import check_rollback
from spec_decode.settings import Settings
from spec_decode.state import State
from spec_decode.target import Target
from spec_decode.text import TextStream

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
KINDS = [
    pytest.param(kind, marks=[pytest.mark.long] if kind in {"qwen2", "qwen3", "dense", "k_eq_v"} else [])
    for kind in ("llama", "gemma3", "qwen2", "qwen3", *tiny.GEMMA4)
]
DRAFTERS = ["none", "model", "mtp", "mtp centroids"]
# The default tier has every one of these kinds and every drafter once; what depends on both is not our code.
QUICK = {("llama", "model"), ("gemma3", "mtp centroids"), ("shared", "mtp"), ("moe", "none"), ("unified", "none")}
PAIRS = [
    pytest.param(kind, drafter, marks=[] if (kind, drafter) in QUICK else [pytest.mark.long])
    for kind in ("llama", "gemma3", "qwen2", "qwen3", *tiny.GEMMA4)
    for drafter in DRAFTERS
]
RULES = [
    {},
    {"rule": "threshold", "lenience": 0.5},
    {"synthetic_acceptance": 0.6},
    {"synthetic_acceptance": 0.6, "temperature": 0.8},
    *(
        {"rule": rule, "temperature": 0.8, "top_p": 0.9, "top_k": 40}
        for rule in ("coupled", "rejection", "block", "threshold")
    ),
]
PROMPT = [(7 * i * i + 3 * i) % tiny.VOCABULARY for i in range(3 * tiny.WINDOW)]

# Operations that read a value of a tensor, or whose result has a shape that depends on values.
READS = (
    "_local_scalar_dense item is_nonzero equal nonzero nonzero_numpy argwhere masked_select unique _unique _unique2 "
    "unique_consecutive unique_dim bincount repeat_interleave.Tensor allclose"
).split()
# Methods that do so without an operation.
METHODS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.cpu}


class HostRead(AssertionError):
    """The host reads a value from the device, waits for it, or sends it one."""


class Watch(TorchFunctionMode):
    """Refuses what a dispatch mode does not see."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METHODS:
            raise HostRead(str(func))
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Records every operation: its name, the shapes, strides and offsets of tensors, and all other arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).removeprefix("aten.")
        if name in READS or name.split(".")[0] in READS:
            raise HostRead(name)
        if name.startswith("lift_fresh"):  # torch.tensor(…): a copy from memory of the host
            raise HostRead(name)
        if name.startswith(("index.", "index_put")) and any(
            isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        ):
            raise HostRead(f"{name} of a mask")
        self.operations.append((name, _described(args), _described(kwargs)))
        return func(*args, **kwargs)


def _described(x: Any) -> Any:
    if isinstance(x, Tensor):
        return (x.dtype, tuple(x.shape), x.stride(), x.storage_offset())
    if isinstance(x, dict):
        return tuple((key, _described(value)) for key, value in x.items())
    if isinstance(x, list | tuple):
        return tuple(map(_described, x))
    return repr(x) if isinstance(x, float) else x  # NaN is not equal to itself


def recorded(run: Callable[[], Any]) -> tuple[list[Any], Any]:
    """The operations of `run`, and what it returned.

    Raises:
        HostRead: there was one.
    """
    with Watch(), Recorder() as recorder:
        made = run()
    return recorder.operations, made


def assert_same(first: list[Any], second: list[Any]) -> None:
    for i, (one, other) in enumerate(zip(first, second, strict=False)):
        assert one == other, f"operation {i}"
    assert len(first) == len(second)


@pytest.fixture
def visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernels of our own: every operation is PyTorch's."""
    for module in (noise, sampling):
        monkeypatch.setattr(module, "_compiled", lambda x: False)


@cache
def parts(kind: str, drafter: str, vocabulary: int = tiny.VOCABULARY) -> tuple[Target, Drafter]:
    """A target, and a drafter of any class: an assistant may be told which layers it reads."""
    ordered = drafter == "mtp centroids"
    if kind in tiny.GEMMA4:
        model, assistant = tiny.gemma4(kind, ordered=ordered, vocab_size=vocabulary)
    else:
        model = tiny.model(kind, vocab_size=vocabulary)
        assistant = tiny.gemma4("dense", ordered=ordered, global_head_dim=8, vocab_size=vocabulary)[1]
        assistant.config.target_kv_layers = {"full_attention": 3, "sliding_attention": 2}
    target = Target(model)
    target.batched_experts = True  # as on an accelerator
    if drafter == "none":
        return target, NoDrafter()
    if drafter == "model":
        return target, ModelDrafter(Target(_near(model)), "near", vocabulary)
    return target, MTPDrafter(assistant, target)


def _near(model: PreTrainedModel) -> PreTrainedModel:
    """A model that often says the same, with weights a little off."""
    near: PreTrainedModel = deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for weights in near.parameters():
        weights.data += 0.2 * torch.randn(weights.shape, generator=generator)
    return near


def begun(
    target: Target, drafter: Drafter, settings: Settings, prompt: list[int], room: int = 80
) -> tuple[Lane, State]:
    """A lane after its first token."""
    capacity = len(prompt) + room
    prefill = Prefill(target, prompt, capacity, drafter.needs_hidden)
    list(prefill)
    list(drafter.start(prompt, settings, capacity) or ())
    lane = Lane(SPECULATIVE, target, drafter, Fixed(4), settings.deciding, settings)
    state = State.after(prompt, capacity, prefill.cache, CPU)
    assert prefill.passed is not None
    judge(lane, state, Draft.none(state), prefill.passed)
    state.advance(1)
    return lane, state


def rounds(lane: Lane, state: State, length: int) -> Iterator[tuple[list[Any], Outcome]]:
    """What each round's operations are, and its outcome. Without a drafter the draft comes from the host."""
    while True:
        given = None
        if length == 0 or isinstance(lane.drafter, NoDrafter):
            given = Draft((torch.arange(length)[None] + state.length) % tiny.VOCABULARY)
        done = recorded(lambda given=given: decode_round(lane, state, length, given))
        state.advance(int(state.lengths.max()) - state.length)
        yield done


@pytest.mark.usefixtures("visible")
@pytest.mark.parametrize(("kind", "drafter"), PAIRS)
def test_rounds_of_a_length_and_a_bucket_have_the_same_operations(kind: str, drafter: str) -> None:
    target, made = parts(kind, drafter)
    for options in RULES:
        lane, state = begun(target, made, Settings(seed=3, **options), PROMPT)
        for length in (0, 1, 4):
            several = rounds(lane, state, length)  # each begins at another length
            first, second, third = (next(several)[0] for _ in range(3))
            assert len(first) > 50
            assert_same(first, second)
            assert_same(first, third)


@pytest.mark.usefixtures("visible")
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_round_reads_one_bucket_from_its_first_step_to_its_last(drafter: str) -> None:
    """The bucket that holds its end, where the text is about to fill the one before."""
    target, made = parts("dense", drafter)
    prompt = (PROMPT * 11)[:498]
    lane, state = begun(target, made, Settings(), prompt)
    several, length = rounds(lane, state, 4), 4
    seen: dict[int, list[Any]] = {}
    while state.length < 520:
        width = bucket(state.length + length)
        operations, _ = next(several)
        assert_same(seen.setdefault(width, operations), operations)
    assert sorted(seen) == [512, 1024]


BREACHES: dict[str, Callable[[State], Any]] = {
    "item": lambda state: state.lengths.item(),
    "int": lambda state: int(state.lengths[0]),
    "if": lambda state: state.lengths[0] > 3 and 1,
    "list": lambda state: state.lengths.tolist(),
    "numpy": lambda state: state.lengths.numpy(),
    "nonzero": lambda state: state.tokens.nonzero(),
    "mask": lambda state: state.tokens[state.tokens > 3],
    "equal": lambda state: torch.equal(state.tokens, state.tokens),
    "constant": lambda state: torch.tensor([1, 2]),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_host_read_is_found(breach: str) -> None:
    with pytest.raises(HostRead):
        recorded(lambda: BREACHES[breach](tiny.state([1, 2, 3])))


@pytest.mark.parametrize(
    "run",
    [
        lambda state: state.tokens[:, : state.length].sum(),
        lambda state: state.tokens[:, state.length - 1] + 1,
        lambda state: state.tokens + state.length,
        lambda state: torch.zeros(state.length),
    ],
)
def test_a_number_of_the_hosts_is_found(run: Callable[[State], Any]) -> None:
    states = [State.after([1] * n, 10, RollbackCache.__new__(RollbackCache), CPU) for n in (4, 5)]
    (first, _), (second, _) = (recorded(lambda state=state: run(state)) for state in states)
    with pytest.raises(AssertionError):
        assert_same(first, second)


# Masks and experts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_those_of_transformers(kind: str, attention: str) -> None:
    """The same bits come out, at the start of a text, beyond the window, and across a bucket."""
    model = tiny.gemma4(kind)[0] if kind in tiny.GEMMA4 else tiny.model(kind)
    model.set_attn_implementation(attention)
    ours, theirs = Target(model), Target(model)
    assert ours.masks is not None
    theirs.masks = None
    tokens = torch.arange(520) % tiny.VOCABULARY
    for start, count in ((1, 1), (5, 3), (40, 5), (509, 5), (514, 1)):
        logits = []
        for target in (ours, theirs):
            cache = target.new_cache(520)
            target.prefill(tokens[:start], cache)
            logits.append(target.verify(tokens[start : start + count], cache).logits)
        assert torch.equal(*logits), (start, count)


def test_models_that_read_both_ways_or_take_other_masks_keep_those_of_transformers() -> None:
    both_ways = tiny.model("gemma3")
    both_ways.config.use_bidirectional_attention = True
    flexible = tiny.model("llama")
    flexible.config._attn_implementation = "flex_attention"
    assert Target(both_ways).masks is None and Target(flexible).masks is None


def test_a_model_that_fails_with_our_masks_keeps_those_of_transformers() -> None:
    """Found at load, where a rollback is tried."""
    model = tiny.model("llama")

    def refuse(_: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        assert kwargs.get("attention_mask") is None

    model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    target = Target(model)
    assert target.masks is not None
    check_rollback(target, "x")
    assert target.masks is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_reads_our_masks_as_something_else_keeps_those_of_transformers(dtype: torch.dtype) -> None:
    """Here as if a prepared mask said which positions are hidden."""
    model = tiny.model("llama").to(dtype)

    def mistake(_: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        return args, kwargs if mask is None else {**kwargs, "attention_mask": ~mask}

    hook = model.model.register_forward_pre_hook(mistake, with_kwargs=True)
    target = Target(model)
    check_rollback(target, "x")
    assert target.masks is None
    hook.remove()
    target = Target(model)
    check_rollback(target, "x")
    assert target.masks is not None, "its own rounding does not count as a mistake"


def test_a_batch_of_experts_computes_what_single_experts_do() -> None:
    model = tiny.gemma4("moe")[0]
    tokens = torch.tensor(PROMPT)
    logits = []
    for batched in (False, True):
        model.set_experts_implementation("eager")
        target = Target(model)
        target.batched_experts = batched
        cache = target.new_cache(len(PROMPT) + 8)
        target.prefill(tokens, cache)
        assert model.config._experts_implementation == "eager", "a prompt is not read as a batch"
        logits.append(target.verify(tokens[:5], cache).logits)
        assert model.config._experts_implementation == ("batched_mm" if batched else "eager")
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


# Rows --------------------------------------------------------------------------------------------------------------

COUNT = 24
SMALL = 8  # tokens of the vocabulary: random models agree now and then
PROMPTS = [[(a * i * i + 3 * i) % SMALL for i in range(n)] for a, n in ((7, 20), (5, 33), (11, 47))]


@pytest.mark.parametrize("drafter", ["model", "mtp", "mtp centroids"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "shared", "moe"])
@pytest.mark.parametrize("rule", ["greedy", "coupled", "rejection", "block"])
def test_every_row_is_decoded_as_it_is_alone(kind: str, drafter: str, rule: str) -> None:
    """Three texts of different lengths, each with its own acceptance and rollback."""
    target, made = parts(kind, drafter, SMALL)
    length = 3
    temperature = 0.0 if rule == "greedy" else 0.8
    settings = Settings(rule=rule, temperature=temperature, seed=5, max_new_tokens=COUNT + 2 * length)
    alone = []
    for prompt in PROMPTS:
        lane = decode.speculative(target, made, Fixed(length), prompt, TextStream(tiny.Characters(), prompt), settings)
        alone.append([token.id for done in lane for token in done.emitted][:COUNT])

    states, caches = [], []
    for prompt in PROMPTS:
        lane_of, state = begun(target, made, settings, prompt, (length + 1) * COUNT)
        states.append(state)
        if isinstance(made, ModelDrafter):
            caches.append(made.cache)
    state = State.join(states)
    if isinstance(made, ModelDrafter):
        made.cache = RollbackCache.join(caches)
    texts = [[int(token)] for token in state.last]
    accepted = set()
    while min(map(len, texts)) < COUNT:
        outcome = decode_round(lane_of, state, length)
        counts = outcome.verdict.accepted.tolist()
        accepted.add(tuple(counts))
        for text, ids, n, own in zip(texts, outcome.draft.ids.tolist(), counts, outcome.verdict.token, strict=True):
            text += [*ids[:n], int(own)]
        state.advance(max(counts) + 1)
    if drafter == "model":
        assert any(len(set(counts)) > 1 for counts in accepted), "rows part"
    assert [text[:COUNT] for text in texts] == alone
    assert all(
        state.tokens[row, : len(prompt) + len(text)].tolist() == prompt + text
        for row, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True))
    )
    assert state.lengths.tolist() == [len(prompt) + len(text) for prompt, text in zip(PROMPTS, texts, strict=True)]
