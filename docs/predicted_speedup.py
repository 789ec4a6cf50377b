"""How good is the predicted speedup? `python docs/predicted_speedup.py [--prompts 12] [--max-new-tokens 256]`.

Races the embedded pair, adaptive, on held-out prompts, takes the band of every draft length from each race, and then
races every fixed length on the same prompt. Prints, by draft length and for all: how many of the later races fell
inside the band, the median relative width of the band, and the median of predicted ÷ measured; and how often a best
length was named, and how its speedup then compared with the fastest. Meant for an idle machine; minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from spec_decode import models  # noqa: E402
from spec_decode.events import Trace  # noqa: E402
from spec_decode.metrics import speedup  # noqa: E402
from spec_decode.prediction import LENGTHS, predict  # noqa: E402
from spec_decode.race import Race  # noqa: E402
from spec_decode.settings import Settings  # noqa: E402


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=12, help="spread over assets/heldout.jsonl (default 12)")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--drafter", help="as for `race`; the pair's own by default")
    parser.add_argument("--from", dest="source", default="adaptive", help="draft length of the race predicted from")
    options = parser.parse_args()
    lines = (ROOT / "assets" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line) for line in lines[:: max(len(lines) // options.prompts, 1)]][: options.prompts]
    pair = models.load_pair(drafter=options.drafter, device="cpu")

    def race(prompt: str, length: int | str) -> Trace:
        made = Race(
            pair,
            prompt,
            Settings(
                draft_length=length, max_new_tokens=options.max_new_tokens, temperature=options.temperature, seed=1
            ),
        )
        for _ in made:
            pass
        return made.trace

    race(prompts[0]["prompt"], "adaptive")  # the first race of a process is slower
    rows: list[tuple[int, float, float, float, float]] = []  # γ, low, median, high, measured
    named: list[float] = []
    for prompt in prompts:
        found = predict(race(prompt["prompt"], options.source))
        if found is None:
            print(f"{prompt['id']:24} nothing was drafted", flush=True)
            continue
        later = {length: speedup(race(prompt["prompt"], length)) or 0.0 for length in LENGTHS}
        here = list(zip(found.lengths, found.low, found.median, found.high, later.values(), strict=True))
        rows += here
        if found.best:
            named.append(later[found.best] / max(later.values()))
        cells = (f"{m:.2f} {'in' if low <= m <= high else '!!'} {low:.2f}–{high:.2f}" for _, low, _, high, m in here)
        print(f"{prompt['id']:24} " + " | ".join(cells) + f" | best {found.best or '–'}", flush=True)

    print(
        "\n| γ | races | inside the band | median width | predicted ÷ measured |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for length in (*LENGTHS, "all"):
        some = [row for row in rows if length in ("all", row[0])]
        inside = sum(low <= measured <= high for _, low, _, high, measured in some) / len(some)
        width = median((high - low) / middle for _, low, middle, high, _ in some)
        bias = median(middle / measured for _, _, middle, _, measured in some)
        print(f"| {length} | {len(some)} | {inside:.0%} | {width:.0%} | {bias:.2f} |")
    reached = f"; its races reached {median(named):.0%} of the fastest (median)" if named else ""
    print(f"\nA best draft length was named for {len(named)} of {len(rows) // len(LENGTHS)} prompts{reached}.")


if __name__ == "__main__":
    main()
