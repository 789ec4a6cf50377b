"""Synthetic worlds for the advisor: laws of text, drafter and machine, and a benchmark run in one of them.

A world draws, token by token, whether a drafted token would be accepted, and, round by round, how long it takes. What
is true of it is found by simulating many prompts of it (`World.truth` and the others), also of worlds that differ in
one thing ("a drafter that takes no time"), never by a formula of the package. Of `spec_decode.bench` only the records
are used.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from spec_decode.bench.measurement import Condition, LaneFigures, Measurement, ModelSize, RoundFigures
from spec_decode.events import BASELINE, SPECULATIVE, Costs
from spec_decode.metrics import repeated_share

TOP = 16
Length = int | str


@dataclass(frozen=True)
class Text:
    """The law of a category. The logit of the probability that a draft is accepted is `ease`, plus a normal of
    `between` for the prompt, plus a state that follows the text with correlation `memory` and deviation `within`, less
    `decay` for every earlier draft of the round, less `drift` for every 1000 tokens of context. A share `loops` of
    texts repeats itself to the end and is drafted without fault."""

    ease: float
    between: float = 0.35
    within: float = 0.8
    memory: float = 0.5
    decay: float = 0.1
    drift: float = 0.0
    loops: float = 0.0


@dataclass(frozen=True)
class World:
    """Times are in plain steps. A draft of n tokens costs start + n·draft, a target pass over n drafts verify[n], the
    rest of a round `other`; `attention` is what 1000 tokens of context add to a plain step, and, for every draft, to a
    pass. Rounds scatter by `noise`, lanes by `run`; a round in `pauses` takes three steps more. `regret` is by how much
    the adaptive policy misjudges acceptance (standard deviation)."""

    texts: dict[str, Text]
    verify: tuple[float, ...] = tuple(1 + 0.05 * n for n in range(TOP + 1))
    draft: float = 0.05
    start: float = 0.03
    other: float = 0.03
    attention: float = 0.0
    attention_each: float = 0.0
    noise: float = 0.04
    run: float = 0.01
    pauses: float = 0.002
    step: float = 0.02
    regret: float = 0.05
    lengths: tuple[Length, ...] = (1, 2, 4, 8, "adaptive")
    contexts: tuple[int, ...] = ()
    prompts: int = 8  # of a category
    repeats: int = 2
    tokens: int = 72
    common: float = 0.05  # share of the commonest token
    drafter: str = "mtp"
    weights: bool = True
    copied: float = 0.75  # chance that a token has the same outcome under another draft length
    halved: bool = False  # half of the rejections become acceptances

    def with_texts(self, **changes: float) -> World:
        return replace(self, texts={name: replace(text, **changes) for name, text in self.texts.items()})

    def truth(self, length: Length, category: str | None = None, context: int | None = None) -> float:
        """The median speedup of prompts in this world."""
        return float(np.exp(np.median(_speedups(_Key(self), length, category, context))))

    def mean(self, length: Length) -> float:
        """The geometric mean of the speedups of prompts in this world."""
        return float(np.exp(np.mean(_speedups(_Key(self), length, None, None))))

    def ratio(self, length: Length, other: Length) -> float:
        """The geometric mean over prompts of the speed with one draft length ÷ that with another."""
        key = _Key(self)
        return float(np.exp(np.mean(_speedups(key, length, None, None) - _speedups(key, other, None, None))))

    def first_drafts(self) -> float:
        """The share of first drafts that are accepted."""
        lane = _many(_Key(self), 4, None, None)
        return float((lane.accepted[lane.drafted > 0] > 0).mean())

    def shares(self, length: Length) -> np.ndarray:
        """Of draft, verification and the rest in the time of rounds."""
        parts = _many(_Key(self), length, None, None).parts.sum((1, 2))
        return np.asarray(parts / parts.sum())


class _Key:
    """A world as a key of a cache; its dictionary of texts cannot be hashed."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __hash__(self) -> int:
        return zlib.crc32(repr(self.world).encode())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and repr(self.world) == repr(other.world)


PROMPTS = 1000  # that truths are found from


@cache
def _texts(key: _Key, category: str | None) -> _Texts:
    names = [category] if category else list(key.world.texts)
    return _Texts.drawn(key.world, [n for n in names for _ in range(PROMPTS // len(names))], np.random.default_rng(1))


def _many(key: _Key, length: Length, category: str | None, context: int | None) -> _Lane:
    noise = np.random.default_rng(2)
    return _timed(key.world, _rounds(key.world, _texts(key, category), length, context, noise), context, noise)


@cache
def _speedups(key: _Key, length: Length, category: str | None, context: int | None) -> np.ndarray:
    """Logs of the speedups of many prompts, the same ones for every draft length."""
    world, lane = key.world, _many(key, length, category, context)
    base = _plain(world, len(lane.drafted), context, np.random.default_rng(3))
    return np.asarray(np.log(base.sum(1) / lane.seconds.sum(1)))


@dataclass(frozen=True)
class _Texts:
    """Prompts: `logit` of acceptance by token `[prompts, tokens + TOP]`, the outcome `usual` most rounds agree on, and
    which of them `loop`."""

    logit: np.ndarray
    usual: np.ndarray
    loop: np.ndarray
    law: np.ndarray  # decay and drift, [prompts, 2]

    @classmethod
    def drawn(cls, world: World, categories: Sequence[str], noise: np.random.Generator) -> _Texts:
        laws = [world.texts[name] for name in categories]
        shape = (len(laws), world.tokens + TOP)

        def column(name: str) -> np.ndarray:
            return np.array([[getattr(law, name)] for law in laws])

        memory = column("memory")[:, 0]
        state = noise.standard_normal(shape)
        for i in range(1, shape[1]):
            state[:, i] = memory * state[:, i - 1] + np.sqrt(1 - memory**2) * state[:, i]
        logit = column("ease") + column("between") * noise.standard_normal((len(laws), 1)) + column("within") * state
        loop = noise.random(len(laws)) < column("loops")[:, 0]
        return cls(logit, noise.random(shape), loop, np.concatenate([column("decay"), column("drift")], axis=1))


@dataclass(frozen=True)
class _Lane:
    """Rounds after the prefill, `[prompts, rounds]`, zeros after the end of a text."""

    asked: np.ndarray
    drafted: np.ndarray
    accepted: np.ndarray
    emitted: np.ndarray
    parts: np.ndarray  # seconds of draft, verification and the rest, [3, prompts, rounds]

    @property
    def seconds(self) -> np.ndarray:
        return self.parts.sum(0)


def _rounds(
    world: World, texts: _Texts, length: Length, context: int | None, noise: np.random.Generator
) -> dict[str, np.ndarray]:
    """What the rounds draft, accept and emit, `[prompts, rounds]`."""
    count = len(texts.loop)
    logit = texts.logit - texts.law[:, 1:] * (context or 0) / 1000
    copied = np.where(noise.random(logit.shape) < world.copied, texts.usual, noise.random(logit.shape))
    position = np.arange(TOP)
    at = np.ones(count, int)
    belief = np.zeros(count)  # the policy's, of the logit
    error = world.regret * noise.standard_normal(count)
    rows = np.arange(count)[:, None]
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("asked", "drafted", "accepted", "emitted")}
    while (left := world.tokens - at).max() > 0:
        active = left > 0
        asked = np.full(count, length) if isinstance(length, int) else _policy(world, belief + error)
        drafted = np.where(active, np.minimum(asked, left - 1), 0)
        window = np.minimum(at[:, None] + position, logit.shape[1] - 1)
        chance = 1 / (1 + np.exp(-(logit[rows, window] - texts.law[:, :1] * position)))
        if world.halved:
            chance = 1 - (1 - chance) / 2
        right = (copied[rows, window] < chance) | texts.loop[:, None]
        run = np.cumprod(right & (position < drafted[:, None]), axis=1).sum(1)
        emitted = np.where(active, np.minimum(run + 1, left), 0)
        for name, values in zip(found, (np.where(active, asked, 0), drafted, run, emitted), strict=True):
            found[name].append(values)
        judged = active & (drafted > 0)
        seen = np.where(run == drafted, 2.5, np.where(run == 0, -2.5, 0.5 * run))
        belief = np.where(judged, 0.8 * belief + 0.2 * seen, belief + 0.02)
        at = at + emitted
    return {name: np.stack(values, axis=1) for name, values in found.items()}


def _policy(world: World, belief: np.ndarray) -> np.ndarray:
    """A policy's draft length: the fastest at this acceptance and these costs."""
    grid = np.linspace(-6, 6, 61)
    a = 1 / (1 + np.exp(-grid))[:, None]
    n = np.arange(TOP + 1)
    tokens = (1 - a ** (n + 1)) / np.maximum(1 - a, 1e-9)
    cost = np.array(world.verify) + world.draft * n + world.start * (n > 0) + world.other
    best = np.argmax(tokens / cost, axis=1)
    return best[np.clip(np.round((belief + 6) * 5).astype(int), 0, 60)]


def _timed(world: World, rounds: dict[str, np.ndarray], context: int | None, noise: np.random.Generator) -> _Lane:
    drafted = rounds["drafted"]
    alive = rounds["emitted"] > 0
    shape = drafted.shape
    far = (context or 0) / 1000
    run = np.exp(world.run * noise.standard_normal((shape[0], 1)))
    draft = (world.draft * drafted + world.start * (drafted > 0)) * np.exp(world.noise * noise.standard_normal(shape))
    verify = np.array(world.verify)[drafted] + far * (world.attention + world.attention_each * drafted)
    verify = verify * np.exp(world.noise * noise.standard_normal(shape)) + 3 * (noise.random(shape) < world.pauses)
    other = np.full(shape, world.other)
    parts = world.step * run * alive * np.stack([draft, verify, other])
    return _Lane(rounds["asked"], drafted, rounds["accepted"], rounds["emitted"], parts)


def _plain(world: World, prompts: int, context: int | None, noise: np.random.Generator) -> np.ndarray:
    """Seconds of the baseline's steps, `[prompts, steps]`."""
    shape = (prompts, world.tokens - 1)
    run = np.exp(world.run * noise.standard_normal((shape[0], 1)))
    step = (1 + (context or 0) / 1000 * world.attention) * np.exp(world.noise * noise.standard_normal(shape))
    return np.asarray(world.step * run * (step + 3 * (noise.random(shape) < world.pauses)))


def measured(world: World, seed: int, prompts: int | None = None) -> list[Measurement]:
    """A run of the benchmark in this world: every prompt under every condition in every repeat. A prompt has the same
    text in all of them, as under greedy decoding, and with the same seed also if `repeats` is changed."""
    noise = np.random.default_rng((seed, 0))
    count = prompts or world.prompts
    categories = [name for name in world.texts for _ in range(count)]
    names = [f"{name}-{i}" for name in world.texts for i in range(count)]
    texts = _Texts.drawn(world, categories, noise)
    ids = [_ids(world, bool(loop), noise) for loop in texts.loop]
    shares = [repeated_share(tokens) for tokens in ids]
    costs = _at_load(world, noise)
    found: list[Measurement] = []
    swept: list[tuple[Length, int | None]] = [(length, None) for length in world.lengths]
    swept += [(length, context) for context in world.contexts for length in (4, "adaptive")]
    for number, (length, context) in enumerate(swept):
        noise = np.random.default_rng((seed, 1, number))
        rounds = _rounds(world, texts, length, context, noise)
        condition = Condition(draft_length=length, drafter=world.drafter, context=context)
        for repeat in range(world.repeats if context is None else 1):
            pace = np.exp(0.05 * noise.standard_normal(len(names)))  # of the machine in this race, for both lanes
            fast, base = _timed(world, rounds, context, noise), _plain(world, len(names), context, noise)
            for i, name in enumerate(names):
                lanes = {
                    BASELINE: _plain_figures(base[i] * pace[i], ids[i], shares[i]),
                    SPECULATIVE: _figures(fast, i, float(pace[i]), ids[i], shares[i]),
                }
                speedup = (lanes[SPECULATIVE].tokens_per_second or 0) / (lanes[BASELINE].tokens_per_second or 1)
                order = len(found)
                found.append(
                    Measurement(condition, name, categories[i], repeat, order, "2031-01-01T00:00:00Z", context or 50,
                                lanes, speedup, identical=True, same_text=True, costs=costs,
                                drafter=ModelSize(1000, 1000) if world.weights else None)
                )  # fmt: skip
    return found


def _ids(world: World, loop: bool, noise: np.random.Generator) -> tuple[int, ...]:
    """Token ids with a commonest one, which repeat themselves where the text loops."""
    drawn = np.where(noise.random(world.tokens) < world.common, 1, noise.integers(2, 5000, world.tokens))
    if loop:
        drawn = np.resize(drawn[:12], world.tokens)
    return tuple(drawn.tolist())


def _at_load(world: World, noise: np.random.Generator) -> Costs:
    """What a pair measures of its costs when it is loaded: right within some percent."""
    error = np.exp(0.03 * noise.standard_normal(TOP + 2))
    verify = np.maximum.accumulate(np.array(world.verify) * error[: TOP + 1] / error[0])
    return Costs(world.step, tuple(verify.tolist()), world.draft * float(error[-1]), world.start, world.other, 0.05)


def _plain_figures(seconds: np.ndarray, ids: tuple[int, ...], share: float) -> LaneFigures:
    prefill = 0.1
    clock = prefill + np.cumsum(seconds)
    rounds = [RoundFigures(0, 0, 0, 1, 0.0, prefill, 0.0, prefill)]
    rounds += [RoundFigures(0, 0, 0, 1, 0.0, s, 0.0, c) for s, c in zip(seconds.tolist(), clock.tolist(), strict=True)]
    rate = len(seconds) / float(seconds.sum())
    return LaneFigures(ids, "length", rounds=tuple(rounds), tokens_per_second=rate, repeated_share=share)


def _figures(lane: _Lane, i: int, pace: float, ids: tuple[int, ...], share: float) -> LaneFigures:
    prefill = 0.1
    alive = lane.emitted[i] > 0
    parts = pace * lane.parts[:, i, alive]
    clock = prefill + np.cumsum(parts.sum(0))
    counts = [row[i, alive].tolist() for row in (lane.asked, lane.drafted, lane.accepted, lane.emitted)]
    rounds = [RoundFigures(0, 0, 0, 1, 0.0, prefill, 0.0, prefill)]
    rounds += [RoundFigures(*row, "mtp") for row in zip(*counts, *parts.tolist(), clock.tolist(), strict=True)]
    drafted, accepted = sum(counts[1]), sum(counts[2])
    seconds = float(parts.sum())
    rate = (len(ids) - 1) / seconds
    return LaneFigures(
        ids, "length", rounds=tuple(rounds), tokens_per_second=rate, drafted=drafted, accepted=accepted,
        repeated_share=share, acceptance_rate=accepted / drafted if drafted else None,
    )  # fmt: skip


def cliff(at: int, height: float, slope: float = 0.05) -> tuple[float, ...]:
    """v(γ) that grows slowly and jumps by `height` where a pass holds more than `at` drafts."""
    return tuple(1 + slope * n + height * (n > at) for n in range(TOP + 1))


def even(rate: float) -> float:
    """The logit of a probability."""
    return math.log(rate / (1 - rate))
