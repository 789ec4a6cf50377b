"""`check gpu`, which a person with a GPU runs, on the CPU: every step of it, at sizes that cost little; and the command
line of all checks."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from spec_decode.__main__ import main
from spec_decode.check import CHECKS, gpu, lossless, operators, shapes
from spec_decode.check.gpu import correct, others, parts, report, speed
from spec_decode.check.gpu.report import Goal, Part, Report, Result, Skip
from spec_decode.check.gpu.session import Session, raced
from spec_decode.errors import UserError
from spec_decode.loading import catalog
from spec_decode.loading.checkpoints import How, load_model, quantized_copy
from spec_decode.loading.pair import _precision
from spec_decode.rules import Rule
from spec_decode.settings import Settings
from spec_decode.verification import synthetic

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("gemma-4-E2B", marks=pytest.mark.long),
        pytest.param("gemma-4-E4B", marks=pytest.mark.long),
        "gemma-4-12B",
    ],
)
def test_shapes_of_the_catalog_make_a_pair(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers and heads of the real shapes, with fewer numbers in each, made in memory."""
    entry = catalog.find(name)
    assert entry is not None

    def thin(shape: dict[str, Any]) -> dict[str, Any]:
        return {**shape, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 2048, "global_head_dim": 16} | (
            {"head_dim": 8} | {key: 2048 for key in shape if key == "vocab_size_per_layer_input" and shape[key]}
        )

    drafter = entry.drafter_shape
    small = replace(entry, shape=thin(entry.shape))
    drafter = {**drafter, "text_config": thin(drafter["text_config"]), "backbone_hidden_size": 32}
    monkeypatch.setattr(catalog.Entry, "drafter_shape", drafter)
    monkeypatch.setattr(catalog, "find", lambda _: small)
    pair = shapes.pair(name, shapes.shaped(name, CPU))
    trace = raced(pair, shapes.text(40), Settings(draft_length=4, max_new_tokens=16)).trace
    assert len(trace.token_ids("baseline")) == len(trace.token_ids("speculative")) == 16
    assert pair.costs is not None and pair.info["dtype"] == "bfloat16" and pair.context >= 131072


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_a_pair_in_memory_is_quantized_as_one_from_disk(how: str, tmp_path: Path, packed: bool) -> None:
    """The same layers, and the same logits."""
    model = tiny.gemma4("shared", hidden_size=64)[0].to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    read = load_model(str(tmp_path), CPU, "bfloat16", How(how))
    made = quantized_copy(model, how, CPU)
    assert _precision(made) == _precision(read) == how and _precision(model) is None
    assert [type(module) for module in made.modules()] == [type(module) for module in read.modules()]
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        assert torch.equal(made(ids).logits, read(ids).logits)


def options(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    return parser.parse_args(["--tiny", "--device", "cpu", *given])


@pytest.mark.long
def test_the_rehearsal_runs_every_part_and_a_second_one_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    """Device and CPU are the same here; each makes its own models."""
    out = tmp_path / "folder" / "gpu.json"
    given = ["--tiny", "--device", "cpu", "--draws", "150", "--bitsandbytes", "target=int8,drafter=int8", "--minutes"]
    given = ["check", "gpu", *given, "60", "--out", str(out), "--pairs", "gemma-4-E4B", "gemma-4-12B"]
    assert main(given) == 0
    printed = capsys.readouterr().out
    data = json.loads(out.read_text())
    names = [part.name for part in parts.parts(Session(CPU, options(*given[5:])))]
    assert [part["part"] for part in data["parts"]] == names
    found = {part["part"]: part for part in data["parts"]}
    for name, part in found.items():
        if part["status"] == "skipped":
            assert name.startswith(("elsewhere", "batch gemma")) and part["why"]
        else:
            assert part["status"] == "done" and part["figures"] and name in printed
    texts = found["tokens"]["figures"]
    assert len(texts) == 2 * (3 * len(tiny.GEMMA4) + 4) and all(figure["identical"] for figure in texts.values())
    assert found["bandwidth"]["figures"]["best"] > 1e8
    timed = found["round gemma-4-E4B"]["figures"]
    assert timed["roofline_share"] > 0 and timed["baseline"]["weight_bytes"] > 10_000
    assert timed["round_in_steps"] == timed["speculative"]["seconds"] / timed["baseline"]["seconds"]
    assert found["idle gemma-4-E4B"]["figures"]["kernels"] > 100
    assert (out.parent / found["idle gemma-4-E4B"]["figures"]["chrome_trace"]).stat().st_size > 1000
    theirs = found["transformers gemma-4-E4B"]["figures"]
    assert all("failed" not in theirs[name] for name in ("dynamic cache", "static cache", "assisted"))
    assert theirs["assisted"]["rounds"] > 1
    assert found["batch-invariant gemma-4-E4B"]["figures"]["same_bits"]["padded"] == 1
    assert "int8" in found["bitsandbytes target=int8,drafter=int8 gemma-4-E4B"]["figures"]["dtype"]
    assert found["recipe"]["figures"]["tokens_written"] > 0 and found["recipe"]["figures"]["steps"] > 0
    goals = [goal for part in data["parts"] for goal in part["goals"]]
    assert len(goals) > 10 and {goal["met"] for goal in goals} <= {True, False}
    assert data["rehearsal"] and data["command"].startswith("python -m spec_decode") and "torch" in data["versions"]

    def never(*_: Any) -> Any:
        raise AssertionError("it is done already")

    for module, name in ((correct, "tokens"), (correct, "distribution"), (speed, "round_of"), (others, "recipe")):
        monkeypatch.setattr(module, name, never)
    assert main([*given, "--resume", "--only", "tokens", "distribution", "round", "recipe"]) == 0
    again = json.loads(out.read_text())
    assert again["parts"] == data["parts"] and again["date"] == data["date"] and len(again["resumed"]) == 1


def test_a_part_that_fails_is_recorded_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    def part(name: str, body: Callable[[], Result], estimate: float = 0) -> Part:
        def run() -> Result:
            data = json.loads((tmp_path / "x.json").read_text())
            assert name in seen or len(data["parts"]) == "abcdef".index(name), "written after every part"
            seen.append(name)
            return body()

        return Part(name, "told", estimate, run)

    def fails() -> Result:
        raise RuntimeError("CUDA error:\n  out of luck")

    def skips() -> Result:
        raise Skip("there is one device only")

    goals = (Goal("fast", 0.8, 0.75), Goal("idle", 0.1, 0.03, at_least=False), Goal("unknown", None, 1))
    made = [
        part("a", lambda: Result({"x": 1}, goals)),
        part("b", fails),
        part("c", skips),
        part("d", lambda: Result({"y": 2}, wrong="lanes part")),
        part("e", lambda: Result({}), 1e6),
        part("f", lambda: Result({"z": 3})),
    ]
    monkeypatch.setattr(parts, "parts", lambda session: made)
    command = ["check", "gpu", "--tiny", "--device", "cpu", "--out", str(tmp_path / "x.json")]
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 1
    found = {row["part"]: row for row in json.loads((tmp_path / "x.json").read_text())["parts"]}
    assert {name: row["status"] for name, row in found.items()} == {
        "a": "done", "b": "failed", "c": "skipped", "d": "failed", "e": "skipped", "f": "done",
    }  # fmt: skip
    assert found["b"]["why"] == "RuntimeError: CUDA error: out of luck" and found["d"]["why"] == "lanes part"
    assert found["c"]["why"] == "there is one device only" and found["e"]["why"].startswith("it takes about 1000000 s")
    assert [goal["met"] for goal in found["a"]["goals"]] == [True, False, None]
    printed = capsys.readouterr().out
    assert "met    fast: 0.8 (goal ≥ 0.75)" in printed and "MISSED idle: 0.1 (goal ≤ 0.03)" in printed
    assert "2 parts done, 2 failed, 2 skipped; 1 goals met, 1 missed, 1 without a figure" in printed

    done = list(seen)
    made[1] = Part("b", "told", 0, lambda: Result({"mended": True}))
    with pytest.raises(SystemExit):
        main([*command, "--resume"])  # d fails again
    assert seen[len(done) :] == ["c", "d"], "what was done is kept"
    found = {row["part"]: row for row in json.loads((tmp_path / "x.json").read_text())["parts"]}
    assert found["b"]["status"] == "done" and found["b"]["figures"] == {"mended": True}


def test_a_file_of_another_device_is_not_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    about = report.facts(CPU, ["check", "gpu"], True)
    Report(path, {**about, "device": "another"}, 1)
    command = ["check", "gpu", "--tiny", "--device", "cpu", "--out", str(path), "--resume"]
    assert main(command) == 2
    assert "its device is another" in capsys.readouterr().err
    path.write_text("{")
    assert main(command) == 2
    assert "Cannot go on with" in capsys.readouterr().err


def test_texts_that_differ_from_the_cpus_are_found(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """One model of two is made with other weights: the check says where the first token differs."""
    right, count = correct.models, [0]

    def models(kind: str, drafter: str) -> Any:
        target, other = right(kind, drafter)
        count[0] += 1
        if count[0] == 2:
            target.model.layers[0].mlp.up_proj.weight.data *= -1
        return target, other

    monkeypatch.setattr(correct, "classes", lambda: [("llama", "model"), ("shared", "mtp")])
    monkeypatch.setattr(correct, "models", models)
    result = correct.tokens(Session(CPU, options()))
    assert result.wrong.startswith("llama, model, greedy differs from the CPU at token")
    assert [figure["identical"] for figure in result.figures.values()] == [False, False, True, True]


def test_the_distribution_of_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Where every draft is accepted, tokens are the drafter's. A sound rule passes the same test in the rehearsal."""
    monkeypatch.setattr(Rule, "verify", lambda rule, case: synthetic.verify(replace(case, acceptance=1.0)))
    result = correct.distribution(Session(CPU, options("--draws", "150")))
    assert "rejection does not sample from the target" in result.wrong


def test_chi_square_needs_no_scipy() -> None:
    expected = torch.rand(lossless.VOCABULARY, generator=torch.Generator().manual_seed(1)).double()
    expected /= expected.sum()
    drawn = torch.multinomial(expected, 900, replacement=True, generator=torch.Generator().manual_seed(2)).tolist()
    for p in (expected, expected.flip(0)):
        assert correct.chi_square(drawn, p) == pytest.approx(lossless.chi_square(drawn, p), rel=1e-6, abs=1e-12)


def test_intervals_are_joined() -> None:
    assert speed.covered([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4
    assert speed.covered([]) == 0


@pytest.mark.long
def test_training_goes_on_in_slices(tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None) -> None:
    out, home = tmp_path / "train.json", tmp_path / "work"
    command = ["check", "gpu", "--tiny", "--device", "cpu", "--train", "0.1", "--train-dir", str(home)]
    for _ in range(2):
        assert main([*command, "--train-tokens", "1500", "--out", str(out), "--resume"]) == 0
    slices = json.loads(out.read_text())["parts"]
    assert [part["part"] for part in slices] == ["slice 1", "slice 2"]
    first, second = (part["figures"] for part in slices)
    assert (
        0 < first["tokens_written"] <= second["tokens_written"] and second["tokens_before"] == first["tokens_written"]
    )
    assert 0 < first["steps"] < second["steps"] and second["steps_before"] == first["steps"]
    assert any(line.startswith("Resuming at step") for line in second["said"])
    assert (home / "drafter" / "model.safetensors").exists() and second["validation"]["all"]["tokens_per_pass"] >= 1


def test_gpu_refuses_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    for given, said in (
        (["--pairs", "gemma-5"], "no pair 'gemma-5'"),
        (["--minutes", "0"], "must be above 0 minutes"),
        (["--train", "-1"], "must be above 0 minutes"),
        (["--bitsandbytes", "int3"], "Cannot quantize 'int3'"),
    ):
        assert main(["check", "gpu", "--tiny", "--device", "cpu", *given]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(UserError, match="no pair 'gemma-5'"):
        list(shapes.shaped("gemma-5", CPU))


def test_operators_needs_a_pytorch_with_cuda(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert main(["check", "operators"]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith(
        "spec_decode: check operators needs a PyTorch that was built with CUDA"
    )
    assert "pip install torch==2.12.0" in told.err and told.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gemma-5"], "no shapes of a pair 'gemma-5'"),
        (["--draft-length", "0"], "--draft-length takes 1 to 16, not 0"),
        (["--draft-length", "17"], "--draft-length takes 1 to 16, not 17"),
        (["--context", "0"], "--context takes 1 to 131040, not 0"),
        (["gemma-4-31B", "--context", "262144"], "--context takes 1 to 262112, not 262144"),
    ],
)
def test_operators_refuses_in_one_sentence(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert main(["check", "operators", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "-1", "inf", "nan", "x"])
def test_operators_takes_no_assumption_of_nothing(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["check", "operators", "--launch", number])
    assert left.value.code == 2 and "argument --launch" in capsys.readouterr().err


def test_operators_predicts_from_launches_and_bytes() -> None:
    assumed = operators.Assumptions(launch=10.0, replay=2.0, bandwidth=2.0)
    busy = operators.Work(0, 1000, 7_000_000_000, 1_000_000_000).predict(assumed)
    assert busy == {"launching": 10.0, "memory": 4.0, "eager": 10.0, "captured": 6.0}
    assert operators.Work(0, 100, 8_000_000_000, 0).predict(assumed)["eager"] == 4.0


def test_operators_prints_the_same_as_a_table_and_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    works = operators.Work(0, 3000, 4_560_000_000, 200_000_000), operators.Work(2, 4321, 4_670_000_000, 280_000_000)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(operators, "count", lambda entry, length, context, attention: works)
    options = ["google/gemma-4-e2b-it", "--draft-length", "2", "--context", "100", "--launch", "4", "--bandwidth", "1"]
    assert main(["check", "operators", *options]) == 0
    out = capsys.readouterr().out
    assert "100 tokens before" in out and "4 µs to launch" in out and "1 TB/s" in out
    assert out.splitlines()[-2:] == [
        "| gemma-4-E2B | baseline step | 3,000 | 4.56 | 0.20 | 12.0 | 9.3 |",
        "| gemma-4-E2B | round, γ = 2 | 4,321 | 4.67 | 0.28 | 17.3 | 11.4 |",
    ]
    assert main(["check", "operators", *options, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["assumed"] == {"launch": 4.0, "replay": 1.5, "bandwidth": 1.0} and told["conditions"]["context"] == 100
    (row,) = told["pairs"]
    assert row["pair"] == "gemma-4-E2B" and row["round"]["operators"] == 4321 and row["round"]["draft_length"] == 2
    assert row["baseline_step"]["milliseconds"]["captured"] == pytest.approx(4.76 + 4.5)


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["check", name, "--help"])
    assert left.value.code == 0
    assert f"check {name} [-h]" in capsys.readouterr().out


def test_the_list_of_checks_needs_no_torch() -> None:
    look = (
        "import sys; from spec_decode.__main__ import main\n"
        "try: main(['check', '--help'])\n"
        "except SystemExit: print({'torch', 'gradio', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", look], cwd=ROOT, text=True, capture_output=True, check=True, timeout=60
    )
    assert done.stdout.endswith("\nset()\n") and all(name in done.stdout for name in CHECKS)


def test_what_a_check_cannot_do_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert main(["check", "draft-step", "--drafter", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"spec_decode: {tmp_path} holds no MTP drafter with vocabulary lists.\n"
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    assert main(["check", "lossless"]) == 2
    assert capsys.readouterr().err.startswith("spec_decode: check lossless needs the package scipy")


def test_lossless_tells_a_sampler_from_another(one_thread: None) -> None:
    """The target against itself passes, and against the distribution of another prompt it does not."""
    model, _ = tiny.gemma4("dense", vocab_size=lossless.VOCABULARY, initializer_range=0.1)
    drawn, expected = lossless.plain(model, 2000), lossless.exact(model)
    assert expected.sum().item() == pytest.approx(1)
    assert lossless.chi_square(drawn, expected)[2] > 1e-3
    assert lossless.chi_square(drawn, expected.flip(0))[2] < 1e-9
