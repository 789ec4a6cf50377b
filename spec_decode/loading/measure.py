"""What a target pass and a draft step cost, measured on the device when a pair is loaded.

In: a target and a drafter, and the recorders of their rounds where there are any. Out: `Costs` in baseline steps, the
prior of `costs.round_costs`. Where rounds are recorded as graphs, those of the default settings are recorded here, so
that no race waits for them, and their costs are those of the recordings.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from itertools import cycle
from statistics import median

import torch

from .. import rules
from ..clock import finish
from ..costs import isotonic
from ..decode import Lane, judge
from ..draft_length import RECORDED, Fixed
from ..drafters import Draft, Drafter, NoDrafter
from ..events import BASELINE, SPECULATIVE, Costs
from ..graphs import Recorder
from ..settings import MAX_DRAFT_LENGTH, Settings
from ..state import State
from ..target import Target

SWEEP = (0, 1, 2, 3, 0, 4, 5, 6, 0, 7, 8, 0, 12, 16)  # drafted tokens of the passes of a sweep, plain steps in between
RECORDED_SWEEP = (0, 1, 2, 3, 0, 4, 6, 0, 8, 16)  # the same of lengths that are recorded
MOST_SWEEPS = 15
SECONDS = 1.0  # that sweeps may take beyond the least number
LONG_DRAFT = 5  # tokens; compared with drafts of one
LONG_RECORDED = 4  # the same where drafts are recorded
ROOM = 4096  # tokens of the longest text that the recordings made here serve
MAD_TO_SD = 1.48  # median absolute deviation → standard deviation, for a normal distribution


class _Timer:
    """Times passes and drafts after a text of `context` tokens that do not repeat."""

    sweep: Sequence[int] = SWEEP
    long = LONG_DRAFT

    def __init__(self, target: Target, drafter: Drafter, context: int) -> None:
        self.target, self.drafter = target, drafter
        self.room = min(context, target.context - MAX_DRAFT_LENGTH - 1)
        self.tokens = torch.arange(self.room + MAX_DRAFT_LENGTH + 1, device=target.device) % target.vocabulary
        self.cache = target.new_cache(len(self.tokens))
        self.prefix = target.prefill(self.tokens[: self.room], self.cache, drafter.needs_hidden)
        self.drafting = False

    def warm_up(self) -> None:
        for length in (0, 4):
            self.verify(length)

    def verify(self, length: int) -> float:
        """Seconds of a pass over `length` drafted tokens and one more."""
        begun = time.perf_counter()
        fed = self.tokens[self.room : self.room + length + 1]
        self.target.verify(fed, self.cache, self.drafter.needs_hidden).logits[0, 0].item()
        seconds = time.perf_counter() - begun
        self.cache.rollback(self.room)
        return seconds

    def start_drafting(self, drafts: int) -> None:
        """Begins a sequence in which `draft` can be called `drafts` times."""
        text = self.tokens[: self.room].tolist()
        self.drafter.start(text, Settings(max_new_tokens=drafts), self.room + drafts)
        self.drafting = True
        self.state = State.after(text, self.room + drafts + 1, self.cache, self.target.device)
        self.state.hidden = self.prefix.hidden
        self.next_token = cycle(text[:: max(self.room // 20, 1)])  # no n-gram repeats, so lookup finds no match

    def draft(self, length: int) -> float:
        """Seconds of a draft of `length` tokens, after one more token of the text."""
        self.verify(0)  # as in a race: the pass before a draft evicts the drafter from the processor's caches
        token, state = next(self.next_token), self.state
        state.tokens[:, state.length] = token
        state.lengths += 1
        state.length += 1
        self.drafter.extend([token])
        begun = time.perf_counter()
        made = self.drafter.draft_on_host(state, length, None) or self.drafter.draft(state, length)
        if made.ids.shape[1]:
            made.ids[0, 0].item()
        return time.perf_counter() - begun

    def close(self) -> None:
        if self.drafting:
            self.drafter.close()
        self.cache.free()


class _Recorded(_Timer):
    """The same for recorded rounds of the default settings: what a race replays, verdict and copy included. Plain steps
    are those of the baseline lane. Where recording is refused, the rounds are eager, as in a race.

    Args:
        drafter: of the speculative lane; the rounds are recorded with it, and drafts of `Drafter.measured` are timed.
    """

    sweep, long = RECORDED_SWEEP, LONG_RECORDED

    def __init__(self, target: Target, drafter: Drafter, context: int, recorders: Mapping[str, Recorder]) -> None:
        super().__init__(target, drafter, context)
        rule = rules.default(0.0)
        self.recorders = recorders
        self.lanes = {
            BASELINE: Lane(BASELINE, target, NoDrafter(), Fixed(0), rule, Settings()),
            SPECULATIVE: Lane(SPECULATIVE, target, drafter, Fixed(0), rule, Settings()),
        }
        self.states: dict[str, State] = {}
        self.drafter = drafter.measured

    def warm_up(self) -> None:
        for name, lane in self.lanes.items():
            self.states[name] = self._begun(lane)
        for name, length in ((BASELINE, 0), *((SPECULATIVE, length) for length in RECORDED)):
            for _ in range(3):  # asked for, recorded, replayed
                self._restored(name, length)

    @torch.inference_mode()
    def _begun(self, lane: Lane) -> State:
        """A lane's state after the text and one more token, in buffers that serve the races to come."""
        text, room = self.tokens[: self.room].tolist(), min(ROOM, self.target.context)
        for _ in lane.drafter.start(text, lane.settings, room) or ():
            pass
        state = State.after(text, room, self.cache, self.target.device)
        state = self.recorders[lane.name].take(lane, state)
        if state.cache is self.cache:  # nothing is kept: both lanes must not write to one cache
            state.cache = self.cache.copy()
        judge(lane, state, Draft.none(state), self.prefix)
        state.bound(self.room + 1)
        return state

    @torch.inference_mode()
    def _draft(self, name: str, length: int) -> Draft:
        lane, state = self.lanes[name], self.states[name]
        made = lane.drafter.draft_on_host(state, length, None) if length else Draft.none(state)
        made = self.recorders[name].draft(lane, state, length) if made is None else made
        # A drafter that found no match gave fewer.
        return made if made.ids.shape[1] == length else Draft(self.tokens[None, :length])

    @torch.inference_mode()
    def _restored(self, name: str, length: int) -> float:
        """Seconds of a target pass over a draft with its verdict and its copy; the state is what it was."""
        lane, state, recorder = self.lanes[name], self.states[name], self.recorders[name]
        draft = self._draft(name, length)
        finish(self.target.device)
        begun = time.perf_counter()
        outcome = recorder.verify(lane, state, draft)
        assert outcome.parts is not None
        outcome.parts.copy()
        seconds = time.perf_counter() - begun
        state.lengths.fill_(self.room + 1)
        state.cache.rollback(self.room)
        state.bound(self.room + 1)
        return seconds

    def verify(self, length: int) -> float:
        return self._restored(SPECULATIVE if length else BASELINE, length)

    def draft(self, length: int) -> float:
        if not self.drafter.recordable:
            return super().draft(length)
        lane, state, recorder = self.lanes[SPECULATIVE], self.states[SPECULATIVE], self.recorders[SPECULATIVE]
        self.verify(0)
        begun = time.perf_counter()
        recorder.draft(lane, state, length).ids[0, 0].item()
        return time.perf_counter() - begun

    def close(self) -> None:
        for name, state in self.states.items():
            self.recorders[name].give_back(state)
            self.lanes[name].drafter.close()
        super().close()


def measure_costs(
    target: Target,
    drafter: Drafter,
    context: int = 128,
    repeats: int = 3,
    recorders: Mapping[str, Recorder] | None = None,
) -> Costs:
    """Medians over at least `repeats` sweeps over passes of several widths, and more where they take less than a
    second; widths in between are interpolated.

    Each pass is divided by the plain steps of its own sweep, a few milliseconds away, so that slow moments of the
    machine cancel. Sweeps alternate between increasing and decreasing width, so that a steady slowdown cancels as well.
    On a CPU a wider pass cannot be cheaper: ratios are at least 1 and made monotone. `Costs.doubt` is the scatter of
    the ratios. Of a combination of drafters, drafts of `Drafter.measured` are timed.

    Args:
        recorders: of the lanes' rounds; those of the default settings are recorded, at every length of
            `draft_length.RECORDED`, and timed.
    """
    timer = _Recorded(target, drafter, context, recorders) if recorders else _Timer(target, drafter.measured, context)
    try:
        timer.warm_up()
        sweeps: list[list[tuple[int, float]]] = []
        begun = time.perf_counter()
        while len(sweeps) < repeats or (len(sweeps) < MOST_SWEEPS and time.perf_counter() - begun < SECONDS):
            sweeps.append([(length, timer.verify(length)) for length in timer.sweep[:: -1 if len(sweeps) % 2 else 1]])
        timer.start_drafting(2 * len(sweeps))
        drafts = [(timer.draft(1), timer.draft(timer.long)) for _ in sweeps]
    finally:
        timer.close()
    widths = sorted(set(timer.sweep))
    step, ratios, doubt = _passes(sweeps, widths)
    if target.device.type == "cpu":
        ratios = isotonic([max(ratio, 1.0) for ratio in ratios]).tolist()
    known = dict(zip(widths, [1.0, *ratios], strict=True))

    one, many = (median(column) / step for column in zip(*drafts, strict=True))
    each = min(max(many - one, 0.0) / (timer.long - 1), many / timer.long)
    verify_ratio = tuple(_interpolated(known, length) for length in range(MAX_DRAFT_LENGTH + 1))
    return Costs(step, verify_ratio, each, max(one - each, 0.0), doubt=doubt)


def _passes(sweeps: list[list[tuple[int, float]]], widths: list[int]) -> tuple[float, list[float], float]:
    """Seconds of a plain step, the costs of the other `widths` in such steps, and the scatter of their logarithms."""
    steps = [median(seconds for length, seconds in sweep if length == 0) for sweep in sweeps]
    ratios = [[dict(sweep)[width] / step for sweep, step in zip(sweeps, steps, strict=True)] for width in widths[1:]]
    medians = [median(column) for column in ratios]
    deviations = [abs(math.log(x / middle)) for column, middle in zip(ratios, medians, strict=True) for x in column]
    return median(steps), medians, MAD_TO_SD * median(deviations)


def _interpolated(known: dict[int, float], x: int) -> float:
    low, high = max(k for k in known if k <= x), min(k for k in known if k >= x)
    return known[low] if low == high else known[low] + (known[high] - known[low]) * (x - low) / (high - low)
