"""How near the device comes to its limits: bandwidth, a baseline step, a round, its idle share, and what parts cost.

In: a session. Out: results of parts. Seconds are medians of rounds of a race, as a race shows them.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ... import rules
from ...clock import finish
from ...decode import Lane
from ...draft_length import Fixed
from ...drafters import NoDrafter
from ...events import BASELINE, SPECULATIVE
from ...loading.pair import Pair, assemble
from ...settings import Settings
from ...target import Target
from ..operators import Work, counted
from .correct import eager
from .report import Goal, Result, Skip
from .session import WARM, Session, alone, lanes_of, raced, steady

LARGE = 4e9  # parameters from which a step is to run at the speed of memory, per-layer embeddings left out
PROFILED = 4  # rounds
GIBI = 1 << 30


def bandwidth(session: Session) -> Result:
    """Bytes per second that the device reads and writes with large tensors: a copy, a triad (STREAM: a = b + s · c) and
    a sum, which only reads."""
    size = (GIBI if session.device.type == "cuda" else GIBI // 32) // 4  # numbers of 4 bytes
    a, b, c = (torch.ones(size, device=session.device) for _ in range(3))
    work = {
        "copy": (2, lambda: a.copy_(b)),
        "triad": (3, lambda: torch.add(b, c, alpha=2.0, out=a)),
        "read": (1, lambda: b.sum()),
    }
    figures: dict[str, Any] = {
        name: 4 * size * times / session.seconds(body, repeats=10) for name, (times, body) in work.items()
    }
    session.bandwidth = figures["best"] = max(figures.values())
    return Result({"unit": "bytes/s", **figures})


def measured_bandwidth(session: Session) -> float:
    """That of `bandwidth`, measured now where a file was resumed."""
    if session.bandwidth is None:
        bandwidth(session)
    assert session.bandwidth is not None
    return session.bandwidth


def round_of(session: Session, name: str) -> Result:
    """A baseline step against the bandwidth, and a round in baseline steps."""
    pair, length = session.pair(name), session.options.draft_length
    race = raced(pair, session.prompt, session.settings)
    seconds = lanes_of(race, length)
    context = len(race.ids)
    works = {lane: work(pair, lane, length, context) for lane in (BASELINE, SPECULATIVE)}
    step, whole = seconds[BASELINE], seconds[SPECULATIVE]
    least = works[BASELINE].weight_bytes / measured_bandwidth(session)
    lanes = {
        lane: {
            "seconds": seconds[lane],
            "operators": works[lane].operators,
            "weight_bytes": works[lane].weight_bytes,
            "cache_bytes": works[lane].cache_bytes,
        }
        for lane in works
    }
    why = eager(pair.recorders)
    large = _parameters(pair) >= LARGE or session.tiny
    goals = [Goal(f"{name}: round of γ = {length} in baseline steps", whole / step, 1.35, at_least=False)]
    if large:
        goals.append(Goal(f"{name}: share of the bandwidth roofline that a baseline step reaches", least / step, 0.75))
    trace = race.trace
    drafted, accepted = (
        sum(r.drafted for r in trace.lane(SPECULATIVE)),
        sum(r.accepted for r in trace.lane(SPECULATIVE)),
    )
    figures = {
        "dtype": pair.info["dtype"],
        "context": context,
        "synthetic_acceptance": session.options.synthetic_acceptance,
        "acceptance_rate": accepted / max(drafted, 1),
        **lanes,
        "roofline_seconds": least,
        "roofline_share": least / step,
        "round_in_steps": whole / step,
        "costs": pair.costs.to_dict() if pair.costs else None,
        "eager": why,
    }
    wrong = f"rounds are not recorded: {next(iter(why.values()))}" if why else ""
    return Result(figures, tuple(goals), wrong)


def work(pair: Pair, lane: str, length: int, context: int) -> Work:
    """Operators of one eager round of a lane, and the bytes of weights and of keys and values that it reads."""
    settings = Settings(draft_length=length)
    drafter = NoDrafter() if lane == BASELINE else pair.drafter
    made = Lane(lane, pair.target, drafter, Fixed(length), rules.default(0), settings)
    weights = [*pair.target.model.parameters(), *_drafter_weights(pair)]
    return counted(made, 0 if lane == BASELINE else length, context, weights)


def _drafter_weights(pair: Pair) -> list[torch.nn.Parameter]:
    model = getattr(pair.drafter, "model", None)
    return [] if model is None else list(model.parameters())


def _parameters(pair: Pair) -> int:
    """Of the target, without the per-layer embeddings, which are looked up and not multiplied with."""
    named = pair.target.model.named_parameters()
    return sum(weights.numel() for name, weights in named if "embed_tokens_per_layer" not in name)


def idle(session: Session, name: str) -> Result:
    """The share of a round in which the device has nothing to do, and a Chrome trace of rounds.

    The time that its kernels occupy the device is the union of their intervals as the profiler saw them. It is compared
    with the seconds of a round that nobody profiles, since profiling makes the host slower and hardly the kernels.
    """
    pair, length = session.pair(name), session.options.draft_length
    plain = steady(list(alone(pair, session.prompt, session.settings, SPECULATIVE)), length)
    rounds = alone(pair, session.prompt, session.settings, SPECULATIVE)
    if len(list(islice(rounds, WARM))) < WARM:
        raise Skip("the lane ended before it could be profiled")
    cuda = session.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as seen:
        profiled = list(islice(rounds, PROFILED))
        finish(session.device)
    rounds.close()
    kind = "CUDA" if cuda else "CPU"
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in seen.events()
        if event.device_type.name == kind and not event.name.startswith("ProfilerStep")
    ]
    folder = session.traces
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-round.trace.json.gz"
    seen.export_chrome_trace(str(path))
    busy = covered(spans) / 1e6 / max(len(profiled), 1) if spans else None
    share = None if busy is None else max(1 - busy / plain, 0.0)
    figures = {
        "round_seconds": plain,
        "busy_seconds": busy,
        "kernels": len(spans) / max(len(profiled), 1),
        "idle_share": share,
        "chrome_trace": path.name,
    }
    return Result(figures, (Goal(f"{name}: idle share of a round", share, 0.03, at_least=False),))


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return total


def interference(session: Session, name: str) -> Result:
    """Each lane's seconds in a race ÷ those of the lane alone, measured in turns."""
    pair, length = session.pair(name), session.options.draft_length
    together: dict[str, list[float]] = {BASELINE: [], SPECULATIVE: []}
    apart: dict[str, list[float]] = {BASELINE: [], SPECULATIVE: []}
    for _ in range(2):
        for lane, seconds in lanes_of(raced(pair, session.prompt, session.settings), length).items():
            together[lane].append(seconds)
        for lane, found in apart.items():
            rounds = list(alone(pair, session.prompt, session.settings, lane))
            found.append(steady(rounds, 0 if lane == BASELINE else length))
    excess = {lane: min(together[lane]) / min(apart[lane]) - 1 for lane in together}
    goals = tuple(
        Goal(f"{name}: excess of the {lane} lane's rounds in a race", value, 0.02, at_least=False)
        for lane, value in excess.items()
    )
    return Result({"in_a_race": together, "alone": apart, "excess": excess}, goals)


def invariant(session: Session, name: str) -> Result:
    """What batch-invariant passes cost, and whether they are: how many tokens of a text have the same bits in a pass of
    their own and in a pass over a draft, with and without."""
    pair, length = session.pair(name), session.options.draft_length
    model, assistant = pair.target.model, getattr(pair.drafter, "model", None)
    assert assistant is not None
    plain = lanes_of(raced(pair, session.prompt, session.settings), length)
    padded = assemble(name, model, assistant, pair.tokenizer, batch_invariant=True)
    race = raced(padded, session.prompt, session.settings)
    seconds = lanes_of(race, length)
    greedy = Settings(draft_length=length, max_new_tokens=session.tokens)
    bits = {which: same_bits(made.target, race.ids, length) for which, made in (("plain", pair), ("padded", padded))}
    figures: dict[str, Any] = {
        "plain": plain,
        "batch_invariant": seconds,
        "cost": {lane: seconds[lane] / plain[lane] for lane in plain},
        "same_bits": bits,
        "lanes_identical": {
            "plain": raced(pair, session.prompt, greedy).trace.identical,
            "batch_invariant": raced(padded, session.prompt, greedy).trace.identical,
        },
        "eager": eager(padded.recorders),
    }
    goal = Goal(f"{name}: share of tokens with the same bits in batch-invariant passes", bits["padded"], 1.0)
    return Result(figures, (goal,))


def same_bits(target: Target, text: list[int], length: int, count: int = 24) -> float:
    """The share of `count` tokens after `text` whose logits are the same in passes over one token and over γ + 1, the
    tokens at every place of these."""
    tokens = torch.tensor(text + text[: count + length], device=target.device)
    start = len(text)
    found = []
    for size in (1, length + 1):
        cache = target.new_cache(len(tokens))
        for _ in target.read(tokens[:start], cache):
            pass
        parts = [target.verify(tokens[at : at + size], cache).logits for at in range(start, start + count, size)]
        found.append(torch.cat(parts)[:count])
        cache.free()
    return float((found[0] == found[1]).all(-1).double().mean())
