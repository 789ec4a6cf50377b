"""A stopwatch that does not synchronize the device.

On CUDA it records events and reads them after the round's copy to the host, which synchronizes anyway. On other devices
it uses `time.perf_counter`.
"""

from __future__ import annotations

import time
from typing import Any

import torch


def finish(device: torch.device) -> None:
    """Waits until `device` has finished all submitted work. Copies nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Stopwatch:
    """Marks points in time in the work of `device`; `laps` returns the seconds between them."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []  # seconds, or CUDA events
        self.mark()

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Seconds between successive marks. On CUDA, call it after a copy to the host."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.cuda:
            self.marks[-1].synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in pairs]
        return [b - a for a, b in pairs]
