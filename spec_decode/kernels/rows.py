"""What happens to one row of floats: the compiled parts of a pass beside its products, in loops that become vectors.

Everything here reads and writes one row, whatever stands beside it.

Every result is the same bits wherever it is computed. An operation on floats is rounded as IEEE 754 says, alone or as
one of a vector; what could differ is the order of a sum and whether a product is rounded before it is added. Both are
written down here: sums have lanes (`_sum`, `_scores`, `_weighted`), a fused multiply-add is asked for by name (`fma`),
and no flag allows LLVM to reorder or to fuse anything. With such flags it did so as the rest of a module suggested,
and a process that compiled the kernels computed other bits than one that loaded them. Nothing calls a C library,
whose functions differ; e^x and the logarithm are polynomials.
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

from .processor import has_fma

LANES = 8  # numbers in a vector
SUMS = 4  # vectors of partial sums that `_sum` has, so that additions do not wait for each other
_I32, _I64, _F32, _F64 = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()
_EIGHT = ir.VectorType(_F32, LANES)
# A division by zero is not an exception, which loops would have to be left for.
floats = njit(error_model="numpy")


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once, of float32 or vectors of them; the same bits with and without an instruction for it."""
    if has_fma():
        kind = ir.FunctionType(a.type, [a.type] * 3)
        name = f"llvm.fma.v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "llvm.fma.f32"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b, c])
    # In float64 the product is exact. Their sum is rounded to odd, which loses nothing that the rounding to float32
    # asks for (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", IEEE ToC 57, 2008).
    count = a.type.count if isinstance(a.type, ir.VectorType) else 0
    wide, bits = (ir.VectorType(kind, count) if count else kind for kind in (_F64, _I64))

    def whole(value: int) -> Any:
        return ir.Constant(bits, [value] * count if count else value)

    x = builder.fmul(builder.fpext(a, wide), builder.fpext(b, wide))
    y = builder.fpext(c, wide)
    total = builder.fadd(x, y)
    part = builder.fsub(total, x)
    lost = builder.fadd(builder.fsub(x, builder.fsub(total, part)), builder.fsub(y, part))  # Knuth's TwoSum: exact
    inexact = builder.fcmp_ordered("!=", lost, ir.Constant(wide, [0.0] * count if count else 0.0))
    held = builder.bitcast(total, bits)
    even = builder.icmp_signed("==", builder.and_(held, whole(1)), whole(0))
    larger = builder.icmp_signed(">=", builder.xor(held, builder.bitcast(lost, bits)), whole(0))  # in magnitude
    odd = builder.add(held, builder.select(larger, whole(1), whole(-1)))
    held = builder.select(builder.and_(inexact, even), odd, held)
    return builder.fptrunc(builder.bitcast(held, wide), a.type)


@intrinsic
def fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c of float32, rounded once."""
    signature = types.float32(types.float32, types.float32, types.float32)
    return signature, lambda context, builder, signature, arguments: fused(builder, *arguments)


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
    whole = _floor(fma(x, np.float32(1.4426950408889634), np.float32(0.5)))
    n = np.float32(whole)  # then 2 to this power is made of bits
    r = fma(n, np.float32(-0.693145751953125), x)
    r = fma(n, np.float32(-1.42860682030941723e-6), r)
    p = fma(np.float32(1.9875691500e-4), r, np.float32(1.3981999507e-3))
    p = fma(p, r, np.float32(8.3334519073e-3))
    p = fma(p, r, np.float32(4.1665795894e-2))
    p = fma(p, r, np.float32(1.6666665459e-1))
    p = fma(p, r, np.float32(5.0000001201e-1))
    return (fma(p, r * r, r) + np.float32(1.0)) * _float((whole + np.int32(127)) << np.int32(23))


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
    p = fma(np.float32(7.0376836292e-2), m, np.float32(-1.1514610310e-1))
    p = fma(p, m, np.float32(1.1676998740e-1))
    p = fma(p, m, np.float32(-1.2420140846e-1))
    p = fma(p, m, np.float32(1.4249322787e-1))
    p = fma(p, m, np.float32(-1.6668057665e-1))
    p = fma(p, m, np.float32(2.0000714765e-1))
    p = fma(p, m, np.float32(-2.4999993993e-1))
    p = fma(p, m, np.float32(3.3333331174e-1))
    y = fma(e, np.float32(-2.12194440e-4), p * m * z)
    y = fma(z, np.float32(-0.5), y)
    return fma(e, np.float32(0.693359375), m + y)


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


def _sum(square: bool) -> Any:
    """A sum of float32, or of their squares, as an intrinsic."""

    @intrinsic
    def add(context: Any, x: Any, begin: Any, end: Any) -> Any:
        """Σ x[i], or x[i]², for i from `begin` to `end`: lane l of `SUMS · LANES` adds i = begin + l, begin + l +
        SUMS · LANES, … in turn, squares with `fma`. Then each lane of the first half of them adds its partner in the
        second, and so on, until one is left."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            array = context.make_array(signature.args[0])(context, builder, arguments[0])
            _, begin, end = arguments

            def added(total: Any, value: Any) -> Any:
                return fused(builder, value, value, total) if square else builder.fadd(total, value)

            every = SUMS * LANES
            sums = [cgutils.alloca_once_value(builder, ir.Constant(_EIGHT, [0.0] * LANES)) for _ in range(SUMS)]
            turns = builder.sdiv(builder.sub(end, begin), _I64(every))
            with cgutils.for_range(builder, turns) as loop:
                at = builder.add(begin, builder.mul(loop.index, _I64(every)))
                for i, total in enumerate(sums):
                    value = load8(builder, array.data, builder.add(at, _I64(i * LANES)))
                    builder.store(added(builder.load(total), value), total)
            # What is left over is added to the first lanes, one by one.
            lanes = cgutils.alloca_once(builder, ir.ArrayType(_F32, every))
            first = builder.gep(lanes, [_I64(0), _I64(0)])
            for i, total in enumerate(sums):
                store8(builder, builder.load(total), first, _I64(i * LANES))
            done = builder.add(begin, builder.mul(turns, _I64(every)))
            with cgutils.for_range(builder, builder.sub(end, done)) as loop:
                place = builder.gep(first, [loop.index], source_etype=_F32)
                value = builder.gep(array.data, [builder.add(done, loop.index)], source_etype=_F32)
                builder.store(added(builder.load(place, typ=_F32), builder.load(value, typ=_F32)), place)
            parts = [load8(builder, first, _I64(i * LANES)) for i in range(SUMS)]
            while len(parts) > 1:
                half = len(parts) // 2
                parts = [builder.fadd(a, b) for a, b in zip(parts[:half], parts[half:], strict=True)]
            whole, span = parts[0], LANES // 2
            while span:
                partners = ir.Constant(ir.VectorType(_I32, LANES), [(i + span) % LANES for i in range(LANES)])
                whole = builder.fadd(whole, builder.shuffle_vector(whole, whole, partners))
                span //= 2
            return builder.extract_element(whole, _I32(0))

        return types.float32(x, types.int64, types.int64), generate

    return add


_sum_all, _sum_squares = _sum(square=False), _sum(square=True)


@floats
def round_row(x: Any, most: Any, out: Any) -> Any:
    """Writes x in steps of its largest magnitude over `most` to `out`; returns the step."""
    bits = np.int32(_bits(np.float32(1e-12)))
    for i in range(x.shape[0]):
        bits = max(bits, _bits(abs(x[i])))
    largest = _float(bits)
    inverse = most / largest
    for i in range(x.shape[0]):
        out[i] = np.int16(_floor(fma(x[i], inverse, np.float32(0.5))))
    return largest / most


@floats
def norm(x: Any, weight: Any, epsilon: Any, out: Any) -> None:
    """RMS norm."""
    total = _sum_squares(x, 0, x.shape[0])
    factor = np.float32(1.0) / np.float32(math.sqrt(total / np.float32(x.shape[0]) + epsilon))
    for i in range(x.shape[0]):
        out[i] = x[i] * factor * weight[i]


@floats
def turn(x: Any, cos: Any, sin: Any, out: Any) -> None:
    """Rotary position: halves of a head turned against each other."""
    half = x.shape[0] // 2
    for i in range(half):
        a, b = x[i], x[i + half]
        out[i] = fma(a, cos[i], -(b * sin[i]))
        out[i + half] = fma(b, cos[i + half], a * sin[i + half])


@floats
def gate(gate: Any, up: Any, gelu: Any, out: Any) -> None:
    """SiLU(gate) · up, or with GELU in its tanh form, which is x · sigmoid(√(8/π) · (x + 0.044715 x³))."""
    for i in range(gate.shape[0]):
        x = gate[i]
        inner = np.float32(1.5957691216) * fma(np.float32(0.044715) * x * x, x, x) if gelu else x
        out[i] = x / (np.float32(1.0) + exp(-max(inner, np.float32(-80.0)))) * up[i]


@njit(inline="always", error_model="numpy")  # so that LLVM sees when x and out are the same
def exponentials(x: Any, n: Any, top: Any, factor: Any, out: Any) -> Any:
    """Writes e^((x − top) · factor) of the first n numbers to `out`, or 0 where that is below e^−87; returns the sum,
    added up as `_sum` says."""
    for i in range(n):
        away = (x[i] - top) * factor
        share = exp(away)
        out[i] = np.float32(0.0) if away < np.float32(-87.0) else share
    return _sum_all(out, 0, n)


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
                builder.store(fused(builder, left, load8(builder, row, i), builder.load(total)), total)
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
                    builder.store(fused(builder, weights, row, builder.load(total)), total)
            for i, total in enumerate(sums):
                store8(builder, builder.load(total), ao.data, builder.add(at, _I64(8 * i)))
            return context.get_dummy_value()

        return types.void(odds, values, types.int64, types.int64, out, types.int64), generate

    return weighted


_weighted8, _weighted64 = _weighted(1), _weighted(8)


@floats
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
    inverse = np.float32(1.0) / exponentials(odds, n, largest, scaling, odds)
    for j in range(n):
        odds[j] *= inverse
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


@floats
def odds(x: Any, heat: Any, out: Any) -> None:
    """softmax(x / heat), NaN throughout where x holds NaN or +inf or nothing but −inf."""
    largest, worst = np.int32(-(2**31)), np.int32(0)
    for i in range(x.shape[0]):
        largest = max(largest, order(x[i]))
        worst = max(worst, _bits(abs(x[i])))
    top = unordered(largest)
    inverse = np.float32(1.0) / exponentials(x, x.shape[0], top, np.float32(1.0) / heat, out)
    if worst > np.int32(0x7F800000) or abs(top) == np.float32(np.inf):
        inverse = np.float32(np.nan)
    for i in range(x.shape[0]):
        out[i] *= inverse
