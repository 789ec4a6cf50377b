"""`python -m spec_decode bench`: its options, and a run from them to the reports.

In: parsed arguments. Out: a report on standard output, reports and raw measurements in files, progress on standard
error. Imports no torch until a pair is loaded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .. import flags
from ..errors import UserError, quoted
from ..settings import Settings
from . import datasets
from .engines import KINDS
from .plan import Grid
from .record import Record, read

if TYPE_CHECKING:
    from ..loading.pair import Pair
    from .method import Bench, Sizes
    from .peers import Extras

T = TypeVar("T")
Say = Callable[[str], None]

REPEATS = 3


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of `bench` that `race` does not have."""
    which = command.add_mutually_exclusive_group()
    which.add_argument("--prompts", metavar="FILE", help='JSON Lines of {"id", "category", "prompt"} (default: ours)')
    which.add_argument("--dataset", choices=datasets.DATASETS, help="a public set that you have, instead")
    command.add_argument("--path", metavar="PATH", help="its file; of speed-bench also its folder")
    command.add_argument("--draft-lengths", metavar="LIST", help="compare several, such as 1,2,4,8,adaptive")
    command.add_argument("--drafters", metavar="LIST", help="compare several, such as mtp,lookup")
    command.add_argument("--rules", metavar="LIST", help="compare several, such as coupled,block")
    command.add_argument("--temperatures", metavar="LIST", help="compare several, such as 0,0.7,1")
    command.add_argument(
        "--contexts", metavar="LIST", help="extend the prompts to so many tokens, such as 256,1024,4096"
    )
    command.add_argument("--turns", metavar="N", help="ask on, N turns a conversation, with the answers as history")
    command.add_argument("--peers", default="", metavar="LIST", help=f"comma-separated: {', '.join(KINDS)}, or all")
    command.add_argument("--vllm", default="", metavar="PYTHON", help="the Python of an environment that has vLLM")
    command.add_argument("--llama-draft", default="", metavar="FILE", help="a GGUF file that llama.cpp drafts with")
    command.add_argument(
        "--batch-size", metavar="N", help="several prompts at once instead, such as 1,2,4,8; needs --draft-length N"
    )
    command.add_argument(
        "--oracle", action="store_true", help="instead, what a controller could gain that knew every verdict"
    )
    command.add_argument("--repeats", default=REPEATS, metavar="N", help=f"measure everything N times ({REPEATS})")
    command.add_argument("--order-seed", default=0, metavar="N", help="of the shuffled order")
    command.add_argument("--json", metavar="OUT", help="write the report as JSON (docs/bench.schema.json)")
    command.add_argument("--html", metavar="OUT", help="write the report as one HTML file")
    command.add_argument("--markdown", metavar="OUT", help="write the report as Markdown")
    command.add_argument(
        "--raw", metavar="FILE", help="raw measurements, from which an interrupted run goes on (default: beside OUT)"
    )
    command.add_argument("--report", metavar="FILE", help="report on the raw measurements in FILE; measure nothing")
    command.add_argument("--update-readme", action="store_true", help="write README's tables from docs/benchmarks")


def grid(arguments: argparse.Namespace, settings: Settings, peers: Sequence[str] = ()) -> Grid:
    """The grid that the options name. Options for one value hold where those for several are left out; drafters are
    named as they are typed, "" for the pair's own.

    Raises:
        UserError: a value is of the wrong kind or out of range.
    """
    temperatures = _list(arguments.temperatures, float, "temperatures") or (settings.temperature,)
    found = Grid(
        settings=settings,
        draft_lengths=_list(arguments.draft_lengths, _length, "draft-lengths") or (settings.draft_length,),
        drafters=_list(arguments.drafters, str, "drafters") or (arguments.drafter or "",),
        rules=_list(arguments.rules, str, "rules") or (arguments.rule,),
        temperatures=temperatures,
        contexts=_list(arguments.contexts, _positive, "contexts"),
        turns=None if arguments.turns is None else _one(arguments.turns, _positive, "turns"),
        peers=tuple(peers),
        repeats=_one(arguments.repeats, _positive, "repeats"),
        order_seed=_one(arguments.order_seed, int, "order-seed"),
    )
    if arguments.drafters and arguments.drafter:
        raise UserError("Name the drafters by --drafter or by --drafters, not by both.")
    found.conditions()
    return found


def run(
    arguments: argparse.Namespace, settings: Settings, say: Say, check_writable: Callable[[str | None], None]
) -> None:
    """Runs the benchmark.

    Args:
        say: shows a line of progress.
        check_writable: raises where a file cannot be written.

    Raises:
        UserError: an option, a file or a model cannot be used.
        KeyboardInterrupt: the run was interrupted; what was measured has been reported, and stands in the raw file.
    """
    for path in (arguments.json, arguments.html, arguments.markdown, arguments.raw):
        check_writable(path)
    if arguments.report:
        contents = read(arguments.report)
        _write(arguments, contents, Path(arguments.report))
        return
    from .peers import Extras, parse

    extras = Extras(arguments.vllm, arguments.llama_draft)
    names, choice = parse(arguments.peers, extras), flags.read(arguments)
    wanted = grid(arguments, settings, names)
    prompts = datasets.read(arguments.dataset, arguments.path or arguments.prompts)
    choice["drafter"] = wanted.drafters[0] or choice["drafter"]
    from ..loading.pair import load_pair
    from ..sources.local import LocalSource
    from .gauges import Gauges, read_bandwidth
    from .method import Bench, Instruments
    from .reports import header as header_of

    pair = load_pair(**choice, progress=say)
    source = LocalSource(pair, own=choice["drafter"], drafters=wanted.drafters[1:])
    gauges = Gauges(pair.info["device"])
    instruments = Instruments(gauges, _sizes(pair))
    bench = Bench(source, _named(wanted, source.drafters[0]), prompts, instruments, say=say)
    bench.check()
    say("Warming up …")
    traces = bench.warm_up()
    bandwidth = read_bandwidth(pair.info["device"])
    command = f"python -m spec_decode {shlex.join(sys.argv[1:])}"
    header = header_of(bench, traces, {"bandwidth": bandwidth, "missing": gauges.missing}, command)
    path = _raw(arguments, header)
    with Record(path, header) as record:
        found = record.contents
        instruments.fastest = found.header["instruments"]["bandwidth"]["bytes_per_second"]
        if found.measurements:
            say(f"{path} holds {len(found.measurements)} measurements of this run, which goes on")
        try:
            _measure(bench, record, pair, extras, say)
        except (KeyboardInterrupt, UserError):
            if found.measurements:
                _write(arguments, found, path)
                say(f"Stopped after {len(found.measurements)} measurements; the same command goes on from {path}")
            raise
    _write(arguments, found, path)


VARIED = "peers", "draft_lengths", "drafters", "rules", "temperatures", "contexts", "turns", "html", "markdown"


def _alone(arguments: argparse.Namespace, settings: Settings, option: str, what: str) -> None:
    """Raises UserError where an option that varies something stands beside `option`, which measures one setting."""
    for name in VARIED:
        if getattr(arguments, name):
            raise UserError(f"{what} in one setting; leave out --{name.replace('_', '-')} or {option}.")
    if settings.synthetic_acceptance is not None:
        raise UserError(f"{what} with real verdicts; leave out --synthetic-acceptance or {option}.")


def run_oracle(
    arguments: argparse.Namespace, settings: Settings, say: Say, check_writable: Callable[[str | None], None]
) -> None:
    """Runs `bench --oracle`: every draft length, the adaptive controller and an oracle over the same recorded drafts;
    arguments as in `run`.

    Raises:
        UserError: an option, a file or a model cannot be used.
    """
    _alone(arguments, settings, "--oracle", "An oracle is measured")
    check_writable(arguments.json)
    prompts = datasets.read(arguments.dataset, arguments.path or arguments.prompts)
    from ..loading.pair import load_pair
    from .markdown import oracle
    from .oracle import measure

    pair = load_pair(**flags.read(arguments), progress=say)
    report = measure(pair, prompts, settings, say)
    print("\n".join(oracle({"oracle": report})))
    _write_one(arguments, pair, settings, {"oracle": report})


def run_batches(
    arguments: argparse.Namespace, settings: Settings, say: Say, check_writable: Callable[[str | None], None]
) -> None:
    """Runs `bench --batch-size`: both lanes over batches of several prompts; arguments as in `run`.

    Raises:
        UserError: an option, a file or a model cannot be used.
    """
    from ..batch import check_length
    from .batch import filling, measure, sizes_of, table

    _alone(arguments, settings, "--batch-size", "Batches are measured")
    check_writable(arguments.json)
    check_length(settings)
    sizes = sizes_of(arguments.batch_size)
    prompts = filling(datasets.read(arguments.dataset, arguments.path or arguments.prompts), sizes)
    from ..loading.pair import load_pair

    pair = load_pair(**flags.read(arguments), progress=say)
    report = measure(pair, prompts, settings, sizes, _one(arguments.repeats, _positive, "repeats"), say)
    print(table(report, settings.same_text))
    _write_one(arguments, pair, settings, {"batches": report})


def _write_one(arguments: argparse.Namespace, pair: Pair, settings: Settings, report: dict[str, Any]) -> None:
    """Writes a report on one setting where --json asks for it."""
    if arguments.json:
        about = {
            "command": f"python -m spec_decode {shlex.join(sys.argv[1:])}",
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "pair": pair.info,
            "machine": pair.machine,
            "settings": settings.to_dict(),
        }
        text = json.dumps({**about, **report}, indent=1, ensure_ascii=False)
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")


def _measure(bench: Bench, record: Record, pair: Pair, extras: Extras, say: Say) -> None:
    from tqdm import tqdm

    from .peers import Peers

    found = record.contents
    before = found.notes.get("warm_up", 0)
    with ExitStack() as stack:
        peers = None
        if any(task.condition.peer for task in bench.left(found.measurements)):
            ids = [
                bench.ids(i, context) for i in range(len(bench.prompts)) for context in bench.grid.contexts or (None,)
            ]
            used = [bench.grid.settings_of(c, 0) for c in bench.grid.conditions() if c.peer]
            drawn = next((settings for settings in used if settings.temperature > 0), used[0])
            extras = extras._replace(room=bench.room(), draws=drawn)
            peers = bench.peers = stack.enter_context(Peers(bench.grid.peers, pair, used[0], ids, say, extras))
        quiet = not sys.stderr.isatty()
        bar = stack.enter_context(
            tqdm(
                total=found.header["planned"],
                initial=len(found.measurements),
                unit="race",
                file=sys.stderr,
                mininterval=30 if quiet else 0.1,
                dynamic_ncols=True,
            )
        )
        bench.say = lambda line: bar.write(line, file=sys.stderr)
        try:
            for measurement in bench.run(list(found.measurements)):
                record.add(measurement)
                bar.update()
        finally:
            if peers is not None:
                record.note("peers", peers.report())
            record.note("warm_up", before + bench.warmed)
    record.note("end", datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))


def _named(wanted: Grid, own: str) -> Grid:
    """The grid with the source's own name for its first drafter."""
    from dataclasses import replace

    return replace(wanted, drafters=tuple(dict.fromkeys((own, *wanted.drafters[1:]))))


def _sizes(pair: Pair) -> Sizes:
    """Sizes of the models, counted once for each drafter."""
    from .sizes import sizes

    known: dict[str, Any] = {}

    def counted() -> Any:
        name = pair.drafter.name
        if name not in known:
            known[name] = sizes(pair)
        return known[name]

    return counted


def _raw(arguments: argparse.Namespace, header: dict[str, Any]) -> Path:
    """Where raw measurements go: where --raw says, beside the first report, or into the cache."""
    if arguments.raw:
        return Path(arguments.raw)
    for report in (arguments.json, arguments.html, arguments.markdown):
        if report:
            return Path(report).with_suffix(".jsonl")
    from ..loading.embedded import cache_dir

    name = hashlib.sha256(json.dumps([header[k] for k in ("pair", "plan", "versions")], sort_keys=True).encode())
    folder = cache_dir() / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name.hexdigest()[:16]}.jsonl"


def _write(arguments: argparse.Namespace, contents: Any, raw: Path) -> None:
    """Prints the report, and writes it where it is asked for."""
    from .reports import Reports

    made = Reports(contents, raw.name)
    print(made.markdown, end="")
    if arguments.markdown:
        Path(arguments.markdown).write_text(made.markdown, encoding="utf-8")
    if arguments.json:
        Path(arguments.json).write_text(made.json, encoding="utf-8")
    if arguments.html:
        Path(arguments.html).write_text(made.html, encoding="utf-8")


def _list(text: str | None, convert: Callable[[str], T], name: str) -> tuple[T, ...]:
    """The values of a comma-separated list, each once."""
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if text is not None and not parts:
        raise UserError(f"--{name} takes a comma-separated list, and this one is empty.")
    return tuple(dict.fromkeys(_one(part, convert, name) for part in parts))


def _one(text: Any, convert: Callable[[str], T], name: str) -> T:
    try:
        return convert(str(text))
    except ValueError as error:
        raise UserError(f"--{name} does not take {quoted(text)}.") from error


def _length(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value
