"""Decoding on CUDA tensors without a GPU or a driver: every class of tiny model in bfloat16, every drafter and rule.

Fake tensors have a shape and a device and no numbers. A round that mixes devices, reads a number on the host or makes a
shape that depends on data raises. What a device without a driver cannot do is replaced: CUDA events tell 0 seconds, and
the one copy of a round to the host brings made-up numbers. Needs a PyTorch that was built with CUDA (CONTRIBUTING.md
says how to install one); any other skips these tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spec_decode import decode, transfer
from spec_decode.check.operators import fake_gpu
from spec_decode.clock import finish
from spec_decode.draft_length import Fixed
from spec_decode.drafters import Draft, Drafter
from spec_decode.drafters.lookup import LookupDrafter
from spec_decode.drafters.model import ModelDrafter
from spec_decode.drafters.mtp import MTPDrafter
from spec_decode.events import Round
from spec_decode.rules import RULES, Rule
from spec_decode.settings import Settings
from spec_decode.state import State
from spec_decode.target import Target
from spec_decode.text import TextStream
from spec_decode.verification import Case, Verdict

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch was built without CUDA")

CUDA = torch.device("cuda")
LENGTHS = (1, 4)
KINDS = ("llama", "gemma3", "qwen2", "qwen3", *tiny.GEMMA4)
TOKEN = 9  # what every copy says was drafted and emitted; the prompt ends with it, so that lookup finds a match
PROMPT = [(7 * i * i + 3 * i) % tiny.VOCABULARY for i in range(3 * tiny.WINDOW)] + [TOKEN] * 4
ROUNDS = 4  # of a text; the first has no draft


class HostRead(Exception):
    """Something waits for the device, or an operator on CUDA tensors gave a tensor on the CPU, which waits as well."""


class Watch(TorchDispatchMode):
    """Refuses every copy from the device but the one of a round, which goes to pinned memory and is not waited for."""

    def __init__(self, copies: Copies) -> None:
        super().__init__()
        self.copies = copies

    def __enter__(self) -> Any:
        self.copies.watched = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.copies.watched = False
        super().__exit__(*error)

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.copy_.default and len(args) > 2 and args[2]:  # non_blocking
            assert args[0].device.type == "cpu" and args[0].dtype == torch.float32 and args[0].dim() == 1
            self.copies.begun += 1
            return result
        read, made = (
            {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
            for tree in ((args, kwargs), result)
        )
        if "cuda" in read and "cpu" in made:
            raise HostRead(str(function))
        return result


class Event:
    """A CUDA event of no duration."""

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 0.0


class Copies:
    """Stands for the one copy of a round: all is gathered on the device, and the numbers that arrive are made up. Of
    the three drafts, none, all and one token are accepted."""

    def __init__(self) -> None:
        self.count = 0
        self.begun = 0  # while they were watched
        self.watched = False

    def __call__(self, buffer: Tensor, sizes: dict[str, int], event: Event) -> dict[str, list[float]]:
        assert buffer.shape[0] == sum(sizes.values())
        drafted = sizes["ids"]
        accepted = (0, 0, drafted, min(1, drafted))[self.count]
        self.count += 1
        known = {"accepted": float(accepted), "own": float(TOKEN), "ids": float(TOKEN)}
        return {name: [known.get(name, 0.5)] * size for name, size in sizes.items()}


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    """Replaces what wants a driver. To wait for the device is refused while rounds are watched."""
    made = Copies()

    def synchronize(device: Any = None) -> None:
        if made.watched:
            raise HostRead("a round waits for the device")

    monkeypatch.setattr(transfer, "_read", made)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    return made


@pytest.fixture
def fake() -> Iterator[None]:
    """Models made here are fake, on CUDA and in bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with fake_gpu():
            yield
    finally:
        torch.set_default_dtype(before)


def pair(kind: str, drafter: str) -> tuple[Target, Drafter | None]:
    """A tiny target on the fake device, and a drafter: none, lookup, model, mtp, or centroids (mtp with them)."""
    assistant = None
    with CUDA:
        if kind in tiny.GEMMA4:
            model, assistant = tiny.gemma4(kind, ordered=drafter == "centroids")
        else:
            model = tiny.model(kind)
        target = Target(model)
        if drafter == "none":
            return target, None
        if drafter == "lookup":
            return target, LookupDrafter(CUDA)
        if drafter == "model":
            small = Target(tiny.model("llama", seed=9, num_hidden_layers=1))
            return target, ModelDrafter(small, "small", tiny.VOCABULARY, CUDA)
    assert assistant is not None
    return target, MTPDrafter(assistant, target)


def run(
    target: Target, drafter: Drafter | None, rule: str, length: int, copies: Copies, count: int = ROUNDS
) -> list[Round]:
    """The first rounds of a text. All but the first, which reads the prompt, are watched."""
    top = {} if rule == "greedy" else {"temperature": 0.8, "top_p": 0.95, "top_k": 20}
    settings = Settings(rule=rule, draft_length=length, max_new_tokens=64, seed=3, **top)
    text = TextStream(tiny.Characters(), PROMPT)
    if drafter is None:
        lane = decode.baseline(target, PROMPT, text, settings)
    else:
        lane = decode.speculative(target, drafter, Fixed(length), PROMPT, text, settings)
    told = [next(lane)]
    with Watch(copies):
        told += islice(lane, count - 1)
    lane.close()
    return told


CASES = [
    (kind, drafter, rule)
    for kind in KINDS
    for drafter in ("none", "lookup", "model", *(("mtp", "centroids") if kind in tiny.GEMMA4 else ()))
    for rule in (("greedy", "coupled") if drafter == "none" else RULES)  # the only rules of a baseline
]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("kind", "drafter", "rule"), CASES)
def test_a_text_is_decoded_with_one_copy_a_round(kind: str, drafter: str, rule: str, copies: Copies) -> None:
    target, drafts = pair(kind, drafter)
    for length in LENGTHS if drafts else (1,):
        copies.count = 0
        copies.begun = 0
        told = run(target, drafts, rule, length, copies)
        assert copies.count == len(told) == ROUNDS
        assert copies.begun == ROUNDS - 1, "one for each round that was read, if one ahead of it"
        drafted = length if drafts else 0
        assert [r.drafted for r in told] == [0, *[drafted] * (ROUNDS - 1)]
        assert [r.accepted for r in told] == [0, 0, drafted, min(1, drafted)]


# What the tests above must notice


class Broken(LookupDrafter):
    """A drafter on the device with a fault."""

    def __init__(self, fault: Callable[[State], Tensor]) -> None:
        super().__init__(CUDA)
        self.fault = fault

    def draft_on_host(self, state: State, length: int, stop: Any) -> None:  # type: ignore[override]
        return None

    def draft(self, state: State, length: int) -> Draft:
        return Draft(self.fault(state), drafter=self.name)


def _item(state: State) -> Tensor:
    return state.last + int(state.last)


def _copied(state: State) -> Tensor:
    return state.last.cpu().to(CUDA)


def _waits(state: State) -> Tensor:
    finish(CUDA)
    return state.last


def _shape(state: State) -> Tensor:
    return state.tokens[state.tokens > 0][None, :1]


def _device(state: State) -> Tensor:
    return state.last + torch.ones(1, 1, dtype=torch.long)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (_item, DataDependentOutputException),
        (_copied, HostRead),
        (_waits, HostRead),
        (_shape, DynamicOutputShapeException),
        (_device, RuntimeError),
    ],
)
def test_a_fault_in_a_round_is_noticed(
    fault: Callable[[State], Tensor], error: type[Exception], copies: Copies
) -> None:
    target, _ = pair("llama", "none")
    with pytest.raises(error):
        run(target, Broken(fault), "greedy", 1, copies)


@pytest.mark.usefixtures("fake")
def test_a_rule_that_reads_is_noticed(monkeypatch: pytest.MonkeyPatch, copies: Copies) -> None:
    def verify(rule: Rule, case: Case) -> Verdict:
        assert bool((case.p >= 0).all())
        return Verdict(case.draft.new_zeros(1), case.draft.new_zeros(1), case.p.new_zeros(*case.draft.shape, 2))

    target, _ = pair("llama", "none")
    monkeypatch.setattr(Rule, "verify", verify)
    with pytest.raises(DataDependentOutputException):
        run(target, None, "greedy", 1, copies)
