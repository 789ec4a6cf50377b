"""The share image: a card with the headline of a race, its interval, pair and machine, as SVG.

In: a `Trace`. Out: the words of the card, and the SVG of assets/image.svg with them. The page fills the same template
with the same words (assets/image.js).
"""

from __future__ import annotations

from html import escape
from typing import Any

from ..events import BASELINE, SPECULATIVE, Trace
from ..paths import ASSETS
from ..rules import RULES
from ..session.tally import Tally
from ..settings import Settings

VERDICTS = {
    "faster": "faster than the same model without a drafter",
    "slower": "slower than the same model without a drafter",
    "no difference": "no measurable difference: the interval holds 1×",
    "nothing drafted": "nothing was drafted: both lanes took plain steps",
}
OTHERWISE = "speculative ÷ baseline, tokens per second"
PLAIN = "no interval: the file holds the trace alone"
BAR = 560  # pixels of the faster lane's bar


def words(trace: Trace) -> dict[str, str]:
    """What stands on the card, by the names of the places in the template."""
    tally = Tally()
    for r in trace.rounds:
        tally.add(r)
    return told(tally.to_dict(trace), trace)


def told(stats: dict[str, Any], trace: Trace) -> dict[str, str]:
    """As `words`, from the last score board of the race."""
    settings = Settings(**trace.settings)
    rates = {lane: stats[lane]["rate"] or 0.0 for lane in (BASELINE, SPECULATIVE)}
    fastest = max(rates.values()) or 1.0
    interval, facts = stats.get("interval"), []
    if stats["acceptance"] is not None:
        facts.append(f"acceptance rate {100 * stats['acceptance']:.0f} %")
    if stats["per_pass"] is not None:
        facts.append(f"{stats['per_pass']:.2f} tokens per target pass")
    if not settings.synthetic:
        same = "identical texts" if stats["identical"] else "texts differ"
        facts.append(same if settings.same_text or stats["identical"] else "texts drawn separately")
    verdict = VERDICTS.get(stats.get("verdict") or "", OTHERWISE)
    if settings.synthetic:
        verdict = "at a synthetic acceptance: only times mean something"
    elif not RULES[str(settings.rule)].exact:
        verdict += ", lossy"
    place = [str(trace.pair[key]) for key in ("device", "dtype") if trace.pair.get(key)]
    machine = str(trace.machine.get("gpu") or trace.machine.get("processor") or "machine not known")
    when = f"{trace.date[:10]}" if trace.date else "date not known"
    return {
        "speedup": "–" if stats["speedup"] is None else f"{stats['speedup']:.2f}×",
        "verdict": verdict,
        "interval": f"95 % interval {interval[0]:.2f}–{interval[1]:.2f}×" if interval else PLAIN,
        "prompt": cut(" ".join(trace.prompt.split()), 76),
        "baseline": f"{rates[BASELINE]:.1f} tokens/s",
        "speculative": f"{rates[SPECULATIVE]:.1f} tokens/s",
        "baseline_bar": f"{BAR * rates[BASELINE] / fastest:.1f}",
        "speculative_bar": f"{BAR * rates[SPECULATIVE] / fastest:.1f}",
        "facts": " · ".join(facts),
        "pair": cut(" + ".join(str(trace.pair[key]) for key in ("target", "drafter")), 68),
        "machine": cut(" · ".join([", ".join([*place, machine]), when]), 80),
    }


def svg(values: dict[str, str]) -> str:
    """The card. Every word is escaped."""
    text = (ASSETS / "image.svg").read_text(encoding="utf-8")
    before, *pieces = text.split("{{")
    for piece in pieces:  # what is filled in is not searched for places again
        name, after = piece.split("}}", 1)
        before += escape(_clean(values[name])) + after
    return before


def cut(text: str, length: int) -> str:
    """The text, shortened to so many characters."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _clean(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return "".join(c for c in text if c >= " " and not 0xD800 <= ord(c) < 0xE000 and c not in "\ufffe\uffff")
