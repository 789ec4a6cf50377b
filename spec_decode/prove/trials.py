"""Texts of `decode`, the generator that races use, on a target whose distribution of texts can be enumerated.

In: a `Setup`. Out: the cells, their exact probabilities, and the cell of every text. Sampling, noise, the loop, the
rule and the drafters are the engine's own; the target and the drafter's model are tables of logits (`table`).

Above temperature 0 a cell is a sequence of the first three tokens over a vocabulary of three. The first token comes
from the prompt's pass, the other two from drafts, from corrections and from the tokens after accepted drafts. Every
text has a seed of its own, and noise of different seeds is independent, so texts are independent draws. A controller
that lives on from text to text sees only texts that are finished, so each new one follows the target given all of them.

At temperature 0 the target's text is its argmax and there is nothing to count but whether the text is that one: every
index has a target of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .. import decode
from ..draft_length import EarlyStop, controller
from ..drafters import Draft, Drafter
from ..drafters.either import EitherDrafter
from ..drafters.lookup import LookupDrafter
from ..drafters.model import ModelDrafter
from ..drafters.suffix import SuffixDrafter
from ..sampling import distribution
from ..settings import Settings
from ..state import State
from .setup import CLAIMED, NEW_TOKENS, Setup
from .table import SilentText, TableTarget, joint

VOCABULARY = 3
PROMPT = (0, 0, 1, 0, 2, 1, 1, 2, 2, 0, 1)  # every pair of tokens, so that lookup has something to find


def logits(seed: int, scale: float = 0.8) -> Tensor:
    """A table `[V, V, V]`: logits of the next token given the last two."""
    drawn = np.random.Generator(np.random.PCG64(seed)).standard_normal((VOCABULARY,) * 3)
    return torch.from_numpy(drawn).float() * scale


TARGET = logits(7)
OTHER = 0.5 * TARGET + logits(98)  # the drafter's: it has learned half of the target


class ArgmaxDrafter(ModelDrafter):
    """Drafts the likeliest tokens of its model, whatever the temperature; nothing is drawn."""

    def start(self, prompt: list[int], settings: Settings, capacity: int):  # type: ignore[no-untyped-def]
        return super().start(prompt, replace(settings, temperature=0.0), capacity)


class ClaimingDrafter(ArgmaxDrafter):
    """The same with a q that the tokens were not drawn from: what makes `setup.WRONG` wrong."""

    def start(self, prompt: list[int], settings: Settings, capacity: int):  # type: ignore[no-untyped-def]
        self.claimed = distribution(self.model.logits, settings)  # type: ignore[attr-defined]
        return super().start(prompt, settings, capacity)

    def draft_on_host(self, state: State, length: int, stop: EarlyStop | None) -> Draft | None:
        made = super().draft_on_host(state, length, stop)
        assert made is not None
        text = [*state.tokens[0, state.length - 2 : state.length].tolist(), *made.ids[0].tolist()]
        return replace(made, q=torch.stack([self.claimed[pair] for pair in pairwise(text[:-1])])[None])


def drafter(name: str, table: Tensor) -> Drafter:
    """The drafter of this name; `table` is its model, where it has one."""
    model = TableTarget(table)
    kinds = {"model": ModelDrafter, "argmax": ArgmaxDrafter, CLAIMED: ClaimingDrafter}
    if name in kinds:
        return kinds[name](model, name, VOCABULARY)  # type: ignore[arg-type]
    if name == "model+lookup":
        return EitherDrafter(ModelDrafter(model, "model", VOCABULARY), LookupDrafter())  # type: ignore[arg-type]
    return LookupDrafter() if name == "lookup" else SuffixDrafter()


def cells(setup: Setup) -> list[str]:
    """The name of every cell."""
    if setup.greedy:
        return ["the target’s argmax", "another text"]
    letters = [chr(ord("A") + i) for i in range(VOCABULARY)]
    names = [""]
    for _ in range(NEW_TOKENS):
        names = [name + letter for name in names for letter in letters]
    return names


def probabilities(setup: Setup) -> np.ndarray:
    """The exact probability of every cell, float64 `[cells]`."""
    if setup.greedy:
        return np.array([1.0, 0.0])
    return joint(distribution(TARGET, setup.settings(0)), PROMPT, NEW_TOKENS).flatten().numpy()


def drawn(setup: Setup, first: int = 0, count: int | None = None) -> Iterator[int]:
    """The cell of every text from the index `first` on, `count` of them or all."""
    lengths = controller(setup.settings(0), None)
    target, guess = TableTarget(TARGET), drafter(setup.drafter, OTHER)
    end = setup.seeds if count is None else min(first + count, setup.seeds)
    for index in range(first, end):
        if setup.greedy:
            table = logits(setup.first + index)
            target, guess = TableTarget(table), drafter(setup.drafter, 0.5 * table + OTHER)
        lane = decode.speculative(target, guess, lengths, list(PROMPT), SilentText(), setup.settings(index))  # type: ignore[arg-type]
        ids: list[int] = []
        with closing(lane):  # type: ignore[type-var]
            while len(ids) < NEW_TOKENS:
                ids += [token.id for token in next(lane).emitted]
        ids = ids[:NEW_TOKENS]
        if setup.greedy:
            yield int(ids != _argmax(target.logits))
        else:
            yield int(np.ravel_multi_index(ids, (VOCABULARY,) * NEW_TOKENS))


def _argmax(table: Tensor) -> list[int]:
    """The target's own text at temperature 0."""
    text = list(PROMPT)
    for _ in range(NEW_TOKENS):
        text.append(int(table[text[-2], text[-1]].argmax()))
    return text[len(PROMPT) :]
