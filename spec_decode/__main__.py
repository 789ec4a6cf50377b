"""Command line: `python -m spec_decode race`, `… bench`, `… prove`, `… models`, `… replay` and others.

What is asked for goes to standard output, progress and errors to standard error. Exit code 2 for bad input, 1 for a
failure, 0 otherwise; `prove` has two more (`prove.command`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import check, flags
from .bench import command
from .errors import ModelError, OutOfMemory, UserError
from .events import Note
from .paths import ASSETS
from .prove import command as prove
from .request import Request
from .rules import RULES
from .settings import Settings
from .share import command as share
from .sources import Source


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        code = arguments.run(arguments)
    except UserError as error:
        print(f"spec_decode: {error}", file=sys.stderr)
        return 1 if isinstance(error, (ModelError, OutOfMemory)) else 2
    except OSError as error:  # a full disk, a reader of our output that has gone
        print(f"spec_decode: {error}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return code or 0


def _race(arguments: argparse.Namespace) -> None:
    from .metrics import race_report

    source, request = _recorded(arguments) if arguments.replay else _loaded(arguments)
    race = source.race(request)
    for step in race.steps():
        if isinstance(step, Note):
            print(f"spec_decode: {step}.", file=sys.stderr, flush=True)
    trace = race.trace
    report = race_report(trace)
    print(json.dumps(report, ensure_ascii=False) if arguments.json else _describe(report))
    if arguments.trace:
        text = trace.exported(system=arguments.keep_system).to_json()
        Path(arguments.trace).write_text(text, encoding="utf-8")
    if arguments.html:
        from .share import saved

        page = saved.page(trace.exported(system=arguments.keep_system))
        Path(arguments.html).write_text(page, encoding="utf-8")


def _recorded(arguments: argparse.Namespace) -> tuple[Source, Request]:
    """A trace that is played back without waiting, and the request it was recorded of. Needs no torch."""
    from .sources.replay import ReplaySource, read

    for path in (arguments.trace, arguments.html):
        _check_writable(path)
    source = ReplaySource(read(arguments.replay), speed=math.inf)
    return source, source.recording.request


def _loaded(arguments: argparse.Namespace) -> tuple[Source, Request]:
    """The pair and the request that the flags name. The pair is loaded after all that can be checked without it."""
    settings, choice = _settings(arguments), flags.read(arguments)
    for path in (arguments.trace, arguments.html):
        _check_writable(path)
    request = Request(
        arguments.prompt,
        settings,
        system=arguments.system,
        truncate=arguments.truncate,
        thinking=arguments.thinking,
    )
    from .loading.pair import load_pair
    from .sources.local import LocalSource

    return LocalSource(load_pair(**choice, progress=_progress), own=choice["drafter"]), request


def _bench(arguments: argparse.Namespace) -> None:
    if arguments.update_readme:
        from .bench.readme import update

        update()
        return
    from .bench.command import run, run_batches, run_oracle

    if arguments.oracle and arguments.batch_size:
        raise UserError("An oracle is measured of single texts; leave out --batch-size or --oracle.")
    go = run_oracle if arguments.oracle else run_batches if arguments.batch_size else run
    go(arguments, _settings(arguments), _progress, _check_writable)


def _record(arguments: argparse.Namespace) -> None:
    from . import recording

    if not arguments.runs.isdecimal() or int(arguments.runs) < 1:
        raise UserError(f"--runs takes a number from 1 up, not {arguments.runs!r}.")
    choice = flags.read(arguments)
    _check_folder(arguments.out)
    arguments.out.mkdir(exist_ok=True)
    from .loading.pair import load_pair
    from .metrics import speedup
    from .sources.local import LocalSource

    source = LocalSource(load_pair(**choice, progress=_progress), own=choice["drafter"])
    for scene, trace in recording.record(source, arguments.out, int(arguments.runs)):
        path, ratio = scene.path(arguments.out), speedup(trace)
        found = "–" if ratio is None else f"{ratio:.2f}×"
        print(f"{path}: {path.stat().st_size:,} bytes, {len(trace.token_ids('baseline'))} tokens, speedup {found}")


def _train_drafter(arguments: argparse.Namespace) -> None:
    _check_folder(arguments.out)
    from .loading.embedded import cache_dir
    from .training.data import Writing
    from .training.recipe import Recipe, run
    from .training.train import Training

    work = arguments.work_dir or cache_dir() / "training" / Path(arguments.target).name
    held_out = arguments.held_out or [ASSETS / "heldout.jsonl"]
    recipe = Recipe(
        target=arguments.target,
        out=arguments.out,
        work=work,
        tokens=arguments.tokens,
        data=arguments.data,
        held_out=tuple(held_out),
        layers=tuple(arguments.layers) if arguments.layers else None,
        intermediate=arguments.intermediate,
        centroids=arguments.centroids,
        chosen=arguments.chosen,
        head=not arguments.without_head,
        init=arguments.init,
        also=tuple(arguments.also or ()),
        only=arguments.only,
        device=arguments.device,
    )
    training = Training(
        steps=arguments.steps,
        texts=arguments.texts,
        rate=arguments.rate,
        unroll=arguments.unroll,
        prompt=arguments.user_turns,
        seed=arguments.seed,
    )
    temperatures = arguments.temperatures
    writing = Writing(slots=arguments.slots, length=arguments.length, answer=tuple(arguments.answer))
    if temperatures:
        writing = replace(writing, temperatures=tuple((t, 1 / len(temperatures)) for t in temperatures))
    if arguments.turn:
        writing = replace(writing, prompt=arguments.turn)
    elif arguments.data:  # given prompts are kept whole where they fit
        writing = replace(writing, prompt=max(writing.prompt, writing.length - writing.answer[1] - 18))
    report = run(recipe, training, writing, _progress)
    print(json.dumps(report, indent=1))


def _models(arguments: argparse.Namespace) -> None:
    try:
        room = None if arguments.memory is None else float(arguments.memory)
    except ValueError:
        room = math.nan
    if room is not None and not 0 < room < math.inf:
        raise UserError(f"--memory takes a number of gigabytes above 0, not {arguments.memory!r}.")
    from .loading.listing import listing, table
    from .loading.placement import find_device

    rows = listing(find_device("auto"), room)
    print(json.dumps(rows, indent=1) if arguments.json else table(rows))


def _add_training(command: argparse.ArgumentParser) -> None:
    command.add_argument("--target", default="embedded", help="embedded (default), a Hub id or a directory")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="output folder of the drafter")
    command.add_argument("--work-dir", type=Path, metavar="DIR", help="texts and checkpoints; in the cache by default")
    command.add_argument("--tokens", type=int, default=1_500_000, metavar="N", help="tokens of text to generate")
    command.add_argument("--data", type=Path, metavar="FILE", help='prompts to answer: JSON Lines of {"prompt"}')
    command.add_argument(
        "--held-out", type=Path, action="append", metavar="FILE", help="prompts that no text may contain"
    )
    command.add_argument("--only", choices=("data", "train"), help="run one of the two stages only")
    command.add_argument(
        "--layers", type=int, nargs="+", metavar="I", help="the target's layers it attends to, one or two"
    )
    command.add_argument("--intermediate", type=int, metavar="N", help="width of its MLPs (default: as the target's)")
    command.add_argument("--centroids", type=int, default=1024, metavar="N", help="vocabulary lists; 0 for none")
    command.add_argument("--chosen", type=int, default=64, metavar="N", help="vocabulary lists that a step scores")
    command.add_argument("--without-head", action="store_true", help="leave out the head, which is the target's")
    command.add_argument("--init", type=Path, metavar="DIR", help="a trained drafter of the same shape to start from")
    command.add_argument("--steps", type=int, default=4000, metavar="N", help="updates")
    command.add_argument("--texts", type=int, default=8, metavar="N", help="texts an update")
    command.add_argument("--rate", type=float, default=1e-3, metavar="R", help="peak learning rate")
    command.add_argument("--unroll", type=int, default=4, metavar="N", help="unrolled draft steps of a round")
    command.add_argument("--slots", type=int, default=96, metavar="N", help="texts generated at once")
    command.add_argument("--length", type=int, default=352, metavar="N", help="maximum tokens of a text")
    command.add_argument(
        "--turn",
        type=int,
        metavar="N",
        help="maximum tokens of a user turn (default: 150; with --data, all that fit)",
    )
    command.add_argument(
        "--answer",
        type=int,
        nargs=2,
        default=(64, 224),
        metavar=("LOW", "HIGH"),
        help="range of an answer's token limit",
    )
    command.add_argument(
        "--temperatures", type=float, nargs="+", metavar="T", help="of answers, in equal shares (default: mostly 0)"
    )
    command.add_argument(
        "--also", type=Path, action="append", metavar="DIR", help="work folder of another run to train on too"
    )
    command.add_argument(
        "--user-turns", type=float, default=0.3, metavar="SHARE", help="share of positions in user turns to train on"
    )
    command.add_argument("--device", default="cpu", help="cpu (default), cuda")
    command.add_argument("--seed", type=int, default=0, metavar="N")
    command.set_defaults(run=_train_drafter)


def _settings(arguments: argparse.Namespace) -> Settings:
    return Settings(**{name: getattr(arguments, name) for name in Settings.names()})


def _describe(report: dict[str, Any]) -> str:
    pair, base, fast = report["pair"], report["baseline"], report["speculative"]

    def rate(lane: dict[str, Any]) -> str:
        speed = lane["tokens_per_second"]
        text = "–" if speed is None else f"{speed:.1f}"
        first = f"first token after {lane['prefill_seconds']:.2f} s"
        return f"{len(lane['token_ids']):4d} tokens   {text:>6} tokens/s   {first}"

    lines = [fast["text"].strip(), "", f"{pair['target']} + {pair['drafter']} on {pair['device']}, {pair['dtype']}"]
    lines += [f"baseline     {rate(base)}", f"speculative  {rate(fast)}"]
    summary = []
    if report["speedup_interval"]:
        low, high = report["speedup_interval"]
        said = {"no difference": "no measurable difference", "nothing drafted": "nothing was drafted"}
        verdict = said.get(report["verdict"], report["verdict"])
        summary.append(f"speedup {report['speedup']:.2f}× (95 % interval {low:.2f}–{high:.2f}×: {verdict})")
        summary.append(f"end to end {report['end_to_end_speedup']:.2f}×")
    elif report["speedup"] is not None:
        summary.append(f"speedup {report['speedup']:.2f}×")
    if fast["acceptance_rate"] is not None:
        summary.append(f"acceptance rate {fast['acceptance_rate']:.0%}")
    if fast["tokens_per_pass"] is not None:
        summary.append(f"{fast['tokens_per_pass']:.2f} tokens per target pass")
    if report["synthetic_acceptance"] is None:
        summary.append("lanes identical" if report["identical"] else f"lanes differ{_parting(report['parting'])}")
    if report["looping"]:
        summary.append("the text loops, which flatters the drafter")
    if report["synthetic_acceptance"] is not None:
        lines.append(_synthetic(report["synthetic_acceptance"]))
    return "\n".join([*lines, ", ".join(summary)])


def _synthetic(acceptance: float) -> str:
    return f"Synthetic acceptance {acceptance:g}: only the times mean something; the speculative text does not."


def _parting(parting: dict[str, Any] | None) -> str:
    """At which token lanes part that should not, and with which logit gap."""
    if parting is None:
        return ""
    tokens = " and ".join(repr(parting[lane]["text"]) for lane in ("baseline", "speculative"))
    gaps = [parting[lane]["logit_gap"] for lane in ("baseline", "speculative")]
    said = ", ".join("unknown" if gap is None else f"{gap:.4g}" for gap in gaps)
    return f" from token {parting['position'] + 1} ({tokens}; logit gaps {said})"


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="" if line != "Ready" else "\r\033[K", file=sys.stderr, flush=True)
    else:
        print(line, file=sys.stderr, flush=True)


def _check_writable(path: str | None) -> None:
    """Raises UserError where a file cannot be written, before minutes are spent on what goes into it."""
    if not path:
        return
    file = Path(path)
    try:
        if not file.absolute().parent.is_dir():
            raise UserError(f"Cannot write {path}: its folder does not exist.")
        if file.is_dir():
            raise UserError(f"Cannot write {path}: it is a folder.")
        if not os.path.lexists(file):
            file.open("xb").close()
            file.unlink()
        elif file.is_file():
            file.open("ab").close()
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"Cannot write {path!r}: {error}.") from error


def _check_folder(path: Path) -> None:
    """As `_check_writable`, of a folder that is there or will be made in one that is."""
    if not path.absolute().parent.is_dir():
        raise UserError(f"Cannot write {path}: its folder does not exist.")
    if path.exists() and not path.is_dir():
        raise UserError(f"Cannot write into {path}: it is a file.")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK | os.X_OK):
        raise UserError(f"Cannot write into {path}: Permission denied.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m spec_decode", description="Race a target against itself with a drafter."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    race = commands.add_parser("race", help="one prompt through both lanes")
    what = race.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="what to ask")
    what.add_argument("--replay", metavar="FILE", help="report on a trace that --trace wrote; no model is loaded")
    race.add_argument("--system", help="system prompt")
    race.add_argument("--truncate", action="store_true", help="cut a prompt that is too long instead of refusing it")
    race.add_argument("--json", action="store_true", help="print one JSON object")
    race.add_argument("--trace", metavar="FILE", help="write the whole trace of the race as JSON")
    race.add_argument("--html", metavar="FILE", help="write one HTML file that shows the race without a network")
    race.add_argument(
        "--keep-system", action="store_true", help="write the system prompt into the trace and the HTML too"
    )
    race.set_defaults(run=_race)
    bench = commands.add_parser("bench", help="a file of prompts through both lanes and other engines")
    command.add_arguments(bench)
    bench.set_defaults(run=_bench)
    prove.add_command(commands)
    listing = commands.add_parser("models", help="the pairs known by name, and which of them fit")
    listing.add_argument("--memory", metavar="GB", help="of the card to fit (default: what is free on this machine)")
    listing.add_argument("--json", action="store_true", help="print one JSON array")
    listing.set_defaults(run=_models)
    share.add_command(commands, _describe, _progress)
    record = commands.add_parser("record", help="the recordings that the page plays by itself, anew")
    record.add_argument(
        "--out", type=Path, default=ASSETS / "replays", metavar="DIR", help="folder to write to (default: the page's)"
    )
    record.add_argument(
        "--runs",
        default="5",
        metavar="N",
        help="races of each, of which the one of median speedup is kept (default: 5)",
    )
    flags.add(record)
    record.set_defaults(run=_record)
    _add_training(commands.add_parser("train-drafter", help="an MTP drafter for any target, from its own texts"))
    check.add_commands(commands)
    for both in (race, bench):
        defaults = Settings()
        flags.add(both)
        both.add_argument("--draft-length", default="adaptive", metavar="N", help="1…16, adaptive (default), rate")
        both.add_argument("--temperature", default=defaults.temperature, metavar="T", help="0 (default) is greedy")
        both.add_argument("--top-p", default=defaults.top_p, metavar="P")
        both.add_argument("--top-k", default=defaults.top_k, metavar="K")
        both.add_argument("--rule", choices=tuple(RULES), help="greedy at temperature 0, else coupled")
        both.add_argument(
            "--synthetic-acceptance",
            metavar="A",
            help="measure time alone: accept each drafted token with this probability, whatever the target says",
        )
        both.add_argument("--lenience", default=defaults.lenience, metavar="L", help="for lossy rules")
        both.add_argument("--max-new-tokens", default=defaults.max_new_tokens, metavar="N")
        both.add_argument("--seed", default=defaults.seed, metavar="N")
    return parser


if __name__ == "__main__":
    sys.exit(main())
