"""The report of a benchmark as Markdown: what `bench` prints, and the tables that the README shows.

In: the object of `summary.report`. Out: text. Imports no torch.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

Report = dict[str, Any]

PAYS, SPEEDUP, CATEGORIES, ROUNDS = "Does it pay?", "Speedup", "By category", "Where the time of a round goes"
LATENCY, ACCEPTANCE, PEERS = "Latency", "Acceptance", "Other engines"
MACHINE, PROMPTS = "The machine", "Prompts"
SAME = {True: "yes", False: "no", None: "–"}
SHARED = ("temperature", "context", "turn", "batch")  # what a baseline depends on, as labels begin with it


def markdown(report: Report, advice: Sequence[str] = ()) -> str:
    """The whole report.

    Args:
        advice: the advisor's paragraphs.
    """
    parts = [f"# {title(report)}", "", *ran(report)]
    for head, lines in sections(report, advice):
        parts += ["", f"## {head}", "", *lines]
    return "\n".join(parts) + "\n"


def sections(report: Report, advice: Sequence[str] = ()) -> Iterator[tuple[str, list[str]]]:
    """Title and lines of each part of the report that has something to say."""
    told = report["conditions"]
    if advice:
        yield PAYS, "\n\n".join(advice).split("\n")
    yield SPEEDUP, [*headline(report), "", *sentences(report)]
    if any(len(c["categories"]) > 1 for c in told):
        yield CATEGORIES, [line for c in told for line in (f"{c['label']}:", "", *categories(c), "")][:-1]
    yield ROUNDS, [*rounds(report)]
    yield LATENCY, [*latency(report)]
    if any(c["lanes"]["speculative"]["drafted"] for c in told):
        yield ACCEPTANCE, [*acceptance(report)]
    if report["peers"]:
        yield PEERS, [*peers(report), *peer_settings(report)]
    yield MACHINE, "\n\n".join(machine(report)).split("\n")
    yield PROMPTS, [*prompts(report)]


def title(report: Report) -> str:
    """Of the whole report."""
    drafters = dict.fromkeys(c["condition"]["drafter"] for c in report["conditions"])
    return f"Benchmark of {(report['pair'] or {}).get('target')} with {' and '.join(drafters) or 'no drafter'}"


def ran(report: Report) -> Iterator[str]:
    """What was run, on what, and how much of it."""
    pair, machine, versions, plan = (report[key] or {} for key in ("pair", "machine", "versions", "plan"))
    where = machine.get("gpu") or machine.get("processor") or "unknown machine"
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    cores = f", {machine['cores']} cores" if machine.get("cores") else ""
    yield f"{where}{cores}; {pair.get('device')}, {pair.get('dtype')}; {named}; {report['date']}."
    yield ""
    yield f"`{report['command']}`"
    yield ""
    often = "once" if plan.get("repeats") == 1 else f"{plan.get('repeats')} times"
    yield (
        f"{report['measured']} of {report['planned']} measurements of {plan.get('prompts')} prompts, "
        f"{often} each, in an order shuffled by the seed {plan.get('order_seed')}; "
        f"{report['warm_up_races']} warm-up races discarded. Raw measurements: {report['raw']}."
        + ("" if report["finished"] else " **The run was not finished.**")
    )


def headline(report: Report) -> Iterator[str]:
    """The speedup under every condition."""
    yield (
        "| condition | speedup, median (95 % interval) | worst prompt | end to end | baseline tok/s "
        "| speculative tok/s | acceptance | tokens/pass | same text |"
    )
    yield "| --- |" + " ---: |" * 8
    for c in report["conditions"]:
        base, fast = c["lanes"]["baseline"], c["lanes"]["speculative"]
        speedup = c["speedup"]
        worst = f"{speedup['worst']:.2f}× ({cell(speedup['worst_prompt'])})" if speedup else "–"
        same = "not claimed" if c["identical"] is None else f"{c['identical']} of {c['measurements']}"
        yield (
            f"| {c['label']} | {interval(speedup)} | {worst} | {interval(c['end_to_end_speedup'])} "
            f"| {show(base['tokens_per_second'], 1)} | {show(fast['tokens_per_second'], 1)} "
            f"| {show(fast['acceptance_rate'], 2)} | {show(fast['tokens_per_pass'], 2)} | {same} |"
        )


def sentences(report: Report) -> Iterator[str]:
    """The verdicts in words."""
    for c in report["conditions"]:
        yield f"- {c['label']}: {cell(c['words'])}"
        if c["same_text"] and c["identical"] != c["measurements"]:
            yield f"- {c['label']}: **the lanes must emit the same text, and did not always.** That is a fault."
        if looping := c["lanes"]["speculative"]["looping_texts"]:
            yield f"- {c['label']}: {looping} of {c['measurements']} texts loop, which flatters the drafter."
        kl, refused = (c["lanes"]["speculative"][name] for name in ("mean_kl", "refused_share"))
        if kl is not None:
            yield (
                f"- {c['label']} is lossy: KL divergence from the target {kl:.4f} nats a round, and the exact rule "
                f"would have refused {100 * refused:.1f} % of the tokens."
            )
        if c["condition"]["synthetic_acceptance"] is not None:
            yield f"- {c['label']}: verdicts were drawn, not made; texts mean nothing and no exactness is claimed."


def categories(condition: dict[str, Any]) -> Iterator[str]:
    """One condition by category, and over all."""
    yield "| medians by category | prompts | baseline tok/s | speculative tok/s | speedup | acceptance | tokens/pass |"
    yield "| --- |" + " ---: |" * 6
    lanes = condition["lanes"]
    over_all = {
        "prompts": condition["prompts"],
        "speedup": condition["speedup"],
        "baseline": lanes["baseline"]["tokens_per_second"],
        "speculative": lanes["speculative"]["tokens_per_second"],
        "acceptance_rate": lanes["speculative"]["acceptance_rate"],
        "tokens_per_pass": lanes["speculative"]["tokens_per_pass"],
    }
    named = [(cell(category), found) for category, found in condition["categories"].items()]
    for category, found in [*named, ("**all**", over_all)]:
        yield (
            f"| {category} | {found['prompts']} | {show(found['baseline'], 1)} | {show(found['speculative'], 1)} "
            f"| {interval(found['speedup'])} | {show(found['acceptance_rate'], 2)} "
            f"| {show(found['tokens_per_pass'], 2)} |"
        )


def rounds(report: Report) -> Iterator[str]:
    """Milliseconds of a round, and what the weights' bytes make of them."""
    yield (
        "| lane | draft ms | verify ms | other ms | other, share | bandwidth GB/s | of this machine's | CPU | GPU "
        "| peak GB | energy J |"
    )
    yield "| --- |" + " ---: |" * 10
    for name, lane in lanes(report):
        times = [lane[f"{part}_seconds"] for part in ("draft", "verify", "other")]
        total = sum(time or 0.0 for time in times)
        share = (times[2] or 0.0) / total if total else None
        cells = [*(show(time, 2, 1e3) for time in times), percent(share), show(lane["bandwidth"], 1, 1e-9)]
        cells += [percent(lane["bandwidth_share"]), percent(lane["cpu_utilization"]), percent(lane["gpu_utilization"])]
        cells += [show(lane["peak_memory"], 2, 1e-9), show(lane["energy"], 1)]
        yield f"| {name} | " + " | ".join(cells) + " |"
    for drafter, costs in report["costs"].items():
        ratios = costs["verify_ratio"]
        passes = ", ".join(f"{g + 1} tokens {ratios[g]:.2f}×" for g in (1, 2, 4, 8, 16) if g < len(ratios))
        first = costs["draft_start"] + costs["draft_ratio"]
        yield ""
        yield (
            f"Measured when {drafter} was loaded: a target pass over 1 token {costs['step_seconds'] * 1e3:.1f} ms; "
            f"relative to it {passes}, the first draft step of a round {first:.3f}×, the others "
            f"{costs['draft_ratio']:.3f}×."
        )


def latency(report: Report) -> Iterator[str]:
    """Latencies in milliseconds; the names are vLLM's."""
    yield (
        "| lane | time to first token ms | time per output token ms: mean | p50 | p95 | p99 "
        "| over requests (vLLM) p50 | p95 | p99 | inter-token latency p50 | p99 | output tok/s, end to end |"
    )
    yield "| --- |" + " ---: |" * 11
    for name, lane in lanes(report):
        token, chunk = lane["time_per_output_token"], lane["inter_token_latency"]
        over = lane["over_requests"]["time_per_output_token"] or {}
        cells = [show(lane["time_to_first_token"], 1, 1e3), *(show(token[p], 2, 1e3) for p in token)]
        cells += [show(over.get(p), 2, 1e3) for p in ("p50", "p95", "p99")]
        cells += [show(chunk["p50"], 2, 1e3), show(chunk["p99"], 2, 1e3), show(lane["end_to_end_tokens_per_second"], 1)]
        yield f"| {name} | " + " | ".join(cells) + " |"
    yield ""
    yield (
        "Time per output token is over tokens, each of which took its round's time ÷ the round's tokens; vLLM's "
        "percentiles are of the means of requests. Inter-token latency is the time between two outputs, which hold "
        "several tokens each where drafts are accepted."
    )


def acceptance(report: Report) -> Iterator[str]:
    """Acceptance, by our definitions and by vLLM's."""
    yield (
        "| condition | acceptance rate | tokens per target pass | mean acceptance length (vLLM) "
        "| conditional, by position | cumulative, by position (vLLM) |"
    )
    yield "| --- | ---: | ---: | ---: | --- | --- |"
    for c in report["conditions"]:
        lane = c["lanes"]["speculative"]
        lists = [
            " ".join(f"{p:.2f}" for p in lane[k][:8]) for k in ("conditional_acceptance", "acceptance_per_position")
        ]
        yield (
            f"| {c['label']} | {show(lane['acceptance_rate'], 2)} | {show(lane['tokens_per_pass'], 2)} "
            f"| {show(lane['mean_acceptance_length'], 2)} | {lists[0]} | {lists[1]} |"
        )
    yield ""
    yield (
        "Tokens per target pass count rounds without a draft too; vLLM's mean acceptance length counts those with one. "
        "Conditional: of the drafts whose predecessors were accepted. Cumulative: of all rounds with a draft."
    )


def machine(report: Report) -> Iterator[str]:
    """How quiet the machine was, the sizes of the models, and what could not be measured."""
    spread, tools = report["spread"], report["instruments"] or {}
    facts = []
    if spread["load"]:
        facts.append(f"load average {spread['load']['median']:.2f} (highest {spread['load']['highest']:.2f})")
    if spread["others_busy"]:
        facts.append(f"cores busy with other processes {spread['others_busy']['median']:.2f}")
    if spread["frequency"]:
        low, high = spread["frequency"]["lowest"] / 1e9, spread["frequency"]["highest"] / 1e9
        facts.append(f"clock {low:.2f} to {high:.2f} GHz")
    if spread["baseline"] is not None:
        facts.append(
            f"the baseline differs by {100 * spread['baseline']:.1f} % between measurements of the same prompt"
        )
    if facts:
        said = ", ".join(facts)
        yield f"{said[0].upper()}{said[1:]}."
    yield from spread["words"]
    if bandwidth := tools.get("bandwidth"):
        yield f"Memory is read at {bandwidth['bytes_per_second'] / 1e9:.1f} GB/s ({bandwidth['how']})."
    models = report["models"]
    for name, size in [("target", models["target"]), *(models["drafters"] or {}).items()]:
        if size:
            read = f", {size['read'] / 1e6:,.0f} MB of them read by a pass" if size["read"] else ""
            yield f"{name}: {size['parameters'] / 1e6:,.1f} M parameters, {size['bytes'] / 1e6:,.0f} MB{read}."
    for figure, why in (tools.get("missing") or {}).items():
        yield f"Not measured: {figure.replace('_', ' ')}, since {why}."


def peers(report: Report) -> Iterator[str]:
    """Rates of other engines and the ratios of our lanes to them."""
    found = [peer for peer in report["peers"] if "tokens_per_second" in peer]
    if found:
        yield (
            "| engine | weights | threads | tok/s | acceptance | our baseline | our speculative lane "
            "| same text as our target | common prefix | KL from float32, nats |"
        )
        yield "| --- | --- |" + " ---: |" * 8
    for peer in found:
        facts, texts, rate = peer["facts"], peer["agreement"], peer["tokens_per_second"]
        ours = "; ".join(f"{name}: {interval(ratio)}" for name, ratio in peer["speculative"].items())
        if len(peer["speculative"]) == 1:
            ours = interval(next(iter(peer["speculative"].values())))
        same = f"{texts['identical']} of {texts['texts']}" if texts["texts"] else "–"
        yield (
            f"| {peer['label']} | {facts.get('weights', '–')} | {facts.get('threads', '–')} "
            f"| {show(rate['median'] if rate else None, 1)} | {show(peer['acceptance_rate'], 2)} "
            f"| {interval(peer['baseline'])} | {ours} | {same} | {show(texts['common_prefix'], 1)} tokens "
            f"| {show(facts.get('fidelity', {}).get('kl'), 4)} |"
        )


def peer_settings(report: Report) -> Iterator[str]:
    """The settings of other engines, what was tried, and why some did not run."""
    for peer in report["peers"]:
        name, facts = peer["name"], peer["facts"]
        yield ""
        if "skipped" in facts:
            yield f"Without {name}: {facts['skipped']}"
            continue
        if "trials" in facts:
            tried = ", ".join(_trial(trial) for trial in facts["trials"])
            settings = ", ".join(f"{key} {value}" for key, value in facts["settings"].items())
            yield f"{name}: {facts['version']}; {settings}. Tried, tokens/s: {tried}."
        if busy := facts.get("busy_cores"):
            yield (
                f"Busy cores: {show(busy['own'], 2)} in its own turns, {show(busy['others'], 3)} in the turns of "
                f"others. Our process in its turns: {show(busy['ours'], 3)}."
            )
        if found := facts.get("fidelity"):
            yield " ".join(fidelity(found))
        if "failed" in facts:
            yield f"It ended early: {facts['failed']}"


def fidelity(found: dict[str, Any]) -> Iterator[str]:
    """How far an engine's distributions are from float32, and whether its draws follow its own."""
    if "failed" in found:
        yield f"Its distribution was not measured: {found['failed']}"
        return
    if found["kl"] is None:
        yield "It gives no distribution to compare with float32."
    else:
        yield f"KL(float32 ‖ engine) {found['kl']:.4f} nats, mean over {found['positions']} positions" + (
            f"; of our target {found['ours']:.4f} nats." if found.get("ours") is not None else "."
        )
    if drawn := found["chi_square"]:
        whose = "its own distribution" if drawn["own"] else "the distribution in float32, since it gives none"
        if drawn["p"] is None:
            yield "No chi-square test of its draws: nearly all of the probability is on one pair of tokens."
        else:
            yield (
                f"{drawn['draws']} drawn pairs of tokens against {whose}: chi-square {drawn['statistic']:.1f} with "
                f"{drawn['cells'] - 1} degrees of freedom, p = {drawn['p']:.3g}."
            )


def _trial(trial: dict[str, Any]) -> str:
    """Settings and rate of a trial."""
    words = [str(trial[key]) for key in ("dtype", "cache", "attention", "kind") if key in trial]
    words += [f"{trial[key]} {what}" for key, what in (("tokens", "drafted"), ("ngram", "matched")) if key in trial]
    words.append(f"{trial['threads']} thread{'s' * (trial['threads'] > 1)}")
    return f"{' '.join(words)} {trial['tokens_per_second']:.1f}"


def prompts(report: Report) -> Iterator[str]:
    """Every prompt under every condition."""
    yield (
        "| prompt | category | condition | tokens | baseline tok/s | speculative tok/s | speedup | acceptance "
        "| tokens/pass | same text |"
    )
    yield "| --- | --- | --- |" + " ---: |" * 7
    for row in report["prompts"]:
        yield (
            f"| {cell(row['id'])} | {cell(row['category'])} | {report['conditions'][row['condition']]['label']} "
            f"| {row['tokens']} | {show(row['baseline'], 1)} | {show(row['speculative'], 1)} "
            f"| {show(row['speedup'], 2)}× | {show(row['acceptance_rate'], 2)} | {show(row['tokens_per_pass'], 2)} "
            f"| {SAME[row['identical']]} |"
        )


def lanes(report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and figures of the lanes: the speculative one of every condition, and before those that share a temperature,
    a context, a turn and a batch size, the baseline."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for c in report["conditions"]:
        groups[tuple(c["condition"][name] for name in ("temperature", "context", "turn", "batch_size"))].append(c)
    for group in groups.values():
        parts = [part for part in group[0]["label"].split(", ") if part.split(" ")[0] in SHARED]
        yield ", ".join(["baseline", *(parts if len(groups) > 1 else [])]), group[0]["lanes"]["baseline"]
        yield from ((c["label"], c["lanes"]["speculative"]) for c in group)


def cell(text: str) -> str:
    """A name from a file, such as that of a prompt, as it stands in a table."""
    return " ".join(re.sub(r"([\\|*`<])", r"\\\1", text).split())


def interval(estimate: dict[str, Any] | None) -> str:
    """A median and its interval as a ratio."""
    if estimate is None:
        return "–"
    if estimate["low"] is None:
        return f"{estimate['median']:.2f}×"
    return f"{estimate['median']:.2f}× ({estimate['low']:.2f}–{estimate['high']:.2f})"


def show(value: float | None, digits: int, scale: float = 1.0) -> str:
    """A figure, or a dash."""
    return "–" if value is None else f"{value * scale:.{digits}f}"


def percent(value: float | None) -> str:
    """A share, or a dash."""
    return "–" if value is None else f"{100 * value:.1f} %"


def oracle(report: dict[str, Any]) -> Iterator[str]:
    """Speedups of every draft length, the adaptive controller and an oracle, of a report of `bench --oracle`."""
    found = report["oracle"]
    rows = [(f"γ = {length}", speedup) for length, speedup in found["fixed"].items()]
    rows += [("adaptive", found["adaptive"]), ("oracle", found["oracle"])]
    yield "| draft length | geometric mean | median | least |"
    yield "| --- | ---: | ---: | ---: |"
    for name, speedup in rows:
        yield f"| {name} | {speedup['mean']:.2f}× | {speedup['median']:.2f}× | {speedup['least']:.2f}× |"
    closed = "" if found["closed"] is None else f" Adaptive goes {found['closed']:.0%} of the way between them."
    yield ""
    yield (
        f"Speedups of {found['texts']} texts by the measured costs, not by a clock. The oracle knows every verdict "
        f"before it drafts. The best fixed draft length is {found['best_fixed']}.{closed}"
    )
