"""How threads share a kernel.

The work is cut into phases (a projection, the attention, …) and a phase into chunks. Threads draw tickets: each takes
the next chunk nobody has taken. A thread that the operating system takes off its core delays nothing but the chunk it
works on, and one that comes late finds the work done. The calling thread can finish all work alone.

A chunk whose thread fails is never done. So a thread that fails marks all chunks of all phases as taken and done: no
thread waits for them, all run to the end, and the caller gets the error instead of a result.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

TICKETS = 16  # int64 for each phase: the count of chunks taken and that of chunks done, in cache lines of their own
_X86 = platform.machine().lower() in ("x86_64", "amd64")
_I64 = ir.IntType(64)
_ALL = 2**40  # more than there are chunks in any phase


@intrinsic
def _add_one(context: Any, tickets: Any, place: Any) -> Any:
    """Adds 1 to tickets[place] atomically and returns the value before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        at = builder.gep(array.data, [arguments[1]], source_etype=_I64)
        return builder.atomic_rmw("add", at, _I64(1), "seq_cst")

    return types.int64(tickets, types.int64), generate


@intrinsic
def _look(context: Any, tickets: Any, place: Any) -> Any:
    """tickets[place], read from memory, after a pause that leaves the core to its other hardware thread."""

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
    """The next chunk of a phase. With none left, waits until all chunks are done and returns −1.

    A phase that there are no tickets for has no chunks: a kernel with more phases than its caller counted leaves work
    undone, and says so by the number it returns, but writes nowhere else.
    """
    place = phase * TICKETS
    if place >= tickets.shape[0]:
        return -1
    ticket = _add_one(tickets, place)
    if ticket < chunks:
        return ticket
    while _look(tickets, place + TICKETS // 2) < chunks:
        pass
    return -1


@njit
def finish_chunk(tickets: Any, phase: Any, chunks: Any) -> Any:
    """Marks the thread's chunk as done and returns the next one, as `next_chunk` does."""
    _add_one(tickets, phase * TICKETS + TICKETS // 2)
    return next_chunk(tickets, phase, chunks)


class _Job:
    """A kernel that several threads run at once with the same arguments, the tickets first."""

    def __init__(self, kernel: Callable[..., Any], tickets: np.ndarray, arguments: tuple[Any, ...]) -> None:
        self.kernel, self.tickets, self.arguments = kernel, tickets, arguments
        self.error: BaseException | None = None

    def help(self) -> None:
        try:
            self.kernel(self.tickets, *self.arguments)
        except BaseException as error:  # the caller raises it
            self.error = error  # before the tickets: a thread that finds none left must find the reason
            self.give_up()

    def give_up(self) -> None:
        self.tickets.fill(_ALL)


class _Helper(threading.Thread):
    """A thread that runs jobs. A pool of the standard library takes several times as long to hand over a job."""

    def __init__(self) -> None:
        super().__init__(name="kernel", daemon=True)
        self.jobs: SimpleQueue[_Job] = SimpleQueue()
        self.job: _Job | None = None  # the one at work
        self.start()

    def help(self, job: _Job) -> None:
        self.job = job
        self.jobs.put(job)

    def run(self) -> None:
        while True:
            job = self.jobs.get()
            job.help()
            del job  # it refers to buffers
            self.job = None


class ThreadTeam:
    """Threads that share the work of kernels.

    Attributes:
        most: threads worth trying on this machine.
        threads: threads that share the work of a call, the calling one included.
    """

    def __init__(self, most: int) -> None:
        self.most = self.threads = most
        self._helpers: list[_Helper] = []

    def run(self, kernel: Callable[..., Any], phases: int, *arguments: Any, threads: int | None = None) -> Any:
        """Runs `kernel(tickets, *arguments)` in this thread and in the free helpers.

        Args:
            phases: of the kernel, for which there are tickets.
            threads: instead of `self.threads`.

        Returns:
            What the kernel returns in this thread.

        Raises:
            BaseException: what the kernel raises, in this thread or in a helper. Its results are then undefined.
        """
        job = _Job(kernel, np.zeros(phases * TICKETS, np.int64), arguments)
        helpers = self._free((threads or self.threads) - 1)
        try:
            for helper in helpers:
                helper.help(job)
            result = kernel(job.tickets, *arguments)
            if job.error:
                raise job.error
        except BaseException:
            job.give_up()
            while any(helper.job is job and helper.is_alive() for helper in helpers):
                time.sleep(0.001)  # they may still write to the caller's buffers
            raise
        return result

    def _free(self, most: int) -> list[_Helper]:
        """The free ones of `most` helpers. Dead ones are replaced: after a fork the child process has none."""
        helpers = self._helpers
        helpers[:most] = [helper if helper.is_alive() else _Helper() for helper in helpers[:most]]
        helpers.extend(_Helper() for _ in range(most - len(helpers)))
        return [helper for helper in helpers[:most] if helper.job is None]


team = ThreadTeam(torch.get_num_threads())  # physical cores, or what OMP_NUM_THREADS says
