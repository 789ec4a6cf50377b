"""How threads share a kernel, and where compiled kernels are kept.

Threads take tickets: the work is cut into phases (a projection, the attention, …), a phase into chunks, and whoever
comes next draws the next chunk. A thread that the machine lends to somebody else holds up nothing but the chunk it has
in hand, and one that comes late finds the work done. Helpers are help; the caller alone would finish too.
"""

from __future__ import annotations

import hashlib
import platform
import threading
from collections.abc import Callable
from pathlib import Path
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
# Numba looks at a function's own file to see whether what it kept on disk is still true; the names it keeps it under
# tell about the others.
_EDITION = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
).hexdigest()


def kernel(function: Callable[..., Any]) -> Any:
    """Compiled for every kind of arguments when they first come, and kept on disk, if there is a place for it."""
    function.__qualname__ += f"_{_EDITION[:12]}"
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


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


class _Helper(threading.Thread):
    """Runs a kernel now and then. A pool of the standard library takes several times as long to hand one over."""

    def __init__(self) -> None:
        super().__init__(name="kernel", daemon=True)
        self.jobs: SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...]]] = SimpleQueue()
        self.busy = False
        self.start()

    def help(self, kernel: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.busy = True
        self.jobs.put((kernel, arguments))

    def run(self) -> None:
        while True:
            kernel, arguments = self.jobs.get()
            kernel(*arguments)
            del arguments  # they hold buffers
            self.busy = False


_helpers: list[_Helper] = []


def together(kernel: Callable[..., Any], phases: int, *arguments: Any, most_threads: int | None = None) -> Any:
    """Runs `kernel` here and on those of the helpers that are free; returns what it returns here.

    most_threads: if not `threads`.
    """
    arguments = (np.zeros(phases * PLACES, np.int64), *arguments)
    others = (most_threads or threads) - 1
    while len(_helpers) < others:
        _helpers.append(_Helper())
    for helper in _helpers[:others]:
        if not helper.busy:
            helper.help(kernel, arguments)
    return kernel(*arguments)
