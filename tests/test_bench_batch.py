"""The benchmark of batches: what is measured, what is claimed, and what is refused. No timing decides a test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_rounds
import tiny

from spec_decode import batch
from spec_decode.__main__ import main
from spec_decode.bench.batch import conclusion, crossing, filling, measure, sizes_of, table
from spec_decode.errors import OutOfMemory, PromptError, UserError
from spec_decode.loading import pair as models
from spec_decode.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [{"id": str(i), "category": "c", "prompt": f"{i} and {i}, {'and ' * i}so on"} for i in range(5)]
SETTINGS = Settings(draft_length=3, max_new_tokens=8, rule="coupled", temperature=0.8)


@pytest.fixture(scope="module")
def pair() -> Any:
    return tiny.PairOf(*test_rounds.parts("llama", "model"))


class Watched:
    """The batches that were decoded: lane, rows and seeds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
        decode = batch.decode

        def watched(lane: Any, prefills: Any, texts: Any, seeds: Any) -> Iterator[Any]:
            lengths = tuple(len(prefill.prompt) for prefill in prefills)
            self.seen.append((lane.name, lengths, tuple(seeds)))
            return decode(lane, prefills, texts, seeds)

        monkeypatch.setattr(batch, "decode", watched)


def test_every_size_decodes_the_same_prompts_in_both_lanes(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watched, said = Watched(monkeypatch), []
    report = measure(pair, PROMPTS, SETTINGS, [1, 2, 4], repeats=2, say=said.append)
    assert [row["size"] for row in report["sizes"]] == [1, 2, 4] and len(said) == 3
    for row in report["sizes"]:
        # Four of the five prompts fill batches of four, and those of the others.
        assert (row["prompts"], row["texts"]) == (4, 8)
        assert row["identical"] == row["as_alone"] == 8, "a prompt has the same seed at every size"
        base, fast = row["baseline"], row["speculative"]
        assert base["tokens"] == fast["tokens"] == 8 * SETTINGS.max_new_tokens
        assert base["passes"] == 8 // row["size"] * (SETTINGS.max_new_tokens - 1)
        assert base["rows_per_pass"] == row["size"] and 1 <= fast["rows_per_pass"] <= row["size"]
        assert 0 <= fast["acceptance_rate"] <= 1 and 1 <= fast["tokens_per_pass"] <= 4
        low, high = row["speedup_interval"]
        assert low <= row["speedup"] <= high
        assert row["speedup"] == pytest.approx(fast["tokens_per_second"] / base["tokens_per_second"])
    of_two = [run for run in watched.seen if len(run[1]) == 2]
    assert [lane for lane, *_ in of_two] == ["baseline", "speculative"] * 2 + ["speculative", "baseline"] + [
        "baseline",
        "speculative",
        "speculative",
        "baseline",
    ]
    assert {seeds for _, _, seeds in of_two} == {(0, 1), (2, 3)}
    lengths = {length for _, rows, _ in watched.seen for length in rows}
    assert len(lengths) == 4, "the prompts differ, and the fifth is left out"
    json.dumps(report)
    shown = table(report, same_text=True)
    assert shown.count("8 of 8") == 3 and conclusion(report) in shown
    assert "not promised" in table(report, same_text=False)


def test_memory_that_runs_out_ends_the_measurement_and_not_what_was_measured(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    join = batch.State.join

    def scarce(states: Any) -> Any:
        if len(states) >= most[0]:
            raise RuntimeError("CUDA out of memory")
        return join(states)

    monkeypatch.setattr(batch.State, "join", scarce)
    most = [4]
    report = measure(pair, PROMPTS, SETTINGS, [1, 2, 4], repeats=1)
    assert [row["size"] for row in report["sizes"]] == [1, 2]
    assert report["skipped"] == "The device ran out of memory at a batch of 4."
    assert report["skipped"] in table(report, same_text=True)
    most[0] = 1
    with pytest.raises(OutOfMemory, match="at a batch of 1; try"):
        measure(pair, PROMPTS, SETTINGS, [1, 2], repeats=1)


def report_of(*points: tuple[int, float, float, float]) -> dict[str, Any]:
    rows = [{"size": size, "speedup": value, "speedup_interval": [low, high]} for size, value, low, high in points]
    return {"sizes": rows, "crossing": crossing([point[:2] for point in points])}


def test_where_the_speedup_crosses_1_is_said() -> None:
    found = report_of((1, 2.0, 1.9, 2.1), (2, 1.5, 1.4, 1.6), (8, 1 / 1.5, 0.6, 1.1), (16, 0.5, 0.4, 0.6))
    assert found["crossing"] == {"between": [2, 8], "at": pytest.approx(4.0)}  # halfway, in logarithms
    assert conclusion(found) == (
        "The speedup crosses 1 between batches of 2 and 8, at about 4.0 rows. Its interval holds 1 at 8."
    )
    above = report_of((1, 2.0, 1.9, 2.1), (4, 1.2, 1.1, 1.3))
    assert above["crossing"] is None
    assert (
        conclusion(above) == "The speedup stays above 1 in batches of 1 to 4: it does not cross 1 in what was measured."
    )
    assert "at or below 1 in a batch of 4" in conclusion(report_of((4, 0.9, 0.8, 0.95)))
    assert crossing([(1, 0.5), (2, 2.0)]) == {"between": [1, 2], "at": pytest.approx(2**0.5)}
    assert crossing([(1, 1.2), (2, 1.0)]) == {"between": [1, 2], "at": pytest.approx(2.0)}
    assert crossing([]) is None and crossing([(3, 2.0)]) is None
    assert conclusion({"sizes": [{"speedup": None}], "crossing": None}).startswith("No speedup was measured")


@pytest.mark.parametrize("text", ["", "0", "1,", "two", "1.5", "-1", "2000"])
def test_sizes_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--batch-size takes whole numbers from 1 to 1024"):
        sizes_of(text)


def test_sizes_are_sorted_and_prompts_suffice() -> None:
    assert sizes_of("8, 1,2,2") == [1, 2, 8]
    assert [prompt["id"] for prompt in filling(PROMPTS, [1, 2])] == ["0", "1", "2", "3"]
    with pytest.raises(UserError, match="A batch of 6 takes as many different prompts, and the file holds 5"):
        filling(PROMPTS, [2, 6])


def test_a_prompt_that_leaves_no_room_for_drafts_beyond_the_end_is_refused(pair: Any) -> None:
    longest = Settings(draft_length=3, max_new_tokens=pair.context - 30)
    with pytest.raises(PromptError, match="tokens long"):
        measure(pair, PROMPTS, longest, [1])


def test_the_command(pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(models, "load_pair", lambda **options: pair)
    monkeypatch.setattr("spec_decode.bench.batch.REPEATS", 1)
    file, out = tmp_path / "prompts.jsonl", tmp_path / "report.json"
    file.write_text("\n".join(map(json.dumps, PROMPTS)))
    base = ["bench", "--prompts", str(file), "--max-new-tokens", "6", "--batch-size", "1,2"]
    assert main([*base, "--draft-length", "2", "--json", str(out)]) == 0
    assert "| 2 | 4 |" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert [row["size"] for row in report["batches"]["sizes"]] == [1, 2]
    assert report["settings"]["draft_length"] == 2 and report["pair"]["target"] == "tiny"
    for extra, sentence in (
        ([], "choose a number from 1 to 16"),
        (["--draft-length", "2", "--peers", "transformers"], "leave out --peers or --batch-size"),
        (["--draft-length", "2", "--batch-size", "9"], "the file holds 5"),
    ):
        assert main([*base, *extra]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
