"""`python -m spec_decode bench`: from the options to the reports, on a tiny model; the page in a browser; the README's
tables."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from jsonschema import Draft202012Validator
from test_peers import _with_tokenizer

from spec_decode.__main__ import main
from spec_decode.bench import page, readme
from spec_decode.bench.markdown import markdown
from spec_decode.bench.method import Bench
from spec_decode.bench.page import plotly
from spec_decode.bench.record import Record, read
from spec_decode.bench.sizes import sizes
from spec_decode.bench.summary import report
from spec_decode.errors import UserError
from spec_decode.loading import pair as models

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = json.loads((ROOT / "docs" / "bench.schema.json").read_text(encoding="utf-8"))
PROMPTS = [("a", "x", "one two"), ("b", "y", "three"), ("c <script>|*", "x", "two one four")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, and a file of prompts."""
    made = tmp_path_factory.mktemp("bench")
    _with_tokenizer(made / "model")
    lines = [json.dumps({"id": i, "category": c, "prompt": p}) for i, c, p in PROMPTS]
    (made / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return made


def run(folder: Path, *options: Any) -> int:
    prompts, model = folder / "prompts.jsonl", folder / "model"
    told = ["bench", "--prompts", prompts, "--target", model, "--device", "cpu", "--max-new-tokens", "6", *options]
    return main([str(option) for option in told])


@pytest.fixture(scope="module")
def measured(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the three reports and the raw file of a run with two conditions."""
    out = tmp_path_factory.mktemp("out")
    kinds = [part for kind in ("json", "html", "markdown") for part in (f"--{kind}", out / f"r.{kind}")]
    assert run(folder, "--draft-lengths", "2,adaptive", "--repeats", "2", *kinds) == 0
    return out


def fits(name: str | None, data: Any) -> list[str]:
    """What does not fit a definition of the schema, or the whole."""
    schema = SCHEMA if name is None else {**SCHEMA["$defs"][name], "$defs": SCHEMA["$defs"]}
    return [f"{list(error.path)}: {error.message}" for error in Draft202012Validator(schema).iter_errors(data)]


def test_reports_and_raw_measurements_fit_their_schema(measured: Path) -> None:
    Draft202012Validator.check_schema(SCHEMA)
    found = json.loads((measured / "r.json").read_text(encoding="utf-8"))
    assert fits(None, found) == []
    lines = [json.loads(line) for line in (measured / "r.jsonl").read_text(encoding="utf-8").splitlines()]
    assert fits("header", lines[0]["header"]) == []
    raw = [line for line in lines[1:] if "note" not in line]
    assert len(raw) == found["planned"] == found["measured"] == 3 * 2 * 2
    assert all(fits("measurement", line) == [] for line in raw)
    assert {key for line in lines if "note" in line for key in line["note"]} == {"warm_up", "end"}
    assert found["advice"][0]["text"] in (measured / "r.markdown").read_text(encoding="utf-8")
    broken = json.loads(json.dumps(found))
    broken["conditions"][0]["speedup"]["median"] = "fast"
    assert fits(None, broken) and fits("measurement", {**raw[0], "prompt": None})


def test_the_report_says_what_was_run_and_how(measured: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads((measured / "r.json").read_text(encoding="utf-8"))
    assert found["finished"] and found["raw"] == "r.jsonl" and found["warm_up_races"] == 2
    assert found["command"].startswith("python -m spec_decode ") and "torch" in found["versions"]
    assert found["machine"]["processor"] and found["pair"]["target"] == str(folder / "model")
    assert [c["label"] for c in found["conditions"]] == ["γ = 2", "adaptive"]
    for c in found["conditions"]:
        assert c["identical"] == c["measurements"] == 6 and c["same_text"] and set(c["categories"]) == {"x", "y"}
        assert c["lanes"]["baseline"]["verify_seconds"] > 0 and c["lanes"]["baseline"]["bandwidth_share"] > 0
        assert found["costs"]["lookup"]["step_seconds"] > 0
        assert c["speedup"]["low"] <= c["speedup"]["median"] <= c["speedup"]["high"]
    assert len(found["prompts"]) == 6 and found["models"]["target"]["read"] <= found["models"]["target"]["bytes"]
    text = (measured / "r.markdown").read_text(encoding="utf-8")
    assert "12 of 12 measurements of 3 prompts, 2 times each" in text and "2 warm-up races discarded" in text
    for head in ("Speedup", "By category", "Where the time of a round goes", "Latency", "The machine", "Prompts"):
        assert f"\n## {head}\n" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) in (7, 8, 9, 10, 11, 12, 13) for row in rows)
    assert r"c \<script>\|\*" in text
    assert main(["bench", "--report", str(measured / "r.jsonl")]) == 0  # again, without measuring
    assert capsys.readouterr().out == text


def test_an_interrupted_run_reports_and_the_same_command_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--repeats", "2", "--draft-length", "2", "--json", tmp_path / "r.json"]
    measure, left = Bench._race, [4]

    def interrupted(self: Bench, task: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return measure(self, task)

    monkeypatch.setattr(Bench, "_race", interrupted)
    assert run(folder, *options) == 130
    printed = capsys.readouterr()
    assert "4 of 6 measurements" in printed.out and "**The run was not finished.**" in printed.out
    assert "the same command goes on from" in printed.err
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["finished"] is False
    first = read(tmp_path / "r.jsonl").measurements
    assert run(folder, *options[:-4], "--draft-length", "3", *options[-2:]) == 2  # other settings: the part is kept
    assert "other settings" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    assert run(folder, *options) == 0
    assert "holds 4 measurements of this run, which goes on" in capsys.readouterr().err
    contents = read(tmp_path / "r.jsonl")
    assert contents.ended and contents.measurements[:4] == first and len(contents.measurements) == 6
    assert contents.notes["warm_up"] == 2
    assert run(folder, *options) == 0  # a finished run is measured anew
    assert read(tmp_path / "r.jsonl").measurements[0] != first[0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--draft-lengths", "0,1"], "Draft length must be a whole number from 1 to 16"),
        (["--temperatures", "warm"], "--temperatures does not take 'warm'"),
        (["--repeats", "0"], "--repeats does not take '0'"),
        (["--contexts", ","], "--contexts takes a comma-separated list"),
        (["--drafter", "lookup", "--drafters", "lookup,suffix"], "by --drafter or by --drafters"),
        (["--rules", "best"], "Unknown rule 'best'"),
        (["--report", "nowhere.jsonl"], "Cannot read nowhere.jsonl"),
        (["--html", "nowhere/r.html"], "its folder does not exist"),
    ],
)
def test_options_are_refused_in_a_sentence_before_a_model_is_loaded(
    options: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--target", str(tmp_path / "none"), *options]) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err and len(printed.err.strip().splitlines()) == 1 and not printed.out


def test_without_outputs_raw_measurements_go_into_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEC_DECODE_CACHE", str(tmp_path))
    assert run(folder, "--repeats", "1", "--drafters", "lookup,suffix", "--contexts", "12") == 2  # a word is a token
    assert run(folder, "--repeats", "1", "--drafters", "lookup,suffix", "--turns", "2") == 0
    (raw,) = (tmp_path / "bench").iterdir()
    found = read(raw).measurements
    assert {(m.condition.drafter, m.condition.turn) for m in found} == {
        (d, t) for d in ("lookup", "suffix") for t in (1, 2)
    }
    later = [m for m in found if m.condition.turn == 2]
    first = {m.prompt: m.prompt_tokens for m in found if m.condition.turn == 1}
    assert all(m.prompt_tokens > first[m.prompt] + 6 for m in later)  # the answer is read again


def test_sizes_count_what_is_held_and_what_a_pass_reads(folder: Path) -> None:
    pair = models.load_pair(str(folder / "model"), device="cpu")
    size, drafter = sizes(pair)
    model = tiny.model("llama")
    assert size.parameters == sum(p.numel() for p in model.parameters()) and drafter is None
    assert size.bytes == 4 * size.parameters
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert size.read == size.bytes - (0 if tied else 4 * model.get_input_embeddings().weight.numel())
    quantized = models.load_pair(str(folder / "model"), str(folder / "model"), device="cpu", dtype="int8")
    small, drafter = sizes(quantized)
    assert small.parameters == size.parameters and small.read < size.read / 2
    assert drafter.parameters == size.parameters and drafter.bytes == pytest.approx(small.bytes, rel=0.01)


# The page


@pytest.mark.browser
def test_the_page_needs_no_network_and_fits_a_phone(measured: Path) -> None:
    from playwright.sync_api import sync_playwright

    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found[0], args=["--no-sandbox"])
        for width, scheme in ((1280, "light"), (390, "dark")):
            context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
            tab, asked, wrong = context.new_page(), [], []
            tab.on("request", lambda request, asked=asked: asked.append(request.url))
            tab.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
            tab.goto((measured / "r.html").as_uri())
            tab.wait_for_selector("#plot-2 .main-svg")
            assert not wrong and all(url.startswith(("file:", "data:", "blob:")) for url in asked)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert tab.locator("section h2").all_inner_texts()[:2] == ["Does it pay?", "Speedup"]
            assert "c <script>|*" in tab.locator("details").inner_text() + tab.locator("details table").text_content()
            painted = tab.evaluate("document.querySelector('.gtitle, .xtitle').style.fill")
            tab.emulate_media(color_scheme="dark" if scheme == "light" else "light")
            tab.wait_for_function(f"document.querySelector('.gtitle, .xtitle').style.fill !== {json.dumps(painted)}")
            context.close()
        browser.close()


def test_the_page_holds_the_advisors_words_and_figure(measured: Path) -> None:
    found = json.loads((measured / "r.json").read_text(encoding="utf-8"))
    why = {theme: {"data": [{"name": "</script><b>"}], "layout": {"height": 701}} for theme in ("light", "dark")}
    text = page.page(found, ["Take **γ = 2**.", "A second paragraph."], [why]).replace(plotly(), "")
    assert text.index("Does it pay?") < text.index("<strong>γ = 2</strong>") < text.index("<h2>Speedup</h2>")
    assert "</script><b>" not in text and r"<\/script><b>" in text and 'style="height: 701px"' in text
    assert "Take **γ = 2**.\n\nA second paragraph.\n" in markdown(found, ["Take **γ = 2**.", "A second paragraph."])
    assert "Does it pay?" not in page.page(found).replace(plotly(), "")


def test_sweeps_are_drawn_as_lines() -> None:
    def condition(context: int, label: str, median: float) -> dict[str, Any]:
        speedup = {"median": median, "low": median - 0.1, "high": median + 0.1, "worst": 1.0, "worst_prompt": "a"}
        return {
            "condition": {"context": context, "turn": None},
            "label": f"{label}, context {context}",
            "speedup": speedup,
        }

    told = [condition(c, label, 1 + c / 1e4) for label in ("γ = 2", "adaptive") for c in (1024, 256)]
    (figure,) = page.sweeps({"conditions": told})
    assert [trace["name"] for trace in figure["data"]] == ["γ = 2", "adaptive"]
    assert figure["data"][0]["x"] == [256, 1024] and figure["data"][0]["y"] == [1.0256, 1.1024]
    assert figure["data"][0]["error_y"]["array"] == pytest.approx([0.1, 0.1])
    assert page.sweeps({"conditions": told[:1]}) == []


# The README


def test_the_readmes_tables_are_those_of_their_files() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert readme.written(text) == text, "run `python -m spec_decode bench --update-readme`"


def test_files_of_benchmarks_say_where_and_how_they_were_made() -> None:
    for path in readme.FOLDER.glob("*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        assert all(found[key] for key in ("command", "date", "machine", "pair")), path.name
        if "oracle" in found:
            assert found["machine"]["torch"] and found["machine"]["transformers"], path.name
        else:
            assert fits(None, found) == [] and found["finished"] and found["versions"], path.name
            assert len(read(readme.FOLDER / found["raw"]).measurements) == found["measured"], path.name


def test_raw_measurements_may_be_compressed(measured: Path, tmp_path: Path) -> None:
    packed, plain = tmp_path / "r.jsonl.gz", measured / "r.jsonl"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert report(read(packed), "r") == report(read(plain), "r")
    with pytest.raises(UserError, match="no file of measurements"):
        Record(packed, {})  # nothing is appended to a compressed file
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(UserError, match="no whole gzip file"):
        read(packed)


def test_tables_are_written_between_their_markers(measured: Path, tmp_path: Path) -> None:
    shutil.copy(measured / "r.json", tmp_path)
    file = tmp_path / "README.md"
    begin = "<!-- benchmark: r.json {} -->\n"
    one, other = begin.format("headline"), begin.format("categories γ = 2")
    file.write_text(f"# A\n\n{one}old\n{readme.END}\n\n{other}{readme.END}\nZ\n", encoding="utf-8")
    assert readme.update(file, tmp_path)
    text = file.read_text(encoding="utf-8")
    assert text.startswith(f"# A\n\n{one}| condition |") and text.endswith(f"{readme.END}\nZ\n")
    assert "old" not in text and "| **all** | 3 |" in text
    assert not readme.update(file, tmp_path)  # nothing is left to change
    file.write_text(text.replace("| **all** | 3 |", "| **all** | 4 |"), encoding="utf-8")
    assert readme.update(file, tmp_path) and file.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("marker", "sentence"),
    [
        ("r.json headline", "has no end"),
        (f"none.json headline -->\n{readme.END}", "names no report"),
        (f"r.json best -->\n{readme.END}", "names no table"),
        (f"r.json categories γ = 9 -->\n{readme.END}", "names no condition; there are 'γ = 2', 'adaptive'"),
    ],
)
def test_a_marker_that_names_nothing_is_refused(marker: str, sentence: str, measured: Path) -> None:
    text = f"<!-- benchmark: {marker}" + ("" if "-->" in marker else " -->\n")
    with pytest.raises(UserError, match=sentence):
        readme.written(text, measured)


def test_a_report_of_nothing_is_a_report() -> None:
    contents = SimpleNamespace(header={"plan": {}}, measurements=[], notes={}, ended=False)
    found = report(contents, "raw.jsonl")
    assert "The run was not finished" in markdown(found) and found["conditions"] == []
    assert "The run was not finished" in page.page(found).replace(plotly(), "")
