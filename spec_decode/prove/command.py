"""The command line of the exactness test: `python -m spec_decode prove`.

In: options. Out: a table or JSON on standard output, and the exit code: 0 where all tests agree with exactness, 3
where one refutes it, 4 where none refutes it and one cannot tell. The engine, and PyTorch with it, is loaded when a
test runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import textwrap
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import SettingsError, quoted
from ..rules import RULES
from .setup import BIAS, DRAFTERS, LEVEL, MOST_SEEDS, POWER, SEEDS, WRONG, Setup, suite

if TYPE_CHECKING:
    from .experiment import Result

FEWER = 5  # a text at temperature 0 is right or not: a fifth of the texts is enough


def add_command(commands: Any) -> None:
    """Adds the command `prove` to the subparsers of the command line."""
    command = commands.add_parser(
        "prove",
        help="a chi-square test of what the engine emits against the exact distribution of a tiny target",
        description="Tests by chi-square whether the texts that the engine emits follow the distribution of a target "
        "so small that it can be written out. Exit code 0: they do; 3: they do not; 4: cannot tell.",
    )
    names = ", ".join([*RULES, WRONG])
    command.add_argument(
        "--rule", default="", metavar="LIST", help=f"of {names} (default: every exact rule); wrong is wrong on purpose"
    )
    command.add_argument("--drafter", default="", metavar="LIST", help=f"of {', '.join(DRAFTERS)} (default: all)")
    command.add_argument("--draft-length", default="3", metavar="N", help="1…16 (default: 3), adaptive, rate")
    command.add_argument("--temperature", metavar="T", help="0 to 5 (default: 1; 0 for greedy)")
    command.add_argument("--top-p", default=1.0, metavar="P")
    command.add_argument(
        "--seeds", metavar="N", help=f"texts of each test (default: {SEEDS}, and {SEEDS // FEWER} at temperature 0)"
    )
    command.add_argument("--seed", default=0, metavar="N", help="the first seed (default: 0)")
    command.add_argument(
        "--level", default=LEVEL, metavar="A", help=f"family-wise false-positive rate (default: {LEVEL:g})"
    )
    command.add_argument(
        "--bias", default=BIAS, metavar="D", help=f"total-variation distance to be seen (default: {BIAS:g})"
    )
    command.add_argument(
        "--processes", default=min(4, os.cpu_count() or 1), metavar="N", help="at once (default: %(default)s)"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the tests and returns the exit code.

    Raises:
        SettingsError: an option cannot be used.
    """
    setups, level, bias = _setups(options), _share("level", options.level), _share("bias", options.bias)
    processes = _whole("processes", options.processes, 1, 64)
    from .experiment import AGREES, CANNOT_TELL, REFUTED, judged
    from .experiment import run as run_all

    began = time.perf_counter()
    found = run_all(setups, processes, _teller())
    results = judged(found, setups, level, bias)
    seconds = time.perf_counter() - began
    verdicts = [result.verdict for result in results]
    overall = REFUTED if REFUTED in verdicts else CANNOT_TELL if CANNOT_TELL in verdicts else AGREES
    if options.json:
        tests = [result.to_dict() for result in results]
        report = {"verdict": overall, "family_wise_rate": level, "bias": bias, "power": POWER, "seconds": seconds}
        print(json.dumps({**report, "tests": tests}, ensure_ascii=False))
    else:
        print(table(results, level, bias, seconds))
    return {AGREES: 0, REFUTED: 3, CANNOT_TELL: 4}[overall]


def table(results: list[Result], level: float, bias: float, seconds: float) -> str:
    """The report for people."""
    from .experiment import number, percent, words

    head = ("rule", "drafter", "γ", "T", "texts", "χ²", "dof", "p", "p, Holm", "smallest bias", "verdict")
    rows = [
        (
            result.setup.rule,
            result.setup.drafter,
            str(result.setup.draft_length),
            f"{float(result.setup.temperature):g}",
            f"{result.progress.count:,}",
            "–" if result.setup.greedy else f"{result.progress.fit.statistic:.1f}",
            "–" if result.setup.greedy else str(result.progress.fit.freedom),
            number(result.progress.fit.p_value),
            number(result.adjusted),
            percent(result.smallest),
            result.verdict,
        )
        for result in results
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    left = (0, 1, 10)
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]
    tests = "1 test" if len(results) == 1 else f"{len(results)} tests"
    lines += ["", f"{tests} in {seconds:.0f} s. What the columns say:"]
    explained = [
        "χ²: the sum over all texts of three tokens of (observed − expected)² / expected.",
        "dof: degrees of freedom, the number of different texts (rare ones pooled) less one; about what χ² is if the "
        "rule is exact.",
        "p: the probability of a χ² at least this large if the rule is exact; small means refuted.",
        f"p, Holm: p after Holm’s correction for {tests}. Refuted means at most {level:g}: the family-wise rate, the "
        "probability that even one exact rule among them is refuted by chance.",
        f"smallest bias: what the test sees with probability {percent(POWER)}, as a total-variation distance; wanted: "
        f"{percent(bias)}. At temperature 0: the share of texts that are not the target’s argmax; one refutes.",
    ]
    lines += [
        textwrap.fill(line, 110, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
        for line in explained
    ]
    lines.append("")
    said = [result for result in results if result.verdict != "agrees"] or results[-1:]
    return "\n".join(lines + [f"{each.setup.rule}, {each.setup.drafter}: {words(each, bias)}" for each in said])


def _setups(options: argparse.Namespace) -> list[Setup]:
    rules = _names("rule", options.rule, [*RULES, WRONG])
    drafters = _names("drafter", options.drafter, list(DRAFTERS))
    temperature = options.temperature
    if temperature is not None:
        try:
            temperature = float(temperature)
        except ValueError:
            raise SettingsError("temperature", f"Temperature must be a number, not {quoted(temperature)}.") from None
    seeds = SEEDS if options.seeds is None else _whole("seeds", options.seeds, 1, MOST_SEEDS)
    first = _whole("seed", options.seed, 0, 2**52)
    setups = suite(
        rules, drafters, temperature, draft_length=options.draft_length, top_p=options.top_p, seeds=seeds, first=first
    )
    if options.seeds is None:
        setups = [replace(setup, seeds=SEEDS // FEWER) if setup.greedy else setup for setup in setups]
    # Seeds of its own for each: a rule of shared noise would give every drafter the same texts, and one result often.
    return [replace(setup, first=first + i * seeds) for i, setup in enumerate(setups)]


def _names(option: str, text: str, known: list[str]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise SettingsError(option, f"Unknown {option} {quoted(name)}; choose {', '.join(known)}.")
    return names


def _share(option: str, value: object) -> float:
    try:
        share = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        share = math.nan
    if not 0 < share < 1:
        raise SettingsError(option, f"--{option} takes a number between 0 and 1, not {quoted(value)}.")
    return share


def _whole(option: str, value: object, low: int, high: int) -> int:
    try:
        whole = int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        whole = low - 1
    if not low <= whole <= high:
        raise SettingsError(option, f"--{option} takes a whole number from {low} to {high:,}, not {quoted(value)}.")
    return int(whole)


def _teller() -> Any:
    """Progress on standard error, with the time left; nothing where nobody looks."""
    began = time.perf_counter()

    def tell(done: int, of: int) -> None:
        if sys.stderr.isatty():
            left = (time.perf_counter() - began) * (of - done) / max(done, 1)
            line = f"{done:,} of {of:,} texts, about {left:.0f} s left" if done < of else ""
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    return tell
