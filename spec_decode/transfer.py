"""The one copy of a round to the host: begun when the round is launched, read when its numbers are wanted.

In: what a round tells the host (`narrate.Parts`). Out: the numbers by name. On CUDA they are copied into pinned memory,
which the device writes while the host does something else, and an event says when they are there. The copy stands in
the device's queue behind the round and before whatever is launched next, so a next round that writes to the same
addresses, as a replayed graph does, changes nothing of it. On other devices the numbers are read at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .narrate import Parts, split

Numbers = dict[str, list[float]]
IN_FLIGHT = 2  # copies that may be under way at a time: of a round, and of one that was launched before it was read


class Transfer:
    """Copies for one lane, in the order in which they are read.

    Args:
        device: that the rounds run on.

    Attributes:
        asynchronous: whether `send` returns before the numbers are there.
    """

    def __init__(self, device: torch.device) -> None:
        self.asynchronous = device.type == "cuda"
        self._buffers: list[Tensor | None] = [None] * IN_FLIGHT
        self._sent = 0

    def send(self, parts: Parts) -> Callable[[], Numbers]:
        """Begins the copy. What is returned waits for it, and gives the numbers; it is to be called before `send` has
        been called `IN_FLIGHT` more times."""
        if not self.asynchronous:
            numbers = parts.copy()
            return lambda: numbers
        joined, sizes = parts.join(), parts.sizes
        buffer, event = self._buffer(joined.shape[0]), torch.cuda.Event()
        buffer.copy_(joined, non_blocking=True)
        event.record(torch.cuda.current_stream(joined.device))  # of this device, whichever is the current one
        return lambda: _read(buffer, sizes, event)

    def _buffer(self, size: int) -> Tensor:
        """Pinned memory of `size` numbers that no copy in flight writes to."""
        at, self._sent = self._sent % IN_FLIGHT, self._sent + 1
        kept = self._buffers[at]
        if kept is None or kept.shape[0] < size:
            kept = self._buffers[at] = torch.empty(2 * size, dtype=torch.float32, pin_memory=True)
        return kept[:size]


def _read(buffer: Tensor, sizes: dict[str, int], event: Any) -> Numbers:
    event.synchronize()
    return split(buffer.tolist(), sizes)
