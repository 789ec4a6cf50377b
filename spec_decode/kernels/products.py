"""Products of 8-bit weights with rows of activations.

Activations are rounded to 14 bits with a scale for each row, weights have one for each output. The sums are over
integers, exact in any order. So a row's result is the same bit for bit whatever stands beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .processor import has_avx2
from .rows import LANES, fold, load8, spread, store8

STEP = 64  # weights of a row come in multiples of it
MOST = 6  # rows that one reading of the weights serves
AHEAD = 2048  # bytes of weights that are asked for before they are needed
_I8, _I16, _I32, _I64, _F32 = (*(ir.IntType(n) for n in (8, 16, 32, 64)), ir.FloatType())
_PARTS = ir.VectorType(_I32, LANES)


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


@njit
def levels(width: Any) -> Any:
    """The largest activation, in steps, for which no sum over `width` products can leave 32 bits."""
    return np.float32(min(8191, (2**31 - 1) // (127 * width)))


def _dots(rows: int) -> Any:
    """The products of one row of weights with `rows` rows of activations, as an intrinsic."""
    turns = max(4 // rows, 1)  # so that sums do not wait for each other

    @intrinsic
    def dots(context: Any, w: Any, row: Any, x: Any, first: Any, out: Any, slot: Any) -> Any:
        """out[slot, b] = w[row, i] · x[first + b, i], summed over i in `LANES` parts"""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kinds = signature.args
            aw, ax, ao = (context.make_array(kinds[i])(context, builder, arguments[i]) for i in (0, 2, 4))
            avx2 = has_avx2()
            width = 16 if avx2 else 8  # products in one instruction

            def start(array: Any, index: Any, plus: int, kind: Any) -> Any:
                long = builder.extract_value(array.shape, 1)
                at = builder.mul(builder.add(index, _I64(plus)), long)
                return builder.gep(array.data, [at], source_etype=kind)

            weights = start(aw, arguments[1], 0, _I8)
            inputs = [start(ax, arguments[3], b, _I16) for b in range(rows)]
            zero = ir.Constant(_PARTS, [0] * LANES)
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(turns)] for _ in range(rows)]
            wide = ir.VectorType(_I16 if avx2 else _I32, width)

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
                        if avx2:  # sums of neighbouring products, in 32 bits
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


def _prefetch(builder: Any, place: Any) -> None:
    """Asks for a cache line; the hardware would ask late, and not across pages. Beyond the end it is no fault."""
    kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(), _I32, _I32, _I32])
    call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(call, [builder.bitcast(place, ir.PointerType()), _I32(0), _I32(3), _I32(1)])  # to read, to keep, data


def _parts_at(builder: Any, array: Any, slot: Any, row: Any) -> Any:
    """Where sums[slot, row] begins."""
    row = _I64(row) if isinstance(row, int) else row
    at = builder.mul(builder.add(builder.mul(slot, _I64(MOST)), row), _I64(LANES))
    return builder.bitcast(builder.gep(array.data, [at], source_etype=_I32), _PARTS.as_pointer())


@intrinsic
def _fold(context: Any, sums: Any, b: Any, scale: Any, o: Any, size: Any, row: Any, out: Any, at: Any) -> Any:
    """out[row, at + s] = (Σ sums[s, b]) · (scale[o + s] · size[row]) for all `LANES` slots s of what `_dots` left."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        held, scales, outs = (context.make_array(kinds[i])(context, builder, arguments[i]) for i in (0, 2, 6))
        steps = context.make_array(kinds[4])(context, builder, arguments[4])
        parts = [
            builder.load(_parts_at(builder, held, _I64(slot), arguments[1]), typ=_PARTS, align=4)
            for slot in range(LANES)
        ]
        whole = builder.sitofp(fold(builder, parts, builder.add), ir.VectorType(_F32, LANES))
        step = builder.load(builder.gep(steps.data, [arguments[5]], source_etype=_F32), typ=_F32)
        unit = builder.fmul(load8(builder, scales.data, arguments[3]), spread(builder, step))
        begin = builder.mul(arguments[5], builder.extract_value(outs.strides, 0))
        row = builder.gep(outs.data, [begin], source_etype=_I8)
        store8(builder, builder.fmul(whole, unit), row, arguments[7])
        return context.get_dummy_value()

    return types.void(sums, types.int64, scale, types.int64, size, types.int64, out, types.int64), generate


_dots1, _dots2, _dots3, _dots4, _dots5, _dots6 = (_dots(n) for n in range(1, MOST + 1))


@njit
def products(w: Any, scale: Any, x: Any, size: Any, begin: Any, end: Any, out: Any, sums: Any) -> None:
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
