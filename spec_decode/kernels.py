"""CPU kernels: a pass over a whole decoder in one call, compiled when first used.

In: 8-bit weights and float32 activations as NumPy arrays. Out: the same arrays filled. At one row a pass is bound by
reading the weights, so they are read in one stream, and nothing returns to Python between the first layer and the last.

Activations are rounded to 14 bits with a scale for each row, weights have one for each output. The sums are over
integers, exact in any order, and everything else is done row by row by the same code. So a row's result is the same bit
for bit whatever stands beside it and however many threads there are; verification relies on that.

Threads take tickets: the work is cut into phases (a projection, the attention, …), a phase into chunks, and whoever
comes next draws the next chunk. A thread that the machine lends to somebody else holds up nothing but the chunk it has
in hand, and one that comes late finds the work done. Helpers are help; the caller alone would finish too.
"""

from __future__ import annotations

import math
import platform
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

STEP = 64  # weights of a row come in multiples of it
MOST = 6  # rows that one reading of the weights serves
CHUNK = 16  # outputs a thread takes at a time
PLACES = 16  # int64 places for the tickets of a phase: those drawn and those done lie in cache lines of their own
_AVX2 = bool(llvm.get_host_cpu_features().get("avx2"))
_X86 = platform.machine().lower() in ("x86_64", "amd64")
_I8, _I16, _I32, _I64, _F32 = (*(ir.IntType(n) for n in (8, 16, 32, 64)), ir.FloatType())
_MATH = {"reassoc", "contract", "nsz", "arcp"}


@njit
def levels(width: Any) -> Any:
    """The largest activation, in steps, for which no sum over `width` products can leave 32 bits."""
    return np.float32(min(8191, (2**31 - 1) // (127 * width)))


# --- what Numba does not offer -------------------------------------------------------------------------------------


def _dots(rows: int) -> Any:
    """The product of one row of weights with `rows` rows of activations, as an intrinsic."""
    width = 16 if _AVX2 else 8  # products in one instruction
    lanes = ir.VectorType(_I32, 8)
    turns = max(4 // rows, 1)  # so that sums do not wait for each other

    @intrinsic
    def dots(context: Any, w: Any, row: Any, x: Any, first: Any, out: Any) -> Any:
        """out[b] = Σ w[row, i] · x[first + b, i]"""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kinds = signature.args
            aw, ax, ao = (context.make_array(kinds[i])(context, builder, arguments[i]) for i in (0, 2, 4))

            def start(array: Any, index: Any, plus: int, kind: Any) -> Any:
                long = builder.extract_value(array.shape, 1)
                at = builder.mul(builder.add(index, _I64(plus)), long)
                return builder.gep(array.data, [at], source_etype=kind)

            weights = start(aw, arguments[1], 0, _I8)
            inputs = [start(ax, arguments[3], b, _I16) for b in range(rows)]
            zero = ir.Constant(lanes, [0] * 8)
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(turns)] for _ in range(rows)]
            wide = ir.VectorType(_I16 if _AVX2 else _I32, width)

            def load(base: Any, at: Any, kind: Any, size: int) -> Any:
                place = builder.gep(base, [at], source_etype=kind)
                loaded = builder.load(place, typ=ir.VectorType(kind, width))
                loaded.align = size
                return loaded if loaded.type == wide else builder.sext(loaded, wide)

            with cgutils.for_range(builder, builder.sdiv(builder.extract_value(aw.shape, 1), _I64(STEP))) as loop:
                begin = builder.mul(loop.index, _I64(STEP))
                for i in range(STEP // width):
                    at = builder.add(begin, _I64(i * width))
                    weight = load(weights, at, _I8, 1)
                    for b in range(rows):
                        value = load(inputs[b], at, _I16, 2)
                        if _AVX2:  # sums of neighbouring products, in 32 bits
                            kind = ir.FunctionType(lanes, [wide, wide])
                            add = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.wd")
                            product = builder.call(add, [weight, value])
                        else:
                            product = builder.mul(weight, value)
                        place = sums[b][i % turns]
                        builder.store(builder.add(builder.load(place), product), place)
            reduce = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(_I32, [lanes]), "llvm.vector.reduce.add.v8i32"
            )
            for b in range(rows):
                whole = builder.load(sums[b][0])
                for place in sums[b][1:]:
                    whole = builder.add(whole, builder.load(place))
                builder.store(builder.call(reduce, [whole]), builder.gep(ao.data, [_I64(b)], source_etype=_I32))
            return context.get_dummy_value()

        return types.void(w, types.int64, x, types.int64, out), generate

    return dots


_dots1, _dots2, _dots3, _dots4, _dots5, _dots6 = (_dots(n) for n in range(1, MOST + 1))


@intrinsic
def _scores(context: Any, q: Any, keys: Any, first: Any, out: Any, at: Any) -> Any:
    """out[at + j] = Σ q[i] · keys[first + j, i] for j from 0 to 3; the row is a multiple of 8 long."""
    lanes = ir.VectorType(_F32, 8)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        aq, ak, ao = (context.make_array(kinds[i])(context, builder, arguments[i]) for i in (0, 1, 3))
        size = builder.extract_value(ak.shape, 1)
        rows = [
            builder.gep(ak.data, [builder.mul(builder.add(arguments[2], _I64(j)), size)], source_etype=_F32)
            for j in range(4)
        ]
        sums = [cgutils.alloca_once_value(builder, ir.Constant(lanes, [0.0] * 8)) for _ in rows]
        with cgutils.for_range(builder, builder.sdiv(size, _I64(8))) as loop:
            i = builder.mul(loop.index, _I64(8))
            left = _load8(builder, aq.data, i)
            for row, total in zip(rows, sums, strict=True):
                product = builder.fmul(left, _load8(builder, row, i), flags=("contract",))
                builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
        kind = ir.FunctionType(_F32, [_F32, lanes])
        reduce = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fadd.v8f32")
        for j, total in enumerate(sums):
            whole = builder.call(reduce, [_F32(-0.0), builder.load(total)], fastmath=("reassoc",))
            builder.store(whole, builder.gep(ao.data, [builder.add(arguments[4], _I64(j))], source_etype=_F32))
        return context.get_dummy_value()

    return types.void(q, keys, types.int64, out, types.int64), generate


def _mix(vectors: int) -> Any:
    """A weighted sum of rows, 8 · `vectors` columns of it, as an intrinsic."""
    lanes = ir.VectorType(_F32, 8)

    @intrinsic
    def mix(context: Any, odds: Any, values: Any, begin: Any, end: Any, out: Any, at: Any) -> Any:
        """out[at + i] = Σ odds[j − begin] · values[j, at + i] for j from `begin` to `end`"""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kinds = signature.args
            aw, av, ao = (context.make_array(kinds[i])(context, builder, arguments[i]) for i in (0, 1, 4))
            _, _, begin, end, _, at = arguments
            size = builder.extract_value(av.shape, 1)
            sums = [cgutils.alloca_once_value(builder, ir.Constant(lanes, [0.0] * 8)) for _ in range(vectors)]
            with cgutils.for_range(builder, builder.sub(end, begin)) as loop:
                weight = builder.load(builder.gep(aw.data, [loop.index], source_etype=_F32), typ=_F32)
                spread = builder.insert_element(ir.Constant(lanes, ir.Undefined), weight, _I32(0))
                spread = builder.shuffle_vector(spread, spread, ir.Constant(ir.VectorType(_I32, 8), [0] * 8))
                start = builder.add(builder.mul(builder.add(begin, loop.index), size), at)
                for i, total in enumerate(sums):
                    row = _load8(builder, av.data, builder.add(start, _I64(8 * i)))
                    product = builder.fmul(spread, row, flags=("contract",))
                    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
            for i, total in enumerate(sums):
                place = builder.gep(ao.data, [builder.add(at, _I64(8 * i))], source_etype=_F32)
                builder.store(builder.load(total), builder.bitcast(place, lanes.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(odds, values, types.int64, types.int64, out, types.int64), generate

    return mix


def _load8(builder: Any, base: Any, at: Any) -> Any:
    place = builder.gep(base, [at], source_etype=_F32)
    return builder.load(place, typ=ir.VectorType(_F32, 8), align=4)


_mix8, _mix64 = _mix(1), _mix(8)


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


@intrinsic
def _at(context: Any, address: Any) -> Any:
    """A pointer to the float32 at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), generate


@intrinsic
def _power_of_two(context: Any, exponent: Any) -> Any:
    """2 to a whole power from −126 to 127, as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.shl(builder.add(arguments[0], _I32(127)), _I32(23))
        return builder.bitcast(bits, _F32)

    return types.float32(types.int32), generate


@njit(inline="always")
def _exp(x: Any) -> Any:
    """e^x for x ≤ 88, with a relative error below 3e-7: 2^n · e^r, the latter as a polynomial."""
    x = max(x, np.float32(-87.0))
    n = np.float32(math.floor(x * np.float32(1.4426950408889634) + np.float32(0.5)))
    r = x - n * np.float32(0.693145751953125) - n * np.float32(1.42860682030941723e-6)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * r * r + r + np.float32(1.0)) * _power_of_two(np.int32(n))


# --- parts of a pass -----------------------------------------------------------------------------------------------


@njit
def _next(tickets: Any, phase: Any, chunks: Any) -> Any:
    """The next chunk of a phase, or −1 when none is left; then returns only once all are done."""
    ticket = _draw(tickets, phase * PLACES)
    if ticket < chunks:
        return ticket
    while _look(tickets, phase * PLACES + PLACES // 2) < chunks:
        pass
    return -1


@njit
def _then(tickets: Any, phase: Any, chunks: Any) -> Any:
    """The chunk in hand is done: `_next`."""
    _draw(tickets, phase * PLACES + PLACES // 2)
    return _next(tickets, phase, chunks)


@njit
def _products(w: Any, scale: Any, x: Any, size: Any, begin: Any, end: Any, out: Any, sums: Any) -> None:
    """out[r, o] = Σ w[o] · x[r], in units of both scales, for the outputs from `begin` to `end` and every row."""
    rows = x.shape[0]
    for first in range(0, rows, MOST):
        n = min(rows - first, MOST)
        for o in range(begin, end):
            if n == 1:
                _dots1(w, o, x, first, sums)
            elif n == 2:
                _dots2(w, o, x, first, sums)
            elif n == 3:
                _dots3(w, o, x, first, sums)
            elif n == 4:
                _dots4(w, o, x, first, sums)
            elif n == 5:
                _dots5(w, o, x, first, sums)
            else:
                _dots6(w, o, x, first, sums)
            for b in range(n):
                out[first + b, o] = np.float32(sums[b]) * (scale[o] * size[first + b])


@njit(fastmath=_MATH)
def _round(x: Any, most: Any, out: Any) -> Any:
    """Writes x in steps of its largest magnitude over `most` to `out`; returns the step."""
    largest = np.float32(1e-12)
    for i in range(x.shape[0]):
        largest = max(largest, abs(x[i]))
    inverse = most / largest
    for i in range(x.shape[0]):
        out[i] = np.int16(math.floor(x[i] * inverse + np.float32(0.5)))
    return largest / most


@njit(fastmath=_MATH)
def _norm(x: Any, weight: Any, epsilon: Any, out: Any) -> None:
    """RMS norm."""
    total = np.float32(0.0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    factor = np.float32(1.0) / np.float32(math.sqrt(total / np.float32(x.shape[0]) + epsilon))
    for i in range(x.shape[0]):
        out[i] = x[i] * factor * weight[i]


@njit(fastmath=_MATH)
def _turn(x: Any, cos: Any, sin: Any, out: Any) -> None:
    """Rotary position: halves of a head turned against each other."""
    half = x.shape[0] // 2
    for i in range(half):
        a, b = x[i], x[i + half]
        out[i] = a * cos[i] - b * sin[i]
        out[i + half] = b * cos[i + half] + a * sin[i + half]


@njit(fastmath=_MATH)
def _attend(q: Any, keys: Any, values: Any, begin: Any, end: Any, scaling: Any, odds: Any, out: Any) -> None:
    """One query over the positions from `begin` to `end` of one head: keys and values are `[positions, head_dim]`.

    Reads whole fours of keys, whatever the ones outside may be.
    """
    n, before = end - begin, begin % 4
    for j in range(0, before + n, 4):
        _scores(q, keys, begin - before + j, odds, j)
    odds = odds[before:]
    largest = np.float32(-np.inf)
    for j in range(n):
        largest = max(largest, odds[j])
    total = np.float32(0.0)
    for j in range(n):
        odds[j] = _exp((odds[j] - largest) * scaling)
        total += odds[j]
    for j in range(n):
        odds[j] /= total
    size = q.shape[0]
    for i in range(0, size - size % 64, 64):
        _mix64(odds, values, begin, end, out, i)
    for i in range(size - size % 64, size, 8):
        _mix8(odds, values, begin, end, out, i)


@njit(fastmath=_MATH)
def _gate(gate: Any, up: Any, gelu: Any, out: Any) -> None:
    """SiLU(gate) · up, or with GELU in its tanh form, which is x · sigmoid(√(8/π) · (x + 0.044715 x³))."""
    for i in range(gate.shape[0]):
        x = gate[i]
        inner = np.float32(1.5957691216) * (x + np.float32(0.044715) * x * x * x) if gelu else x
        out[i] = x / (np.float32(1.0) + _exp(-max(inner, np.float32(-80.0)))) * up[i]


@njit
def _round_rows(tickets: Any, phase: Any, x: Any, most: Any, out: Any, steps: Any) -> None:
    """A phase: `_round` of every row."""
    r = _next(tickets, phase, x.shape[0])
    while r >= 0:
        steps[r] = _round(x[r], most, out[r])
        r = _then(tickets, phase, x.shape[0])


@njit
def _norm_rows(
    tickets: Any, phase: Any, x: Any, weight: Any, epsilon: Any, most: Any, normed: Any, out: Any, steps: Any
) -> None:
    """A phase: `_norm` of every row, then `_round`."""
    r = _next(tickets, phase, x.shape[0])
    while r >= 0:
        _norm(x[r], weight, epsilon, normed[r])
        steps[r] = _round(normed[r], most, out[r])
        r = _then(tickets, phase, x.shape[0])


@njit
def _add_products(
    tickets: Any, phase: Any, w: Any, scale: Any, rounded: Any, steps: Any, x: Any, out: Any, sums: Any
) -> None:
    """A phase: `_products`, added to x."""
    rows, outputs = x.shape
    chunks = (outputs + CHUNK - 1) // CHUNK
    c = _next(tickets, phase, chunks)
    while c >= 0:
        begin, end = c * CHUNK, min(c * CHUNK + CHUNK, outputs)
        _products(w, scale, rounded, steps, begin, end, out, sums)
        for r in range(rows):
            for i in range(begin, end):
                x[r, i] += out[r, i]
        c = _then(tickets, phase, chunks)


def _kernel(function: Callable[..., None]) -> Any:
    """Compiled for every kind of arguments when they first come, and kept on disk, if there is a place for it."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


# --- passes, as every thread runs them -----------------------------------------------------------------------------


@_kernel
def _linear(tickets: Any, x: Any, w: Any, scale: Any, most: Any, rounded: Any, size: Any, out: Any) -> None:
    """x `[rows, in]` → out `[rows, outputs]`; `rounded` and `size` are room for x in steps."""
    sums = np.empty(MOST, np.int32)
    outputs = w.shape[0]
    _round_rows(tickets, 0, x, most, rounded, size)
    chunks = (outputs + CHUNK - 1) // CHUNK
    c = _next(tickets, 1, chunks)
    while c >= 0:
        _products(w, scale, rounded, size, c * CHUNK, min(c * CHUNK + CHUNK, outputs), out, sums)
        c = _then(tickets, 1, chunks)


@_kernel
def _llama(
    tickets: Any,
    x: Any,
    start: Any,
    cos: Any,
    sin: Any,
    norms: Any,
    last_norm: Any,
    weights: Any,
    scales: Any,
    shape: Any,
    epsilon: Any,
    scaling: Any,
    key_at: Any,
    value_at: Any,
    capacity: Any,
    room: Any,
) -> None:
    """x `[rows, width]` in place, from embeddings to what follows the last norm. Keys and values of the new positions
    are written behind `start`.

    Args:
        norms: `[layers, 2, width]`.
        weights: of the four projections, `[layers, outputs, in]`: q, k and v; out; gate and up; down.
        scales: `[layers, outputs]` of each.
        shape: heads, heads of keys and values, size of a head.
        key_at, value_at: addresses of each layer's `[kv heads, capacity, head size]`.
        room: buffers, see `cpu.Int8Llama`.
    """
    heads, kv_heads, size = shape
    w_qkv, w_out, w_gate, w_down = weights
    s_qkv, s_out, s_gate, s_down = scales
    normed, wide, narrow, steps, qkv, mixed, gated, inner, inner_rounded = room
    rows, width = x.shape
    hidden = inner.shape[1]
    group = heads // kv_heads
    most_x, most_mixed, most_inner = (
        levels(width),
        levels(mixed.shape[1]),
        levels(hidden),
    )
    sums = np.empty(MOST, np.int32)
    odds = np.empty(start + rows + 3, np.float32)
    turned = np.empty(size, np.float32)
    phase = 0
    for layer in range(w_qkv.shape[0]):
        _norm_rows(tickets, phase, x, norms[layer, 0], epsilon, most_x, normed, wide, steps)
        phase += 1
        places = (kv_heads, capacity, size)
        keys = carray(_at(key_at[layer]), places)
        values = carray(_at(value_at[layer]), places)
        # A chunk is a head: it is turned and stored while it is at hand.
        head = _next(tickets, phase, heads + 2 * kv_heads)
        while head >= 0:
            _products(w_qkv[layer], s_qkv[layer], wide, steps, head * size, head * size + size, qkv, sums)
            for r in range(rows):
                part = qkv[r, head * size : head * size + size]
                if head >= heads + kv_heads:
                    values[head - heads - kv_heads, start + r, :] = part
                elif head >= heads:
                    _turn(part, cos[r], sin[r], keys[head - heads, start + r])
                else:
                    _turn(part, cos[r], sin[r], turned)
                    part[:] = turned
            head = _then(tickets, phase, heads + 2 * kv_heads)
        phase += 1
        c = _next(tickets, phase, rows * heads)
        while c >= 0:
            r, head = c // heads, c % heads
            at = slice(head * size, head * size + size)
            k, v = keys[head // group], values[head // group]
            _attend(qkv[r, at], k, v, 0, start + r + 1, scaling, odds, mixed[r, at])
            c = _then(tickets, phase, rows * heads)
        phase += 1
        _round_rows(tickets, phase, mixed, most_mixed, narrow, steps)
        phase += 1
        _add_products(tickets, phase, w_out[layer], s_out[layer], narrow, steps, x, normed, sums)
        phase += 1
        _norm_rows(tickets, phase, x, norms[layer, 1], epsilon, most_x, normed, wide, steps)
        phase += 1
        chunks = (hidden + CHUNK - 1) // CHUNK
        c = _next(tickets, phase, chunks)
        while c >= 0:
            begin, end = c * CHUNK, min(c * CHUNK + CHUNK, hidden)
            _products(w_gate[layer], s_gate[layer], wide, steps, begin, end, gated, sums)
            _products(w_gate[layer], s_gate[layer], wide, steps, hidden + begin, hidden + end, gated, sums)
            for r in range(rows):
                _gate(gated[r, begin:end], gated[r, hidden + begin : hidden + end], False, inner[r, begin:end])
            c = _then(tickets, phase, chunks)
        phase += 1
        _round_rows(tickets, phase, inner, most_inner, inner_rounded, steps)
        phase += 1
        _add_products(tickets, phase, w_down[layer], s_down[layer], inner_rounded, steps, x, normed, sums)
        phase += 1
    r = _next(tickets, phase, rows)
    while r >= 0:
        _norm(x[r], last_norm, epsilon, x[r])
        r = _then(tickets, phase, rows)


@njit
def _project(tickets: Any, phase: Any, x: Any, w: Any, scale: Any, outs: Any, sums: Any) -> Any:
    """One row through w, by all threads: outs[phase] is filled, and the part of it that holds the result returned."""
    row = np.zeros((1, w.shape[1]), np.int16)
    size = np.empty(1, np.float32)
    size[0] = _round(x, levels(x.shape[0]), row[0])
    chunks = (w.shape[0] + CHUNK - 1) // CHUNK
    c = _next(tickets, phase, chunks)
    while c >= 0:
        _products(w, scale, row, size, c * CHUNK, min(c * CHUNK + CHUNK, w.shape[0]), outs[phase : phase + 1], sums)
        c = _then(tickets, phase, chunks)
    return outs[phase, : w.shape[0]]


@_kernel
def _assistant(
    tickets: Any,
    inputs: Any,
    weights: Any,
    scales: Any,
    norms: Any,
    numbers: Any,
    reads: Any,
    turns: Any,
    chosen: Any,
    logits: Any,
    outs: Any,
) -> None:
    """One draft step. Every thread does the small things itself; projections and heads are shared. What a phase gives
    lies in a row of `outs` that no other phase writes to, so a thread that falls behind still finds it.

    Args:
        inputs: embedding of the last token and hidden state, one behind the other.
        weights, scales: before the layers; of each layer q, out, gate and up, down; behind the layers; centroids and
            lists, if there are any.
        norms: of each layer the four and the one of q; the last one.
        numbers: epsilon, whether the activation is GELU, and for each layer scaling and scalar.
        reads: int64 `[layers, 8]`: heads, their size, heads of keys and values, addresses of keys and values, their
            capacity, the first position to be read and the one behind the last.
        turns: of each layer cos and sin.
        chosen, logits: the lists looked at, and the products with their rows.
        outs: float32 `[5 · layers + 6, widest]`. The row before the last gets the output, the last the hidden state.
    """
    epsilon, gelu, scalings, scalars = numbers
    layers = reads.shape[0]
    width = weights[0].shape[0]
    sums = np.empty(MOST, np.int32)
    x = _project(tickets, 0, inputs, weights[0], scales[0], outs, sums).copy()
    normed = np.empty_like(x)
    phase = 1
    for layer in range(layers):
        heads, size, kv_heads, key_at, value_at, capacity, begin, end = reads[layer]
        first = 1 + 4 * layer
        _norm(x, norms[5 * layer], epsilon, normed)
        q = _project(tickets, phase, normed, weights[first], scales[first], outs, sums)
        phase += 1
        mixed = outs[phase, : heads * size]
        keys = carray(_at(key_at), (kv_heads, capacity, size))
        values = carray(_at(value_at), (kv_heads, capacity, size))
        straight, turned = np.empty(size, np.float32), np.empty(size, np.float32)
        odds = np.empty(end - begin + 6, np.float32)
        head = _next(tickets, phase, heads)
        while head >= 0:
            at = slice(head * size, head * size + size)
            _norm(q[at], norms[5 * layer + 4], epsilon, straight)
            _turn(straight, turns[2 * layer], turns[2 * layer + 1], turned)
            kv = head // (heads // kv_heads)
            _attend(turned, keys[kv], values[kv], begin, end, scalings[layer], odds, mixed[at])
            head = _then(tickets, phase, heads)
        phase += 1
        y = _project(tickets, phase, mixed, weights[first + 1], scales[first + 1], outs, sums)
        _norm(y, norms[5 * layer + 1], epsilon, normed)
        x += normed
        phase += 1
        _norm(x, norms[5 * layer + 2], epsilon, normed)
        gated = _project(tickets, phase, normed, weights[first + 2], scales[first + 2], outs, sums)
        hidden = gated.shape[0] // 2
        inner = np.empty(hidden, np.float32)
        _gate(gated[:hidden], gated[hidden:], gelu, inner)
        phase += 1
        y = _project(tickets, phase, inner, weights[first + 3], scales[first + 3], outs, sums)
        _norm(y, norms[5 * layer + 3], epsilon, normed)
        for i in range(width):
            x[i] = (x[i] + normed[i]) * scalars[layer]
        phase += 1
    _norm(x, norms[5 * layers], epsilon, normed)
    behind = 1 + 4 * layers
    if _next(tickets, phase, 1) == 0:
        outs[outs.shape[0] - 2, :width] = normed
        _then(tickets, phase, 1)
    phase += 1
    if len(weights) > behind + 1:
        scores = _project(tickets, phase, normed, weights[behind + 1], scales[behind + 1], outs, sums)
        phase += 1
        if _next(tickets, phase, 1) == 0:
            n = chosen.shape[0]
            least = np.partition(scores, scores.shape[0] - n)[scores.shape[0] - n]
            found = 0
            for i in range(scores.shape[0]):
                if scores[i] >= least and found < n:
                    chosen[found] = i
                    found += 1
            _then(tickets, phase, 1)
        phase += 1
        w, scale = weights[behind + 2], scales[behind + 2]
        size = w.shape[0] // scores.shape[0]
        row = np.zeros((1, w.shape[1]), np.int16)
        step = _round(normed, levels(width), row[0])
        c = _next(tickets, phase, chosen.shape[0])
        while c >= 0:
            first = chosen[c] * size
            for j in range(size):
                _dots1(w, first + j, row, 0, sums)
                logits[c * size + j] = np.float32(sums[0]) * (scale[first + j] * step)
            c = _then(tickets, phase, chosen.shape[0])
    _project(tickets, outs.shape[0] - 1, normed, weights[behind], scales[behind], outs, sums)


# --- calls ---------------------------------------------------------------------------------------------------------


class Weights:
    """A weight matrix `[outputs, in]`, or a stack of them, in 8 bits with a scale for every output: values int8
    `[stack, outputs, in]`, `in` rounded up to whole steps, and scales float32 `[stack, outputs]`."""

    def __init__(self, matrices: list[np.ndarray]) -> None:
        outputs, inputs = matrices[0].shape
        self.values = np.zeros((len(matrices), outputs, -(-inputs // STEP) * STEP), np.int8)
        self.scales = np.empty((len(matrices), outputs), np.float32)
        for i, matrix in enumerate(matrices):
            scale = np.maximum(np.abs(matrix).max(1) / 127, 1e-12).astype(np.float32)
            np.rint(matrix / scale[:, None], casting="unsafe", out=self.values[i, :, :inputs])
            self.scales[i] = scale


def linear(x: np.ndarray, weights: Weights, threads: int) -> np.ndarray:
    """float32 `[rows, in]` → `[rows, outputs]`."""
    values, scales = weights.values[0], weights.scales[0]
    rows, inputs = x.shape
    out = np.empty((rows, len(values)), np.float32)
    rounded = np.zeros((rows, values.shape[1]), np.int16)
    most = np.float32(levels(inputs))
    size = np.empty(rows, np.float32)
    together(threads, _linear, 2, x, values, scales, most, rounded, size, out)
    return out


def llama(threads: int, layers: int, *arguments: Any) -> None:
    """`_llama` with fresh tickets."""
    together(threads, _llama, 9 * layers + 1, *arguments)


def assistant(threads: int, layers: int, *arguments: Any) -> None:
    """`_assistant` with fresh tickets."""
    together(threads, _assistant, 5 * layers + 6, *arguments)


class _Helper(threading.Thread):
    """Runs a kernel now and then. A pool of the standard library takes several times as long to hand one over."""

    def __init__(self) -> None:
        super().__init__(name="kernel", daemon=True)
        self.jobs: SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]]] = SimpleQueue()
        self.busy = False
        self.start()

    def help(self, kernel: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.busy = True
        self.jobs.put((kernel, arguments))

    def run(self) -> None:
        while True:
            kernel, arguments = self.jobs.get()
            kernel(*arguments)
            del arguments  # they hold buffers
            self.busy = False


_helpers: list[_Helper] = []


def together(threads: int, kernel: Callable[..., None], phases: int, *arguments: Any) -> None:
    """Runs `kernel` here and on those of the helpers that are free."""
    arguments = (np.zeros(phases * PLACES, np.int64), *arguments)
    while len(_helpers) < threads - 1:
        _helpers.append(_Helper())
    for helper in _helpers[: threads - 1]:
        if not helper.busy:
            helper.help(kernel, arguments)
    kernel(*arguments)
