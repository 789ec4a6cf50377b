"""The advisor: what measurements say in words, and which draft length to set.

In: measurements. Out: an `Advice` for every setup, a paragraph of typed sentences, each with the figures behind it and
the name of the table or figure that shows them. A sentence is said only where the data carry it; where they do not, the
advisor says that it cannot tell, and how many prompts or repeats more would. Imports no torch.

Two intervals are used. Sentences show the median of prompts with its 95 % interval, as the tables do. Whether a
sentence is said is decided on stricter ones: means of logarithms with Student's t, at an error that all claims of one
kind share (`ERRORS`; Bonferroni, for categories Holm), so that a paragraph of many sentences is not wrong more often
than one sentence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..student import quantile
from . import intervals, reasons
from .intervals import Interval
from .measurement import Measurement
from .model import Length, Setup, Speedups, Sums, setups, unswept
from .words import Kind, Sentence, between, gain, listed, named, percent, signed

# Probability of at least one false claim of a kind, at most: about the draft lengths over all prompts, about
# categories, about contexts, and about what is behind it.
ERRORS = {"answer": 0.015, "categories": 0.015, "contexts": 0.005, "reasons": 0.015}
SAME = 0.03  # a difference in speed that does not matter
MANY = 300  # prompts or repeats, beyond which their number is not told


@dataclass(frozen=True)
class Advice:
    """What the measurements of one setup say.

    draft_length: the one to set, 0 for decoding without a drafter; None where the measurements cannot tell whether
        speculation pays.
    fixed: the best γ to set by hand, by the mean over prompts of the logarithm of the speedup; 0 where the mean of none
        is above 0.
    """

    setup: Setup
    sentences: tuple[Sentence, ...]
    draft_length: Length | None
    fixed: int

    @property
    def text(self) -> str:
        """The paragraph."""
        return " ".join(sentence.text for sentence in self.sentences)

    @property
    def title(self) -> str:
        """The setup in a few words, for where there are several."""
        return f"{self.setup.drafter or 'drafter'}, {self.setup.rule}, temperature {self.setup.temperature:g}"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {
            "title": self.title,
            "setup": self.setup._asdict(),
            "draft_length": self.draft_length,
            "fixed": self.fixed,
            "text": self.text,
            "sentences": [sentence.to_dict() for sentence in self.sentences],
        }


def advise(measurements: Iterable[Measurement]) -> tuple[Advice, ...]:
    """The advice for every setup that was measured; empty without races of ours."""
    return tuple(_Advisor(setup, found).advice() for setup, found in setups(measurements).items())


class _Advisor:
    """The measurements of one setup and what is asked of them."""

    def __init__(self, setup: Setup, measurements: Sequence[Measurement]) -> None:
        self.setup = setup
        self.all = measurements
        self.plain = unswept(measurements)
        self.speedups = Speedups(self.plain)
        self.lengths = self.speedups.lengths
        self.fixed = [n for n in self.lengths if isinstance(n, int)]
        self.whose = _whose(self.speedups)
        self.error = ERRORS["answer"] / (2 * len(self.lengths))  # half for draft lengths against 1, half for pairs
        means = self.speedups.means
        self.best: Length = max(self.lengths, key=lambda n: means[n])
        self.best_fixed = max(self.fixed, key=lambda n: means[n], default=0)
        self.by_hand = self.best_fixed if self.fixed and means[self.best_fixed] > 0 else 0

    def advice(self) -> Advice:
        verdict, sentences = self._answer()
        chosen: Length | None = {"pays": self.best, "loses": 0, "same": 0}.get(verdict)
        sentences += self._lengths() if verdict == "pays" else []
        sentences += self._categories()
        sentences += self._contexts()
        sums = {n: Sums.of([m for m in self.plain if m.condition.draft_length == n]) for n in self.lengths}
        looked_at = self.best if self.best in self.fixed or not self.fixed else self.best_fixed
        sentences += reasons.reasons(self.plain, sums, looked_at, self.best, ERRORS["reasons"])
        if self.setup.synthetic_acceptance is not None:
            text = f"Acceptance is synthetic, {percent(self.setup.synthetic_acceptance)} a token: only times are real."
            figures = {"acceptance": self.setup.synthetic_acceptance}
            sentences.append(Sentence("synthetic", text, figures, "acceptance"))
        return Advice(self.setup, tuple(sentences), chosen, self.by_hand)

    def _sure(self, length: Length, error: float, category: str | None = None) -> str:
        """Whether a draft length "gains", "loses", or neither, "": both intervals must agree."""
        strict = intervals.mean(self.speedups.of(length, category), error)
        if strict.low > 0:
            return "gains" if self.speedups.shown(length, category).low > 1 else ""
        if strict.high < 0:
            return "loses" if self.speedups.shown(length, category).high < 1 else ""
        return ""

    def _answer(self) -> tuple[str, list[Sentence]]:
        """Whether speculation pays over all prompts: the verdict, and the sentence."""
        shown, strict = self.speedups.shown(self.best), intervals.mean(self.speedups.of(self.best), self.error)
        figures: dict[str, Any] = {"draft_length": self.best, "of": "median", **_figures(shown)}
        if strict.low > 0 and shown.low > 1:
            text = f"Set {named(self.best)}: {self.whose} decode {gain(shown)} faster with it than without a drafter."
            return "pays", [Sentence("pays", text, figures, "draft lengths")]
        if strict.low > 0:
            overall = _ratio(intervals.mean(self.speedups.of(self.best)))
            text = (
                f"Set {named(self.best)}: it gains {gain(overall)} in the geometric mean of {self.whose}, which differ "
                f"much (the median prompt: {signed(shown)})."
            )
            figures |= {"of": "geometric mean", **_figures(overall), "median": shown.value}
            return "pays", [Sentence("pays", text, figures, "draft lengths")]
        if all(self._sure(n, self.error) == "loses" for n in self.lengths):
            text = (
                f"Decode without a drafter: {named(self.best)}, the best of the draft lengths measured, is "
                f"{gain(shown)} slower on {self.whose}."
            )
            return "loses", [Sentence("loses", text, figures, "draft lengths")]
        if strict.low > -SAME and strict.high < SAME:
            text = (
                f"Speculation makes no difference on {self.whose}: with {named(self.best)}, the best of the draft "
                f"lengths measured, the change in speed lies {self._strict(strict)}."
            )
            return "same", [Sentence("same", text, figures, "draft lengths")]
        return "cannot tell", [self._cannot_tell(strict, figures)]

    def _strict(self, strict: Interval) -> str:
        """An interval that is wider than those of the table, with its confidence: what is said of all draft lengths and
        their pairs is to be right together."""
        count = len(self.lengths)
        why = f", shared by {count} draft lengths and their pairs" if count > 1 else ""
        return f"{between(_ratio(strict))} (with {100 * (1 - self.error):.4g} % confidence{why})"

    def _cannot_tell(self, strict: Interval, figures: dict[str, Any]) -> Sentence:
        """What is missing: prompts, or repeats where these scatter more than prompts do."""
        values = self.speedups.of(self.best)
        if len(values) < intervals.LEAST:
            text = "Fewer than three prompts, or repeats of one, cannot tell whether speculation pays: measure more."
            return Sentence("cannot tell", text, {**figures, "more_repeats": 3}, "draft lengths")
        text = (
            f"These measurements cannot tell whether speculation pays on {self.whose}: with {named(self.best)}, the "
            f"best of the draft lengths measured, the change in speed lies {self._strict(strict)}."
        )
        more = max(intervals.LEAST, intervals.prompts_needed(values, SAME, self.error) - len(values))
        unit = "prompts like these" if self.speedups.general else "repeats"
        if more > MANY:
            text += f" More than {MANY} more {unit} would be needed to narrow that to ±{percent(SAME)}."
        else:
            text += f" About {more} more {unit} would narrow that to ±{percent(SAME)}."
        figures["more_prompts" if self.speedups.general else "more_repeats"] = more
        if self.speedups.general and (repeats := self._repeats(len(values))):
            text += f" So would about {repeats} repeats of each."
            figures["repeats"] = repeats
        return Sentence("cannot tell", text, figures, "draft lengths")

    def _repeats(self, prompts: int) -> int | None:
        """Repeats of every prompt that would narrow the interval to ±`SAME` by themselves, None where prompts differ
        too much, or repeats were not measured."""
        logs: dict[str, list[float]] = {}
        for m in self.plain:
            if m.condition.draft_length == self.best:
                logs.setdefault(m.prompt, []).append(math.log(m.speedup or math.nan))
        several = [values for values in logs.values() if len(values) > 1]
        if not several:
            return None
        within = float(np.mean([np.var(values, ddof=1) for values in several]))
        count = float(np.mean([len(values) for values in several]))
        prompt = max(intervals.spread(self.speedups.of(self.best)) ** 2 - within / count, 0.0)
        allowed = prompts * (SAME / quantile(1 - self.error / 2, prompts - 1)) ** 2 - prompt
        found = math.ceil(within / allowed) if allowed > 0 else 0
        return found if count < found <= 20 * count else None

    def _lengths(self) -> list[Sentence]:
        """The best draft length beside the others."""
        found = []
        rival: Length | None = self.best_fixed if self.best not in self.fixed else next(
            (n for n in self.lengths if isinstance(n, str)), None
        )  # fmt: skip
        if rival in self.lengths and rival is not None:
            found.append(self._beside(rival))
        losing = [n for n in self.lengths if self._sure(n, self.error) == "loses"]
        if losing:
            claims = [self._claim(n, None, "loses") for n in losing]
            text = listed([f"{named(n)} loses {gain(self.speedups.shown(n))}" for n in losing])
            found.append(Sentence("lengths", f"Over all, {text}.", {"claims": claims}, "draft lengths"))
        return found

    def _beside(self, rival: Length) -> Sentence:
        """The best draft length against the best fixed one, or against a policy."""
        logs = self.speedups.between(self.best, rival)
        strict, usual = intervals.mean(logs, self.error), _ratio(intervals.mean(logs))
        figures: dict[str, Any] = {"draft_length": self.best, "rival": rival, **_figures(usual)}
        if strict.low > 0:
            text = f"That is {gain(usual)} faster than {named(rival)}"
            text += ", the best fixed draft length measured." if isinstance(rival, int) else "."
            return Sentence("beats", text, figures, "draft lengths")
        text = f"It cannot be told apart from {named(rival)} ({signed(_ratio(strict))})"
        text += ", which needs no setting." if isinstance(rival, str) else ", the best fixed draft length measured."
        return Sentence(
            "equals", text, {"draft_length": self.best, "rival": rival, **_figures(_ratio(strict))}, "draft lengths"
        )

    def _categories(self) -> list[Sentence]:
        """Categories in which the best draft length gains, loses, or neither, and where another one loses."""
        kinds = [k for k in self.speedups.kinds if len(self.speedups.of(self.best, k)) >= intervals.LEAST]
        if not self.speedups.general or len(self.speedups.kinds) < 2 or not kinds:
            return []
        found, verdicts = [], self._settled(kinds)
        for verdict in ("gains", "loses"):
            told = [k for k in kinds if verdicts.get((self.best, k)) == verdict]
            told.sort(key=lambda k: -abs(math.log(self.speedups.shown(self.best, k).value)))
            if told:
                rows = [f"{k} {gain(self.speedups.shown(self.best, k))}" for k in told]
                rows[0] = rows[0].replace(told[0], f"{told[0]} {verdict}", 1)
                text = f"With {named(self.best)}, {listed(rows)}."
                claims = [self._claim(self.best, k, verdict) for k in told]
                found.append(Sentence("categories", text, {"claims": claims}, "categories"))
        unsure = [k for k in kinds if (self.best, k) not in verdicts]
        if unsure:
            most = max(len(self.speedups.of(self.best, k)) for k in unsure)
            text = (
                f"For {listed(unsure)} {most} prompts each are too few for claims about all categories at once; the "
                "interval of each stands in the table."
            )
            found.append(Sentence("cannot tell category", text, {"categories": unsure}, "categories"))
        for k in kinds:
            losing = [n for n in self.lengths if n != self.best and verdicts.get((n, k)) == "loses"]
            if verdicts.get((self.best, k)) == "loses" or not losing:
                continue
            worst = min(losing, key=lambda n: self.speedups.shown(n, k).value)
            claims = [self._claim(worst, k, "loses")]
            text = f"On {k} {named(worst)} loses {gain(self.speedups.shown(worst, k))}"
            if verdicts.get((self.best, k)) == "gains":
                text += f"; {named(self.best)} gains {gain(self.speedups.shown(self.best, k))}"
                claims.append(self._claim(self.best, k, "gains"))
            found.append(Sentence("categories", f"{text}.", {"claims": claims}, "categories"))
        return found

    def _settled(self, kinds: Sequence[str]) -> dict[tuple[Length, str], str]:
        """Draft lengths and categories of which it is sure that they gain, or lose. Each of these pairs may be spoken
        of: the best draft length is known from these measurements alone, so the others count as well. By Holm's method
        (Holm 1979): what is settled at the error of one among those left no longer counts among them."""
        left = [(n, k) for n in self.lengths for k in kinds]
        found: dict[tuple[Length, str], str] = {}
        while left:
            error = ERRORS["categories"] / len(left)
            sure = {(n, k): verdict for n, k in left if (verdict := self._sure(n, error, k))}
            if not sure:
                break
            found |= sure
            left = [pair for pair in left if pair not in sure]
        return found

    def _claim(self, length: Length, category: str | None, verdict: str) -> dict[str, Any]:
        shown = self.speedups.shown(length, category)
        return {"draft_length": length, "category": category, "verdict": verdict, **_figures(shown)}

    def _contexts(self) -> list[Sentence]:
        """Where along the context it pays, for one draft length: the best one, or the first that was swept."""
        swept = [m for m in self.all if m.condition.context is not None]
        lengths = {m.condition.draft_length for m in swept}
        if not lengths:
            return []
        length = self.best if self.best in lengths else sorted(lengths, key=str)[0]
        by_context: dict[int, list[Measurement]] = {}
        for m in swept:
            if m.condition.draft_length == length and m.condition.context is not None:
                by_context.setdefault(m.condition.context, []).append(m)
        if len(by_context) < 2:
            return []
        error = ERRORS["contexts"] / (len(by_context) * len(lengths))
        return _along(length, {c: Speedups(by_context[c]) for c in sorted(by_context)}, error)


def _along(length: Length, by_context: dict[int, Speedups], error: float) -> list[Sentence]:
    """What changes with the context, from the speedups at each; `error` is that of every claim."""
    strict = {c: intervals.mean(s.of(length), error) for c, s in by_context.items()}
    shown = {c: s.shown(length) for c, s in by_context.items()}
    gains = [c for c in by_context if strict[c].low > 0 and shown[c].low > 1]
    loses = [c for c in by_context if strict[c].high < 0 and shown[c].high < 1]
    figures: dict[str, Any] = {
        "draft_length": length, "gains": gains, "loses": loses, "contexts": {c: _figures(e) for c, e in shown.items()},
    }  # fmt: skip
    first, last = min(by_context), max(by_context)
    refers: Kind = "context"
    if len(gains) == len(by_context):
        text = (
            f"{named(length, True)} pays at every context measured, from {first} tokens ({gain(shown[first])} faster) "
            f"to {last} ({gain(shown[last])})."
        )
    elif len(loses) == len(by_context):
        text = f"{named(length, True)} loses at every context measured, from {first} to {last} tokens."
    elif gains and loses and max(gains) < min(loses):
        low, high = max(gains), min(loses)
        a, b = strict[low].value, strict[high].value
        crossing = low * (high / low) ** (a / (a - b)) if low > 0 else high
        figures["crossing"] = crossing
        text = (
            f"Beyond about {_round(crossing)} tokens of context {named(length)} stops paying: it gains "
            f"{gain(shown[low])} at {low} and loses {gain(shown[high])} at {high}."
        )
    elif gains or loses:
        clear = [f"it gains {gain(shown[c])} at {c} tokens" for c in gains[:1] + gains[1:][-1:]]
        clear += [f"it loses {gain(shown[c])} at {c} tokens" for c in loses[:1] + loses[1:][-1:]]
        unsure = [str(c) for c in by_context if c not in gains and c not in loses]
        text = f"Along the context, with {named(length)}, {listed(clear)}"
        text += f"; at {listed(unsure)} tokens the measurements cannot tell." if unsure else "."
    else:
        text = f"At which contexts {named(length)} pays, between {first} and {last} tokens, cannot be told."
    return [Sentence("context", text, figures, refers)]


def _round(tokens: float) -> int:
    """Two significant digits: the crossing lies between two contexts that were measured."""
    size = 10 ** max(math.floor(math.log10(tokens)) - 1, 0)
    return int(round(tokens / size) * size)


def _whose(speedups: Speedups) -> str:
    """Which prompts are spoken of."""
    count = len(set(speedups.prompts))
    return "your prompts" if speedups.general else "this prompt" if count == 1 else f"these {count} prompts"


def _ratio(logs: Interval) -> Interval:
    """Of logarithms; a ratio above e³⁰ is as good as no bound."""
    return logs._replace(value=math.exp(logs.value), low=math.exp(logs.low), high=math.exp(min(logs.high, 30.0)))


def _figures(shown: Interval) -> dict[str, Any]:
    """For JSON, which has no infinity."""
    high = shown.high if math.isfinite(shown.high) else None
    return {"speedup": shown.value, "low": shown.low, "high": high, "prompts": shown.prompts}
