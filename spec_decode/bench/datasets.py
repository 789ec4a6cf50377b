"""Prompts of the benchmark: the shipped set, a file of one's own, and public sets that a user has.

In: the name of a set and a path. Out: prompts as {"id", "category", "prompt"}. A conversation gives its first turn.
SPEED-Bench and Spec-Bench are not shipped, since their licences do not allow it. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..paths import ASSETS

Prompt = dict[str, str]

SHIPPED = ASSETS / "benchmark.jsonl"
SPEED_BENCH, SPEC_BENCH = "speed-bench", "spec-bench"
DATASETS = (SPEED_BENCH, SPEC_BENCH)

# SPEED-Bench: https://huggingface.co/datasets/nvidia/SPEED-Bench. Two programs of NVIDIA fetch its texts: prepare.py of
# NeMo-Skills writes SPLIT.jsonl with "messages", prepare_data.py of Model-Optimizer writes SPLIT/test.parquet with
# "turns". In the repository itself most turns are this placeholder.
PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"
QUALITATIVE = "qualitative"
SPLITS = (QUALITATIVE, *(f"throughput_{size}k" for size in (1, 2, 8, 16, 32)))


def read(name: str | None = None, path: str | Path | None = None) -> list[Prompt]:
    """The prompts of a set.

    Args:
        name: one of `DATASETS`; None for a file of one's own, or for the shipped set where there is no path either.
        path: the file of Spec-Bench (question.jsonl); the folder or a file of SPEED-Bench, of which the split
            `qualitative` is read where the folder holds several; a JSON Lines file of one's own.

    Raises:
        UserError: in one sentence: the path is missing, cannot be read, or does not hold that set.
    """
    if name is None:
        return read_prompts(SHIPPED if path is None else path)
    if name not in DATASETS:
        raise UserError(f"There is no data set {name!r}; there are {' and '.join(DATASETS)}.")
    if path is None:
        raise UserError(f"--dataset {name} needs --path: the set is not shipped, because its licence forbids that.")
    file = _split_file(Path(path)) if name == SPEED_BENCH else Path(path)
    rows = list(_parquet(file) if file.suffix == ".parquet" else _json_lines(file))
    needed = '"question_id", "category" and "turns"' + (' or "messages"' if name == SPEED_BENCH else "")
    prompts, missing = [], 0
    for where, row in rows:
        turns = _turns(row, messages=name == SPEED_BENCH)
        if turns is None or "question_id" not in row or not isinstance(row.get("category"), str):
            raise UserError(f"{where}: not an object with {needed}, as {_TITLES[name]} has them.")
        missing += any(PLACEHOLDER in turn for turn in turns)
        prompts.append({"id": str(row["question_id"]), "category": row["category"], "prompt": turns[0]})
    if missing:
        raise UserError(
            f"{file}: the texts of {missing} of {len(rows)} prompts are placeholders; fetch them first with NVIDIA's "
            "prepare.py, see the card of the data set nvidia/SPEED-Bench."
        )
    return _checked(prompts, file)


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a JSON Lines file.

    Raises:
        UserError: the file cannot be read or is not UTF-8, or a line is not an object with "id", "category" and
            "prompt", or its prompt is empty, or two prompts have one id.
    """
    prompts = []
    for where, row in _json_lines(Path(path)):
        try:
            prompts.append({key: str(row[key]) for key in ("id", "category", "prompt")})
        except KeyError as error:
            raise UserError(f'{where}: not an object with "id", "category" and "prompt".') from error
        if not _is_text(row["prompt"]):
            raise UserError(f"{where}: the prompt is empty or no text.")
    return _checked(prompts, path)


_TITLES = {SPEED_BENCH: "SPEED-Bench", SPEC_BENCH: "Spec-Bench"}


def _checked(prompts: list[Prompt], path: str | Path) -> list[Prompt]:
    if not prompts:
        raise UserError(f"{path} holds no prompts.")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt["id"] in seen:
            raise UserError(f"{path}: two prompts have the id {prompt['id']!r}.")
        seen.add(prompt["id"])
    return prompts


def _is_text(value: Any) -> bool:
    """Whether this is a string with something in it that can be encoded (JSON may escape half a surrogate pair)."""
    try:
        return isinstance(value, str) and bool(value.strip()) and bool(value.encode())
    except UnicodeEncodeError:
        return False


def _turns(row: dict[str, Any], messages: bool) -> list[str] | None:
    """The user's turns of a conversation, None where it has none or they are no text."""
    turns = row.get("turns")
    if messages and turns is None and isinstance(row.get("messages"), list):
        told = [message for message in row["messages"] if isinstance(message, dict)]
        turns = [message.get("content") for message in told if message.get("role") == "user"]
    return turns if isinstance(turns, list) and turns and all(map(_is_text, turns)) else None


def _json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where it stands, and the object, of every line that is not empty."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"Cannot read the prompts: {error}.") from error
    except ValueError as error:
        raise UserError(f"Cannot read the prompts: {file} is not UTF-8 text ({error}).") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not a line of JSON.") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: not an object.")
        yield where, row


def _parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"Reading {file} needs pyarrow: pip install pyarrow.") from error
    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except OSError as error:
        raise UserError(f"Cannot read the prompts: {error}.") from error
    except pyarrow.ArrowException as error:
        raise UserError(f"Cannot read the prompts: {file} is not a Parquet file.") from error
    for number, row in enumerate(rows, 1):
        yield f"{file}, row {number}", row


def _split_file(path: Path) -> Path:
    """The file of the split to read: `path` itself, or the one below it that holds `qualitative` or the only split."""
    if not path.is_dir():
        return path
    found: dict[str, Path] = {}
    for suffix in (".parquet", ".jsonl"):  # of two forms of a split, the one that needs no further package wins
        for file in sorted(path.rglob(f"*{suffix}")):
            for part in (file.stem, *reversed(file.parent.absolute().parts)):
                if part in SPLITS:
                    found[part] = file
                    break
    if not found:
        raise UserError(
            f"{path} holds no split of SPEED-Bench: neither {QUALITATIVE}.jsonl nor {QUALITATIVE}/test.parquet, nor "
            "those of another split."
        )
    if QUALITATIVE not in found and len(found) > 1:
        raise UserError(f"{path} holds several splits of SPEED-Bench, {', '.join(sorted(found))}: name one file.")
    return found.get(QUALITATIVE) or next(iter(found.values()))
