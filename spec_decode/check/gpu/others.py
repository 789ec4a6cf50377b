"""What else needs a GPU: quantized pairs, a drafter on another device, batches, and the drafter recipe.

In: a session. Out: results of parts.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch

from ...events import BASELINE, SPECULATIVE
from ...metrics import tokens_per_second
from .. import shapes
from .correct import eager
from .report import Goal, Result, Skip
from .session import Session, lanes_of, raced
from .train import Slice, trained

SIZES = (1, 2, 4, 8, 16, 32)


def quantized(session: Session, name: str, how: str) -> Result:
    """A pair that bitsandbytes quantized, raced as the others are; whether its rounds are recorded is told."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Skip("bitsandbytes is not installed")
    pair = shapes.pair(name, session.models(name), quantize=how)
    race = raced(pair, session.prompt, session.settings)
    seconds = lanes_of(race, session.options.draft_length)
    figures = {
        "dtype": pair.info["dtype"],
        "seconds": seconds,
        "round_in_steps": seconds[SPECULATIVE] / seconds[BASELINE],
        "tokens_per_second": {lane: tokens_per_second(race.trace.lane(lane)) for lane in seconds},
        "weight_bytes": sum(p.numel() * p.element_size() for p in pair.target.model.parameters()),
        "eager": eager(pair.recorders),
    }
    return Result(figures)


def elsewhere(session: Session, name: str) -> Result:
    """The drafter on another device than the target: a second GPU, else the CPU."""
    if session.device.type != "cuda":
        raise Skip("there is one device only")
    places = [torch.device("cpu")]
    if torch.cuda.device_count() > 1:
        index = session.device.index or 0
        places.insert(0, torch.device("cuda", 1 if index == 0 else 0))
    figures: dict[str, Any] = {}
    for place in places:
        target, assistant = session.models(name)
        pair = shapes.pair(name, (target, assistant.to(place)))
        race = raced(pair, session.prompt, session.settings)
        seconds = lanes_of(race, session.options.draft_length)
        ratio = seconds[SPECULATIVE] / seconds[BASELINE]
        figures[str(place)] = {"seconds": seconds, "round_in_steps": ratio, "eager": eager(pair.recorders)}
        session.free()
    return Result(figures)


def batch(session: Session, name: str) -> Result:
    """Speedup by batch size, by `spec_decode.bench.batch`."""
    if importlib.util.find_spec("spec_decode.bench.batch") is None:
        raise Skip("this version has no batched benchmark")
    batched = importlib.import_module("spec_decode.bench.batch")
    pair = session.pair(name)
    sizes = SIZES[:2] if session.tiny else SIZES
    prompts = [{"id": str(i), "category": "random", "prompt": shapes.text(32 + i)} for i in range(max(sizes))]
    return Result(batched.measure(pair, prompts, session.settings, sizes, 1))


def recipe(session: Session) -> Result:
    """The drafter recipe on the device for a short time: texts are written, a drafter is trained, saved and told."""
    seconds = 6.0 if session.tiny else 40.0
    with tempfile.TemporaryDirectory() as folder:
        found = trained(session, Slice(Path(folder), seconds, tokens=200_000))
    goals = (
        Goal("recipe: tokens of text written", found["tokens_written"], 1),
        Goal("recipe: updates of the drafter", found["steps"], 1),
    )
    wrong = "" if all(goal.met for goal in goals) else "nothing was written or trained"
    return Result(found, goals, wrong)
