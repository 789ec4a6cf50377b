"""Rounds recorded as graphs: the same texts as eager rounds, and what happens where a graph cannot be had.

A graph that stands in for CUDA's runs the body again on a replay and puts what it gives into the tensors of the
recording, so that anything that does not lie in the recorder's tensors goes wrong here too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import test_rounds
import tiny
import torch

from spec_decode import __main__, decode, graphs
from spec_decode.draft_length import RECORDED, Adaptive, Fixed
from spec_decode.drafters import Draft, Drafter
from spec_decode.drafters.lookup import LookupDrafter
from spec_decode.events import BASELINE, SPECULATIVE, Note, Round, Trace
from spec_decode.graphs import Recorder
from spec_decode.loading import measure
from spec_decode.loading.measure import measure_costs
from spec_decode.request import Request
from spec_decode.settings import Settings
from spec_decode.sources import local
from spec_decode.target import Target
from spec_decode.text import TextStream

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = test_rounds.PROMPT
LANES = (BASELINE, SPECULATIVE)
RULES = [
    {},
    {"temperature": 0.9},
    {"temperature": 0.9, "rule": "rejection", "top_k": 30},
    {"temperature": 0.9, "rule": "block", "top_p": 0.9},
    {"temperature": 0.9, "rule": "threshold", "lenience": 0.5},
    {"temperature": 0.9, "synthetic_acceptance": 0.6},
]


class Standing:
    """A graph without a device. A replay on CUDA does nothing on the host, so neither does this one."""

    def __init__(self, recorder: list[Recorder]) -> None:
        self.recorder, self.replays = recorder, 0

    def record(self, body: Callable[[], Any]) -> Any:
        self.body = body
        self.result = body()
        return self.result

    def replay(self) -> None:
        state = self.recorder[0]._state
        assert state is not None
        length, cached = state.length, state.cache.length
        for static, made in zip(graphs._parts(self.result), graphs._parts(self.body()), strict=True):
            static.copy_(made)
        state.length, state.cache.length = length, cached
        self.replays += 1


class Recording:
    """A recorder for each lane, with graphs of a kind, and what they said."""

    def __init__(self, graph: type = Standing) -> None:
        self.said: list[str] = []
        self.made: list[Any] = []
        self.recorders = {lane: self._recorder(graph) for lane in LANES}

    def _recorder(self, graph: type) -> Recorder:
        held: list[Recorder] = []

        def new() -> Any:
            self.made.append(graph(held))
            return self.made[-1]

        held.append(Recorder(new, self.said.append))
        return held[0]


def on_device(drafter: Drafter) -> Drafter:
    """The drafter as on an accelerator: it is asked for a draft on the device."""
    drafter.draft_on_host = lambda state, length, stop: None  # type: ignore[method-assign]
    drafter.needs_text = False
    return drafter


def pair(kind: str, drafter: str) -> tuple[Target, Drafter]:
    if drafter == "lookup":
        return test_rounds.parts(kind, "none")[0], LookupDrafter()
    target, made = test_rounds.parts(kind, drafter)
    return target, on_device(made)


def race(
    target: Target, drafter: Drafter, settings: Settings, prompt: list[int], recording: Recording | None = None
) -> dict[str, list[Round]]:
    """The rounds of both lanes, which take turns."""
    prefill = decode.Prefill(target, prompt, len(prompt) + settings.max_new_tokens, drafter.needs_hidden)
    list(prefill)
    text = TextStream(tiny.Characters(), prompt)
    lengths = Fixed(int(settings.draft_length))
    recorders = recording.recorders if recording else None
    lanes = decode.lanes(prefill, drafter, lengths, [text.fork(), text], settings, recorders)
    rounds: dict[str, list[Round]] = {lane: [] for lane in lanes}
    while lanes:
        for lane, steps in list(lanes.items()):
            step = next(steps, None)
            if step is None:
                del lanes[lane]
            elif isinstance(step, Round):
                rounds[lane].append(step)
    return rounds


def told(rounds: dict[str, list[Round]]) -> list[Any]:
    """What the rounds show, times left out."""
    return [(r.lane, r.index, r.tokens, r.draft_length, r.drafter, r.residual) for lane in LANES for r in rounds[lane]]


@pytest.mark.parametrize(
    ("kind", "drafter", "rules"),
    [
        ("llama", "mtp", RULES),
        ("llama", "lookup", RULES[:1] + RULES[2:3]),
        ("gemma3", "model", RULES[2:3]),
        ("shared", "mtp centroids", RULES[1:2]),
        ("moe", "mtp", RULES[:1]),
    ],
)
def test_recorded_rounds_are_the_eager_ones(kind: str, drafter: str, rules: list[dict[str, Any]]) -> None:
    """One recorder serves races with other prompts and seeds, whose text it has never seen."""
    target, made = pair(kind, drafter)
    for rule in rules:
        recording = Recording()
        for seed, prompt in ((1, PROMPT), (2, PROMPT[5:] + PROMPT[:9])):
            settings = Settings(max_new_tokens=16, draft_length=3, seed=seed, **rule)
            eager = told(race(target, made, settings, prompt))
            assert told(race(target, made, settings, prompt, recording)) == eager
        assert sum(graph.replays for graph in recording.made) > 5
        assert not any(recorder.refused for recorder in recording.recorders.values())
        assert len(recording.made) < 12, "the same recordings serve both"


def test_a_bucket_is_part_of_what_was_recorded() -> None:
    target, made = pair("llama", "mtp")
    prompt = [i * i % tiny.VOCABULARY for i in range(490)]
    settings = Settings(max_new_tokens=60, draft_length=3)
    recording = Recording()
    assert told(race(target, made, settings, prompt, recording)) == told(race(target, made, settings, prompt))
    widths = {line.split("up to ")[1] for line in recording.said}
    assert widths == {"512 positions", "1024 positions"}


def test_a_longer_text_gets_a_larger_state_and_new_recordings() -> None:
    target, made = pair("llama", "mtp")
    recording = Recording()
    settings = Settings(max_new_tokens=20, draft_length=3)
    race(target, made, settings, PROMPT, recording)
    recorder = recording.recorders[SPECULATIVE]
    small = recorder._state
    race(target, made, settings, PROMPT, recording)  # the lengths at its end are asked for the second time
    before = len(recording.made)
    race(target, made, settings, PROMPT, recording)
    assert recorder._state is small and len(recording.made) == before
    long = [i * i % tiny.VOCABULARY for i in range(700)]
    assert told(race(target, made, settings, long, recording)) == told(race(target, made, settings, long))
    assert recorder._state is not small and len(recording.made) > before


def test_another_drafter_gets_recordings_of_its_own() -> None:
    target, first = pair("llama", "mtp")
    _, second = pair("llama", "mtp centroids")
    recording = Recording()
    settings = Settings(max_new_tokens=20, draft_length=3)
    for made in (first, second):
        assert told(race(target, made, settings, PROMPT, recording)) == told(race(target, made, settings, PROMPT))


def test_one_state_serves_one_lane_at_a_time() -> None:
    """A second race meanwhile runs eagerly, on a state of its own."""
    target, made = pair("llama", "lookup")
    recording = Recording()
    settings = Settings(max_new_tokens=20, draft_length=3)
    alone = told(race(target, made, settings, PROMPT))
    prefill = decode.Prefill(target, PROMPT, len(PROMPT) + 20)
    list(prefill)
    texts = [TextStream(tiny.Characters(), PROMPT) for _ in LANES]
    open_lanes = decode.lanes(prefill, LookupDrafter(), Fixed(3), texts, settings, recording.recorders)
    first = [next(steps) for steps in open_lanes.values()]
    assert told(race(target, made, settings, PROMPT, recording)) == alone
    assert recording.made == []
    rest = {lane: [step, *steps] for step, (lane, steps) in zip(first, open_lanes.items(), strict=True)}
    assert told(rest) == alone  # type: ignore[arg-type]
    race(target, made, settings, PROMPT, recording)
    assert recording.made != []


class Refusing(Standing):
    """As a device that has to be waited for within the body."""

    def record(self, body: Callable[[], Any]) -> Any:
        body()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


class Wrong(Standing):
    """Replays something else than was recorded."""

    def replay(self) -> None:
        super().replay()
        for tensor in graphs._parts(self.result):
            tensor.add_(1) if tensor.dtype == torch.long else tensor.mul_(0.5)


@pytest.mark.parametrize(
    ("graph", "why"),
    [(Refusing, "the device refuses to record them (operation not"), (Wrong, "differs from the eager")],
)
def test_without_a_graph_rounds_stay_eager_and_say_so(graph: type, why: str) -> None:
    target, made = pair("shared", "mtp")
    for rule in RULES[:3]:
        settings = Settings(max_new_tokens=24, draft_length=3, seed=5, **rule)  # type: ignore[arg-type]
        recording = Recording(graph)
        assert told(race(target, made, settings, PROMPT, recording)) == told(race(target, made, settings, PROMPT))
        assert len(recording.made) == len(recording.said) == 2, "once for each lane"
        assert all(why in line for line in recording.said)


def test_the_oldest_recording_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 2)
    target, made = pair("llama", "mtp")
    recording = Recording()
    for length in (1, 2, 3, 1):
        settings = Settings(max_new_tokens=24, draft_length=length)
        assert told(race(target, made, settings, PROMPT, recording)) == told(race(target, made, settings, PROMPT))
        assert len(recording.recorders[SPECULATIVE]._recordings) <= 2


def test_the_time_of_a_recording_is_on_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Standing):
        def record(self, body: Callable[[], Any]) -> Any:
            graphs.time.sleep(0.5)
            return super().record(body)

    target, made = pair("llama", "mtp")
    recording = Recording(Slow)
    rounds = race(target, made, Settings(max_new_tokens=24, draft_length=3), PROMPT, recording)
    assert len(recording.made) > 2
    every = [r for lane in LANES for r in rounds[lane]]
    assert max(r.seconds for r in every) < 0.45
    assert all(r.draft_seconds + r.verify_seconds <= r.seconds + 0.01 for r in every)


def test_without_memory_for_a_state_that_is_kept_rounds_stay_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    target, made = pair("llama", "mtp")
    recording = Recording()
    settings = Settings(max_new_tokens=16, draft_length=3)
    eager = told(race(target, made, settings, PROMPT))
    monkeypatch.setattr(graphs, "_room", full)
    assert told(race(target, made, settings, PROMPT, recording)) == eager
    assert recording.made == [] and len(recording.said) == 2


def ids(rounds: dict[str, list[Round]]) -> list[list[int]]:
    """The texts of both lanes."""
    return [[token.id for r in rounds[lane] for token in r.emitted] for lane in LANES]


# At load -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", ["mtp", "lookup", "model"])
def test_the_rounds_of_the_defaults_are_recorded_and_timed_at_load(drafter: str) -> None:
    """The first race then records none of the lengths that are recorded, whatever its prompt."""
    target, made = pair("llama", drafter)
    recording = Recording()
    costs = measure_costs(target, made, context=40, repeats=2, recorders=recording.recorders)
    assert not any(recorder._taken for recorder in recording.recorders.values()), "given back"
    keys = [key for recorder in recording.recorders.values() for key in recorder._recordings]
    assert {key[1] for key in keys if key[0] == "verify"} == set(RECORDED)
    assert {key[1] for key in keys if key[0] == "draft"} == (set(RECORDED) - {0} if drafter == "mtp" else set())
    assert all(graph.replays > 1 for graph in recording.made), "more often than for the test of a recording"
    assert costs.step_seconds > 0 and len(costs.verify_ratio) == 17 and min(costs.verify_ratio) > 0

    before = len(recording.made)
    for length in (4, 6):
        settings = Settings(max_new_tokens=24, draft_length=length)
        eager = ids(race(target, made, settings, PROMPT[3:]))
        replays = sum(graph.replays for graph in recording.made)
        assert ids(race(target, made, settings, PROMPT[3:], recording)) == eager
        assert sum(graph.replays for graph in recording.made) > replays
        assert drafter == "lookup" or len(recording.made) == before


def test_the_costs_are_those_of_the_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only replays move: as many seconds as tokens in the pass, and half of one for each drafted."""
    now = 0.0

    class Timed(Standing):
        def replay(self) -> None:
            nonlocal now
            super().replay()
            ids = self.result.ids if isinstance(self.result, Draft) else self.result.draft.ids
            now += ids.shape[1] / 2 if isinstance(self.result, Draft) else ids.shape[1] + 1

    target, made = pair("llama", "mtp")
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now))
    costs = measure_costs(target, made, context=40, repeats=2, recorders=Recording(Timed).recorders)
    assert costs.step_seconds == 1.0
    assert costs.verify_ratio == tuple(range(1, 18)), "what is not recorded is interpolated"
    assert costs.draft(1) == pytest.approx(0.5) and costs.draft(4) == pytest.approx(2.0)


@pytest.mark.parametrize("graph", [Refusing, Wrong])
def test_costs_are_measured_where_recording_is_refused(graph: type) -> None:
    target, made = pair("llama", "mtp")
    recording = Recording(graph)
    costs = measure_costs(target, made, context=40, repeats=1, recorders=recording.recorders)
    assert costs.step_seconds > 0 and all(recorder.refused for recorder in recording.recorders.values())
    settings = Settings(max_new_tokens=12, draft_length=3)
    assert told(race(target, made, settings, PROMPT, recording)) == told(race(target, made, settings, PROMPT))


def test_a_measurement_that_fails_gives_the_states_back(monkeypatch: pytest.MonkeyPatch) -> None:
    target, made = pair("llama", "mtp")
    recording = Recording()

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measure._Recorded, "_restored", full)
    with pytest.raises(torch.OutOfMemoryError):
        measure_costs(target, made, context=40, recorders=recording.recorders)
    assert not any(recorder._taken for recorder in recording.recorders.values())


# Lengths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [5, 8, 16])
def test_the_end_of_a_text_takes_no_recordings_of_its_own(length: int) -> None:
    """Lengths at the end of a text are those that are recorded already, and the text ends where it should."""
    target, made = pair("llama", "mtp")
    for rule in RULES:
        settings = Settings(max_new_tokens=29, draft_length=length, seed=3, **rule)  # type: ignore[arg-type]
        recording = Recording()
        rounds = race(target, made, settings, PROMPT, recording)[SPECULATIVE]
        assert {r.draft_length for r in rounds} <= {*RECORDED, length}
        assert sum(len(r.emitted) for r in rounds) == 29
        if settings.same_text:
            expected = ids(race(target, made, settings, PROMPT))[0]
            assert [t.id for r in rounds for t in r.emitted] == expected


# Notes -------------------------------------------------------------------------------------------------------------


def prepared(recording: Recording, **options: Any) -> local.Race:
    """A race of a pair with these recorders."""
    target, made = pair("llama", "mtp")
    whole: Any = tiny.PairOf(target, made)
    whole.recorders = recording.recorders
    said: list[Note] = []
    for lane, recorder in recording.recorders.items():
        recorder._say = lambda line, lane=lane, recorder=recorder: said.append(Note(lane, line, bool(recorder.refused)))

    def take_notes() -> list[Note]:
        taken = list(said)
        said.clear()
        return taken

    whole.take_notes = take_notes
    return local.Race(whole, Request("".join(map(chr, range(40, 90))), Settings(max_new_tokens=20, **options)))


def raced(recording: Recording, **options: Any) -> tuple[local.Race, list[Note]]:
    """Such a race at its end, and what was said of it."""
    made = prepared(recording, **options)
    return made, [step for step in made.steps() if isinstance(step, Note)]


def test_a_race_says_what_is_recorded_and_keeps_it_in_its_trace() -> None:
    made, notes = raced(Recording(), draft_length=3)
    assert {note.lane for note in notes} == {BASELINE, SPECULATIVE} and not any(note.lasting for note in notes)
    assert "baseline: Recorded: verify of 0 tokens, up to 512 positions" in made.trace.notes
    assert Trace.from_json(made.trace.to_json()).notes == tuple(map(str, notes)) != ()


def test_a_race_says_that_rounds_are_not_recorded_each_time() -> None:
    recording = Recording(Refusing)
    for _ in range(2):
        made, notes = raced(recording, draft_length=3)
        assert [note.lane for note in notes if note.lasting] == [BASELINE, SPECULATIVE] and len(notes) == 2
        assert all("Rounds are not recorded: the device refuses" in note for note in made.trace.notes)


def test_the_command_line_says_it_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = prepared(Recording(Refusing), draft_length=3)
    source = SimpleNamespace(race=lambda request: made)
    monkeypatch.setattr(__main__, "_loaded", lambda arguments: (source, made.request))
    assert __main__.main(["race", "--prompt", "x", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["identical"] is True
    lines = err.strip().splitlines()
    assert [line.split(": ")[1] for line in lines] == [BASELINE, SPECULATIVE]
    assert all("Rounds are not recorded: the device refuses" in line and line.endswith(".") for line in lines)


def test_an_adaptive_race_chooses_among_recorded_lengths() -> None:
    made, _ = raced(Recording())
    assert {r.draft_length for r in made.rounds} <= set(RECORDED)
    everything = {Adaptive(None).choose(), *Adaptive(None).among}
    assert everything == set(range(17)), "elsewhere it chooses among all"
