"""`check gpu --train MINUTES`: writes texts with the target and trains the embedded drafter, in slices that resume.

In: a session and a folder. Out: texts, checkpoints and a drafter in that folder, and a part of the report for each
slice. A slice takes ten minutes at most, and leaves a drafter that can be used; the next one, of this call or of a
later one, goes on from its files.
"""

from __future__ import annotations

import argparse
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...loading.catalog import EMBEDDED
from ...loading.embedded import cache_dir
from ...paths import ASSETS
from ...training.data import Texts, Writing
from ...training.recipe import Recipe
from ...training.recipe import run as follow
from ...training.train import Training
from .. import shapes, tiny
from .report import Part, Report, Result
from .session import Session

SLICE = 600.0  # seconds at most
WRITE, TRAIN = 0.4, 0.4  # shares of a slice; the rest is for loading, the vocabulary lists and the validation


@dataclass(frozen=True)
class Slice:
    """folder: of texts, checkpoints and the drafter. seconds: about how long. tokens: of text in all."""

    folder: Path
    seconds: float
    tokens: int


def run(session: Session, report: Report, options: argparse.Namespace) -> None:
    """Slice after slice until the minutes are over; each is a part of the report."""
    folder = options.train_dir or cache_dir() / "training" / f"check-gpu{'-tiny' if session.tiny else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    left = options.train * 60
    count = math.ceil(left / SLICE)
    first = sum(name.startswith("slice") for name in report.parts) + 1
    for number in range(first, first + count):
        piece = Slice(folder, left / count, options.train_tokens)
        # The time limit of the other parts is not the training's.
        report.run(Part(f"slice {number}", "texts and training", 0, partial(_slice, session, piece)))


def _slice(session: Session, piece: Slice) -> Result:
    return Result(trained(session, piece))


def trained(session: Session, piece: Slice) -> dict[str, Any]:
    """One slice: writes texts while there are too few, trains, saves the drafter. Figures of texts and training."""
    begun = time.perf_counter()
    written, steps = _progress(piece.folder)
    recipe = _recipe(session, piece)
    writing, training = _writing(session, piece, written), _training(session, piece, written)
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(f"        {line}", flush=True)

    report = follow(recipe, training, writing, say)
    after, reached = _progress(piece.folder)
    return {
        "seconds": time.perf_counter() - begun,
        "tokens_before": written,
        "tokens_written": after,
        "steps_before": steps,
        "steps": reached,
        "validation": report["validation"],
        "drafter": recipe.out.name,
        "said": lines,
    }


def _recipe(session: Session, piece: Slice) -> Recipe:
    """The embedded drafter's, or that of a tiny target, which is written to the folder first."""
    out, device = piece.folder / "drafter", str(session.device)
    if not session.tiny:
        held_out = (ASSETS / "heldout.jsonl",)
        return Recipe(EMBEDDED, out, piece.folder, piece.tokens, held_out=held_out, device=device)
    home = piece.folder / "target"
    if not home.exists():
        model = tiny.model("llama", initializer_range=0.5)
        model.generation_config.eos_token_id = None
        model.save_pretrained(home)
        shapes.words(tiny.VOCABULARY, template=True).save_pretrained(home)
    return Recipe(str(home), out, piece.folder, piece.tokens, centroids=8, chosen=3, device=device)


def _writing(session: Session, piece: Slice, written: int) -> Writing:
    share = WRITE if written < piece.tokens else 0.0
    if not session.tiny:
        return Writing(slots=192 if session.device.type == "cuda" else 96, seconds=share * piece.seconds)
    greedy = ((0.0, 1.0),)
    return Writing(8, 64, 12, (8, 24), greedy, shard=1_000, seconds=share * piece.seconds)


def _training(session: Session, piece: Slice, written: int) -> Training:
    share = TRAIN if written < piece.tokens else WRITE + TRAIN
    limit = share * piece.seconds
    return Training(check=20, validation=0.2, seconds=limit) if session.tiny else Training(texts=16, seconds=limit)


def _progress(folder: Path) -> tuple[int, int]:
    """Tokens of the texts in a folder, and updates of the drafter trained on them."""
    texts = Texts([folder / "texts"])
    steps = 0
    with suppress(OSError, ValueError, IndexError):
        rows = (folder / "curve.csv").read_text(encoding="utf-8").splitlines()
        steps = int(rows[-1].split(",")[0])
    return sum(texts.length(text) for text in range(len(texts))), steps
