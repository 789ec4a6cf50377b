"""Drafter weights that differ from the SHA-256 sums beside them are refused in one sentence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from spec_decode.errors import ModelError
from spec_decode.loading import checkpoints
from spec_decode.loading.drafter import SHIPPED
from spec_decode.training.assistant import Learner, Shape, save

CPU = torch.device("cpu")


def flip(weights: Path) -> None:
    """Inverts one bit in the middle of a matrix."""
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def check(folder: Path) -> None:
    """It loads intact; damaged, the error names the file in one sentence."""
    weights = folder / "model.safetensors"
    intact = weights.read_bytes()
    checkpoints.load_assistant(str(folder), CPU, "float32")
    harms: list[Callable[[Path], None]] = [
        flip,
        lambda path: os.truncate(path, 1000),
        lambda path: path.write_bytes(b""),
    ]
    for harm in harms:
        harm(weights)
        with pytest.raises(ModelError, match=r"model\.safetensors is damaged or was not fetched whole") as caught:
            checkpoints.load_assistant(str(folder), CPU, "float32")
        assert "\n" not in str(caught.value)
        weights.write_bytes(intact)
    weights.unlink()
    with pytest.raises(ModelError, match=r"SHA256SUMS cannot be compared: .*model\.safetensors") as caught:
        checkpoints.load_assistant(str(folder), CPU, "float32")
    assert "\n" not in str(caught.value)


def test_the_drafter_that_is_shipped(tmp_path: Path) -> None:
    folder = tmp_path / "drafter"
    shutil.copytree(SHIPPED, folder)
    check(folder)


def test_a_drafter_that_was_trained_here(tmp_path: Path) -> None:
    learner = Learner(tiny.model("llama"), Shape(intermediate=64, layers=(1, 3)))
    save(learner, tmp_path / "drafter", head=True)
    check(tmp_path / "drafter")


def test_sums_that_cannot_be_read(tmp_path: Path) -> None:
    for sums in (b"\xff\xfe", b"no sum at all\n"):
        folder = tmp_path / "drafter"
        shutil.copytree(SHIPPED, folder, dirs_exist_ok=True)
        (folder / "SHA256SUMS").write_bytes(sums)
        with pytest.raises(ModelError, match="SHA256SUMS cannot be compared"):
            checkpoints.load_assistant(str(folder), CPU, "float32")


def test_a_checkpoint_without_sums_loads(tmp_path: Path) -> None:
    folder = tmp_path / "drafter"
    shutil.copytree(SHIPPED, folder)
    (folder / "SHA256SUMS").unlink()
    checkpoints.load_assistant(str(folder), CPU, "float32")
