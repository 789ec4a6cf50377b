"""What a target pass and a draft step cost, measured on the device when a pair is loaded.

In: a target and a drafter. Out: `Costs` in baseline steps, the prior of `costs.round_costs`.
"""

from __future__ import annotations

import math
import time
from itertools import cycle
from statistics import median

import torch

from ..costs import isotonic
from ..drafters import Drafter
from ..events import Costs
from ..settings import MAX_DRAFT_LENGTH, Settings
from ..state import State
from ..target import Target

SWEEP = (0, 1, 2, 3, 0, 4, 5, 6, 0, 7, 8, 0, 12, 16)  # drafted tokens of the passes of a sweep, plain steps in between
WIDTHS = sorted(set(SWEEP))
MOST_SWEEPS = 15
SECONDS = 1.0  # that sweeps may take beyond the least number
LONG_DRAFT = 5  # tokens; compared with drafts of one
MAD_TO_SD = 1.48  # median absolute deviation → standard deviation, for a normal distribution


class _Timer:
    """Times passes and drafts after a text of `context` tokens that do not repeat."""

    def __init__(self, target: Target, drafter: Drafter, context: int) -> None:
        self.target, self.drafter = target, drafter
        self.room = min(context, target.context - MAX_DRAFT_LENGTH - 1)
        self.tokens = torch.arange(self.room + MAX_DRAFT_LENGTH + 1, device=target.device) % target.vocabulary
        self.cache = target.new_cache(len(self.tokens))
        self.prefix = target.prefill(self.tokens[: self.room], self.cache, drafter.needs_hidden)

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
        self.drafter.close()
        self.cache.free()


def measure_costs(target: Target, drafter: Drafter, context: int = 128, repeats: int = 3) -> Costs:
    """Medians over at least `repeats` sweeps over passes of all `WIDTHS`, and more where they take less than a second;
    widths in between are interpolated.

    Each pass is divided by the plain steps of its own sweep, a few milliseconds away, so that slow moments of the
    machine cancel. Sweeps alternate between increasing and decreasing width, so that a steady slowdown cancels as well.
    On a CPU a wider pass cannot be cheaper: ratios are at least 1 and made monotone. `Costs.doubt` is the scatter of
    the ratios. Of a combination of drafters, drafts of `Drafter.measured` are timed.
    """
    timer = _Timer(target, drafter.measured, context)
    for length in (0, 4):
        timer.verify(length)  # warms up
    sweeps: list[list[tuple[int, float]]] = []
    begun = time.perf_counter()
    while len(sweeps) < repeats or (len(sweeps) < MOST_SWEEPS and time.perf_counter() - begun < SECONDS):
        sweeps.append([(length, timer.verify(length)) for length in SWEEP[:: -1 if len(sweeps) % 2 else 1]])
    step, ratios, doubt = _passes(sweeps)
    if target.device.type == "cpu":
        ratios = isotonic([max(ratio, 1.0) for ratio in ratios]).tolist()
    known = dict(zip(WIDTHS, [1.0, *ratios], strict=True))

    timer.start_drafting(2 * len(sweeps))
    drafts = [(timer.draft(1), timer.draft(LONG_DRAFT)) for _ in sweeps]
    timer.close()
    one, many = (median(column) / step for column in zip(*drafts, strict=True))
    each = min(max(many - one, 0.0) / (LONG_DRAFT - 1), many / LONG_DRAFT)
    verify_ratio = tuple(_interpolated(known, length) for length in range(MAX_DRAFT_LENGTH + 1))
    return Costs(step, verify_ratio, each, max(one - each, 0.0), doubt=doubt)


def _passes(sweeps: list[list[tuple[int, float]]]) -> tuple[float, list[float], float]:
    """Seconds of a plain step, the costs of the other `WIDTHS` in such steps, and the scatter of their logarithms."""
    steps = [median(seconds for length, seconds in sweep if length == 0) for sweep in sweeps]
    ratios = [[dict(sweep)[width] / step for sweep, step in zip(sweeps, steps, strict=True)] for width in WIDTHS[1:]]
    medians = [median(column) for column in ratios]
    deviations = [abs(math.log(x / middle)) for column, middle in zip(ratios, medians, strict=True) for x in column]
    return median(steps), medians, MAD_TO_SD * median(deviations)


def _interpolated(known: dict[int, float], x: int) -> float:
    low, high = max(k for k in known if k <= x), min(k for k in known if k >= x)
    return known[low] if low == high else known[low] + (known[high] - known[low]) * (x - low) / (high - low)
