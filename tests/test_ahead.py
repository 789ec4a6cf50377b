"""Rounds launched before the one before has been read: the same texts, nothing read between, times that hide nothing.

A stand-in for CUDA's queue: what a round tells is copied when it is launched, and read when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import test_graphs
import test_rounds
import tiny
import torch
from test_graphs import PROMPT, RULES, on_device, pair
from test_rounds import METHODS, READS, HostRead
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from spec_decode import decode
from spec_decode.cache import bucket
from spec_decode.draft_length import Controller, Fixed, Rate
from spec_decode.drafters import Drafter
from spec_decode.events import SPECULATIVE, Round
from spec_decode.graphs import Recorder
from spec_decode.narrate import Parts, split
from spec_decode.settings import Settings
from spec_decode.target import Target
from spec_decode.text import TextStream

pytestmark = pytest.mark.usefixtures("one_thread")

reading = False  # the host is allowed to


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METHODS and not reading:
            raise HostRead(str(func))
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if not reading and (name in READS or name.split(".")[0] in READS):
            raise HostRead(name)
        return func(*args, **(kwargs or {}))


class Queue:
    """Stands for `transfer.Transfer` on CUDA. `log` has +n where round n is launched and -n where it is read."""

    log: list[int]
    late = False  # read what stands in the tensors when the numbers are asked for

    def __init__(self, device: torch.device) -> None:
        self.asynchronous = True
        self.log.clear()

    def send(self, parts: Parts) -> Callable[[], dict[str, list[float]]]:
        number = 1 + max(self.log, default=0)
        self.log.append(number)
        joined = parts.join()
        copied = joined if self.late else joined.clone()

        def read() -> dict[str, list[float]]:
            global reading
            self.log.append(-number)
            reading = True
            try:
                return split(copied.tolist(), parts.sizes)
            finally:
                reading = False

        return read


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> type[Queue]:
    """The device of a lane that is decoded alone."""

    fresh = type("Fresh", (Queue,), {"log": []})
    monkeypatch.setattr(decode, "Transfer", fresh)
    return fresh


def alone(
    target: Target,
    drafter: Drafter | None,
    settings: Settings,
    prompt: list[int] = PROMPT,
    recorder: Recorder | None = None,
    lengths: Controller | None = None,
    watched: bool = False,
) -> list[Round]:
    """The rounds of one lane; with `watched`, nothing but the reading of a copy may read a value after the prompt."""
    text = TextStream(tiny.Characters(), prompt)
    if drafter is None:
        lane: Iterator[Round] = decode.baseline(target, prompt, text, settings, recorder)
    else:
        lengths = lengths or Fixed(int(settings.draft_length))
        lane = decode.speculative(target, drafter, lengths, prompt, text, settings, recorder)
    first = list(islice(lane, 1))
    if not watched:
        return first + list(lane)
    with Functions(), Operations():
        return first + list(lane)


def told(rounds: list[Round]) -> list[Any]:
    return [(r.index, r.tokens, r.draft_length, r.drafter, r.residual, r.refused, r.kl) for r in rounds]


CASES = [("llama", "mtp"), ("shared", "mtp centroids"), ("gemma3", "model"), ("moe", "mtp"), ("llama", None)]


@pytest.mark.usefixtures("visible")
@pytest.mark.parametrize(("kind", "drafter"), CASES)
def test_texts_and_rounds_are_those_of_a_host_that_waits(
    kind: str, drafter: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, made = test_rounds.parts(kind, drafter or "none")
    monkeypatch.setattr(type(made), "needs_text", False)
    asked = on_device(made) if drafter else None
    for rule in RULES[:2] if drafter is None else RULES:
        settings = Settings(max_new_tokens=30, draft_length=3, seed=2, **rule)  # type: ignore[arg-type]
        waited = told(alone(target, asked, settings))
        with monkeypatch.context() as patch:
            queue = type("Fresh", (Queue,), {"log": []})
            patch.setattr(decode, "Transfer", queue)
            assert told(alone(target, asked, settings, watched=True)) == waited
        assert queue.log[:5] == [1, 2, -1, 3, -2], "a round is launched before the one before is read"
        assert sum(n < 0 for n in queue.log) == len(waited), "every round is read once"


visible = test_rounds.visible


@pytest.mark.parametrize("late", [False, True])
def test_recorded_rounds_run_ahead_too(queue: type[Queue], late: bool) -> None:
    """Their tensors are written again by the next replay: what is read was copied before, or it would be wrong."""
    target, made = pair("llama", "mtp")
    settings = Settings(max_new_tokens=30, draft_length=3, seed=1, temperature=0.9, rule="rejection")
    recording = test_graphs.Recording()
    waited = told(alone(target, made, settings, lengths=Always(3)))
    queue.late = late
    found = alone(target, made, settings, recorder=recording.recorders[SPECULATIVE])
    assert (told(found) == waited) != late
    assert sum(graph.replays for graph in recording.made) > 3


class Always(Rate):
    """A length that is not known to be fixed."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def choose(self) -> int:
        return self.length


@pytest.mark.parametrize("drafter", [None, "mtp"])
def test_an_end_that_is_read_late_discards_what_followed(
    drafter: str | None, queue: type[Queue], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, made = pair("llama", "mtp")
    asked = made if drafter else None
    settings = Settings(max_new_tokens=40, draft_length=3)
    ids = [token.id for r in alone(target, asked, settings) for token in r.emitted]
    end = next(token for i, token in enumerate(ids) if i > 8 and token not in ids[:i])
    monkeypatch.setattr(target, "eos", frozenset([end]))
    rounds = alone(target, asked, settings)
    assert [token.id for r in rounds for token in r.emitted] == ids[: ids.index(end) + 1]
    launched, read = max(queue.log), -min(queue.log)
    assert (launched, read) == (len(rounds) + 1, len(rounds))
    monkeypatch.undo()
    again = alone(target, asked, settings)  # what the surplus wrote is nobody's
    assert [token.id for r in again for token in r.emitted] == ids


def test_where_the_bucket_is_not_certain_the_host_reads_first(
    queue: type[Queue], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, made = pair("llama", "mtp")
    prompt = [i * i % tiny.VOCABULARY for i in range(490)]
    settings = Settings(max_new_tokens=60, draft_length=3)
    rounds = alone(target, made, settings, prompt)
    log = list(queue.log)
    monkeypatch.undo()
    on_device(made)
    assert told(rounds) == told(alone(target, made, settings, prompt))
    length, left = len(prompt), 60
    for i, r in enumerate(rounds[:-1], 1):
        most = r.drafted + 1
        certain = bucket(length + 1 + 3) == bucket(length + most + 3) and left - most > 3
        assert (log.index(i + 1) < log.index(-i)) == certain
        length, left = length + len(r.emitted), left - len(r.emitted)
    assert any(log.index(i + 1) > log.index(-i) for i in range(5, len(rounds) - 5)), "it happened at the bucket"


def test_only_a_fixed_length_and_a_drafter_that_needs_no_text_run_ahead(queue: type[Queue]) -> None:
    target, made = pair("llama", "mtp")
    settings = Settings(max_new_tokens=20, draft_length=3)
    alone(target, made, settings, lengths=Rate())
    assert queue.log[2:6] == [2, -2, 3, -3]
    lookup = pair("llama", "lookup")[1]
    alone(target, lookup, settings)
    assert queue.log[2:6] == [2, -2, 3, -3]


def test_a_race_does_not_run_ahead(queue: type[Queue]) -> None:
    """The surplus would stand in the queue before the other lane's round."""
    log: list[int] = []
    queue.log = log
    target, made = pair("llama", "mtp")
    test_graphs.race(target, made, Settings(max_new_tokens=12, draft_length=3), PROMPT)
    assert all(-number in log[log.index(number) + 1 : log.index(number) + 2] for number in log if number > 0)


class Time:
    """Seconds that pass where they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


LAUNCH, READ, PAUSE = 3.0, 5.0, 100.0


@pytest.mark.parametrize("device", [0.0, 22.0])
def test_a_round_has_its_own_seconds(device: float, queue: type[Queue], monkeypatch: pytest.MonkeyPatch) -> None:
    """Launching counts for the round that is launched, waiting for the one that is waited for, the device's own time
    where it is more, what the reader of rounds does for none, and a surplus round for nobody."""
    clock = Time()
    round_, send = decode.decode_round, queue.send

    def launch(*args: Any, **options: Any) -> Any:
        clock.now += LAUNCH
        return round_(*args, **options)

    def sent(transfer: Queue, parts: Parts) -> Callable[[], Any]:
        read = send(transfer, parts)

        def reads() -> Any:
            clock.now += READ
            return read()

        return reads

    target, made = pair("llama", "mtp")
    settings = Settings(max_new_tokens=40, draft_length=3)
    ids = [token.id for r in alone(target, made, settings) for token in r.emitted]
    monkeypatch.setattr(target, "eos", frozenset([next(t for i, t in enumerate(ids) if i > 8 and t not in ids[:i])]))
    monkeypatch.setattr(queue, "send", sent)
    monkeypatch.setattr(decode, "decode_round", launch)
    monkeypatch.setattr(decode, "time", clock)
    laps = SimpleNamespace(mark=lambda: None, laps=lambda: [2.0, device - 2.0] if device else [0.0, 0.0])
    monkeypatch.setattr(decode, "Stopwatch", lambda where: laps)
    lane = decode.speculative(target, made, Fixed(3), PROMPT, TextStream(tiny.Characters(), PROMPT), settings)
    rounds = []
    for done in lane:
        rounds.append(done)
        clock.now += PAUSE
    assert max(queue.log) == len(rounds) + 1, "there was a surplus"
    for r in rounds[1:]:
        assert r.seconds == max(LAUNCH + READ, device)
    assert rounds[-1].clock == sum(r.seconds for r in rounds)
