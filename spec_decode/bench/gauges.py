"""Gauges: what the machine tells beside clocks, while lanes take turns.

In: the lane of every round that has just run. Out: per lane the busy share of processor and card, memory and energy;
for the whole time load, clock frequency and the work of other processes; and once, how fast this machine reads memory.
What cannot be measured is None, with a reason. Imports torch only where a GPU is measured.
"""

from __future__ import annotations

import importlib
import os
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from .measurement import MachineState

RAPL = Path("/sys/class/powercap")
BUFFER = 256 * 2**20  # bytes; far more than the caches of a processor hold
_TRIES = 7
_SAMPLE = 0.1  # seconds between two questions to NVML


@dataclass(frozen=True, slots=True)
class Reading:
    """What was measured while one lane ran; see `LaneFigures`."""

    cpu_utilization: float | None = None
    gpu_utilization: float | None = None
    peak_memory: int | None = None
    energy: float | None = None


class Gauges:
    """Reads the gauges of this machine.

    Call `begin`, then `lap` with the lane after every round, then `reading` and `state`.

    Args:
        device: of the target, as torch names it.
        clock, cpu: seconds, and seconds of CPU time of this process.

    Attributes:
        missing: by the name of a figure, why it cannot be measured here.
    """

    def __init__(
        self,
        device: str = "cpu",
        clock: Callable[[], float] = time.perf_counter,
        cpu: Callable[[], float] = time.process_time,
    ) -> None:
        self.device = device
        self.missing: dict[str, str] = {}
        self._clock, self._cpu = clock, cpu
        self._process = psutil.Process()
        self._cores = usable_cores()
        self._card = _Card.of(device, self.missing)
        self._energy = self._card.energy if self._card else _package_energy(self.missing)
        self._wall = self._cpu_time = self._joules = 0.0  # at the last lap
        self.begin()

    def begin(self) -> None:
        """Starts a measurement."""
        self._spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])  # seconds, CPU seconds, joules
        self._memory: dict[str, int] = defaultdict(int)
        self._gpu: list[float] = []
        self._sampled = -_SAMPLE
        self._load = _load()
        self._all = self._clock(), self._cpu(), _busy()
        self._now()

    def lap(self, lane: str | None) -> None:
        """What has been spent since the last call was the lane's; None discards it."""
        wall, cpu, energy = self._wall, self._cpu_time, self._joules
        self._now()
        if lane is None:
            return
        spent = self._spent[lane]
        spent[0] += self._wall - wall
        spent[1] += self._cpu_time - cpu
        spent[2] += self._joules - energy
        memory = self._card.memory() if self._card else int(self._process.memory_info().rss)
        self._memory[lane] = max(self._memory[lane], memory)
        if self._card and self._wall - self._sampled >= _SAMPLE:
            self._sampled = self._wall
            with suppress(Exception):  # a driver that does not tell
                self._gpu.append(self._card.utilization())
        self._wall, self._cpu_time = self._clock(), self._cpu()  # reading the gauges is nobody's time

    def reading(self, lane: str) -> Reading:
        """What was measured during a lane."""
        seconds, cpu, joules = self._spent[lane]
        return Reading(
            cpu_utilization=min(cpu / (seconds * self._cores), 1.0) if seconds > 0 else None,
            gpu_utilization=float(np.mean(self._gpu)) if self._gpu else None,
            peak_memory=self._memory[lane] or None,
            energy=joules if self._energy and seconds > 0 else None,
        )

    def state(self) -> MachineState:
        """The machine since `begin`."""
        wall, cpu, busy = self._all
        seconds, own = self._clock() - wall, self._cpu() - cpu
        others = None if busy is None else max((_busy() or 0.0) - busy - own, 0.0)
        return MachineState(self._load, _frequency(), others / seconds if others is not None and seconds > 0 else None)

    def _now(self) -> None:
        self._wall, self._cpu_time = self._clock(), self._cpu()
        self._joules = self._energy() if self._energy else 0.0


class _Card:
    """A GPU, through NVML where the package nvidia-ml-py is installed, and PyTorch's own count of its memory."""

    def __init__(self, nvml: Any, handle: Any, device: str) -> None:
        self._nvml, self._handle, self._device = nvml, handle, device
        self.energy: Callable[[], float] | None = None

    @classmethod
    def of(cls, device: str, missing: dict[str, str]) -> _Card | None:
        if not device.startswith("cuda"):
            missing["gpu_utilization"] = f"no GPU: the target is on {device}"
            return None
        import torch

        try:
            nvml: Any = importlib.import_module("pynvml")
            nvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            card = cls(nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}"), device)
        except ImportError:
            why = "NVML needs the package nvidia-ml-py; run `pip install nvidia-ml-py`"
            missing |= {"gpu_utilization": why, "energy": why}
            return cls(None, None, device)
        except Exception as error:  # of NVML, which has a class for every failure
            why = f"NVML: {' '.join(str(error).split())}"
            missing |= {"gpu_utilization": why, "energy": why}
            return cls(None, None, device)
        try:
            card._joules()
            card.energy = card._joules
        except Exception as error:
            missing["energy"] = f"NVML: {' '.join(str(error).split())}"
        return card

    def _joules(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3

    def utilization(self) -> float:
        return float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu) / 100

    def memory(self) -> int:
        """The most that PyTorch had allocated since the last question."""
        import torch

        found = int(torch.cuda.max_memory_allocated(self._device))
        torch.cuda.reset_peak_memory_stats(self._device)
        return found


def _package_energy(missing: dict[str, str]) -> Callable[[], float] | None:
    """Joules of all processor packages so far, by the counters of RAPL; None where they cannot be read."""
    packages = sorted(RAPL.glob("intel-rapl:[0-9]*"))  # AMD processors have the same name
    counters = [package / "energy_uj" for package in packages if package.name.count(":") == 1]
    if not counters:
        missing["energy"] = "the machine has no RAPL counters"
        return None
    try:
        limits = [float((counter.parent / "max_energy_range_uj").read_text()) for counter in counters]
        last = [float(counter.read_text()) for counter in counters]
    except OSError as error:
        missing["energy"] = f"RAPL counters cannot be read: {error.strerror}"
        return None
    total = 0.0

    def joules() -> float:
        nonlocal total
        for i, counter in enumerate(counters):
            now = float(counter.read_text())
            total += (now - last[i]) % limits[i]  # a counter begins again at its limit
            last[i] = now
        return total / 1e6

    return joules


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _frequency() -> float | None:
    try:
        found = psutil.cpu_freq()
    except (OSError, NotImplementedError):
        return None
    return found.current * 1e6 if found and found.current else None


def _busy() -> float | None:
    """Core seconds that were not idle so far, those that a hypervisor took included."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
                 - getattr(times, "guest_nice", 0.0))  # fmt: skip


def read_bandwidth(device: str = "cpu") -> dict[str, Any]:
    """How fast memory is read: bytes per second of a sum over a large buffer, the best of some tries, and how it was
    measured. On a CPU all usable cores read a part each."""
    if device.startswith("cuda"):
        return _card_bandwidth(device)
    buffer, cores = np.ones(BUFFER // 8, np.int64), usable_cores()
    parts = np.array_split(buffer, cores * 4)
    best = np.inf
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(_TRIES):
            begun = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            best = min(best, time.perf_counter() - begun)
    how = f"best of {_TRIES} reads of {BUFFER // 2**20} MiB by {cores} threads"
    return {"bytes_per_second": buffer.nbytes / best, "how": how}


def _card_bandwidth(device: str) -> dict[str, Any]:
    import torch

    buffer = torch.ones(4 * BUFFER // 4, dtype=torch.float32, device=device)
    best = np.inf
    for _ in range(_TRIES):
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        buffer.sum()
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    how = f"best of {_TRIES} sums over {4 * BUFFER // 2**20} MiB on {device}"
    return {"bytes_per_second": buffer.nbytes / best, "how": how}
