"""Tiny random models of real classes (`spec_decode.check.tiny`), a scripted drafter and a pair around them: what the
engine's tests race."""

from __future__ import annotations

from typing import Any

import torch

from spec_decode.cache import RollbackCache
from spec_decode.check.tiny import COMMON, GEMMA4, SLIDING, VOCABULARY, WINDOW, Characters, gemma4, model  # noqa: F401
from spec_decode.draft_length import EarlyStop
from spec_decode.drafters import Draft, Drafter
from spec_decode.state import State
from spec_decode.target import Target

CPU = torch.device("cpu")


def state(tokens: list[int], cache: Any = None, hidden: torch.Tensor | None = None) -> State:
    """A lane after these tokens, the last of which the target has not read; `hidden` `[H]` predicted it."""
    made = State.after(tokens, len(tokens), RollbackCache.__new__(RollbackCache) if cache is None else cache, CPU)
    made.hidden = None if hidden is None else hidden.view(1, -1)
    return made


def read(target: Target, prompt: list[int], last: int, room: int = 32) -> State:
    """The state after `target` has read `prompt`, whatever it predicts, and `last` was emitted."""
    cache = target.new_cache(len(prompt) + room)
    passed = target.prefill(torch.tensor(prompt), cache, hidden=True)
    assert passed.hidden is not None
    return state([*prompt, last], cache, passed.hidden[0])


def drafted(drafter: Drafter, length: int, stop: EarlyStop | None = None, after: State | None = None) -> Draft:
    """A draft as decoding asks for it; drafters on the host that keep the text themselves need no state."""
    after = state([0]) if after is None else after
    made = drafter.draft_on_host(after, length, stop)
    return drafter.draft(after, length) if made is None else made


def ids(draft: Draft) -> list[int]:
    """The drafted ids of the one row."""
    (row,) = draft.ids.tolist()
    return list(row)


class ScriptedDrafter(Drafter):
    """Drafts what a function of (tokens so far, length) says; the sequence it was fed is there to look at."""

    name = "scripted"

    def __init__(self, script: Any) -> None:
        self.script = script
        self.tokens: list[int] = []
        self.closed = False

    def start(self, prompt: list[int], settings: Any, capacity: int) -> None:
        self.tokens, self.closed = list(prompt), False

    def extend(self, tokens: list[int]) -> None:
        self.tokens += tokens

    def draft_on_host(self, state: State, length: int, stop: EarlyStop | None) -> Draft:
        return Draft(torch.tensor([self.script(self.tokens, length)], dtype=torch.long), drafter=self.name)

    def close(self) -> None:
        self.closed = True


class PairOf:
    """What a race asks of a pair, around a tiny target."""

    def __init__(self, target: Target, drafter: Any) -> None:
        self.target, self.drafter, self.tokenizer = target, drafter, Characters()
        self.context, self.costs, self.learned = target.context, None, None
        self.info = {"target": "tiny", "drafter": drafter.name, "device": "cpu", "dtype": "float32"}
        self.machine: dict[str, Any] = {}
        self.drafter_model, self.drafter_path = None, ""
