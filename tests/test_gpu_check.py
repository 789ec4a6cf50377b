"""The script that a person with a GPU runs, on the CPU: every step of it, at sizes that cost little."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

sys.path.append(str(Path(__file__).parents[1] / "docs"))

import gpu_check

from spec_decode import catalog

CPU = torch.device("cpu")


def test_a_race_is_told_and_a_failure_too(tmp_path: Path, capsys: pytest.CaptureFixture[str], packed: bool) -> None:
    gpu_check.write(tmp_path, tiny.gemma4("shared", ordered=True, hidden_size=64))
    assert gpu_check.race("tiny", tmp_path, CPU, "target=nf4,drafter=int8", "bfloat16", 80)
    assert gpu_check.race("tiny", tmp_path, CPU, None, "float32", 80)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * 4
    assert "target nf4, drafter int8" in lines[0] and "lanes identical" in lines[2] and "80 tokens" in lines[3]
    shutil.rmtree(tmp_path / "drafter")
    assert not gpu_check.race("tiny", tmp_path, CPU, None, "float32", 80)
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
    gpu_check.write(tmp_path, gpu_check.shaped(name, CPU))
    assert gpu_check.race(name, tmp_path, CPU, None, "bfloat16", 80)
