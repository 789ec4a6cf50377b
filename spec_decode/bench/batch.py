"""The benchmark of batches: how the speedup falls as more prompts are decoded at once, and where it crosses 1.

In: a pair, prompts, settings, batch sizes. Out: figures for every size, as an object and as a table. A batch of n takes
n different prompts of the file. Both lanes decode it, one after the other, from one reading of the prompts; which goes
first alternates from batch to batch, so that a machine that becomes slower harms both. The speedup is over the same
prompts in a batch of the same size: speculative tokens/s ÷ baseline tokens/s, of all rows together, from the first
tokens to the end of the last row. Rows end at different times and leave, so passes become narrower towards the end of a
batch; `rows_per_pass` tells their mean width.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import batch
from ..decode import Lane, Prefill
from ..errors import OutOfMemory, UserError, is_out_of_memory
from ..events import BASELINE, SPECULATIVE
from ..metrics import Lane as Rounds
from ..metrics import ratio, speedup_with_interval
from ..request import Request
from ..settings import MAX_DRAFT_LENGTH, Settings
from ..sources.local import Race
from ..text import TextStream

if TYPE_CHECKING:
    from ..loading.pair import Pair

REPEATS = 3
MOST = 1024  # rows of a batch
WARM_UP = 3  # rounds of a lane at a new size that nothing is measured of

Ids = list[list[int]]


def sizes_of(text: str) -> list[int]:
    """The batch sizes in a list such as "1,2,4,8", ascending.

    Raises:
        UserError: one is no whole number from 1 to `MOST`.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= MOST for part in parts):
        raise UserError(f"--batch-size takes whole numbers from 1 to {MOST}, such as 1,2,4,8, and not {text!r}.")
    return sorted({int(part) for part in parts})


def filling(prompts: Sequence[dict[str, str]], sizes: Sequence[int]) -> Sequence[dict[str, str]]:
    """The prompts that fill batches of the largest size.

    Raises:
        UserError: there are too few for one.
    """
    most = max(sizes)
    if len(prompts) < most:
        raise UserError(f"A batch of {most} takes as many different prompts, and the file holds {len(prompts)}.")
    return prompts[: len(prompts) // most * most]


@dataclass
class _Tally:
    """One lane at one size, over all batches and repeats: tokens, seconds and rows of every round after the first of
    its batch, and tokens and seconds of the first ones."""

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    first_tokens: int = 0
    first_seconds: float = 0.0
    drafted: int = 0
    accepted: int = 0

    def run(self, lane: Lane, prefills: Sequence[Prefill], seeds: Sequence[int], tokenizer: Any) -> Ids:
        """Decodes one batch, and returns the tokens of every row."""
        texts = [TextStream(tokenizer, prefill.prompt) for prefill in prefills]
        ids: Ids = [[] for _ in prefills]
        for number, done in enumerate(batch.decode(lane, prefills, texts, seeds)):
            for row, round in done.rounds.items():
                ids[row] += [token.id for token in round.emitted]
                self.drafted += round.drafted
                self.accepted += round.accepted
            if number == 0:
                self.first_tokens += done.emitted
                self.first_seconds += done.seconds
            else:
                self.tokens.append(done.emitted)
                self.seconds.append(done.seconds)
                self.rows.append(len(done.rounds))
        return ids

    @property
    def figures(self) -> dict[str, Any]:
        return {
            "tokens_per_second": ratio(sum(self.tokens), sum(self.seconds)),
            "time_to_first_tokens": self.first_seconds,
            "tokens": self.first_tokens + sum(self.tokens),
            "seconds": sum(self.seconds),
            "passes": len(self.rows),
            "rows_per_pass": ratio(sum(self.rows), len(self.rows)),
        }

    @property
    def rounds(self) -> Rounds:
        return Rounds(np.array(self.tokens, float), np.array(self.seconds), self.first_tokens, self.first_seconds)


def measure(
    pair: Pair,
    prompts: Sequence[dict[str, str]],
    settings: Settings,
    sizes: Sequence[int],
    repeats: int = REPEATS,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures both lanes at every batch size.

    The prompts are as many as fill batches of the largest size; every size takes them in order and leaves out what does
    not fill a batch of its own. The prompt with number i, from 0, has the seed `settings.seed` + i at every size.

    Args:
        prompts: {"id", "prompt", …} each.
        sizes: ascending.
        repeats: of everything.
        say: gets a line after each size.

    Returns:
        {"sizes": a list of figures by size (`_figures`), "repeats", "crossing": where the speedup crosses 1
        (`crossing`), "skipped": why larger sizes were not measured, or None}. Rates are tokens/s, times seconds.

    Raises:
        UserError: there are fewer prompts than rows, the draft length is not a number, or the target or drafter takes
            one text at a time.
        PromptError: a prompt is empty, or too long.
        OutOfMemory: the device ran out at the first size.
    """
    prompts = filling(prompts, sizes)
    lanes = {
        BASELINE: batch.baseline(pair.target, settings),
        SPECULATIVE: batch.speculative(pair.target, pair.drafter, settings),
    }
    # A row may draft beyond its last token, so a prompt leaves room for that.
    longest = replace(settings, max_new_tokens=settings.max_new_tokens + MAX_DRAFT_LENGTH)
    ids = [Race(pair, Request(prompt["prompt"], longest)).ids for prompt in prompts]
    seeds = batch.row_seeds(settings.seed, len(prompts))
    alone: dict[int, list[int]] = {}  # the baseline's text of each prompt in a batch of its own
    found: list[dict[str, Any]] = []
    skipped = None
    for size in sizes:
        try:
            found.append(_figures(_Case(pair, lanes, settings, ids, seeds), size, repeats, alone))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the tensors of the pass
            skipped = f"The device ran out of memory at a batch of {size}."
            if not found:
                raise OutOfMemory(f"{skipped[:-1]}; try shorter prompts or fewer new tokens.") from error
            break
        say(f"{len(found)} of {len(sizes)} batch sizes")
    points = [(row["size"], row["speedup"]) for row in found if row["speedup"] is not None]
    return {"sizes": found, "repeats": repeats, "crossing": crossing(points), "skipped": skipped}


@dataclass(frozen=True)
class _Case:
    """What is the same at every size."""

    pair: Pair
    lanes: dict[str, Lane]
    settings: Settings
    ids: Ids
    seeds: Sequence[int]

    def prefills(self, numbers: Sequence[int]) -> list[Prefill]:
        """The prompts with these numbers, read."""
        hidden = self.lanes[SPECULATIVE].drafter.needs_hidden
        return batch.read(self.pair.target, [self.ids[number] for number in numbers], self.settings, hidden)


def _figures(case: _Case, size: int, repeats: int, alone: dict[int, list[int]]) -> dict[str, Any]:
    """Figures of one size: "baseline" and "speculative" (`_Tally.figures`), the speedup and its 95 % interval by a
    block bootstrap over rounds, and how many texts were identical in both lanes, and as in a batch of one."""
    tallies = {name: _Tally() for name in case.lanes}
    identical = as_alone = texts = 0
    groups = [range(first, first + size) for first in range(0, len(case.ids) - size + 1, size)]
    _warm_up(case, groups[0])
    for turn, numbers in enumerate(numbers for _ in range(repeats) for numbers in groups):
        prefills = case.prefills(numbers)
        try:
            said = {
                name: tallies[name].run(
                    case.lanes[name], prefills, [case.seeds[number] for number in numbers], case.pair.tokenizer
                )
                for name in (list(case.lanes) if turn % 2 == 0 else list(case.lanes)[::-1])
            }
        finally:
            for prefill in prefills:
                prefill.free()
        texts += size
        identical += sum(one == other for one, other in zip(said[BASELINE], said[SPECULATIVE], strict=True))
        if size == 1:
            alone |= dict(zip(numbers, said[BASELINE], strict=True))
        as_alone += sum(alone.get(number) == own for number, own in zip(numbers, said[BASELINE], strict=True))
    base, fast = tallies[BASELINE], tallies[SPECULATIVE]
    estimate = speedup_with_interval(base.rounds, fast.rounds)
    return {
        "size": size,
        "prompts": len(groups) * size,
        "baseline": base.figures,
        "speculative": {
            **fast.figures,
            "acceptance_rate": ratio(fast.accepted, fast.drafted),
            "tokens_per_pass": 1 + fast.accepted / sum(fast.rows) if fast.rows else None,
        },
        "speedup": estimate.value if estimate else None,
        "speedup_interval": [estimate.low, estimate.high] if estimate else None,
        "end_to_end_speedup": estimate.end_to_end if estimate else None,
        "texts": texts,
        "identical": identical,
        "as_alone": as_alone if alone else None,
    }


def _warm_up(case: _Case, numbers: Sequence[int]) -> None:
    """The first rounds of both lanes, so that nothing is compiled or allocated for the first time while it counts."""
    prefills = case.prefills(numbers)
    try:
        for lane in case.lanes.values():
            texts = [TextStream(case.pair.tokenizer, prefill.prompt) for prefill in prefills]
            with closing(batch.decode(lane, prefills, texts, case.seeds[: len(prefills)])) as rounds:
                for _ in islice(rounds, WARM_UP):
                    pass
    finally:
        for prefill in prefills:
            prefill.free()


def crossing(points: Sequence[tuple[int, float]]) -> dict[str, Any] | None:
    """Where the speedup first crosses 1, in either direction: "between" two sizes that follow each other, and "at" a
    size that is linear between them in the logarithms of size and speedup. None where it stays on one side.

    Args:
        points: (size, speedup), sizes ascending.
    """
    for (size, value), (larger, after) in pairwise(points):
        if (value > 1) != (after > 1):
            share = math.log(value) / (math.log(value) - math.log(after))
            return {"between": [size, larger], "at": size * (larger / size) ** share}
    return None


def conclusion(report: dict[str, Any]) -> str:
    """Where the speedup crosses 1, in a sentence or two, from the report of `measure`."""
    rows = [row for row in report["sizes"] if row["speedup"] is not None]
    if not rows:
        return "No speedup was measured: a text needs more than one token."
    sizes = [row["size"] for row in rows]
    span = f"a batch of {sizes[0]}" if len(sizes) == 1 else f"batches of {sizes[0]} to {sizes[-1]}"
    if report["crossing"] is None:
        side = "above" if rows[0]["speedup"] > 1 else "at or below"
        said = f"The speedup stays {side} 1 in {span}: it does not cross 1 in what was measured."
    else:
        low, high = report["crossing"]["between"]
        said = (
            f"The speedup crosses 1 between batches of {low} and {high}, at about {report['crossing']['at']:.1f} rows."
        )
    open_ = [str(row["size"]) for row in rows if row["speedup_interval"][0] <= 1 <= row["speedup_interval"][1]]
    return said + (f" Its interval holds 1 at {', '.join(open_)}." if open_ else "")


def table(report: dict[str, Any], same_text: bool) -> str:
    """The report of `measure` as Markdown.

    Args:
        same_text: the rule promises both lanes the same text (`Settings.same_text`).
    """
    return "\n".join(_lines(report, same_text))


def _lines(report: dict[str, Any], same_text: bool) -> Iterator[str]:
    yield (
        "| batch | prompts | baseline tok/s | speculative tok/s | speedup | 95 % interval | acceptance | tokens/pass "
        "| rows/pass | identical |"
    )
    yield "|" + " ---: |" * 10
    for row in report["sizes"]:
        base, fast = row["baseline"], row["speculative"]
        low, high = row["speedup_interval"] or (None, None)
        cells: Iterable[str] = (
            str(row["size"]),
            str(row["prompts"]),
            _show(base["tokens_per_second"], 1),
            _show(fast["tokens_per_second"], 1),
            f"{_show(row['speedup'], 2)}×",
            f"{_show(low, 2)} to {_show(high, 2)}",
            _show(fast["acceptance_rate"], 2),
            _show(fast["tokens_per_pass"], 2),
            _show(fast["rows_per_pass"], 1),
            f"{row['identical']} of {row['texts']}" if same_text else "not promised",
        )
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield (
        f"Tokens/s of all rows together, {report['repeats']} times each. tokens/pass is a row's, rows/pass the mean "
        "width of the speculative passes; rows that have ended leave."
    )
    yield conclusion(report)
    for row in report["sizes"]:
        if row["as_alone"] is not None and row["as_alone"] < row["texts"]:
            yield (
                f"In a batch of {row['size']}, {row['texts'] - row['as_alone']} of {row['texts']} baseline texts "
                "differ from those of the prompt alone: sums are rounded differently in wider passes."
            )
    if report["skipped"]:
        yield report["skipped"]


def _show(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
