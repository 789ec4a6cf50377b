"""How often the measured speedup lies in the predicted band.

    python -m spec_decode check predicted-speedup [--prompts 12] [--max-new-tokens 256]

Races the embedded pair, adaptive, on held-out prompts, takes the predicted band of every draft length from each race,
and then races every fixed length twice on the same prompt. Prints, by draft length and for all: how many of the later
races fell inside the band, the median relative width of the band, the median of predicted ÷ measured, and the width
that a band needs at least: two races of one length have the same tokens and differ by the machine alone, and a band
around the true mean that holds 90 % of races is 3.29 of their standard deviations wide. Then how often a best length
was named, and how its speedup compared with the fastest. Needs an idle machine; takes about ten minutes.
"""

from __future__ import annotations

import argparse
import json
import math
from statistics import median

from ..events import Trace
from ..loading.pair import load_pair
from ..metrics import speedup
from ..paths import ASSETS
from ..prediction import LENGTHS, predict
from ..request import Request
from ..settings import Settings
from ..sources.local import Race

BACK = LENGTHS[::-1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `check predicted-speedup`."""
    parser.add_argument(
        "--prompts", type=int, default=12, metavar="N", help="spread over assets/heldout.jsonl (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T")
    parser.add_argument("--drafter", metavar="ID", help="as for `race` (default: the pair's own)")
    parser.add_argument(
        "--from", dest="source", default="adaptive", metavar="N", help="draft length of the race predicted from"
    )


def run(options: argparse.Namespace) -> None:
    """Prints a line for each prompt, then the table by draft length."""
    lines = (ASSETS / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line) for line in lines[:: max(len(lines) // options.prompts, 1)]][: options.prompts]
    pair = load_pair(drafter=options.drafter, device="cpu")

    def race(prompt: str, length: int | str) -> Trace:
        made = Race(
            pair,
            Request(
                prompt,
                Settings(
                    draft_length=length, max_new_tokens=options.max_new_tokens, temperature=options.temperature, seed=1
                ),
            ),
        )
        for _ in made:
            pass
        return made.trace

    race(prompts[0]["prompt"], "adaptive")  # the first race of a process is slower
    rows: list[tuple[int, float, float, float, tuple[float, float]]] = []  # γ, low, median, high, measured twice
    named: list[float] = []  # speedup of the best length named ÷ that of the fastest
    for prompt in prompts:
        found = predict(race(prompt["prompt"], options.source))
        if found is None:
            print(f"{prompt['id']:24} nothing was drafted", flush=True)
            continue
        first, again = ({n: speedup(race(prompt["prompt"], n)) or 0.0 for n in order} for order in (LENGTHS, BACK))
        later = {n: (first[n], again[n]) for n in LENGTHS}
        here = list(zip(found.lengths, found.low, found.median, found.high, later.values(), strict=True))
        rows += here
        if found.best:
            named.append(sum(later[found.best]) / max(sum(twice) for twice in later.values()))
        cells = (
            " ".join(f"{m:.2f}{'' if low <= m <= high else '!'}" for m in twice) + f" in {low:.2f}–{high:.2f}"
            for _, low, _, high, twice in here
        )
        print(f"{prompt['id']:24} " + " | ".join(cells) + f" | best {found.best or '–'}", flush=True)

    print("\n| γ | races | inside the band | median width | least width | predicted ÷ measured |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for length in (*LENGTHS, "all"):
        some = [row for row in rows if length in ("all", row[0])]
        every = [(low, middle, high, m) for _, low, middle, high, twice in some for m in twice]
        inside = sum(low <= m <= high for low, _, high, m in every) / len(every)
        width = median((high - low) / middle for low, middle, high, _ in every)
        bias = median(middle / m for _, middle, _, m in every)
        least = 3.29 * math.sqrt(sum(math.log(a / b) ** 2 for *_, (a, b) in some) / len(some) / 2)
        print(f"| {length} | {len(every)} | {inside:.0%} | {width:.0%} | {least:.0%} | {bias:.2f} |")
    reached = f"; its races reached {median(named):.0%} of the fastest (median)" if named else ""
    print(f"\nA best draft length was named for {len(named)} of {len(rows) // len(LENGTHS)} prompts{reached}.")
