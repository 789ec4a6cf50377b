"""What the parts of `check gpu` share: the device, the options, one pair at a time, and clocks.

In: a device and options. Out: pairs in memory, rounds of one lane or both, seconds of what runs on the device.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ... import decode
from ...clock import finish
from ...draft_length import Fixed
from ...events import BASELINE, Round
from ...loading import catalog, memory
from ...loading.pair import Pair
from ...request import Request
from ...settings import Settings
from ...sources.local import Race
from ...text import TextStream
from .. import shapes
from .report import Skip

WARM = 6  # rounds of a lane that are left out: the first are eager, and graphs are recorded in them


class Session:
    """The device, the options, and the pair in use.

    Attributes:
        bandwidth: of the device's memory, bytes/s, once it was measured.
    """

    def __init__(self, device: torch.device, options: argparse.Namespace) -> None:
        self.device, self.options = device, options
        self.tiny = bool(options.tiny)
        self.bandwidth: float | None = None
        self._held: tuple[str, Pair] | None = None

    @property
    def traces(self) -> Path:
        """The folder of profiles, beside the report."""
        return self.options.out.parent if self.options.out else Path("docs/benchmarks")

    @property
    def tokens(self) -> int:
        """New tokens of a timed lane."""
        return 40 if self.tiny else 160

    @property
    def prompt(self) -> str:
        """The prompt of timed races."""
        return shapes.text(min(self.options.context, 64) if self.tiny else self.options.context)

    @property
    def settings(self) -> Settings:
        """Of timed races."""
        return Settings(
            draft_length=self.options.draft_length,
            max_new_tokens=self.tokens,
            synthetic_acceptance=self.options.synthetic_acceptance,
        )

    def models(self, name: str) -> Iterator[Any]:
        """Target and drafter in the shape called `name`, or tiny ones of the same classes.

        Raises:
            Skip: the device has too little memory.
        """
        entry = catalog.find(name)
        assert entry is not None
        self.free()
        if not self.tiny and self.device.type == "cuda":
            empty = memory.of_catalog(entry), memory.drafter_of_catalog(entry)
            needed = sum(2 * weights.numel() for model in empty for weights in model.parameters())
            free = torch.cuda.mem_get_info(self.device)[0]
            if 1.1 * needed > free:  # caches and workspace
                raise Skip(f"its weights take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")
        return (shapes.stand_in if self.tiny else shapes.shaped)(name, self.device)

    def pair(self, name: str) -> Pair:
        """The pair in the shape called `name`, made when it is asked for; the one before it goes.

        Raises:
            Skip: the device has too little memory.
        """
        if self._held is None or self._held[0] != name:
            self._held = name, shapes.pair(name, self.models(name))
        return self._held[1]

    def free(self) -> None:
        """Lets go of the pair in use."""
        self._held = None
        gc.unfreeze()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def seconds(self, body: Callable[[], Any], repeats: int = 5) -> float:
        """The least seconds of `body` on the device, of several runs."""
        body()
        taken = []
        for _ in range(repeats):
            finish(self.device)
            begun = time.perf_counter()
            body()
            finish(self.device)
            taken.append(time.perf_counter() - begun)
        return min(taken)


def raced(pair: Pair, prompt: str, settings: Settings) -> Race:
    """A whole race of both lanes."""
    race = Race(pair, Request(prompt, settings))
    for _ in race:
        pass
    return race


def alone(pair: Pair, prompt: str, settings: Settings, lane: str) -> Generator[Round, None, None]:
    """The rounds of one lane, as in a race in which the other lane never runs."""
    ids = Race(pair, Request(prompt, settings)).ids
    prefill = decode.Prefill(pair.target, ids, len(ids) + settings.max_new_tokens, pair.drafter.needs_hidden)
    for _ in prefill:
        pass
    text = TextStream(pair.tokenizer, ids)
    lengths = Fixed(int(settings.draft_length))
    lanes = decode.lanes(prefill, pair.drafter, lengths, [text.fork(), text], settings, pair.recorders)
    other = next(steps for name, steps in lanes.items() if name != lane)
    other.close()
    with closing(lanes[lane]) as steps:
        yield from (step for step in steps if isinstance(step, Round))
    prefill.free()


def steady(rounds: list[Round] | tuple[Round, ...], length: int) -> float:
    """Median seconds of a lane's rounds of γ = `length`, the first of them left out.

    Raises:
        Skip: there are too few.
    """
    wanted = [r.seconds for r in rounds if r.index > 0 and r.draft_length == length]
    if len(wanted) < WARM + 2:
        raise Skip(f"{len(wanted)} rounds of draft length {length} are too few to time")
    return median(wanted[WARM:])


def lanes_of(race: Race, length: int) -> dict[str, float]:
    """Seconds of a baseline step and of a round."""
    trace = race.trace
    return {lane: steady(trace.lane(lane), 0 if lane == BASELINE else length) for lane in trace.finish}
