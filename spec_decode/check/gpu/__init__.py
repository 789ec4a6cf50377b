"""Everything that needs a GPU, in one command: correctness, then speed, within a time limit and without network.

    python -m spec_decode check gpu                            # on an NVIDIA GPU, in less than eight minutes
    python -m spec_decode check gpu --resume                   # goes on with what is missing in the file
    python -m spec_decode check gpu --pairs gemma-4-12B --minutes 20 --bitsandbytes target=nf4
    python -m spec_decode check gpu --tiny --device cpu        # the same parts at a size that any machine can run
    python -m spec_decode check gpu --train 10                 # writes texts and trains the embedded drafter; resumes

In: shapes from the catalog, with random weights that are made on the device. Out: a line for each part and each goal,
and a JSON file (`--out`) that is written again after every part, with device, versions, command and date. Parts run in
the order of their worth. One that no longer fits into the time, or that this machine cannot run, is skipped and says
why; one that fails is recorded, and the rest goes on. Exit code 1 if a part failed; a goal that is missed does not
fail. Speed is measured with synthetic acceptance (`Settings.synthetic_acceptance`), since random weights agree on
nothing: times are real, and texts mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers.utils import logging

from ...errors import UserError
from ...loading import catalog
from ...loading.placement import find_device
from .report import Report, default_path, facts
from .session import Session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `check gpu`."""
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N, mps or cpu")
    parser.add_argument(
        "--pairs",
        nargs="*",
        default=["gemma-4-E4B", "gemma-4-E2B", "gemma-4-12B", "gemma-4-31B"],
        help="shapes to time, by name, the most important first (default: E4B, E2B, 12B, 31B)",
    )
    parser.add_argument(
        "--context", type=int, default=768, metavar="N", help="tokens of a prompt (default: %(default)s)"
    )
    parser.add_argument("--draft-length", type=int, default=4, metavar="N", help="γ (default: %(default)s)")
    parser.add_argument(
        "--synthetic-acceptance", type=float, default=0.8, metavar="A", help="of the timed races (default: %(default)s)"
    )
    parser.add_argument(
        "--bitsandbytes",
        nargs="*",
        default=["int8", "nf4", "target=nf4,drafter=int8"],
        metavar="HOW",
        help="quantizations, as --quantize takes them (default: int8 nf4 target=nf4,drafter=int8)",
    )
    parser.add_argument("--draws", type=int, default=1000, metavar="N", help="texts of each chi-square test")
    parser.add_argument("--minutes", type=float, default=7.5, metavar="M", help="time limit (default: %(default)s)")
    parser.add_argument("--only", nargs="*", metavar="PART", help="parts to run, by the beginning of their names")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: docs/benchmarks/gpu-DEVICE-DATE.json")
    parser.add_argument("--resume", action="store_true", help="go on with the file; finished parts are not run again")
    parser.add_argument("--tiny", action="store_true", help="tiny models in place of the shapes: a rehearsal")
    parser.add_argument(
        "--train", type=float, metavar="MINUTES", help="write texts and train the embedded drafter for so long instead"
    )
    parser.add_argument("--train-dir", type=Path, metavar="DIR", help="texts, checkpoints and drafter (in the cache)")
    parser.add_argument(
        "--train-tokens", type=int, default=1_500_000, metavar="N", help="texts to write (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> None:
    """Runs the parts, or with `--train` the training; exit code 1 if a part failed.

    Raises:
        UserError: an option cannot be used, or the file cannot be read or belongs to another device.
        ModelError: there is no such device.
    """
    from . import parts, train

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = find_device(options.device)
    unknown = [name for name in options.pairs if catalog.find(name) is None]
    if unknown:
        raise UserError(f"There is no pair {unknown[0]!r}; `python -m spec_decode models` lists them.")
    for how in options.bitsandbytes:
        catalog.quantization(how)
    if not options.minutes > 0 or (options.train is not None and not options.train > 0):
        raise UserError("A time limit must be above 0 minutes.")
    if options.tiny and device.type == "cpu":
        torch.set_num_threads(1)  # tiny tensors are not worth handing out
    session = Session(device, options)
    kind = "train-" if options.train is not None else "tiny-" if options.tiny else ""
    path = options.out or default_path(device, kind)
    report = Report(path, facts(device, sys.argv[1:], options.tiny), options.minutes * 60, options.resume)
    print(f"{report.about['device']}: {', '.join(f'{k} {v}' for k, v in report.about['versions'].items())}\n{path}\n")
    if options.train is not None:
        train.run(session, report, options)
    else:
        for part in parts.parts(session):
            if not options.only or part.name.startswith(tuple(options.only)):
                report.run(part)
    report.close()
    if report.failed:
        raise SystemExit(1)
