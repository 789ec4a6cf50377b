"""The words of the advisor: typed sentences, and numbers as sentences have them.

In: numbers with intervals. Out: text. Knows nothing of measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .intervals import Interval

Kind = Literal["draft lengths", "categories", "context", "acceptance", "round time", "texts", "machine"]


@dataclass(frozen=True)
class Sentence:
    """One sentence of the advisor.

    kind: what it says; a program can rely on it.
    text: the sentence.
    figures: the numbers behind it, by name.
    refers: the table or figure that shows them: "draft lengths" and "categories" (speedups over all prompts and by
        category), "context" (speedups by context), "acceptance" (by position), "round time" (draft, verification and
        the rest, by draft length), "texts" (the outputs), "machine" (spread between repeats).
    """

    kind: str
    text: str
    figures: dict[str, Any]
    refers: Kind

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


def named(length: int | str, first: bool = False) -> str:
    """A draft length as sentences call it; `first` at the beginning of one."""
    if isinstance(length, int):
        return f"γ = {length}"
    name = "adaptive" if length == "adaptive" else f"the policy {length}"
    return name[0].upper() + name[1:] if first else name


def percent(share: float) -> str:
    """A share as a percentage, with one digit after the point below 2 %."""
    value = 100 * share
    return f"{value:.1f} %" if abs(value) < 1.95 and round(value, 1) != round(value) else f"{value:.0f} %"


def gain(speedup: Interval) -> str:
    """By how much a speed differs from 1, with its interval, both without a sign: "21 % (17–26)"."""
    ends = sorted(abs(end - 1) for end in (speedup.low, speedup.high))
    digits = 1 if ends[1] < 0.0195 else 0
    return f"{percent(abs(speedup.value - 1))} ({100 * ends[0]:.{digits}f}–{100 * ends[1]:.{digits}f})"


def between(speedup: Interval) -> str:
    """The interval of a speed that may lie on either side of 1: "between −3 and +5 %"."""
    return f"between {_signed(speedup.low - 1)} and {_signed(speedup.high - 1)} %"


def signed(speedup: Interval) -> str:
    """A difference in speed with its interval and signs: "+2 %, −1 to +5"."""
    return f"{_signed(speedup.value - 1)} %, {_signed(speedup.low - 1)} to {_signed(speedup.high - 1)}"


def _signed(share: float) -> str:
    value = 100 * share
    if value > 1000:
        return "more than +1000"
    text = f"{value:+.1f}" if abs(value) < 1.95 else f"{value:+.0f}"
    return text.replace("-", "−").replace("+0.0", "0").replace("−0.0", "0")


def share(interval: Interval) -> str:
    """A share with its interval: "61 % (58–64)"; without it where it is no wider than the digits shown."""
    digits = 1 if 100 * interval.high < 1.95 else 0
    ends = [f"{100 * max(end, 0.0):.{digits}f}" for end in (interval.low, interval.high)]
    return percent(interval.value) + (f" ({ends[0]}–{ends[1]})" if ends[0] != ends[1] else "")


def times(interval: Interval) -> str:
    """A factor with its interval: "1.6 times (1.5–1.7)"; without it where it is no wider than the digits shown."""
    low, high = f"{interval.low:.2g}", f"{interval.high:.2g}"
    return f"{interval.value:.2g} times" + (f" ({low}–{high})" if low != high else "")


def listed(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""
