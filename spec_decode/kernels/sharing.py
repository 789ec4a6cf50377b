"""How threads share a kernel.

Threads take tickets: the work is cut into phases (a projection, the attention, …), a phase into chunks, and whoever
comes next draws the next chunk. A thread that the machine lends to somebody else holds up nothing but the chunk it has
in hand, and one that comes late finds the work done. Helpers are help; the caller alone would finish too.

If one of them fails with a chunk in hand, that chunk is never done. So whoever fails marks all chunks of all phases as
drawn and done: nobody waits for them, everyone runs to the end, and the caller gets the error in place of a result.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

PLACES = 16  # int64 places for the tickets of a phase: those drawn and those done lie in cache lines of their own
threads = 1  # that share the work of a call, unless it says otherwise
_X86 = platform.machine().lower() in ("x86_64", "amd64")
_I64 = ir.IntType(64)
_OVER = 2**40  # more than there are chunks in any phase


@intrinsic
def _draw(context: Any, tickets: Any, place: Any) -> Any:
    """Adds 1 to tickets[place] and returns what it was, atomically."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        at = builder.gep(array.data, [arguments[1]], source_etype=_I64)
        return builder.atomic_rmw("add", at, _I64(1), "seq_cst")

    return types.int64(tickets, types.int64), generate


@intrinsic
def _look(context: Any, tickets: Any, place: Any) -> Any:
    """tickets[place], read anew, at a pace that leaves a core's other thread its share."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        at = builder.gep(array.data, [arguments[1]], source_etype=_I64)
        return builder.load_atomic(at, "seq_cst", 8, typ=_I64)

    return types.int64(tickets, types.int64), generate


@njit
def next_chunk(tickets: Any, phase: Any, chunks: Any) -> Any:
    """The next chunk of a phase, or −1 when none is left; then returns only once all are done."""
    ticket = _draw(tickets, phase * PLACES)
    if ticket < chunks:
        return ticket
    while _look(tickets, phase * PLACES + PLACES // 2) < chunks:
        pass
    return -1


@njit
def then(tickets: Any, phase: Any, chunks: Any) -> Any:
    """The chunk in hand is done: `next_chunk`."""
    _draw(tickets, phase * PLACES + PLACES // 2)
    return next_chunk(tickets, phase, chunks)


class _Job:
    """A kernel that several threads run at once, with the same arguments, the tickets first."""

    def __init__(self, kernel: Callable[..., Any], tickets: np.ndarray, arguments: tuple[Any, ...]) -> None:
        self.kernel, self.tickets, self.arguments = kernel, tickets, arguments
        self.error: BaseException | None = None

    def help(self) -> None:
        try:
            self.kernel(self.tickets, *self.arguments)
        except BaseException as error:  # it belongs to the caller
            self.error = error  # first: who finds no tickets left finds the reason
            self.give_up()

    def give_up(self) -> None:
        self.tickets.fill(_OVER)


class _Helper(threading.Thread):
    """Runs a kernel now and then. A pool of the standard library takes several times as long to hand one over."""

    def __init__(self) -> None:
        super().__init__(name="kernel", daemon=True)
        self.jobs: SimpleQueue[_Job] = SimpleQueue()
        self.job: _Job | None = None  # while there is one
        self.start()

    def help(self, job: _Job) -> None:
        self.job = job
        self.jobs.put(job)

    def run(self) -> None:
        while True:
            job = self.jobs.get()
            job.help()
            del job  # it holds buffers
            self.job = None


_helpers: list[_Helper] = []


def together(kernel: Callable[..., Any], phases: int, *arguments: Any, most_threads: int | None = None) -> Any:
    """Runs `kernel` here and on those of the helpers that are free; returns what it returns here.

    most_threads: if not `threads`.

    Raises what the kernel raises, here or in a helper; what it was to fill is then worth nothing.
    """
    job = _Job(kernel, np.zeros(phases * PLACES, np.int64), arguments)
    helping = _free((most_threads or threads) - 1)
    try:
        for helper in helping:
            helper.help(job)
        result = kernel(job.tickets, *arguments)
        if job.error:
            raise job.error
    except BaseException:
        job.give_up()
        while any(helper.job is job and helper.is_alive() for helper in helping):
            time.sleep(0.001)  # they may still write to the caller's buffers
        raise
    return result


def _free(most: int) -> list[_Helper]:
    """The free ones of `most` helpers. Those that have ended are replaced: a process that was forked has none."""
    _helpers[:most] = [helper if helper.is_alive() else _Helper() for helper in _helpers[:most]]
    _helpers.extend(_Helper() for _ in range(most - len(_helpers)))
    return [helper for helper in _helpers[:most] if helper.job is None]
