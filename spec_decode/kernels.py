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
CHUNK = 48  # outputs a thread takes at a time: fewer, and drawing tickets costs more than it evens out
AHEAD = 2048  # bytes of weights that are asked for before they are needed
PLACES = 16  # int64 places for the tickets of a phase: those drawn and those done lie in cache lines of their own
threads = 1  # that share the work of a call, unless it says otherwise
_AVX2 = bool(llvm.get_host_cpu_features().get("avx2"))
_X86 = platform.machine().lower() in ("x86_64", "amd64")
LANES = 8  # numbers in a vector
_I8, _I16, _I32, _I64, _F32 = (*(ir.IntType(n) for n in (8, 16, 32, 64)), ir.FloatType())
_PARTS = ir.VectorType(_I32, LANES)
# Sums may be taken in any order, so that loops become vectors; and a division by zero is not an exception, which loops
# would have to be left for.
_vectors = njit(fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy")


@njit
def levels(width: Any) -> Any:
    """The largest activation, in steps, for which no sum over `width` products can leave 32 bits."""
    return np.float32(min(8191, (2**31 - 1) // (127 * width)))


# --- what Numba does not offer -------------------------------------------------------------------------------------


def _dots(rows: int) -> Any:
    """The products of one row of weights with `rows` rows of activations, as an intrinsic."""
    width = 16 if _AVX2 else 8  # products in one instruction
    turns = max(4 // rows, 1)  # so that sums do not wait for each other

    @intrinsic
    def dots(context: Any, w: Any, row: Any, x: Any, first: Any, out: Any, slot: Any) -> Any:
        """out[slot, b] = w[row, i] · x[first + b, i], summed over i in `LANES` parts"""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kinds = signature.args
            aw, ax, ao = (context.make_array(kinds[i])(context, builder, arguments[i]) for i in (0, 2, 4))

            def start(array: Any, index: Any, plus: int, kind: Any) -> Any:
                long = builder.extract_value(array.shape, 1)
                at = builder.mul(builder.add(index, _I64(plus)), long)
                return builder.gep(array.data, [at], source_etype=kind)

            weights = start(aw, arguments[1], 0, _I8)
            inputs = [start(ax, arguments[3], b, _I16) for b in range(rows)]
            zero = ir.Constant(_PARTS, [0] * LANES)
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(turns)] for _ in range(rows)]
            wide = ir.VectorType(_I16 if _AVX2 else _I32, width)

            def load(base: Any, at: Any, kind: Any, size: int) -> Any:
                place = builder.gep(base, [at], source_etype=kind)
                loaded = builder.load(place, typ=ir.VectorType(kind, width))
                loaded.align = size
                return loaded if loaded.type == wide else builder.sext(loaded, wide)

            with cgutils.for_range(builder, builder.sdiv(builder.extract_value(aw.shape, 1), _I64(STEP))) as loop:
                begin = builder.mul(loop.index, _I64(STEP))
                _prefetch(builder, builder.gep(weights, [builder.add(begin, _I64(AHEAD))], source_etype=_I8))
                for i in range(STEP // width):
                    at = builder.add(begin, _I64(i * width))
                    weight = load(weights, at, _I8, 1)
                    for b in range(rows):
                        value = load(inputs[b], at, _I16, 2)
                        if _AVX2:  # sums of neighbouring products, in 32 bits
                            kind = ir.FunctionType(_PARTS, [wide, wide])
                            add = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.wd")
                            product = builder.call(add, [weight, value])
                        else:
                            product = builder.mul(weight, value)
                        place = sums[b][i % turns]
                        builder.store(builder.add(builder.load(place), product), place)
            for b in range(rows):
                whole = builder.load(sums[b][0])
                for place in sums[b][1:]:
                    whole = builder.add(whole, builder.load(place))
                builder.store(whole, _parts_at(builder, ao, arguments[5], b), align=4)
            return context.get_dummy_value()

        return types.void(w, types.int64, x, types.int64, out, types.int64), generate

    return dots


def _parts_at(builder: Any, array: Any, slot: Any, row: Any) -> Any:
    """Where sums[slot, row] begins."""
    row = _I64(row) if isinstance(row, int) else row
    at = builder.mul(builder.add(builder.mul(slot, _I64(MOST)), row), _I64(LANES))
    return builder.bitcast(builder.gep(array.data, [at], source_etype=_I32), _PARTS.as_pointer())


@intrinsic
def _fold(context: Any, sums: Any, b: Any, scale: Any, o: Any, size: Any, row: Any, out: Any, at: Any) -> Any:
    """out[row, at + s] = (Σ sums[s, b]) · (scale[o + s] · size[row]) for all `LANES` slots s: what `_dots` left in
    parts is put together for eight outputs at once, where one by one would take as long as a third of the products."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        held, scales, outs = (context.make_array(kinds[i])(context, builder, arguments[i]) for i in (0, 2, 6))
        steps = context.make_array(kinds[4])(context, builder, arguments[4])
        parts = [
            builder.load(_parts_at(builder, held, _I64(slot), arguments[1]), typ=_PARTS, align=4)
            for slot in range(LANES)
        ]
        # Each turn adds halves of neighbours: [a0+a1, b0+b1, a2+a3, …], and so on until lane s is the sum of slot s.
        for span in (1, 2, 4):
            firsts = [i for i in range(LANES) if not i & span]  # of both halves of each pair of parts, in turn
            picked = [
                i + half for begin in range(0, len(firsts), span) for half in (0, LANES) for i in firsts[begin:][:span]
            ]
            pick = [ir.Constant(ir.VectorType(_I32, LANES), [i + plus for i in picked]) for plus in (0, span)]
            parts = [
                builder.add(builder.shuffle_vector(a, b, pick[0]), builder.shuffle_vector(a, b, pick[1]))
                for a, b in zip(parts[::2], parts[1::2], strict=True)
            ]
        step = builder.load(builder.gep(steps.data, [arguments[5]], source_etype=_F32), typ=_F32)
        whole = builder.sitofp(parts[0], ir.VectorType(_F32, LANES))
        spread = builder.insert_element(ir.Constant(ir.VectorType(_F32, LANES), ir.Undefined), step, _I32(0))
        spread = builder.shuffle_vector(spread, spread, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))
        unit = builder.fmul(_load8(builder, scales.data, arguments[3]), spread)
        begin = builder.mul(arguments[5], builder.extract_value(outs.strides, 0))
        place = builder.gep(builder.gep(outs.data, [begin], source_etype=_I8), [arguments[7]], source_etype=_F32)
        builder.store(
            builder.fmul(whole, unit), builder.bitcast(place, ir.VectorType(_F32, LANES).as_pointer()), align=4
        )
        return context.get_dummy_value()

    return types.void(sums, types.int64, scale, types.int64, size, types.int64, out, types.int64), generate


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


def _weighted(vectors: int) -> Any:
    """A weighted sum of rows, 8 · `vectors` columns of it, as an intrinsic."""
    lanes = ir.VectorType(_F32, 8)

    @intrinsic
    def weighted(context: Any, odds: Any, values: Any, begin: Any, end: Any, out: Any, at: Any) -> Any:
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

    return weighted


def _prefetch(builder: Any, place: Any) -> None:
    """Asks for a cache line; the hardware would ask late, and not across pages. Beyond the end it is no fault."""
    kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(), _I32, _I32, _I32])
    call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(call, [builder.bitcast(place, ir.PointerType()), _I32(0), _I32(3), _I32(1)])  # to read, to keep, data


def _load8(builder: Any, base: Any, at: Any) -> Any:
    place = builder.gep(base, [at], source_etype=_F32)
    return builder.load(place, typ=ir.VectorType(_F32, 8), align=4)


_weighted8, _weighted64 = _weighted(1), _weighted(8)


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
def _bits(context: Any, x: Any) -> Any:
    """A float32 as int32. Of those that are not negative the order is the same, with NaN above all."""
    return types.int32(types.float32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], _I32
    )


@intrinsic
def _float(context: Any, bits: Any) -> Any:
    """The float32 with these bits."""
    return types.float32(types.int32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], _F32
    )


@intrinsic
def _floor(context: Any, x: Any) -> Any:
    """The largest whole number up to a float32, as int32; unlike `math.floor`, several at once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(_F32, [_F32])
        whole = builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.floor.f32"), arguments)
        return builder.fptosi(whole, _I32)

    return types.int32(types.float32), generate


@njit(inline="always")
def _order(x: Any) -> Any:
    """An int32 for a float32, in the same order."""
    bits = _bits(x)
    return bits if bits >= 0 else bits ^ np.int32(0x7FFFFFFF)


@njit(inline="always", error_model="numpy")
def _exp(x: Any) -> Any:
    """e^x for x ≤ 88, with a relative error below 3e-7: 2^n · e^r, the latter as a polynomial."""
    x = max(x, np.float32(-87.0))
    whole = _floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    n = np.float32(whole)  # then 2 to this power is made of bits
    r = x - n * np.float32(0.693145751953125) - n * np.float32(1.42860682030941723e-6)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * r * r + r + np.float32(1.0)) * _float((whole + np.int32(127)) << np.int32(23))


@njit(inline="always", error_model="numpy")
def _log(x: Any) -> Any:
    """The natural logarithm of a normal positive float32, with an error below one unit in the last place or two."""
    bits = _bits(x)
    exponent = (bits >> np.int32(23)) - np.int32(126)
    m = _float((bits & np.int32(0x007FFFFF)) | np.int32(0x3F000000))  # in [0.5, 1)
    low = m < np.float32(0.70710678118654752)
    m = (m + m if low else m) - np.float32(1.0)
    e = np.float32(exponent) - (np.float32(1.0) if low else np.float32(0.0))
    z = m * m
    p = np.float32(7.0376836292e-2)
    p = p * m - np.float32(1.1514610310e-1)
    p = p * m + np.float32(1.1676998740e-1)
    p = p * m - np.float32(1.2420140846e-1)
    p = p * m + np.float32(1.4249322787e-1)
    p = p * m - np.float32(1.6668057665e-1)
    p = p * m + np.float32(2.0000714765e-1)
    p = p * m - np.float32(2.4999993993e-1)
    p = p * m + np.float32(3.3333331174e-1)
    y = p * m * z - np.float32(2.12194440e-4) * e - np.float32(0.5) * z
    return m + y + np.float32(0.693359375) * e


@njit(inline="always")
def _mix(x: Any) -> Any:
    """`sampling._mix` for one uint32."""
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x7FEB352D))
    x = np.uint32(x ^ (x >> np.uint32(15)))
    x = np.uint32(x * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@njit(inline="always", error_model="numpy")
def _noise(key1: Any, key2: Any, token: Any) -> Any:
    """Exp(1) noise of one token, see `sampling.exponential`; the keys are those of the position."""
    bits = _mix(np.uint32(_mix(np.uint32(token ^ key1)) + key2))
    # Uniform in (0, 1), with its finest steps near 0, where the winners of a race lie.
    v = np.float32(np.int32(bits)) * np.float32(2.0**-32)
    v = (v + np.float32(1.0) if v < np.float32(0.0) else v) + np.float32(2.0**-33)
    v = min(v, np.float32(1 - 2.0**-24))
    left = np.float32(1.0) - v
    lost = np.float32(1.0) - left  # v as far as the subtraction saw it
    return -_log(left) * (v / lost) if lost > np.float32(0.0) else v


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
    """out[r, o − begin] = Σ w[o] · x[r], in units of both scales, for the outputs from `begin` to `end` and every row.

    sums: int32 `[LANES, MOST, LANES]`, to work in.
    """
    rows = x.shape[0]
    for first in range(0, rows, MOST):
        n = min(rows - first, MOST)
        for o in range(begin, end):
            slot = (o - begin) % LANES
            if n == 1:
                _dots1(w, o, x, first, sums, slot)
            elif n == 2:
                _dots2(w, o, x, first, sums, slot)
            elif n == 3:
                _dots3(w, o, x, first, sums, slot)
            elif n == 4:
                _dots4(w, o, x, first, sums, slot)
            elif n == 5:
                _dots5(w, o, x, first, sums, slot)
            else:
                _dots6(w, o, x, first, sums, slot)
            if slot == LANES - 1:
                for b in range(n):
                    _fold(sums, b, scale, o - slot, size, first + b, out, o - begin - slot)
        done = begin + (end - begin) // LANES * LANES
        for o in range(done, end):
            for b in range(n):
                out[first + b, o - begin] = np.float32(sums[o - done, b].sum()) * (scale[o] * size[first + b])


@_vectors
def _round(x: Any, most: Any, out: Any) -> Any:
    """Writes x in steps of its largest magnitude over `most` to `out`; returns the step."""
    bits = np.int32(_bits(np.float32(1e-12)))
    for i in range(x.shape[0]):
        bits = max(bits, _bits(abs(x[i])))
    largest = _float(bits)
    inverse = most / largest
    for i in range(x.shape[0]):
        out[i] = np.int16(_floor(x[i] * inverse + np.float32(0.5)))
    return largest / most


@_vectors
def _norm(x: Any, weight: Any, epsilon: Any, out: Any) -> None:
    """RMS norm."""
    total = np.float32(0.0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    factor = np.float32(1.0) / np.float32(math.sqrt(total / np.float32(x.shape[0]) + epsilon))
    for i in range(x.shape[0]):
        out[i] = x[i] * factor * weight[i]


@_vectors
def _turn(x: Any, cos: Any, sin: Any, out: Any) -> None:
    """Rotary position: halves of a head turned against each other."""
    half = x.shape[0] // 2
    for i in range(half):
        a, b = x[i], x[i + half]
        out[i] = a * cos[i] - b * sin[i]
        out[i + half] = b * cos[i + half] + a * sin[i + half]


@_vectors
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
        _weighted64(odds, values, begin, end, out, i)
    for i in range(size - size % 64, size, 8):
        _weighted8(odds, values, begin, end, out, i)


@_vectors
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
        _products(w, scale, rounded, steps, begin, end, out[:, begin:end], sums)
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
    sums = np.empty((LANES, MOST, LANES), np.int32)
    outputs = w.shape[0]
    _round_rows(tickets, 0, x, most, rounded, size)
    chunks = (outputs + CHUNK - 1) // CHUNK
    c = _next(tickets, 1, chunks)
    while c >= 0:
        begin, end = c * CHUNK, min(c * CHUNK + CHUNK, outputs)
        _products(w, scale, rounded, size, begin, end, out[:, begin:end], sums)
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
    sums = np.empty((LANES, MOST, LANES), np.int32)
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
            begin, end = head * size, head * size + size
            _products(w_qkv[layer], s_qkv[layer], wide, steps, begin, end, qkv[:, begin:end], sums)
            for r in range(rows):
                part = qkv[r, begin:end]
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
            gate, up = gated[:, begin:end], gated[:, hidden + begin : hidden + end]
            _products(w_gate[layer], s_gate[layer], wide, steps, begin, end, gate, sums)
            _products(w_gate[layer], s_gate[layer], wide, steps, hidden + begin, hidden + end, up, sums)
            for r in range(rows):
                _gate(gate[r], up[r], False, inner[r, begin:end])
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


@njit(error_model="numpy")
def _best(x: Any) -> Any:
    """The first of the largest, by blocks, so that most of it is a comparison of eight at once."""
    at, largest = 0, np.int32(-(2**31))
    for begin in range(0, x.shape[0], 256):
        end = min(begin + 256, x.shape[0])
        here = np.int32(-(2**31))
        for i in range(begin, end):
            here = max(here, _order(x[i]))
        if here > largest:
            at, largest = begin, here
    while _order(x[at]) != largest:
        at += 1
    return at


@_vectors
def _odds(x: Any, heat: Any, out: Any) -> None:
    """softmax(x / heat), NaN throughout where x holds NaN or +inf or nothing but −inf."""
    largest, worst = np.int32(-(2**31)), np.int32(0)
    for i in range(x.shape[0]):
        largest = max(largest, _order(x[i]))
        worst = max(worst, _bits(abs(x[i])))
    top = _float(largest if largest >= 0 else largest ^ np.int32(0x7FFFFFFF))
    total = np.float32(0.0)
    inverse = np.float32(1.0) / heat
    for i in range(x.shape[0]):
        away = (x[i] - top) * inverse
        share = _exp(away)
        out[i] = share if away > np.float32(-87.0) else np.float32(0.0)
        total += out[i]
    inverse = np.float32(1.0) / total
    if worst > np.int32(0x7F800000) or abs(top) == np.float32(np.inf):
        inverse = np.float32(np.nan)
    for i in range(x.shape[0]):
        out[i] *= inverse


@_kernel
def _softmax(tickets: Any, x: Any, heat: Any, out: Any) -> None:
    """`_odds` of every row."""
    r = _next(tickets, 0, x.shape[0])
    while r >= 0:
        _odds(x[r], heat, out[r])
        r = _then(tickets, 0, x.shape[0])


@_kernel
def _argmax(tickets: Any, x: Any, out: Any) -> None:
    """`_best` of every row."""
    r = _next(tickets, 0, x.shape[0])
    while r >= 0:
        out[r] = _best(x[r])
        r = _then(tickets, 0, x.shape[0])


@_kernel
def _exponential(tickets: Any, keys: Any, tokens: Any, out: Any) -> None:
    """out[r, i] = noise of tokens[i] with the keys[r]."""
    parts = 4  # of a row
    size = (tokens.shape[0] + parts - 1) // parts
    c = _next(tickets, 0, keys.shape[0] * parts)
    while c >= 0:
        r, begin = c // parts, c % parts * size
        for i in range(begin, min(begin + size, tokens.shape[0])):
            out[r, i] = _noise(keys[r, 0], keys[r, 1], tokens[i])
        c = _then(tickets, 0, keys.shape[0] * parts)


@njit
def _project(tickets: Any, phase: Any, x: Any, w: Any, scale: Any, outs: Any, sums: Any) -> Any:
    """One row through w, by all threads: outs[phase] is filled, and the part of it that holds the result returned."""
    row = np.zeros((1, w.shape[1]), np.int16)
    size = np.empty(1, np.float32)
    size[0] = _round(x, levels(x.shape[0]), row[0])
    chunks = (w.shape[0] + CHUNK - 1) // CHUNK
    c = _next(tickets, phase, chunks)
    while c >= 0:
        begin, end = c * CHUNK, min(c * CHUNK + CHUNK, w.shape[0])
        _products(w, scale, row, size, begin, end, outs[phase : phase + 1, begin:end], sums)
        c = _then(tickets, phase, chunks)
    return outs[phase, : w.shape[0]]


@_vectors
def _pick(logits: Any, heat: Any, keys: Any, tokens: Any) -> Any:
    """Which of the tokens is drafted, and its probability among them: the most likely one, or at a temperature the
    winner of the race that the target will run at that position (`sampling.race`)."""
    n = logits.shape[0]
    odds = np.empty(n, np.float32)
    best = _best(logits)
    top, inverse = logits[best], np.float32(1.0) / max(heat, np.float32(1e-30))
    if heat == np.float32(0.0):
        inverse = np.float32(1.0)
    total = np.float32(0.0)
    for i in range(n):
        odds[i] = _exp((logits[i] - top) * inverse)
        total += odds[i]
    if heat > np.float32(0.0):
        furthest = np.float32(-1.0)
        for i in range(n):
            lead = odds[i] / _noise(keys[0], keys[1], np.uint32(tokens[i]))
            if lead > furthest:
                best, furthest = i, lead
    return best, odds[best] / total


@_kernel
def _assistant(
    tickets: Any,
    table: Any,
    weights: Any,
    scales: Any,
    norms: Any,
    numbers: Any,
    reads: Any,
    turns: Any,
    lists: Any,
    heat: Any,
    keys: Any,
    goes: Any,
    hidden: Any,
    ids: Any,
    sure: Any,
    chosen: Any,
    logits: Any,
    outs: Any,
) -> Any:
    """A draft; returns how many tokens. Every thread does the small things itself; projections and heads are shared.
    What a phase gives lies in a row of `outs` that no other phase writes to, so a thread that falls behind still finds
    it.

    Args:
        table: the target's embeddings `[V, H]`, still to be multiplied with the last of `numbers`.
        weights, scales: before the layers; of each layer q, out, gate and up, down; behind the layers; centroids and
            lists, if there are any. Without lists there is one step, and nothing is drawn.
        norms: of each layer the four and the one of q; the last one.
        numbers: epsilon, whether the activation is GELU, for each layer scaling and scalar, scale of embeddings.
        reads: int64 `[layers, 8]`: heads, their size, heads of keys and values, addresses of keys and values, their
            capacity, the first position to be read and the one behind the last.
        turns: of each layer cos and sin.
        lists: int64 `[lists, size]`, the tokens in them.
        heat, keys: temperature, and uint32 `[steps, 2]`, the noise keys of the positions; see `_pick`.
        goes: chance of each range of confidence, and after each number of tokens what the draft's chance must be to
            have one more; see `draft_length.GoOn`.
        hidden: the target's last hidden state.
        ids: int64 `[steps + 1]`: the last token, and room for the draft. sure: room for its probabilities.
        chosen, logits `[chosen, size]`: the lists looked at, and the products with their rows.
        outs: float32 `[steps, 5 · layers + 7, widest]`. Of each step the row before the last gets the output, the last
            the hidden state.
    """
    epsilon, gelu, scalings, scalars, embed_scale = numbers
    chances, least = goes
    layers = reads.shape[0]
    steps, phases, _ = outs.shape
    width, fed_back = weights[0].shape[0], hidden.shape[0]
    behind = 1 + 4 * layers
    sums = np.empty((LANES, MOST, LANES), np.int32)
    inputs = np.empty(table.shape[1] + fed_back, np.float32)
    chance = np.float32(1.0)
    for step in range(steps):
        here = outs[step]
        before = tickets[step * phases * PLACES : (step + 1) * phases * PLACES]
        row = table[ids[step]]
        for i in range(row.shape[0]):
            inputs[i] = row[i] * embed_scale
        inputs[row.shape[0] :] = hidden if step == 0 else outs[step - 1, phases - 1, :fed_back]
        x = _project(before, 0, inputs, weights[0], scales[0], here, sums).copy()
        normed = np.empty_like(x)
        phase = 1
        for layer in range(layers):
            heads, size, kv_heads, key_at, value_at, capacity, begin, end = reads[layer]
            first = 1 + 4 * layer
            _norm(x, norms[5 * layer], epsilon, normed)
            q = _project(before, phase, normed, weights[first], scales[first], here, sums)
            phase += 1
            mixed = here[phase, : heads * size]
            held_keys = carray(_at(key_at), (kv_heads, capacity, size))
            held_values = carray(_at(value_at), (kv_heads, capacity, size))
            straight, turned = np.empty(size, np.float32), np.empty(size, np.float32)
            odds = np.empty(end - begin + 6, np.float32)
            head = _next(before, phase, heads)
            while head >= 0:
                at = slice(head * size, head * size + size)
                _norm(q[at], norms[5 * layer + 4], epsilon, straight)
                _turn(straight, turns[2 * layer], turns[2 * layer + 1], turned)
                kv = head // (heads // kv_heads)
                _attend(turned, held_keys[kv], held_values[kv], begin, end, scalings[layer], odds, mixed[at])
                head = _then(before, phase, heads)
            phase += 1
            y = _project(before, phase, mixed, weights[first + 1], scales[first + 1], here, sums)
            _norm(y, norms[5 * layer + 1], epsilon, normed)
            x += normed
            phase += 1
            _norm(x, norms[5 * layer + 2], epsilon, normed)
            gated = _project(before, phase, normed, weights[first + 2], scales[first + 2], here, sums)
            wide = gated.shape[0] // 2
            inner = np.empty(wide, np.float32)
            _gate(gated[:wide], gated[wide:], gelu, inner)
            phase += 1
            y = _project(before, phase, inner, weights[first + 3], scales[first + 3], here, sums)
            _norm(y, norms[5 * layer + 3], epsilon, normed)
            for i in range(width):
                x[i] = (x[i] + normed[i]) * scalars[layer]
            phase += 1
        _norm(x, norms[5 * layers], epsilon, normed)
        _project(before, phases - 1, normed, weights[behind], scales[behind], here, sums)
        if _next(before, phase, 1) == 0:
            here[phases - 2, :width] = normed
            _then(before, phase, 1)
        if lists.shape[0] == 0:
            return 1
        phase += 1
        scores = _project(before, phase, normed, weights[behind + 1], scales[behind + 1], here, sums)
        phase += 1
        if _next(before, phase, 1) == 0:
            n = chosen.shape[0]
            least_score = np.partition(scores, scores.shape[0] - n)[scores.shape[0] - n]
            found = 0
            for i in range(scores.shape[0]):
                if scores[i] >= least_score and found < n:
                    chosen[found] = i
                    found += 1
            _then(before, phase, 1)
        phase += 1
        w, scale = weights[behind + 2], scales[behind + 2]
        size = lists.shape[1]
        rounded, unit = np.zeros((1, w.shape[1]), np.int16), np.empty(1, np.float32)
        unit[0] = _round(normed, levels(width), rounded[0])
        c = _next(before, phase, chosen.shape[0])
        while c >= 0:
            begin = chosen[c] * size
            _products(w, scale, rounded, unit, begin, begin + size, logits[c : c + 1], sums)
            c = _then(before, phase, chosen.shape[0])
        phase += 1
        if _next(before, phase, 1) == 0:
            tokens = np.empty(chosen.shape[0] * size, np.int64)
            for i in range(chosen.shape[0]):
                tokens[i * size : i * size + size] = lists[chosen[i]]
            best, sure[step] = _pick(logits.reshape(-1), heat, keys[step], tokens)
            ids[step + 1] = tokens[best]
            _then(before, phase, 1)
        chance *= chances[min(int(sure[step] * chances.shape[0]), chances.shape[0] - 1)]
        if chance <= least[step + 1]:
            return step + 1
    return steps


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


def steps(rows: int, width: int) -> np.ndarray:
    """Zeros int16 `[rows, width]` for activations in steps, on whole cache lines: a load across two takes longer."""
    held = np.zeros(rows * width * 2 + 64, np.int8)
    skip = -held.ctypes.data % 64
    return held[skip : skip + rows * width * 2].view(np.int16).reshape(rows, width)


def linear(x: np.ndarray, weights: Weights, threads: int) -> np.ndarray:
    """float32 `[rows, in]` → `[rows, outputs]`."""
    values, scales = weights.values[0], weights.scales[0]
    rows, inputs = x.shape
    out = np.empty((rows, len(values)), np.float32)
    rounded = steps(rows, values.shape[1])
    most = np.float32(levels(inputs))
    size = np.empty(rows, np.float32)
    together(threads, _linear, 2, x, values, scales, most, rounded, size, out)
    return out


def softmax(x: np.ndarray, heat: float, threads: int) -> np.ndarray:
    """softmax(x / heat) of float32 rows; see `_odds`."""
    out = np.empty_like(x)
    together(min(threads, len(x)), _softmax, 1, x, np.float32(heat), out)
    return out


def argmax(x: np.ndarray, threads: int) -> np.ndarray:
    """Where each row of float32 is largest, int64, the first place if there are several."""
    out = np.empty(len(x), np.int64)
    together(min(threads, len(x)), _argmax, 1, x, out)
    return out


def exponential(keys: np.ndarray, tokens: np.ndarray, threads: int) -> np.ndarray:
    """Noise float32 `[rows, n]` from uint32 keys `[rows, 2]` and tokens `[n]`; see `sampling.exponential`."""
    out = np.empty((len(keys), len(tokens)), np.float32)
    together(threads, _exponential, 1, keys, tokens, out)
    return out


def llama(threads: int, layers: int, *arguments: Any) -> None:
    """`_llama` with fresh tickets."""
    together(threads, _llama, 9 * layers + 1, *arguments)


def assistant(threads: int, outs: np.ndarray, *arguments: Any) -> int:
    """`_assistant` with fresh tickets."""
    steps, phases, _ = outs.shape
    drafted: int = together(threads, _assistant, steps * phases, *arguments, outs)
    return drafted


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


def together(threads: int, kernel: Callable[..., Any], phases: int, *arguments: Any) -> Any:
    """Runs `kernel` here and on those of the helpers that are free; returns what it returns here."""
    arguments = (np.zeros(phases * PLACES, np.int64), *arguments)
    while len(_helpers) < threads - 1:
        _helpers.append(_Helper())
    for helper in _helpers[: threads - 1]:
        if not helper.busy:
            helper.help(kernel, arguments)
    return kernel(*arguments)
