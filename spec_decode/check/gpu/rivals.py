"""The same weights in transformers: plain generation, with a dynamic and a static cache, and assisted generation.

In: a session. Out: results of parts. Texts have a fixed number of tokens. Random weights accept hardly a draft, so
assisted generation is compared by what a round costs: with the same acceptance it would emit the same tokens a round.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from transformers import PreTrainedModel

from ...events import SPECULATIVE
from ...metrics import expected_tokens_per_pass
from .report import Goal, Result
from .session import Session, lanes_of, raced


def rivals(session: Session, name: str) -> Result:
    """Our lanes against transformers' plain and assisted generation."""
    pair, length = session.pair(name), session.options.draft_length
    race = raced(pair, session.prompt, session.settings)
    ours = lanes_of(race, length)
    fast = _speculative_rate(session, ours[SPECULATIVE])
    model: PreTrainedModel = pair.target.model
    prompt = torch.tensor([race.ids], device=session.device)
    figures: dict[str, Any] = {"ours": {"seconds": ours, "tokens_per_second": fast}}
    plain: dict[str, float] = {}
    for cache, options in {
        "dynamic cache": {},
        "static cache": {"cache_implementation": "static", "disable_compile": True},
    }.items():
        figures[cache] = _tried(lambda options=options: _rate(session, model, prompt, options))
        plain |= {cache: figures[cache]["tokens_per_second"]} if "tokens_per_second" in figures[cache] else {}
    figures["assisted"] = _tried(lambda: _assisted(session, model, pair.drafter.model, prompt))  # type: ignore[attr-defined]
    theirs = figures["assisted"].get("round_seconds")
    best = max(plain.values(), default=None)
    goals = (
        Goal(f"{name}: speculative lane ÷ transformers' plain generation", fast / best if best else None, 1.5),
        Goal(f"{name}: a round of transformers ÷ a round of ours", theirs / ours[SPECULATIVE] if theirs else None, 2.0),
    )
    return Result(figures, goals)


def compiled(session: Session, name: str) -> Result:
    """transformers' plain generation with a static cache and its own compilation, which it uses on accelerators."""
    pair = session.pair(name)
    race = raced(pair, session.prompt, session.settings)
    prompt = torch.tensor([race.ids], device=session.device)
    found = _rate(session, pair.target.model, prompt, {"cache_implementation": "static"})
    rate = found["tokens_per_second"]
    fast = _speculative_rate(session, lanes_of(race, session.options.draft_length)[SPECULATIVE])
    goal = Goal(f"{name}: speculative lane ÷ transformers' compiled generation", fast / rate, 1.5)
    return Result({"compiled": found, "ours": fast}, (goal,))


def _speculative_rate(session: Session, round_seconds: float) -> float:
    """Tokens per second of our speculative lane at the acceptance asked for, not at what few draws happened to give."""
    acceptance, length = session.options.synthetic_acceptance, session.options.draft_length
    return expected_tokens_per_pass([acceptance], length) / round_seconds


def _tried(body: Any) -> dict[str, Any]:
    """What `body` returns, or why there is nothing."""
    try:
        found: dict[str, Any] = body()
    except Exception as error:  # one way of generating may fail where another works
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return found


def _generated(model: PreTrainedModel, prompt: torch.Tensor, tokens: int, options: dict[str, Any]) -> int:
    """How many tokens `generate` made."""
    mask = torch.ones_like(prompt)
    out = model.generate(
        prompt, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options
    )
    return int(out.shape[1] - prompt.shape[1])


def _rate(session: Session, model: PreTrainedModel, prompt: torch.Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second after the first: two texts of different length, so that the prefill cancels."""
    tokens = session.tokens // 2
    first, whole = (
        session.seconds(lambda n=n: _generated(model, prompt, n, options), repeats=2)  # type: ignore[misc]
        for n in (2, tokens)
    )
    return {"tokens": tokens, "tokens_per_second": (tokens - 2) / (whole - first)}


def _assisted(
    session: Session, model: PreTrainedModel, assistant: PreTrainedModel, prompt: torch.Tensor
) -> dict[str, Any]:
    """Seconds of a round of assisted generation, from texts of two lengths and the target passes of each."""
    assistant.generation_config.num_assistant_tokens = session.options.draft_length
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    with suppress(AttributeError):
        assistant.generation_config.assistant_confidence_threshold = 0.0
    passes = [0]

    def count(*_: Any) -> None:
        passes[0] += 1

    def timed(tokens: int) -> tuple[float, int]:
        def body() -> None:
            passes[0] = 0
            _generated(model, prompt, tokens, {"assistant_model": assistant})

        return session.seconds(body, repeats=2), passes[0]

    hook = model.register_forward_pre_hook(count)
    try:
        (short, few), (long, many) = timed(2), timed(session.tokens // 2)
    finally:
        hook.remove()
    rounds = max(many - few, 1)
    return {"round_seconds": (long - short) / rounds, "rounds": rounds, "tokens": session.tokens // 2}
