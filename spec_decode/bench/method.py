"""The benchmark: runs every prompt through both lanes and through the peers.

In: prompts ({"id", "category", "prompt"} a line), a pair, settings, peers. Out: figures per prompt and their medians,
as an object and as tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import fmean, median
from typing import Any

from ..events import SPECULATIVE, Costs
from ..loading.pair import Pair
from ..metrics import acceptance_rate, race_report, tokens_per_pass
from ..request import Request
from ..settings import Settings
from ..sources.local import Race
from .peers import Peers


def bench(
    pair: Pair, prompts: Iterable[dict[str, str]], settings: Settings, peers: Peers | None = None
) -> Iterator[dict[str, Any]]:
    """Yields a row of figures for each prompt when it is finished; rates in tokens/s, times in seconds.

    For each prompt the race runs first and then the peers, in an order that rotates from prompt to prompt.

    Raises:
        PromptError: a prompt is empty, or too long.
    """
    _discard(Race(pair, Request("Warm up.", Settings(max_new_tokens=8))))
    for number, prompt in enumerate(prompts):
        race = Race(pair, Request(prompt["prompt"], settings))
        _discard(race)
        report, lane = race_report(race.trace), race.trace.lane(SPECULATIVE)
        own = report["baseline"]["token_ids"]
        row: dict[str, Any] = {
            "id": prompt["id"],
            "category": prompt["category"],
            "prompt_tokens": report["prompt_tokens"],
            "tokens": len(own),
            "baseline": report["baseline"]["tokens_per_second"],
            "speculative": report["speculative"]["tokens_per_second"],
            "speedup": report["speedup"],
            "acceptance_rate": acceptance_rate(lane),
            "tokens_per_pass": tokens_per_pass(lane),
            "identical": report["identical"],
            "peers": {
                name: {
                    "tokens": len(found["ids"]),
                    "prefill_seconds": found["first"],
                    "tokens_per_second": found["tokens_per_second"],
                    **(agreement(own, found["ids"]) if settings.temperature == 0 else {}),
                }
                for name, found in (peers.run(race.ids, number) if peers else {}).items()
            },
        }
        yield row


def prompt_ids(pair: Pair, prompts: Iterable[dict[str, str]], settings: Settings) -> list[list[int]]:
    """The token ids of every prompt, chat template included.

    Raises:
        PromptError: one is empty, or too long.
    """
    return [Race(pair, Request(prompt["prompt"], settings)).ids for prompt in prompts]


def agreement(own: list[int], theirs: list[int]) -> dict[str, Any]:
    """Compares a peer's greedy text with the target's own: whether they are "identical", and the length of the
    "common_prefix" in tokens."""
    pairs = enumerate(zip(own, theirs, strict=False))
    same = next((position for position, (one, other) in pairs if one != other), min(len(own), len(theirs)))
    return {"identical": own == theirs, "common_prefix": same}


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all prompts and by category, and the number of prompts with identical lanes. For each peer,
    "agreement" with the target's own texts: the "share" of identical texts and the mean "common_prefix" in tokens."""
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))

    def middle(rows: list[dict[str, Any]]) -> dict[str, Any]:
        figures: dict[str, Any] = {
            key: _median(row[key] for row in rows)
            for key in ("baseline", "speculative", "speedup", "acceptance_rate", "tokens_per_pass")
        }
        for name in names:
            ran = [row for row in rows if name in row["peers"]]
            figures[name] = _median(row["peers"][name]["tokens_per_second"] for row in ran)
            for lane in ("baseline", "speculative"):
                figures[f"{lane} / {name}"] = _median(_ratio(row[lane], row["peers"][name]) for row in ran)
        return figures

    def texts(name: str) -> dict[str, Any]:
        found = [row["peers"][name] for row in rows if "identical" in row["peers"].get(name, {})]
        return {
            "texts": len(found),
            "share": fmean(peer["identical"] for peer in found) if found else None,
            "common_prefix": fmean(peer["common_prefix"] for peer in found) if found else None,
        }

    categories = sorted({row["category"] for row in rows})
    return {
        "prompts": len(rows),
        "identical": sum(row["identical"] for row in rows),
        "median": middle(rows),
        "agreement": {name: texts(name) for name in names},
        "categories": {c: middle([row for row in rows if row["category"] == c]) for c in categories},
    }


def table(
    rows: list[dict[str, Any]],
    summary: dict[str, Any],
    costs: Costs | None,
    peers: dict[str, dict[str, Any]] | None = None,
) -> str:
    """The report as Markdown. peers: from `Peers.report`."""
    names = list(summary["agreement"])
    head = ["prompt", "category", "tokens", *(f"{name} tok/s" for name in names), "baseline tok/s", "speculative tok/s"]
    head += ["speedup", "acceptance", "tokens/pass", "identical"]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    for row in rows:
        cells = [row["id"], row["category"], str(row["tokens"])]
        cells += [_show(row["peers"].get(name, {}).get("tokens_per_second"), 1) for name in names]
        cells += [_show(row["baseline"], 1), _show(row["speculative"], 1), _show(row["speedup"], 2) + "×"]
        cells += [
            _show(row["acceptance_rate"], 2),
            _show(row["tokens_per_pass"], 2),
            "yes" if row["identical"] else "no",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    figures = summary["median"]
    cells = ["**median**", "", ""] + [_show(figures[name], 1) for name in names]
    cells += [_show(figures["baseline"], 1), _show(figures["speculative"], 1), _show(figures["speedup"], 2) + "×"]
    cells += [_show(figures["acceptance_rate"], 2), _show(figures["tokens_per_pass"], 2)]
    cells.append(f"{summary['identical']} of {summary['prompts']}")
    lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| medians by category | baseline tok/s | speculative tok/s | speedup | acceptance | tokens/pass |"]
    lines.append("| --- |" + " ---: |" * 5)
    for category, middle in [*summary["categories"].items(), ("**all**", figures)]:
        cells = [category, _show(middle["baseline"], 1), _show(middle["speculative"], 1)]
        cells += [_show(middle["speedup"], 2) + "×", _show(middle["acceptance_rate"], 2)]
        lines.append("| " + " | ".join([*cells, _show(middle["tokens_per_pass"], 2)]) + " |")
    if peers:
        lines += ["", *_peers(summary, peers)]
    if costs:
        first = costs.draft_start + costs.draft_ratio
        passes = ", ".join(f"{g + 1} tokens {costs.verify_ratio[g]:.2f}×" for g in (1, 2, 4, 8, 16))
        lines += [
            "",
            f"Target pass over 1 token: {costs.step_seconds * 1e3:.1f} ms; relative to it: {passes}; "
            f"the first draft step of a round {first:.3f}×, the others {costs.draft_ratio:.3f}×.",
        ]
    return "\n".join(lines)


def _peers(summary: dict[str, Any], peers: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The peers, their settings and the comparison with our lanes, as Markdown."""
    ran = {name: peer for name, peer in peers.items() if name in summary["agreement"]}
    figures = summary["median"]
    if ran:
        yield (
            "| engine, plain decoding | weights | threads | tok/s | our baseline | our speculative lane "
            "| same text as our target | common prefix |"
        )
        yield "| --- | --- |" + " ---: |" * 6
    for name, peer in ran.items():
        texts = summary["agreement"][name]
        same = "–" if texts["share"] is None else f"{round(texts['share'] * texts['texts'])} of {texts['texts']}"
        yield (
            f"| {name} | {peer['weights']} | {peer['threads']} | {_show(figures[name], 1)} "
            f"| {_show(figures[f'baseline / {name}'], 2)}× | {_show(figures[f'speculative / {name}'], 2)}× "
            f"| {same} | {_show(texts['common_prefix'], 1)} tokens |"
        )
    for name, peer in ran.items():
        yield ""
        tried = ", ".join(
            f"{' '.join(str(value) for key, value in trial.items() if key not in ('threads', 'tokens_per_second'))} "
            f"{trial['threads']} thread{'s' * (trial['threads'] > 1)} {trial['tokens_per_second']:.1f}".strip()
            for trial in peer["trials"]
        )
        settings = ", ".join(f"{key} {value}" for key, value in peer["settings"].items())
        yield f"{name}: {peer['version']}; {settings}. Tried, tokens/s: {tried}."
        if busy := peer.get("busy_cores"):
            yield (
                f"Busy cores: {_show(busy['own'], 2)} in its own turns, {_show(busy['others'], 3)} in the turns of "
                f"others. Our process in its turns: {_show(busy['ours'], 3)}."
            )
        if "failed" in peer:
            yield f"It ended early: {peer['failed']}"
    for name, peer in peers.items():
        if "skipped" in peer:
            yield ""
            yield f"Without {name}: {peer['skipped']}"


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
