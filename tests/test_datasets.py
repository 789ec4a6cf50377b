"""Prompts of the benchmark: the shipped set is unseen in training, public sets are read in their own formats."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spec_decode.__main__ import main
from spec_decode.bench import datasets
from spec_decode.errors import UserError
from spec_decode.paths import ASSETS
from spec_decode.training import prompts

# The shipped set


def shipped() -> list[datasets.Prompt]:
    return datasets.read()


def test_the_shipped_set_has_eight_prompts_in_each_of_eight_categories() -> None:
    counts = Counter(prompt["category"] for prompt in shipped())
    names = {"code", "edit", "summarize", "chat", "maths", "json", "translation", "creative"}
    assert counts == dict.fromkeys(names, 8)
    assert all(prompt["id"].startswith(prompt["category"] + "-") for prompt in shipped())


def test_the_shipped_prompts_are_of_varied_length() -> None:
    words = [len(re.findall(r"\w+", prompt["prompt"])) for prompt in shipped()]
    assert min(words) < 20 and sum(100 <= n <= 400 for n in words) >= 20 and max(words) <= 400
    passages = [n for n, prompt in zip(words, shipped(), strict=True) if prompt["category"] == "summarize"]
    assert min(passages) >= 100


@pytest.mark.parametrize("name", ["prompts", "heldout", "examples"])
def test_no_shipped_prompt_shares_eight_words_with_training_or_with_another_set(name: str) -> None:
    """Both ways: neither contains the other, by the rule that training drops texts by (`prompts.HeldOut`)."""
    other = prompts.read(ASSETS / f"{name}.jsonl")
    ours = prompts.HeldOut(prompt["prompt"] for prompt in shipped())
    assert not [entry["prompt"] for entry in other if entry["prompt"] in ours]
    theirs = prompts.HeldOut(entry["prompt"] for entry in other)
    assert not [prompt["id"] for prompt in shipped() if prompt["prompt"] in theirs]


def test_no_two_shipped_prompts_share_eight_words() -> None:
    every = shipped()
    for prompt in every:
        others = prompts.HeldOut(other["prompt"] for other in every if other is not prompt)
        assert prompt["prompt"] not in others, prompt["id"]


# Public sets, in files written as their programs write them


def spec_bench(**changes: Any) -> dict[str, Any]:
    """A line of Spec-Bench's data/spec_bench/question.jsonl: ids are numbers, one or two turns, `reference` in most."""
    row = {"question_id": 81, "category": "writing", "turns": ["Describe a fjord.", "Shorter."], "reference": ["…"]}
    return row | changes


def speed_bench(**changes: Any) -> dict[str, Any]:
    """A row of SPEED-Bench: the fields of its card."""
    row = {
        "question_id": "0f3a", "category": "coding", "sub_category": "python", "turns": ["Sort a list.", "And now?"],
        "source": "example/set", "src_id": "7", "difficulty": "easy", "multiturn": True,
    }  # fmt: skip
    return row | changes


def messages(row: dict[str, Any]) -> dict[str, Any]:
    """The row as NeMo-Skills' prepare.py writes it: the turns become messages of the user."""
    turns = row.pop("turns")
    return row | {"messages": [{"role": "user", "content": turn} for turn in turns]}


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path: Path, *rows: dict[str, Any]) -> Path:
    pyarrow, written = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    written.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def test_spec_bench_gives_the_first_turns(tmp_path: Path) -> None:
    file = lines(tmp_path / "question.jsonl", spec_bench(), spec_bench(question_id=82, category="qa", turns=["Who?"]))
    assert datasets.read("spec-bench", file) == [
        {"id": "81", "category": "writing", "prompt": "Describe a fjord."},
        {"id": "82", "category": "qa", "prompt": "Who?"},
    ]


def test_speed_bench_is_read_as_nemo_skills_writes_it(tmp_path: Path) -> None:
    lines(tmp_path / "qualitative.jsonl", messages(speed_bench()))
    lines(tmp_path / "throughput_1k.jsonl", messages(speed_bench(turns=["Long."])))
    expected = [{"id": "0f3a", "category": "coding", "prompt": "Sort a list."}]
    assert datasets.read("speed-bench", tmp_path) == expected
    (long,) = datasets.read("speed-bench", tmp_path / "throughput_1k.jsonl")
    assert long["prompt"] == "Long."


@pytest.mark.parametrize("below", ["speed/qualitative/test.parquet", "qualitative/test-00000-of-00001.parquet"])
def test_speed_bench_is_read_as_model_optimizer_and_its_repository_keep_it(below: str, tmp_path: Path) -> None:
    parquet(tmp_path / below, speed_bench())
    parquet((tmp_path / below).parents[1] / "throughput_2k" / "test.parquet", speed_bench(turns=["Long."]))
    expected = [{"id": "0f3a", "category": "coding", "prompt": "Sort a list."}]
    assert datasets.read("speed-bench", tmp_path) == expected
    assert datasets.read("speed-bench", (tmp_path / below).parent) == expected


def test_a_file_that_only_claims_to_be_parquet_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "qualitative.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="is not a Parquet file"):
        datasets.read("speed-bench", tmp_path)


def test_without_pyarrow_the_refusal_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "qualitative.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="pip install pyarrow"):
        datasets.read("speed-bench", tmp_path)


REFUSED: dict[str, tuple[str, Callable[[Path], Path | None], str]] = {
    "no path": ("spec-bench", lambda folder: None, "needs --path"),
    "no file": ("spec-bench", lambda folder: folder / "none.jsonl", "No such file"),
    "empty": ("spec-bench", lambda folder: lines(folder / "a.jsonl"), "holds no prompts"),
    "our own format": (
        "spec-bench",
        lambda folder: lines(folder / "a.jsonl", {"id": "1", "category": "x", "prompt": "Hi."}),
        'line 1: not an object with "question_id", "category" and "turns", as Spec-Bench has them',
    ),
    "messages in spec-bench": (
        "spec-bench",
        lambda folder: lines(folder / "a.jsonl", spec_bench(), messages(spec_bench(question_id=9))),
        "line 2: not an object with",
    ),
    "turns that are no list": (
        "speed-bench",
        lambda folder: lines(folder / "qualitative.jsonl", speed_bench(turns="Sort a list.")),
        'not an object with "question_id", "category" and "turns" or "messages", as SPEED-Bench has them',
    ),
    "an empty turn": ("spec-bench", lambda folder: lines(folder / "a.jsonl", spec_bench(turns=[" "])), "not an object"),
    "twice": ("spec-bench", lambda folder: lines(folder / "a.jsonl", spec_bench(), spec_bench()), "two prompts have"),
    "not JSON": (
        "spec-bench",
        lambda folder: (folder / "a.jsonl").write_text("question") and folder / "a.jsonl",
        "line 1: not a line of JSON",
    ),
    "no split": (
        "speed-bench",
        lambda folder: lines(folder / "question.jsonl", spec_bench()) and folder,
        "holds no split of SPEED-Bench",
    ),
    "several splits": (
        "speed-bench",
        lambda folder: [lines(folder / f"throughput_{n}k.jsonl", messages(speed_bench())) for n in (1, 2)] and folder,
        "several splits of SPEED-Bench, throughput_1k, throughput_2k",
    ),
    "placeholders": (
        "speed-bench",
        lambda folder: lines(
            folder / "qualitative.jsonl",
            speed_bench(),
            speed_bench(question_id="1", turns=[f"{datasets.PLACEHOLDER} USING SPECDEC_BENCH\n\nRead {{article}}"]),
        ),
        "the texts of 1 of 2 prompts are placeholders; fetch them first",
    ),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_is_not_the_set_is_refused_in_one_sentence(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, made, sentence = REFUSED[case]
    path = made(tmp_path)
    arguments = ["bench", "--dataset", name, "--target", str(tmp_path / "none")]
    assert main([*arguments, *(["--path", str(path)] if path else [])]) == 2
    told = capsys.readouterr().err.strip()
    assert sentence in told and told.count("\n") == 0 and told.endswith(".")


def test_a_set_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match="there are speed-bench and spec-bench"):
        datasets.read("mt-bench", "somewhere")
