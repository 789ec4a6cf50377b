"""What every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub
# Before anything imports PyTorch: threads that spin while they wait take the cores from the other test processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def embedded_dir() -> Path:
    """The embedded target's checkpoint, made once and kept in the user's cache."""
    from spec_decode.loading import embedded

    return embedded.prepare(print)


@pytest.fixture(params=[False, True], ids=["unpacked", "packed"])
def packed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether bitsandbytes packs 4-bit weights, as on processors with AVX512-BF16 and on all others: both are tested,
    whatever this one has."""
    import bitsandbytes

    for module in (bitsandbytes.functional, bitsandbytes.nn.modules):
        monkeypatch.setattr(module, "has_avx512bf16", lambda: request.param)
    return bool(request.param)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that handing work out loses more than it wins."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
