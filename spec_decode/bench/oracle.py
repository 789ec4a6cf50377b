"""What a controller could gain that knew every verdict before it chose: the bound of all choices of draft length.

In: a pair and prompts. Out: speedups of every fixed draft length, of the adaptive controller and of an oracle, over the
same drafts and the same costs.

Under a rule that makes the same text whatever is drafted (greedy, coupled), a text and the longest draft at each of its
positions hold all that any controller can meet. They are recorded once (`record`). After that a lane is simulated
(`play`) with the measured costs of the pair, without the noise of clocks. The oracle is a shortest path over the
positions of the text: each draft length of each drafter leads from one to another.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import decode
from ..draft_length import Adaptive, Controller, EarlyStop, Fixed
from ..drafters import Draft, Drafter, early
from ..drafters.either import EitherDrafter
from ..drafters.matching import MatchingDrafter
from ..errors import UserError
from ..events import SPECULATIVE, Costs, Round, Token
from ..loading.pair import Pair
from ..settings import MAX_DRAFT_LENGTH, Settings
from ..state import State
from ..text import TextStream, encode_chat

SHORTEST = 48  # tokens of a text that is counted
FIXED = (1, 2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Recorded:
    """A text and the drafts that could have been made on the way.

    Attributes:
        text: ids of the output.
        drafts: by the number of tokens before it, prompt included, the ids of the longest draft there, and the
            drafter's confidence in each, None where it tells none.
    """

    id: str
    category: str
    prompt: list[int]
    text: list[int]
    drafts: dict[int, tuple[list[int], list[float] | None]]

    def accepted(self, at: int, ids: Sequence[int]) -> int:
        """How many of these ids the target emits from the position `at` of its output on."""
        following = self.text[at : at + len(ids)]
        return next((i for i, (a, b) in enumerate(zip(ids, following, strict=False)) if a != b), len(following))


class _Recorder(Drafter):
    """Asks another drafter for a draft before every step, notes it and hands none in."""

    def __init__(self, inner: Drafter) -> None:
        self.inner, self.name, self.needs_hidden = inner, inner.name, inner.needs_hidden
        self.drafts: dict[int, tuple[list[int], list[float] | None]] = {}

    def start(self, prompt: list[int], settings: Settings, capacity: int) -> Any:
        return self.inner.start(prompt, settings, capacity)

    def extend(self, tokens: list[int]) -> None:
        self.inner.extend(tokens)

    def draft_on_host(self, state: State, length: int, stop: EarlyStop | None) -> Draft:
        longest = min(MAX_DRAFT_LENGTH, state.cache.capacity - state.length - 1)
        made = self.inner.draft_on_host(state, longest, None) or self.inner.draft(state, longest)
        confidence = None if made.confidence is None else made.confidence[0].tolist()
        self.drafts[state.length] = made.ids[0].tolist(), confidence
        return Draft.none(state)

    def close(self) -> None:
        self.inner.close()


class _Replayed(Drafter):
    """Drafts what was recorded; a `stop` ends its drafts as it would have ended them then."""

    def __init__(self, recorded: Recorded, name: str) -> None:
        self.recorded, self.name = recorded, name

    def draft_on_host(self, state: Any, length: int, stop: EarlyStop | None) -> Draft:
        ids, confidence = self.recorded.drafts.get(state.length, ([], None))
        ids = ids[:length]
        if confidence is None:
            return Draft(torch.tensor([ids]), drafter=self.name)
        count = min(1, len(ids))
        while count < len(ids) and (stop is None or stop.go_on(confidence[:count])):
            count += 1
        made = Draft(torch.tensor([ids[:count]]), confidence=torch.tensor([confidence[:count]]), drafter=self.name)
        return early(made, stop, length)


@dataclass
class _Place:
    """As much of a `State` as drafters on the host read."""

    length: int


def record(pair: Pair, prompts: Sequence[dict[str, str]], settings: Settings) -> Iterator[Recorded]:
    """Decodes the prompts ({"id", "category", "prompt"}) once, with the longest draft noted at each position.

    Raises:
        UserError: under the rule of `settings` the text depends on the drafts.
    """
    if not settings.same_text:
        raise UserError("An oracle needs a rule under which the text does not depend on drafts: greedy or coupled.")
    inner = pair.drafter.other if isinstance(pair.drafter, EitherDrafter) else pair.drafter
    for prompt in prompts:
        ids = encode_chat(pair.tokenizer, prompt["prompt"], None, False)
        watch = _Recorder(inner)
        rounds = decode.speculative(pair.target, watch, Fixed(1), ids, TextStream(pair.tokenizer, ids), settings)
        text = [token.id for found in rounds for token in found.emitted]
        yield Recorded(prompt["id"], prompt["category"], ids, text, watch.drafts)


def drafter_of(pair: Pair, recorded: Recorded) -> Drafter:
    """The pair's drafter with its drafts replayed. A drafter that finds matches is the real one, since its drafts cost
    nothing to make again."""
    own = pair.drafter
    if isinstance(own, MatchingDrafter):
        return own
    if isinstance(own, EitherDrafter):
        return EitherDrafter(_Replayed(recorded, own.other.name), own.lookup)
    return _Replayed(recorded, own.name)


def play(recorded: Recorded, drafter: Drafter, controller: Controller, costs: Costs, most: int) -> float:
    """The speedup of a lane that this controller steers, by the costs: plain steps for the text ÷ the cost of its
    rounds. The prefill and the first token are left out.

    Args:
        most: tokens that the text could have had, which limits the last drafts.
    """
    text, start = recorded.text, len(recorded.prompt)
    drafter.start(recorded.prompt, Settings(), start + most)
    drafter.extend(text[:1])
    at, index, spent = 1, 1, 0.0
    while at < len(text):
        length = min(controller.choose(), most - at - 1)
        made, ids, sure = None, [], None
        if length > 0:
            place: Any = _Place(start + at)
            made = drafter.draft_on_host(place, length, controller.early_stop)
            assert made is not None
            ids = made.ids[0].tolist()
            sure = None if made.confidence is None else made.confidence[0].tolist()
        accepted = recorded.accepted(at, ids)
        draft, whole = _cost(costs, len(ids), free=made is not None and made.confidence is None)
        roles = ["accepted"] * accepted + ["rejected"] * (len(ids) - accepted)
        own = "target" if not ids else "bonus" if accepted == len(ids) else "correction"
        tokens = [
            Token(id, "", role, q=sure and sure[i], draft_position=i + 1)  # type: ignore[arg-type]
            for i, (id, role) in enumerate(zip(ids, roles, strict=True))
        ]
        seconds = whole * costs.step_seconds
        done = Round(
            SPECULATIVE, index, (*tokens, Token(0, "", own)), length,  # type: ignore[arg-type]
            draft * costs.step_seconds, seconds, seconds, 0.0, drafter=made.drafter if made else "",
        )  # fmt: skip
        controller.observe(done, made.stopped_early if made else None)
        emitted = text[at : at + accepted + 1]
        drafter.extend(emitted)
        at, index, spent = at + len(emitted), index + 1, spent + whole
    return (len(text) - 1) / spent


def bound(recorded: Recorded, drafter: Drafter, costs: Costs) -> float:
    """The speedup of an oracle: the cheapest way through the text, of all draft lengths and of both drafters."""
    text, start = recorded.text, len(recorded.prompt)
    options: list[list[tuple[list[int], bool]]] = [[] for _ in text]
    lookup = drafter.lookup if isinstance(drafter, EitherDrafter) else drafter
    if isinstance(lookup, MatchingDrafter):
        lookup.start(recorded.prompt, Settings(), start + len(text))
        for at in range(1, len(text)):
            lookup.extend(text[at - 1 : at])
            options[at].append((lookup.match(MAX_DRAFT_LENGTH)[1], True))
    for at in range(1, len(text)):
        if start + at in recorded.drafts:
            ids, confidence = recorded.drafts[start + at]
            options[at].append((ids, confidence is None))
    least = [0.0] * (len(text) + MAX_DRAFT_LENGTH + 2)
    for at in range(len(text) - 1, 0, -1):
        ways = [_cost(costs, 0)[1] + least[at + 1]]
        for ids, free in options[at]:
            right = recorded.accepted(at, ids)
            # a draft that goes on behind its first mistake brings no more tokens, but a wider pass may be a cheaper one
            ways += [
                _cost(costs, n, free)[1] + least[min(at + min(n, right) + 1, len(text))] for n in range(1, len(ids) + 1)
            ]
        least[at] = min(ways)
    return (len(text) - 1) / least[1]


def _cost(costs: Costs, drafted: int, free: bool = False) -> tuple[float, float]:
    """Draft and whole round in plain steps. free: the draft was found in the text."""
    draft = 0.0 if free else costs.draft(drafted)
    return draft, costs.round(drafted) - costs.draft(drafted) + draft


def measure(
    pair: Pair, prompts: Sequence[dict[str, str]], settings: Settings, say: Callable[[str], None]
) -> dict[str, Any]:
    """Speedups over texts of `SHORTEST` tokens or more: "fixed" by draft length, "adaptive", "oracle", each the
    geometric mean and the median of the prompts; "best_fixed" one length for all, "closed" the share of the way from
    there to the oracle, in the mean, that the adaptive controller goes."""
    costs = pair.learned or pair.costs
    assert costs is not None
    found, most = [], settings.max_new_tokens
    for done in record(pair, prompts, settings):
        say(f"{done.id}: {len(done.text)} tokens")
        if len(done.text) >= SHORTEST:
            found.append((done, drafter_of(pair, done)))
    if not found:
        raise UserError(f"No text has {SHORTEST} tokens; allow more with --max-new-tokens.")

    def over(make: Callable[[], Controller]) -> dict[str, float]:
        return _summary([play(text, drafter, make(), costs, most) for text, drafter in found])

    fixed = {length: over(lambda length=length: Fixed(length)) for length in FIXED}  # type: ignore[misc]
    adaptive = over(lambda: Adaptive(costs))
    oracle = _summary([bound(text, drafter, costs) for text, drafter in found])
    best = max(fixed, key=lambda length: fixed[length]["mean"])
    way = oracle["mean"] - fixed[best]["mean"]
    return {
        "texts": len(found),
        "costs": costs.to_dict(),
        "fixed": {str(length): speedup for length, speedup in fixed.items()},
        "best_fixed": best,
        "adaptive": adaptive,
        "oracle": oracle,
        "closed": (adaptive["mean"] - fixed[best]["mean"]) / way if way > 0 else None,
    }


def _summary(speedups: Sequence[float]) -> dict[str, float]:
    return {
        "mean": statistics.geometric_mean(speedups),
        "median": statistics.median(speedups),
        "least": min(speedups),
    }
