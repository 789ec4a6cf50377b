"""Rounds recorded as graphs: a launch or two a round, where an eager round on a GPU has thousands.

In: a lane and the state it starts from. Out: the outcomes of `decode.decode_round`.

A graph repeats what was recorded, the same operations on the same addresses. That is a round again because its
operations depend on nothing but the draft length, the bucket and the settings (tests/test_rounds.py), which are the key
of a recording, and because all else that they read stays at its address: a `Recorder` keeps one `State` from race to
race and copies every prompt into it. The host's numbers do not change in a replay, so what the recording did to them is
done again.

A round is recorded when it is asked for the second time, so that the lengths at the end of a text, which occur once,
cost nothing. A recording is compared with the eager round on the same state. Where it differs, or where the device
refuses to record (an operation that waits for it, memory), rounds stay eager, and a note says so: a graph that was
never proven on a device can make it slower and not wrong. The time of a recording is on no lane's clock.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .cache import bucket
from .clock import Stopwatch, finish
from .drafters import Draft, Drafter
from .errors import is_out_of_memory
from .noise import seed_words
from .settings import MAX_DRAFT_LENGTH
from .state import State

if TYPE_CHECKING:
    from .decode import Lane, Outcome
    from .target import Target

MOST = 64  # recordings that are kept
CLOSE = 0.02  # probabilities of a recorded and an eager round may differ by this, for kernels may be chosen anew
Key = tuple[Any, ...]


class Graph(Protocol):
    """Records once, replays often."""

    def record(self, body: Callable[[], Any]) -> Any:
        """Records what `body` does to the device; whether it is also done is up to the graph. Returns what `body` does,
        whose tensors `replay` fills."""

    def replay(self) -> None:
        """Does it."""


class CudaGraph:
    """A `torch.cuda.CUDAGraph`.

    pool: of memory, from `torch.cuda.graph_pool_handle`; graphs that are replayed one after another may share one.
    """

    def __init__(self, pool: Any) -> None:
        self._graph, self._pool = torch.cuda.CUDAGraph(), pool

    def record(self, body: Callable[[], Any]) -> Any:
        # Another thread, of the server say, may use the device meanwhile.
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
            return body()

    def replay(self) -> None:
        self._graph.replay()


@dataclass
class _Recording:
    """A graph, the draft it reads, what it leaves, and by how much it moves the host's count of cached positions."""

    graph: Graph
    given: Draft | None
    result: Any
    advanced: int


class Recorder:
    """The recordings of one lane.

    Args:
        new_graph: makes an empty graph.
        say: gets a line when something is recorded, and when it cannot be.

    Attributes:
        spent: seconds of the latest round that went into recording, of its draft and of its pass.
        refused: why rounds stay eager; empty while they do not.
    """

    def __init__(self, new_graph: Callable[[], Graph], say: Callable[[str], None] = lambda line: None) -> None:
        self._new_graph, self._say = new_graph, say
        self._recordings: OrderedDict[Key, _Recording] = OrderedDict()
        self._asked: Counter[Key] = Counter()
        self._state: State | None = None
        self._models: tuple[Target, Drafter | None] | None = None  # whose weights were recorded
        self._taken = False
        self.spent, self.refused = [0.0, 0.0], ""

    @classmethod
    def on(cls, device: torch.device, say: Callable[[str], None] = lambda line: None) -> Recorder | None:
        """A recorder for a CUDA device; None for others, which have no graphs."""
        if device.type != "cuda":
            return None
        pool = torch.cuda.graph_pool_handle()
        return cls(lambda: CudaGraph(pool), say)

    @torch.inference_mode()
    def take(self, lane: Lane, state: State) -> State:
        """The state that the lane goes on with: that of the recorder, with the content of `state`. Where another lane
        has it, nothing can be recorded, or memory for a second copy is lacking, `state` itself."""
        if self._taken or self.refused:
            return state
        try:
            kept = self._filled(lane, state)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.refuse("there is too little memory for a state that is kept")
            return state
        self._taken = True
        return kept

    def _filled(self, lane: Lane, state: State) -> State:
        kept = self._state
        models = lane.target, lane.drafter if lane.drafter.recordable else None
        if kept is None or kept.tokens.shape[1] < state.tokens.shape[1] or models != self._models:
            self._forget()
            kept = self._state = _room(lane, state)
            self._models = models
        kept.tokens[:, : state.tokens.shape[1]].copy_(state.tokens)
        kept.lengths.copy_(state.lengths)
        kept.length = state.length
        kept.cache.load(state.cache)
        assert kept.seed is not None
        kept.seed.copy_(seed_words(lane.settings.seed))
        return kept

    def _forget(self) -> None:
        """Frees all recordings, and the state unless a lane has it."""
        self._recordings.clear()
        self._asked.clear()
        if not self._taken:
            self._state = None

    def refuse(self, why: str) -> None:
        """Rounds stay eager from now on."""
        self.refused = why
        self._forget()
        self._say(f"Rounds are not recorded: {why}")

    def give_back(self, state: State) -> None:
        """The lane has ended."""
        if state is self._state:
            self._taken = False
            if self.refused:
                self._forget()

    @torch.inference_mode()
    def round(self, lane: Lane, state: State, length: int, draft: Draft | None, watch: Stopwatch | None) -> Outcome:
        """As `decode.decode_round`; `state` is what `take` returned."""
        self.spent = [0.0, 0.0]
        if draft is None:
            draft = self.draft(lane, state, length)
        if watch:
            watch.mark()
        return self.verify(lane, state, draft)

    @torch.inference_mode()
    def draft(self, lane: Lane, state: State, length: int) -> Draft:
        """The first part of `round`: a draft on the device."""

        def body(_: Draft | None) -> Draft:
            return lane.drafter.draft(state, length)

        if not lane.drafter.recordable or state is not self._state:
            return lane.drafter.draft(state, length)
        made: Draft = self._run(("draft", length, *_settings(lane)), state, length + 1, None, body)
        return made

    @torch.inference_mode()
    def verify(self, lane: Lane, state: State, draft: Draft) -> Outcome:
        """The second part of `round`: a target pass over a draft, and the verdict. The outcome has its `parts`."""
        from .decode import verify_draft

        def body(given: Draft | None) -> Outcome:
            return verify_draft(lane, state, draft if given is None else given).joined()

        count = draft.ids.shape[1]
        if state is not self._state:
            return body(None)
        present = tuple(part is not None for part in (draft.q, draft.confidence, draft.top))
        key = ("verify", count, *present, *_settings(lane))
        outcome: Outcome = self._run(key, state, count + 1, draft, body)
        return replace(outcome, draft=replace(outcome.draft, drafter=draft.drafter, stopped_early=draft.stopped_early))

    def _run(self, key: Key, state: State, count: int, given: Draft | None, body: Callable[[Draft | None], Any]) -> Any:
        """The result of `body(given)`, from a recording where there is one.

        Args:
            count: tokens of the pass that belongs to the round; with them the bucket is known.
        """
        key = (*key, state.cache.width(count))
        known = self._recordings.get(key)
        if known:
            self._recordings.move_to_end(key)
            _fill(known.given, given)
            known.graph.replay()
            state.cache.length += known.advanced
            return known.result
        if len(self._asked) > MOST * MOST:
            self._asked.clear()
        self._asked[key] += 1
        if self._asked[key] < 2 or self.refused:
            return body(given)
        finish(state.tokens.device)  # what was launched before is the lane's own time
        begun = time.perf_counter()
        result = self._record(key, state, given, body)
        self.spent[given is not None] += time.perf_counter() - begun
        return result

    def _record(self, key: Key, state: State, given: Draft | None, body: Callable[[Draft | None], Any]) -> Any:
        before = _Moment(state)
        expected = _copied(body(given))
        before.restore()
        static = _copied(given)
        why = ""
        try:
            graph = self._new_graph()
            result = graph.record(lambda: body(static))
            advanced = state.cache.length - before.length
            before.restore()
            graph.replay()
            state.cache.length += advanced
            if not _agree(expected, result):
                why = "a recorded round differs from the eager one"
        except RuntimeError as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            why = "there is too little memory" if is_out_of_memory(error) else "the device refuses to record them"
            why = f"{why} ({said})"
        if why:
            self.refuse(why)
            before.restore()
            return body(given)
        self._recordings[key] = _Recording(graph, static, result, advanced)
        if len(self._recordings) > MOST:
            self._recordings.popitem(last=False)
        self._say(f"Recorded: {key[0]} of {key[1]} tokens, up to {key[-1]} positions")
        return result


def _settings(lane: Lane) -> tuple[Any, ...]:
    """What a round's operations depend on besides lengths. The seed lies in the state."""
    settings = replace(lane.settings, seed=0, max_new_tokens=1, draft_length=1)
    return lane.rule.name, settings, lane.drafter.needs_hidden


def _room(lane: Lane, state: State) -> State:
    """An empty state with at least the room of `state`: twice as many buckets as the last one that was too small, so
    that longer and longer texts seldom need a new one."""
    wanted = max(state.cache.capacity, bucket(state.tokens.shape[1] - MAX_DRAFT_LENGTH - 1))
    capacity = bucket(1)
    while capacity < wanted:
        capacity *= 2
    cache = lane.target.new_cache(capacity)
    tokens = state.tokens.new_zeros(1, capacity + MAX_DRAFT_LENGTH + 1)
    hidden = None if state.hidden is None else torch.empty_like(state.hidden)
    return State(tokens, state.lengths.clone(), 0, cache, hidden, seed_words(0).to(state.tokens.device))


class _Moment:
    """What a round changes of a state, as it was."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._was = [(tensor, tensor.clone()) for tensor in self._tensors()]
        self.length = state.cache.length

    def _tensors(self) -> Sequence[Tensor]:
        state = self._state
        held = [state.tokens, state.lengths, state.cache.lengths]
        return held if state.hidden is None else [*held, state.hidden]

    def restore(self) -> None:
        # Keys and values beyond the lengths are written again before they are read.
        for tensor, value in self._was:
            tensor.copy_(value)
        self._state.cache.settle(self.length)
        self._state.cache.forget_positions()


def _parts(x: Any) -> list[Tensor]:
    """The tensors of nested dataclasses and tuples, in order. A cache counts as none."""
    if isinstance(x, Tensor):
        return [x]
    if is_dataclass(x) and not isinstance(x, type):
        return [part for field in fields(x) for part in _parts(getattr(x, field.name))]
    if isinstance(x, tuple):
        return [part for item in x for part in _parts(item)]
    return []


def _copied(x: Any) -> Any:
    """The same with copies of all tensors."""
    if isinstance(x, Tensor):
        return x.clone()
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{field.name: _copied(getattr(x, field.name)) for field in fields(x)})
    if isinstance(x, tuple):
        return tuple(_copied(item) for item in x)
    return x


def _fill(static: Draft | None, given: Draft | None) -> None:
    for ours, theirs in zip(_parts(static), _parts(given), strict=True):
        ours.copy_(theirs)


def _agree(expected: Any, found: Any) -> bool:
    """Ids are equal and numbers are close."""
    pairs = zip(_parts(expected), _parts(found), strict=True)
    return all(
        torch.allclose(a, b, rtol=CLOSE, atol=CLOSE, equal_nan=True) if a.is_floating_point() else torch.equal(a, b)
        for a, b in pairs
    )
