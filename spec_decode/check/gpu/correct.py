"""Whether the device computes what the CPU does: tokens of tiny models, and distributions from recorded rounds.

In: a session. Out: results of parts. Models are tiny and in float32, so near-ties that rounding could decide do not
occur; the same model is made twice, once on the CPU and once on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ... import decode
from ...draft_length import Fixed
from ...drafters import Drafter
from ...drafters.model import ModelDrafter
from ...drafters.mtp import MTPDrafter
from ...events import BASELINE, SPECULATIVE, Round
from ...graphs import Recorder
from ...metrics import race_report
from ...settings import Settings
from ...target import Target
from ...text import TextStream
from .. import lossless, shapes, tiny
from .report import Result
from .session import Session, raced

LANES = (BASELINE, SPECULATIVE)
PROMPT = [(7 * i * i + 3 * i) % tiny.VOCABULARY for i in range(3 * tiny.WINDOW)]
CPU = torch.device("cpu")
GREEDY = Settings(draft_length=4, max_new_tokens=32)
COUPLED = Settings(draft_length=4, max_new_tokens=32, temperature=0.8, rule="coupled", seed=1)
SPREAD = 0.3  # of weights: few tokens have most of the probability, so that few draws tell distributions apart
FALSE_ALARM = 1e-6  # of one chi-square test of an exact rule
VOCABULARY = lossless.VOCABULARY


def models(kind: str, drafter: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A tiny target, and an assistant to it or a model near it, on the CPU in float32."""
    if drafter == "model":
        target = tiny.gemma4(kind)[0] if kind in tiny.GEMMA4 else tiny.model(kind)
        near = deepcopy(target)
        noise = torch.Generator().manual_seed(1)
        for weights in near.parameters():
            weights.data += 0.1 * torch.randn(weights.shape, generator=noise)
        return target, near
    return tiny.gemma4(kind, ordered=drafter == "mtp centroids")


def made(kind: str, drafter: str, device: torch.device) -> tuple[Target, Drafter]:
    """The two on a device, ready to decode."""
    target, other = (model.to(device) for model in models(kind, drafter))
    ready = Target(target)
    if drafter == "model":
        return ready, ModelDrafter(Target(other), "near", ready.vocabulary, device)
    return ready, MTPDrafter(other, ready)


def classes() -> Iterator[tuple[str, str]]:
    """Every class of target with every kind of drafter that fits it."""
    for kind in (*tiny.GEMMA4, *tiny.OTHERS):
        for drafter in ("mtp", "mtp centroids", "model"):
            if drafter == "model" or kind in tiny.GEMMA4:
                yield kind, drafter


def decoded(
    target: Target, drafter: Drafter, settings: Settings, prompt: list[int], recorders: dict[str, Recorder]
) -> dict[str, list[Round]]:
    """The rounds of both lanes of a race, one lane after the other."""
    prefill = decode.Prefill(target, prompt, len(prompt) + settings.max_new_tokens, drafter.needs_hidden)
    for _ in prefill:
        pass
    text = TextStream(tiny.Characters(), prompt)
    lengths = Fixed(int(settings.draft_length))
    lanes = decode.lanes(prefill, drafter, lengths, [text.fork(), text], settings, recorders)
    return {lane: [step for step in steps if isinstance(step, Round)] for lane, steps in lanes.items()}


def recorders(device: torch.device) -> dict[str, Recorder]:
    """One for each lane, on a device that records rounds."""
    found = {lane: Recorder.on(device) for lane in LANES}
    return {lane: recorder for lane, recorder in found.items() if recorder}


def eager(recorders: dict[str, Recorder]) -> dict[str, str]:
    """Why rounds were not recorded, by lane, where they were to be."""
    return {lane: recorder.refused for lane, recorder in recorders.items() if recorder.refused}


def tokens(session: Session) -> Result:
    """Greedy and coupled texts of every class, on the device and on the CPU, token for token."""
    figures: dict[str, Any] = {}
    wrong = []
    for kind, drafter in classes():
        here, there = made(kind, drafter, CPU), made(kind, drafter, session.device)
        for settings in (GREEDY, COUPLED):
            kept = recorders(session.device)
            expected = ids(decoded(*here, settings, PROMPT, {}))
            # Twice where rounds are recorded: the second race replays from its start what the first recorded.
            runs = [ids(decoded(*there, settings, PROMPT, kept)) for _ in range(2 if kept else 1)]
            name = f"{kind}, {drafter}, {settings.rule}"
            differing = [
                _first(expected[BASELINE], run[lane])
                for run in runs
                for lane in LANES
                if run[lane] != expected[BASELINE]
            ]
            why = eager(kept)
            figures[name] = {"identical": not differing, "first_difference": min(differing, default=None), "eager": why}
            if differing:
                wrong.append(f"{name} differs from the CPU at token {min(differing) + 1}")
            if why:
                wrong.append(f"{name} is not recorded: {next(iter(why.values()))}")
    return Result(figures, wrong="; ".join(wrong))


def ids(rounds: dict[str, list[Round]]) -> dict[str, list[int]]:
    """The emitted tokens of each lane."""
    return {lane: [token.id for done in rounds[lane] for token in done.emitted] for lane in LANES}


def _first(expected: list[int], found: list[int]) -> int:
    pairs = enumerate(zip(expected, found, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(expected), len(found)))


def distribution(session: Session) -> Result:
    """The second token under rejection and block, drawn in rounds that are recorded where the device can, against its
    exact distribution."""
    model, assistant = tiny.gemma4("dense", vocab_size=VOCABULARY, initializer_range=SPREAD)
    expected = lossless.exact(model)
    target = Target(model.to(session.device))
    drafter = MTPDrafter(assistant.to(session.device), target)
    prefill = decode.Prefill(target, lossless.PROMPT, len(lossless.PROMPT) + lossless.TOKENS, drafter.needs_hidden)
    for _ in prefill:
        pass
    figures: dict[str, Any] = {"draws": session.options.draws, "false_alarm": FALSE_ALARM}
    wrong = []
    for rule in ("rejection", "block"):
        kept = recorders(session.device)
        seconds = [second(prefill, drafter, rule, seed, kept) for seed in range(session.options.draws)]
        statistic, freedom, p = chi_square(seconds, expected)
        _, _, other = chi_square(seconds, expected.flip(0))  # what a sample of something else looks like
        why = eager(kept)
        figures[rule] = {"chi_square": statistic, "freedom": freedom, "p": p, "p_of_another": other, "eager": why}
        if p < FALSE_ALARM:
            wrong.append(f"{rule} does not sample from the target (p = {p:.2g})")
        if other >= FALSE_ALARM:
            wrong.append(f"{session.options.draws} draws cannot tell {rule} from another distribution")
        if why:
            wrong.append(f"{rule} is not recorded: {next(iter(why.values()))}")
    return Result(figures, wrong="; ".join(wrong))


def second(prefill: decode.Prefill, drafter: Drafter, rule: str, seed: int, recorders: dict[str, Recorder]) -> int:
    """The second token of a text after the prompt in `prefill`, the first that a draft decides."""
    settings = Settings(temperature=1, rule=rule, draft_length=3, max_new_tokens=lossless.TOKENS, seed=seed)
    text = TextStream(tiny.Characters(), prefill.prompt)
    lanes = decode.lanes(prefill.copy(), drafter, Fixed(3), [text.fork(), text], settings, recorders)
    found: list[int] = []
    with closing(lanes[SPECULATIVE]) as steps:
        while len(found) < 2:
            step = next(steps)
            found += [token.id for token in step.emitted] if isinstance(step, Round) else []
    return found[1]


def chi_square(seconds: list[int], expected: Tensor) -> tuple[float, int, float]:
    """χ², degrees of freedom and p value; tokens expected fewer than five times form one cell. Needs no scipy."""
    counts = torch.bincount(torch.tensor(seconds), minlength=len(expected)).double()
    due = expected.double() * len(seconds)
    rare = due < 5
    cells = [(counts[~rare], due[~rare])]
    if rare.any():
        cells.append((counts[rare].sum()[None], due[rare].sum()[None]))
    observed, due = (torch.cat(column) for column in zip(*cells, strict=True))
    due = due * observed.sum() / due.sum()
    statistic, freedom = float(((observed - due) ** 2 / due).sum()), len(due) - 1
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return statistic, freedom, float(torch.special.gammaincc(half[0], half[1]))


def races(session: Session) -> Result:
    """Tiny pairs of every shape in every precision, raced greedily and sampled: whole texts, recorded rounds, and in
    float32 the same text in both lanes. In bfloat16 lanes may part at a near-tie: where, and how near, is told."""
    figures: dict[str, Any] = {}
    wrong = []
    for kind in tiny.GEMMA4:
        precisions = [(None, torch.float32), (None, torch.bfloat16)]
        if kind == "shared":
            precisions += [(how, torch.bfloat16) for how in session.options.bitsandbytes]
        for how, dtype in precisions:
            floats = str(dtype).removeprefix("torch.")
            name = f"{kind}, {floats}" + (f", {how}" if how else "")
            figures[name], why = race(kind, session.device, how, dtype)
            wrong += [f"{name}: {why}"] if why else []
    return Result(figures, wrong="; ".join(wrong))


def race(kind: str, device: torch.device, how: str | None, dtype: torch.dtype) -> tuple[dict[str, Any], str]:
    """Figures of a tiny pair's races, and what is wrong with them."""
    both = [model.to(device, dtype) for model in tiny.gemma4(kind, ordered=kind == "shared", hidden_size=64)]
    for model in both:
        model.generation_config.eos_token_id = None
    pair = shapes.pair(f"tiny {kind}", (both[0], both[1]), quantize=how)
    figures: dict[str, Any] = {"dtype": pair.info["dtype"]}
    wrong = []
    for settings in (GREEDY, COUPLED):
        report = race_report(raced(pair, shapes.text(4 * tiny.WINDOW), settings).trace)
        rates = {lane: report[lane]["tokens_per_second"] for lane in LANES}
        figures[str(settings.rule)] = {**rates, "identical": report["identical"], "parting": report["parting"]}
        if any(len(report[lane]["token_ids"]) != settings.max_new_tokens for lane in LANES):
            wrong.append(f"a {settings.rule} lane is too short")
        if dtype == torch.float32 and not report["identical"]:
            wrong.append(f"{settings.rule} lanes part in float32")
    figures["eager"] = eager(pair.recorders)
    if figures["eager"] and how is None:
        wrong.append("rounds are not recorded")
    return figures, "; ".join(wrong)
