"""What happens to one row of float32: the parts of a pass other than its matrix products, in loops that become vectors.

Every function reads and writes one row, so a result never depends on the rows beside it. The order of every sum is
written down (`_sum`, `_scores`, `_weighted`), so a result is the same bits wherever it is computed; see `floats`.
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

from .floats import (
    EIGHT,
    F32,
    I32,
    I64,
    LANES,
    LOWEST,
    bits_of,
    exp,
    float_of,
    floor,
    fma,
    fused,
    ieee,
    load8,
    order,
    spread,
    store8,
    unordered,
)

SUMS = 4  # vectors of partial sums in `_sum`, so that additions do not wait for each other
BLOCK = 64  # numbers that `argmax` and `top` take the maximum of before they look at any of them


def _sum(square: bool) -> Any:
    """A sum of float32, or of their squares, as an intrinsic."""

    @intrinsic
    def add(context: Any, x: Any, begin: Any, end: Any) -> Any:
        """Σ x[i], or x[i]², for i from `begin` to `end`: lane l of `SUMS · LANES` adds i = begin + l, begin + l +
        SUMS · LANES, … in turn, squares with `fma`. Then each lane of the first half adds its partner in the second
        half, and so on until one is left."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            array = context.make_array(signature.args[0])(context, builder, arguments[0])
            _, begin, end = arguments

            def added(total: Any, value: Any) -> Any:
                return fused(builder, value, value, total) if square else builder.fadd(total, value)

            every = SUMS * LANES
            sums = [cgutils.alloca_once_value(builder, ir.Constant(EIGHT, [0.0] * LANES)) for _ in range(SUMS)]
            rounds = builder.sdiv(builder.sub(end, begin), I64(every))
            with cgutils.for_range(builder, rounds) as loop:
                at = builder.add(begin, builder.mul(loop.index, I64(every)))
                for i, total in enumerate(sums):
                    value = load8(builder, array.data, builder.add(at, I64(i * LANES)))
                    builder.store(added(builder.load(total), value), total)
            # The rest is added to the first lanes, one number each.
            lanes = cgutils.alloca_once(builder, ir.ArrayType(F32, every))
            first = builder.gep(lanes, [I64(0), I64(0)])
            for i, total in enumerate(sums):
                store8(builder, builder.load(total), first, I64(i * LANES))
            done = builder.add(begin, builder.mul(rounds, I64(every)))
            with cgutils.for_range(builder, builder.sub(end, done)) as loop:
                place = builder.gep(first, [loop.index], source_etype=F32)
                value = builder.gep(array.data, [builder.add(done, loop.index)], source_etype=F32)
                builder.store(added(builder.load(place, typ=F32), builder.load(value, typ=F32)), place)
            parts = [load8(builder, first, I64(i * LANES)) for i in range(SUMS)]
            while len(parts) > 1:
                half = len(parts) // 2
                parts = [builder.fadd(a, b) for a, b in zip(parts[:half], parts[half:], strict=True)]
            whole, span = parts[0], LANES // 2
            while span:
                partners = ir.Constant(ir.VectorType(I32, LANES), [(i + span) % LANES for i in range(LANES)])
                whole = builder.fadd(whole, builder.shuffle_vector(whole, whole, partners))
                span //= 2
            return builder.extract_element(whole, I32(0))

        return types.float32(x, types.int64, types.int64), generate

    return add


_sum_all, _sum_squares = _sum(square=False), _sum(square=True)


@ieee
def quantize_row(x: Any, levels: Any, out: Any) -> Any:
    """Writes x as int16 from −`levels` to `levels` to `out`; returns the scale, the largest magnitude over `levels`."""
    bits = np.int32(bits_of(np.float32(1e-12)))
    for i in range(x.shape[0]):
        bits = max(bits, bits_of(abs(x[i])))
    magnitude = float_of(bits)
    inverse = levels / magnitude
    for i in range(x.shape[0]):
        out[i] = np.int16(floor(fma(x[i], inverse, np.float32(0.5))))
    return magnitude / levels


@ieee
def rms_norm(x: Any, weight: Any, epsilon: Any, out: Any) -> None:
    """RMS norm; `out` may be x."""
    total = _sum_squares(x, 0, x.shape[0])
    factor = np.float32(1.0) / np.float32(math.sqrt(total / np.float32(x.shape[0]) + epsilon))
    for i in range(x.shape[0]):
        out[i] = x[i] * factor * weight[i]


@ieee
def rotate(x: Any, cos: Any, sin: Any, out: Any) -> None:
    """RoPE of one head, whose first half is paired with its second half. `out` must not be x."""
    half = x.shape[0] // 2
    for i in range(half):
        a, b = x[i], x[i + half]
        out[i] = fma(a, cos[i], -(b * sin[i]))
        out[i + half] = fma(b, cos[i + half], a * sin[i + half])


@ieee
def gate(gate: Any, up: Any, gelu: Any, out: Any) -> None:
    """SiLU(gate) · up, or with GELU in its tanh form, which is x · sigmoid(√(8/π) · (x + 0.044715 x³))."""
    for i in range(gate.shape[0]):
        x = gate[i]
        inner = np.float32(1.5957691216) * fma(np.float32(0.044715) * x * x, x, x) if gelu else x
        out[i] = x / (np.float32(1.0) + exp(-max(inner, np.float32(-80.0)))) * up[i]


@njit(inline="always", error_model="numpy")  # inlined, LLVM sees where x and out are the same array
def exponentials(x: Any, n: Any, maximum: Any, factor: Any, out: Any) -> Any:
    """Writes e^((x − maximum) · factor) of the first n numbers to `out`, or 0 where that is below e^−87; returns their
    sum, in the order of `_sum`."""
    for i in range(n):
        exponent = (x[i] - maximum) * factor
        weight = exp(exponent)
        out[i] = np.float32(0.0) if exponent < np.float32(-87.0) else weight
    return _sum_all(out, 0, n)


def fold(builder: Any, parts: list[Any], add: Callable[[Any, Any], Any]) -> Any:
    """`LANES` vectors → one, whose lane s is the sum of vector s. All are added up at once, which takes a fraction of
    the time of one after the other. Every lane is added up in the same order."""
    # Each step adds halves of neighbours: [a0+a1, b0+b1, a2+a3, …], and so on.
    for span in (1, 2, 4):
        firsts = [i for i in range(LANES) if not i & span]  # of both halves of each pair of parts, in turn
        picked = [i + half for at in range(0, len(firsts), span) for half in (0, LANES) for i in firsts[at : at + span]]
        left, right = (ir.Constant(ir.VectorType(I32, LANES), [i + plus for i in picked]) for plus in (0, span))
        parts = [
            add(builder.shuffle_vector(a, b, left), builder.shuffle_vector(a, b, right))
            for a, b in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]


@intrinsic
def _scores(context: Any, q: Any, keys: Any, first: Any, out: Any, at: Any) -> Any:
    """out[at + j] = Σ q[i] · keys[first + j, i] for j from 0 to 7; the row is a multiple of 8 long."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        aq, ak, ao = (context.make_array(kinds[i])(context, builder, arguments[i]) for i in (0, 1, 3))
        size = builder.extract_value(ak.shape, 1)
        rows = [
            builder.gep(ak.data, [builder.mul(builder.add(arguments[2], I64(j)), size)], source_etype=F32)
            for j in range(LANES)
        ]
        sums = [cgutils.alloca_once_value(builder, ir.Constant(EIGHT, [0.0] * LANES)) for _ in rows]
        with cgutils.for_range(builder, builder.sdiv(size, I64(LANES))) as loop:
            i = builder.mul(loop.index, I64(LANES))
            left = load8(builder, aq.data, i)
            for row, total in zip(rows, sums, strict=True):
                builder.store(fused(builder, left, load8(builder, row, i), builder.load(total)), total)
        store8(builder, fold(builder, [builder.load(total) for total in sums], builder.fadd), ao.data, arguments[4])
        return context.get_dummy_value()

    return types.void(q, keys, types.int64, out, types.int64), generate


def _weighted(vectors: int) -> Any:
    """A weighted sum of rows, 8 · `vectors` columns of it, as an intrinsic."""

    @intrinsic
    def weighted(context: Any, weights: Any, values: Any, begin: Any, end: Any, out: Any, at: Any) -> Any:
        """out[at + i] = Σ weights[j − begin] · values[j, at + i] for j from `begin` to `end`"""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kinds = signature.args
            aw, av, ao = (context.make_array(kinds[i])(context, builder, arguments[i]) for i in (0, 1, 4))
            _, _, begin, end, _, at = arguments
            size = builder.extract_value(av.shape, 1)
            sums = [cgutils.alloca_once_value(builder, ir.Constant(EIGHT, [0.0] * LANES)) for _ in range(vectors)]
            with cgutils.for_range(builder, builder.sub(end, begin)) as loop:
                weight = builder.load(builder.gep(aw.data, [loop.index], source_etype=F32), typ=F32)
                repeated = spread(builder, weight)
                start = builder.add(builder.mul(builder.add(begin, loop.index), size), at)
                for i, total in enumerate(sums):
                    row = load8(builder, av.data, builder.add(start, I64(8 * i)))
                    builder.store(fused(builder, repeated, row, builder.load(total)), total)
            for i, total in enumerate(sums):
                store8(builder, builder.load(total), ao.data, builder.add(at, I64(8 * i)))
            return context.get_dummy_value()

        return types.void(weights, values, types.int64, types.int64, out, types.int64), generate

    return weighted


_weighted8, _weighted64 = _weighted(1), _weighted(8)


@ieee
def attend(q: Any, keys: Any, values: Any, begin: Any, end: Any, scaling: Any, weights: Any, out: Any) -> None:
    """Attention of one query over the positions from `begin` to `end` of one head.

    Keys before `begin` and after `end` are read too, up to whole vectors of them, and have no effect.

    Args:
        q, out: `[head size]`, a multiple of 8.
        keys, values: `[positions, head size]`.
        weights: working memory of `attention_weights(begin, end)` numbers.
    """
    n, before = end - begin, begin % LANES
    for j in range(0, before + n, LANES):
        _scores(q, keys, begin - before + j, weights, j)
    weights = weights[before:]
    highest = order(np.float32(-np.inf))
    for j in range(n):
        highest = max(highest, order(weights[j]))
    inverse = np.float32(1.0) / exponentials(weights, n, unordered(highest), scaling, weights)
    for j in range(n):
        weights[j] *= inverse
    size = q.shape[0]
    for i in range(0, size - size % 64, 64):
        _weighted64(weights, values, begin, end, out, i)
    for i in range(size - size % 64, size, 8):
        _weighted8(weights, values, begin, end, out, i)


@njit
def attention_weights(begin: Any, end: Any) -> Any:
    """How many numbers `attend` works in."""
    return end - begin + 2 * LANES - 2


@ieee
def argmax(x: Any) -> Any:
    """The first place of the maximum."""
    at, highest = 0, LOWEST
    whole = x.shape[0] - x.shape[0] % BLOCK
    for begin in range(0, whole, BLOCK):
        here = _block_maximum(x, begin)
        if here > highest:
            at, highest = begin, here
    for i in range(whole, x.shape[0]):
        here = _rank(x[i])
        if here > highest:
            at, highest = i, here
    while _rank(x[at]) != highest:
        at += 1
    return at


@njit(inline="always")
def _rank(x: Any) -> Any:
    """`order`, with −0 equal to 0."""
    return order(x + np.float32(0.0))


@njit(inline="always")
def _block_maximum(x: Any, begin: Any) -> Any:
    """The highest rank of `BLOCK` numbers. The length is a constant, so LLVM compares vectors of them."""
    highest = LOWEST
    for i in range(begin, begin + BLOCK):
        highest = max(highest, _rank(x[i]))
    return highest


@ieee
def top(x: Any, places: Any, ranks: Any) -> None:
    """Writes the places of the largest numbers to `places`, largest first and equal ones by place, and −1 where x has
    no more; `ranks` is working memory, int32 of the same length.

    A block is looked into only if its maximum exceeds the smallest number found so far.
    """
    places[:] = -1
    count = 0
    whole = x.shape[0] - x.shape[0] % BLOCK
    for begin in range(0, whole, BLOCK):
        if count < places.shape[0] or _block_maximum(x, begin) > ranks[count - 1]:
            count = _insert(x, begin, begin + BLOCK, places, ranks, count)
    _insert(x, whole, x.shape[0], places, ranks, count)


@ieee
def _insert(x: Any, begin: Any, end: Any, places: Any, ranks: Any, count: Any) -> Any:
    """Inserts x[begin:end] into the `count` largest numbers found so far; returns how many there are then."""
    for i in range(begin, end):
        rank = _rank(x[i])
        if count < places.shape[0]:
            count += 1
        elif rank <= ranks[count - 1]:
            continue
        at = count - 1
        while at > 0 and ranks[at - 1] < rank:
            places[at], ranks[at] = places[at - 1], ranks[at - 1]
            at -= 1
        places[at], ranks[at] = i, rank
    return count


@ieee
def largest(x: Any, places: Any) -> None:
    """Writes the places of the n largest numbers to `places` `[n]` in ascending order; of equal ones the first count.

    Bisects for the rank of the n-th largest: each step is a comparison of vectors, and nothing is sorted.
    """
    ranks = np.empty(x.shape[0], np.int32)
    low, high = np.int64(2**31 - 1), np.int64(LOWEST)
    for i in range(x.shape[0]):
        ranks[i] = _rank(x[i])
        low, high = min(low, np.int64(ranks[i])), max(high, np.int64(ranks[i]))
    while low < high:
        middle = (low + high + 1) >> 1
        if _above(ranks, middle - 1) >= places.shape[0]:
            low = middle
        else:
            high = middle - 1
    ties = places.shape[0] - _above(ranks, low)
    found = 0
    for i in range(x.shape[0]):
        if ranks[i] > low or (ranks[i] == low and ties > 0):
            ties -= ranks[i] == low
            places[found] = i
            found += 1


@njit
def _above(ranks: Any, bound: Any) -> Any:
    """How many ranks are above `bound`."""
    bound, count = np.int32(bound), np.int32(0)
    for i in range(ranks.shape[0]):
        count += np.int32(ranks[i] > bound)
    return count


@ieee
def softmax_row(x: Any, temperature: Any, out: Any) -> None:
    """softmax(x / temperature), NaN throughout where x holds NaN or +inf or nothing but −inf."""
    highest, magnitude = LOWEST, np.int32(0)
    for i in range(x.shape[0]):
        highest = max(highest, order(x[i]))
        magnitude = max(magnitude, bits_of(abs(x[i])))
    maximum = unordered(highest)
    inverse = np.float32(1.0) / exponentials(x, x.shape[0], maximum, np.float32(1.0) / temperature, out)
    if magnitude > np.int32(0x7F800000) or abs(maximum) == np.float32(np.inf):
        inverse = np.float32(np.nan)
    for i in range(x.shape[0]):
        out[i] *= inverse
