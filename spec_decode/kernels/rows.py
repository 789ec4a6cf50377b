"""What happens to one row of floats: the compiled parts of a pass beside its products, in loops that become vectors.

Everything here reads and writes one row, whatever stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8  # numbers in a vector
_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_EIGHT = ir.VectorType(_F32, LANES)
# Sums may be taken in any order, so that loops become vectors; and a division by zero is not an exception, which loops
# would have to be left for.
vectors = njit(fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy")


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
def order(x: Any) -> Any:
    """An int32 for a float32, in the same order."""
    bits = _bits(x)
    return bits if bits >= 0 else bits ^ np.int32(0x7FFFFFFF)


@njit(inline="always")
def unordered(bits: Any) -> Any:
    """The float32 that `order` made `bits` of."""
    return _float(bits if bits >= 0 else bits ^ np.int32(0x7FFFFFFF))


@njit(inline="always", error_model="numpy")
def exp(x: Any) -> Any:
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


@njit(inline="always")
def noise_keys(low: Any, high: Any, position: Any, start: Any) -> Any:
    """The keys of a position, uint32, see `sampling._keys`; `start` is negative where the round has no part in them."""
    if start >= 0:
        begin = np.uint32(start)
        low = _mix(np.uint32(np.uint32(begin * np.uint32(0x85EBCA6B)) ^ low))
        high = _mix(np.uint32(np.uint32(begin * np.uint32(0xC2B2AE35)) ^ high))
    place = np.uint32(position)
    return _mix(np.uint32(np.uint32(place * np.uint32(0x9E3779B1)) ^ low)), _mix(np.uint32(place ^ high))


@njit(inline="always", error_model="numpy")
def noise(key1: Any, key2: Any, token: Any) -> Any:
    """Exp(1) noise of one token, see `sampling.exponential`; the keys are those of the position."""
    bits = _mix(np.uint32(_mix(np.uint32(token ^ key1)) + key2))
    # Uniform in (0, 1), with its finest steps near 0, where the winners of a race lie.
    v = np.float32(np.int32(bits)) * np.float32(2.0**-32)
    v = (v + np.float32(1.0) if v < np.float32(0.0) else v) + np.float32(2.0**-33)
    v = min(v, np.float32(1 - 2.0**-24))
    left = np.float32(1.0) - v
    lost = np.float32(1.0) - left  # v as far as the subtraction saw it
    return -_log(left) * (v / lost) if lost > np.float32(0.0) else v


@vectors
def round_row(x: Any, most: Any, out: Any) -> Any:
    """Writes x in steps of its largest magnitude over `most` to `out`; returns the step."""
    bits = np.int32(_bits(np.float32(1e-12)))
    for i in range(x.shape[0]):
        bits = max(bits, _bits(abs(x[i])))
    largest = _float(bits)
    inverse = most / largest
    for i in range(x.shape[0]):
        out[i] = np.int16(_floor(x[i] * inverse + np.float32(0.5)))
    return largest / most


@vectors
def norm(x: Any, weight: Any, epsilon: Any, out: Any) -> None:
    """RMS norm."""
    total = np.float32(0.0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    factor = np.float32(1.0) / np.float32(math.sqrt(total / np.float32(x.shape[0]) + epsilon))
    for i in range(x.shape[0]):
        out[i] = x[i] * factor * weight[i]


@vectors
def turn(x: Any, cos: Any, sin: Any, out: Any) -> None:
    """Rotary position: halves of a head turned against each other."""
    half = x.shape[0] // 2
    for i in range(half):
        a, b = x[i], x[i + half]
        out[i] = a * cos[i] - b * sin[i]
        out[i + half] = b * cos[i + half] + a * sin[i + half]


@vectors
def gate(gate: Any, up: Any, gelu: Any, out: Any) -> None:
    """SiLU(gate) · up, or with GELU in its tanh form, which is x · sigmoid(√(8/π) · (x + 0.044715 x³))."""
    for i in range(gate.shape[0]):
        x = gate[i]
        inner = np.float32(1.5957691216) * (x + np.float32(0.044715) * x * x * x) if gelu else x
        out[i] = x / (np.float32(1.0) + exp(-max(inner, np.float32(-80.0)))) * up[i]


def fold(builder: Any, parts: list[Any], add: Callable[[Any, Any], Any]) -> Any:
    """`LANES` vectors → one, whose lane s is the sum of vector s: of all at once, where one by one would take several
    times as long. Every lane is added up in the same order."""
    # Each turn adds halves of neighbours: [a0+a1, b0+b1, a2+a3, …], and so on.
    for span in (1, 2, 4):
        firsts = [i for i in range(LANES) if not i & span]  # of both halves of each pair of parts, in turn
        picked = [i + half for at in range(0, len(firsts), span) for half in (0, LANES) for i in firsts[at : at + span]]
        left, right = (ir.Constant(ir.VectorType(_I32, LANES), [i + plus for i in picked]) for plus in (0, span))
        parts = [
            add(builder.shuffle_vector(a, b, left), builder.shuffle_vector(a, b, right))
            for a, b in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]


def load8(builder: Any, base: Any, at: Any) -> Any:
    """Eight float32 from `at` on."""
    place = builder.gep(base, [at], source_etype=_F32)
    return builder.load(place, typ=_EIGHT, align=4)


def store8(builder: Any, value: Any, base: Any, at: Any) -> None:
    """Eight float32 to `at` and on."""
    place = builder.gep(base, [at], source_etype=_F32)
    builder.store(value, builder.bitcast(place, _EIGHT.as_pointer()), align=4)


def spread(builder: Any, value: Any) -> Any:
    """A float32 eight times."""
    one = builder.insert_element(ir.Constant(_EIGHT, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


@intrinsic
def _scores(context: Any, q: Any, keys: Any, first: Any, out: Any, at: Any) -> Any:
    """out[at + j] = Σ q[i] · keys[first + j, i] for j from 0 to 7; the row is a multiple of 8 long."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        aq, ak, ao = (context.make_array(kinds[i])(context, builder, arguments[i]) for i in (0, 1, 3))
        size = builder.extract_value(ak.shape, 1)
        rows = [
            builder.gep(ak.data, [builder.mul(builder.add(arguments[2], _I64(j)), size)], source_etype=_F32)
            for j in range(LANES)
        ]
        sums = [cgutils.alloca_once_value(builder, ir.Constant(_EIGHT, [0.0] * LANES)) for _ in rows]
        with cgutils.for_range(builder, builder.sdiv(size, _I64(LANES))) as loop:
            i = builder.mul(loop.index, _I64(LANES))
            left = load8(builder, aq.data, i)
            for row, total in zip(rows, sums, strict=True):
                product = builder.fmul(left, load8(builder, row, i), flags=("contract",))
                builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
        store8(builder, fold(builder, [builder.load(total) for total in sums], builder.fadd), ao.data, arguments[4])
        return context.get_dummy_value()

    return types.void(q, keys, types.int64, out, types.int64), generate


def _weighted(vectors: int) -> Any:
    """A weighted sum of rows, 8 · `vectors` columns of it, as an intrinsic."""

    @intrinsic
    def weighted(context: Any, odds: Any, values: Any, begin: Any, end: Any, out: Any, at: Any) -> Any:
        """out[at + i] = Σ odds[j − begin] · values[j, at + i] for j from `begin` to `end`"""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kinds = signature.args
            aw, av, ao = (context.make_array(kinds[i])(context, builder, arguments[i]) for i in (0, 1, 4))
            _, _, begin, end, _, at = arguments
            size = builder.extract_value(av.shape, 1)
            sums = [cgutils.alloca_once_value(builder, ir.Constant(_EIGHT, [0.0] * LANES)) for _ in range(vectors)]
            with cgutils.for_range(builder, builder.sub(end, begin)) as loop:
                weight = builder.load(builder.gep(aw.data, [loop.index], source_etype=_F32), typ=_F32)
                weights = spread(builder, weight)
                start = builder.add(builder.mul(builder.add(begin, loop.index), size), at)
                for i, total in enumerate(sums):
                    row = load8(builder, av.data, builder.add(start, _I64(8 * i)))
                    product = builder.fmul(weights, row, flags=("contract",))
                    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
            for i, total in enumerate(sums):
                store8(builder, builder.load(total), ao.data, builder.add(at, _I64(8 * i)))
            return context.get_dummy_value()

        return types.void(odds, values, types.int64, types.int64, out, types.int64), generate

    return weighted


_weighted8, _weighted64 = _weighted(1), _weighted(8)


@vectors
def attend(q: Any, keys: Any, values: Any, begin: Any, end: Any, scaling: Any, odds: Any, out: Any) -> None:
    """One query over the positions from `begin` to `end` of one head: keys and values are `[positions, head_dim]`.

    Reads whole eights of keys, whatever the ones outside may be.
    """
    n, before = end - begin, begin % LANES
    for j in range(0, before + n, LANES):
        _scores(q, keys, begin - before + j, odds, j)
    odds = odds[before:]
    highest = order(np.float32(-np.inf))
    for j in range(n):
        highest = max(highest, order(odds[j]))
    largest = unordered(highest)
    total = np.float32(0.0)
    for j in range(n):
        odds[j] = exp((odds[j] - largest) * scaling)
        total += odds[j]
    for j in range(n):
        odds[j] /= total
    size = q.shape[0]
    for i in range(0, size - size % 64, 64):
        _weighted64(odds, values, begin, end, out, i)
    for i in range(size - size % 64, size, 8):
        _weighted8(odds, values, begin, end, out, i)


@njit(error_model="numpy")
def best(x: Any) -> Any:
    """The first of the largest, by blocks, so that most of it is a comparison of eight at once."""
    at, largest = 0, np.int32(-(2**31))
    for begin in range(0, x.shape[0], 256):
        end = min(begin + 256, x.shape[0])
        here = np.int32(-(2**31))
        for i in range(begin, end):
            here = max(here, order(x[i]))
        if here > largest:
            at, largest = begin, here
    while order(x[at]) != largest:
        at += 1
    return at


@vectors
def odds(x: Any, heat: Any, out: Any) -> None:
    """softmax(x / heat), NaN throughout where x holds NaN or +inf or nothing but −inf."""
    largest, worst = np.int32(-(2**31)), np.int32(0)
    for i in range(x.shape[0]):
        largest = max(largest, order(x[i]))
        worst = max(worst, _bits(abs(x[i])))
    top = unordered(largest)
    total = np.float32(0.0)
    inverse = np.float32(1.0) / heat
    for i in range(x.shape[0]):
        away = (x[i] - top) * inverse
        share = exp(away)
        out[i] = share if away > np.float32(-87.0) else np.float32(0.0)
        total += out[i]
    inverse = np.float32(1.0) / total
    if worst > np.int32(0x7F800000) or abs(top) == np.float32(np.inf):
        inverse = np.float32(np.nan)
    for i in range(x.shape[0]):
        out[i] *= inverse
