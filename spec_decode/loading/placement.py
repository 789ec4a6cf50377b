"""Where the models of a pair go: device, dtype, threads.

In: the names of devices and dtypes, and options. Out: a `Plan`, or a `ModelError`; the facts about the machine that
figures are reported with. Loads no model.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from ..cpu.kernels import sharing
from ..errors import ModelError
from ..target import Target
from . import catalog
from .catalog import EMBEDDED, Options
from .checkpoints import DTYPES, How

_STEPS = 5  # plain steps timed for each number of threads
_ALL = 0.9  # all threads are chosen unless others are faster by more than a tenth


@dataclass(frozen=True)
class Plan:
    """Devices, dtype (a name of `DTYPES`) and further options of the two models of a pair."""

    device: torch.device
    drafter_device: torch.device
    dtype: str
    target: How
    drafter: How

    def __str__(self) -> str:
        chosen = {"target": self.target.precision, "drafter": self.drafter.precision}
        quantized = ", ".join(f"{role} {precision}" for role, precision in chosen.items() if precision)
        return f"{self.dtype} ({quantized})" if quantized else self.dtype


def make_plan(target: str, device: str, dtype: str, options: Options) -> Plan:
    """The plan for a pair whose target is called `target`.

    Raises:
        ModelError: a device, dtype or device map does not exist or fit.
        SettingsError: a `quantize` or `attention` that cannot be used.
    """
    precisions = catalog.quantization(options.get("quantize"))
    attention = catalog.attention(options.get("attention"))
    device_map, drafter_device = options.get("device_map"), options.get("drafter_device")
    place = find_device(device)
    plan = Plan(
        place,
        find_device(drafter_device) if drafter_device else place,
        _dtype(dtype, place, target),
        How(precisions.get("target"), device_map == "auto", attention, options.get("target_revision")),
        How(precisions.get("drafter"), False, attention, options.get("drafter_revision")),
    )
    if device_map not in (None, "", "auto"):
        raise ModelError(f"Unknown device map {device_map!r}; the only one is auto.")
    if plan.dtype == "int8" and (precisions or device_map):
        raise ModelError("The dtype int8 is a quantization of its own; choose float32 or bfloat16 with --quantize.")
    return plan


def find_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA, then MPS, then the CPU.

    Raises:
        ModelError: it does not exist.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ModelError(f"Unknown device {name!r}; choose auto, cpu, cuda or mps.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("No CUDA device is available; choose --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"There is no {name}: this machine has {torch.cuda.device_count()} CUDA devices, from cuda:0 on."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("Apple's MPS is not available here; choose --device cpu.")
    return device


def _dtype(name: str, device: torch.device, target: str) -> str:
    if name == "auto":
        if device.type == "cpu":
            return "int8" if target == EMBEDDED else "float32"
        return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float16"
    if name not in DTYPES:
        raise ModelError(f"Unknown dtype {name!r}; choose one of auto, {', '.join(DTYPES)}.")
    if name == "int8" and device.type != "cpu":
        raise ModelError("int8 runs on the CPU only; choose float32 or bfloat16 here, or --quantize int8.")
    return name


def choose_threads(target: Target, int8: bool) -> int:
    """Sets the number of threads with which a plain step of `target` is fastest now, and returns it.

    They are the threads of our kernels (`int8`) or PyTorch's; then one or all. All of a few cores are fastest on an
    idle machine. Many threads compete for memory and caches. Where other processes run, each PyTorch operation waits
    until its last thread is scheduled, so that one thread can be several times faster.
    """
    everything = sharing.team.most
    counts = [2**i for i in range(everything.bit_length()) if 2**i < everything and (int8 or i == 0)] + [everything]
    token = torch.zeros(1, dtype=torch.long, device=target.device)
    cache = target.new_cache(1)
    torch.set_num_threads(1)  # beside our kernels PyTorch has little to do, and its idle threads would occupy cores

    def use(threads: int) -> None:
        if int8:
            sharing.team.threads = threads
        else:
            torch.set_num_threads(threads)

    def seconds(threads: int) -> float:
        use(threads)
        cache.reset()
        begun = time.perf_counter()
        target.verify(token, cache)
        return time.perf_counter() - begun

    seconds(everything)
    samples = [[seconds(threads) for threads in counts] for _ in range(_STEPS)]
    medians = dict(zip(counts, (median(column) for column in zip(*samples, strict=True)), strict=True))
    best = min(counts, key=lambda threads: medians[threads] * (_ALL if threads == everything else 1.0))
    use(best)
    return best


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure was measured on: processor, device, threads, versions."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": max(torch.get_num_threads(), sharing.team.threads if device.type == "cpu" else 0),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    else:
        facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    return facts


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
