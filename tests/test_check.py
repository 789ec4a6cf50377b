"""`check gpu`, which a person with a GPU runs, on the CPU: every step of it, at sizes that cost little; and the command
line of all checks."""

from __future__ import annotations

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
from spec_decode.check import CHECKS, gpu, lossless
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
