"""The benchmark: every prompt through both lanes, and through other engines beside them.

In: prompts ({"id", "category", "prompt"} a line), a pair, settings, names of peers. Out: a report of per-prompt and
median figures, as an object and as a table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from .errors import UserError
from .events import SPECULATIVE, Costs
from .metrics import acceptance_rate, race_report, tokens_per_pass
from .models import Pair
from .peers import peer
from .race import Race
from .settings import Settings


def read_prompts(path: str | Path) -> list[dict[str, str]]:
    """The prompts of a JSON Lines file.

    Raises:
        UserError: the file cannot be read or is not UTF-8, or a line is not an object with "id", "category" and
            "prompt", or its prompt is empty.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"Cannot read the prompts: {error}.") from error
    except ValueError as error:
        raise UserError(f"Cannot read the prompts: {path} is not UTF-8 text ({error}).") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)
            prompts.append({key: str(prompt[key]) for key in ("id", "category", "prompt")})
            text = prompt["prompt"] if isinstance(prompt["prompt"], str) else ""
            text.encode()
        except UnicodeEncodeError:
            text = ""
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f'{path}, line {number}: not an object with "id", "category" and "prompt".') from error
        if not text.strip():
            raise UserError(f"{path}, line {number}: the prompt is empty or no text.")
    if not prompts:
        raise UserError(f"{path} holds no prompts.")
    return prompts


def bench(
    pair: Pair, prompts: Iterable[dict[str, str]], settings: Settings, peers: Iterable[str] = ()
) -> Iterator[dict[str, Any]]:
    """One row of figures a prompt, as each is finished; rates in tokens/s, times in seconds.

    Raises:
        UserError: a peer is not known.
        ModelError: a peer cannot be loaded.
    """
    runners = {name: peer(name, pair, settings) for name in peers}
    _discard(Race(pair, "Warm up.", Settings(max_new_tokens=8)))
    for prompt in prompts:
        race = Race(pair, prompt["prompt"], settings)
        _discard(race)
        report, lane = race_report(race.trace), race.trace.lane(SPECULATIVE)
        row: dict[str, Any] = {
            "id": prompt["id"],
            "category": prompt["category"],
            "prompt_tokens": report["prompt_tokens"],
            "tokens": len(report["baseline"]["token_ids"]),
            "baseline": report["baseline"]["tokens_per_second"],
            "speculative": report["speculative"]["tokens_per_second"],
            "speedup": report["speedup"],
            "acceptance_rate": acceptance_rate(lane),
            "tokens_per_pass": tokens_per_pass(lane),
            "identical": report["identical"],
            "peers": {name: run(race.ids) for name, run in runners.items()},
        }
        yield row


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the prompts, all and by category, and how many had identical lanes."""

    def middle(rows: list[dict[str, Any]]) -> dict[str, Any]:
        figures: dict[str, Any] = {
            key: _median(row[key] for row in rows)
            for key in ("baseline", "speculative", "speedup", "acceptance_rate", "tokens_per_pass")
        }
        for name in rows[0]["peers"]:
            figures[name] = _median(row["peers"][name]["tokens_per_second"] for row in rows)
            for lane in ("baseline", "speculative"):
                figures[f"{lane} / {name}"] = _median(_ratio(row[lane], row["peers"][name]) for row in rows)
        return figures

    categories = sorted({row["category"] for row in rows})
    return {
        "prompts": len(rows),
        "identical": sum(row["identical"] for row in rows),
        "median": middle(rows),
        "categories": {c: middle([row for row in rows if row["category"] == c]) for c in categories},
    }


def table(rows: list[dict[str, Any]], summary: dict[str, Any], costs: Costs | None) -> str:
    """The report as Markdown."""
    peers = list(rows[0]["peers"])
    head = ["prompt", "category", "tokens", *(f"{name} tok/s" for name in peers), "baseline tok/s", "speculative tok/s"]
    head += ["speedup", "acceptance", "tokens/pass", "identical"]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    for row in rows:
        cells = [row["id"], row["category"], str(row["tokens"])]
        cells += [_show(row["peers"][name]["tokens_per_second"], 1) for name in peers]
        cells += [_show(row["baseline"], 1), _show(row["speculative"], 1), _show(row["speedup"], 2) + "×"]
        cells += [
            _show(row["acceptance_rate"], 2),
            _show(row["tokens_per_pass"], 2),
            "yes" if row["identical"] else "no",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    figures = summary["median"]
    cells = ["**median**", "", ""] + [_show(figures[name], 1) for name in peers]
    cells += [_show(figures["baseline"], 1), _show(figures["speculative"], 1), _show(figures["speedup"], 2) + "×"]
    cells += [_show(figures["acceptance_rate"], 2), _show(figures["tokens_per_pass"], 2)]
    cells.append(f"{summary['identical']} of {summary['prompts']}")
    lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| medians by category | baseline tok/s | speculative tok/s | speedup | acceptance | tokens/pass |"]
    lines.append("| --- |" + " ---: |" * 5)
    for category, middle in summary["categories"].items():
        cells = [category, _show(middle["baseline"], 1), _show(middle["speculative"], 1)]
        cells += [_show(middle["speedup"], 2) + "×", _show(middle["acceptance_rate"], 2)]
        lines.append("| " + " | ".join([*cells, _show(middle["tokens_per_pass"], 2)]) + " |")
    for name in peers:
        ratios = " and ".join(
            f"{lane} {_show(figures[f'{lane} / {name}'], 2)}×" for lane in ("baseline", "speculative")
        )
        lines += ["", f"Against {name}, median over prompts: {ratios}."]
    if costs:
        first = costs.draft_start + costs.draft_ratio
        passes = ", ".join(f"{g + 1} tokens {costs.verify_ratio[g]:.2f}×" for g in (1, 2, 4, 8, 16))
        lines += [
            "",
            f"Target pass over 1 token: {costs.step_seconds * 1e3:.1f} ms; relative to it: {passes}; "
            f"the first draft step of a round {first:.3f}×, the others {costs.draft_ratio:.3f}×.",
        ]
    return "\n".join(lines)


def _discard(race: Race) -> None:
    for _ in race:
        pass


def _ratio(ours: float | None, peer: dict[str, Any]) -> float | None:
    theirs = peer["tokens_per_second"]
    return ours / theirs if ours and theirs else None


def _median(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return median(present) if present else None


def _show(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
