"""`check gpu`, which a person with a GPU runs, on the CPU: every step of it, at sizes that cost little; and the command
line of all checks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from spec_decode.__main__ import main
from spec_decode.check import CHECKS, gpu, lossless, operators
from spec_decode.errors import UserError
from spec_decode.loading import catalog

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


def test_a_race_is_told_and_a_failure_too(tmp_path: Path, capsys: pytest.CaptureFixture[str], packed: bool) -> None:
    gpu.write(tmp_path, tiny.gemma4("shared", ordered=True, hidden_size=64))
    assert gpu.race("tiny", tmp_path, CPU, "target=nf4,drafter=int8", "bfloat16", 80)
    assert gpu.race("tiny", tmp_path, CPU, None, "float32", 80)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * 4
    assert "target nf4, drafter int8" in lines[0] and "lanes identical" in lines[2] and "80 tokens" in lines[3]
    shutil.rmtree(tmp_path / "drafter")
    assert not gpu.race("tiny", tmp_path, CPU, None, "float32", 80)
    assert capsys.readouterr().out.startswith("FAIL")


@pytest.mark.parametrize("name", ["gemma-4-E2B", "gemma-4-E4B", "gemma-4-12B"])
def test_shapes_of_the_catalog_make_a_pair(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers and heads of the real shapes, with fewer numbers in each."""
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
    gpu.write(tmp_path, gpu.shaped(name, CPU))
    assert gpu.race(name, tmp_path, CPU, None, "bfloat16", 80)


def test_gpu_fails_with_exit_code_1_if_a_race_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raced: list[tuple[Any, ...]] = []

    def race(*args: Any) -> bool:
        raced.append(args)
        return len(raced) != 3

    monkeypatch.setattr(gpu, "race", race)
    monkeypatch.setattr(gpu, "write", lambda *_: None)
    with pytest.raises(SystemExit) as left:
        main(["check", "gpu", "--tiny", "--device", "cpu", "--bitsandbytes", "nf4"])
    assert left.value.code == 1 and capsys.readouterr().out.endswith("\n1 failed\n")
    precisions = [(None, "float32"), (None, "bfloat16"), ("nf4", "bfloat16")]
    assert [args[3:5] for args in raced] == precisions * 2 * len(tiny.GEMMA4)
    assert main(["check", "gpu", "--tiny", "--device", "cpu", "--bitsandbytes"]) == 0
    assert capsys.readouterr().out.endswith("\nall passed\n")


def test_gpu_refuses_a_pair_that_the_catalog_does_not_have(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pair 'gemma-5'"):
        gpu.write(tmp_path, gpu.shaped("gemma-5", CPU))


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
    monkeypatch.setattr(operators, "count", lambda entry, length, context: works)
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
