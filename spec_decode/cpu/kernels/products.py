"""Products of 8-bit weights with rows of 14-bit activations.

Weights have a scale for each output, activations one for each row. The sums are over integers, which are exact in any
order, so a row's result is the same to the bit whatever rows stand beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .arguments import Matrix, Quantized
from .floats import EIGHT, F32, I32, I64, LANES, load8, spread, store8
from .processor import has_avx2
from .rows import fold

BLOCK = 64  # rows of weights and activations are padded with zeros to a multiple of this
MAX_ROWS = 6  # of activations, that the weights are read for at once
PREFETCH = 2048  # bytes of weights that are asked for before they are needed
_I8, _I16 = ir.IntType(8), ir.IntType(16)
_PARTS = ir.VectorType(I32, LANES)


class Weights:
    """Matrices of one shape, float32 `[outputs, in]`, in 8 bits: values int8 `[stack, outputs, in]`, `in` padded to a
    multiple of `BLOCK`, and scales float32 `[stack, outputs]`. `stack` is all of them, `single` the first."""

    def __init__(self, matrices: list[np.ndarray]) -> None:
        outputs, inputs = matrices[0].shape
        self.values = np.zeros((len(matrices), outputs, -(-inputs // BLOCK) * BLOCK), np.int8)
        self.scales = np.empty((len(matrices), outputs), np.float32)
        for i, matrix in enumerate(matrices):
            scale = np.maximum(np.abs(matrix).max(1) / 127, 1e-12).astype(np.float32)
            np.rint(matrix / scale[:, None], casting="unsafe", out=self.values[i, :, :inputs])
            self.scales[i] = scale
        self.stack = Matrix(self.values, self.scales)
        self.single = Matrix(self.values[0], self.scales[0])


def steps(rows: int, width: int) -> np.ndarray:
    """Zeros int16 `[rows, width]` for quantized activations. They begin at a cache line, since a load across two lines
    takes longer."""
    memory = np.zeros(rows * width * 2 + 64, np.int8)
    skip = -memory.ctypes.data % 64
    return memory[skip : skip + rows * width * 2].view(np.int16).reshape(rows, width)


def quantized(rows: int, width: int) -> Quantized:
    """Room for quantized activations `[rows, width]`, `width` a multiple of `BLOCK`."""
    return Quantized(steps(rows, width), np.empty(rows, np.float32))


@njit
def levels(width: Any) -> Any:
    """The largest quantized activation for which a sum over `width` products with weights fits into 32 bits."""
    return np.float32(min(8191, (2**31 - 1) // (127 * width)))


def _dots(rows: int) -> Any:
    """The products of one row of weights with `rows` rows of activations, as an intrinsic."""
    accumulators = max(4 // rows, 1)  # of each row, so that additions do not wait for each other

    @intrinsic
    def dots(context: Any, w: Any, row: Any, x: Any, first: Any, out: Any, slot: Any) -> Any:
        """out[slot, b] = Σ w[row, i] · x[first + b, i], in `LANES` partial sums"""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kinds = signature.args
            aw, ax, ao = (context.make_array(kinds[i])(context, builder, arguments[i]) for i in (0, 2, 4))
            avx2 = has_avx2()
            width = 16 if avx2 else 8  # products in one instruction

            def start(array: Any, index: Any, plus: int, kind: Any) -> Any:
                long = builder.extract_value(array.shape, 1)
                at = builder.mul(builder.add(index, I64(plus)), long)
                return builder.gep(array.data, [at], source_etype=kind)

            weights = start(aw, arguments[1], 0, _I8)
            inputs = [start(ax, arguments[3], b, _I16) for b in range(rows)]
            zero = ir.Constant(_PARTS, [0] * LANES)
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(accumulators)] for _ in range(rows)]
            wide = ir.VectorType(_I16 if avx2 else I32, width)

            def load(base: Any, at: Any, kind: Any, size: int) -> Any:
                place = builder.gep(base, [at], source_etype=kind)
                loaded = builder.load(place, typ=ir.VectorType(kind, width))
                loaded.align = size
                return loaded if loaded.type == wide else builder.sext(loaded, wide)

            with cgutils.for_range(builder, builder.sdiv(builder.extract_value(aw.shape, 1), I64(BLOCK))) as loop:
                begin = builder.mul(loop.index, I64(BLOCK))
                _prefetch(builder, builder.gep(weights, [builder.add(begin, I64(PREFETCH))], source_etype=_I8))
                for i in range(BLOCK // width):
                    at = builder.add(begin, I64(i * width))
                    weight = load(weights, at, _I8, 1)
                    for b in range(rows):
                        value = load(inputs[b], at, _I16, 2)
                        if avx2:  # each lane is the sum of two neighbouring products
                            kind = ir.FunctionType(_PARTS, [wide, wide])
                            add = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.wd")
                            product = builder.call(add, [weight, value])
                        else:
                            product = builder.mul(weight, value)
                        place = sums[b][i % accumulators]
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
    """Asks for a cache line. The hardware prefetcher asks later, and not across pages. An address beyond the end is
    ignored."""
    kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(), I32, I32, I32])
    call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(
        call, [builder.bitcast(place, ir.PointerType()), I32(0), I32(3), I32(1)]
    )  # for reading, to keep in all caches, data


def _parts_at(builder: Any, array: Any, slot: Any, row: Any) -> Any:
    """Where sums[slot, row] begins."""
    row = I64(row) if isinstance(row, int) else row
    at = builder.mul(builder.add(builder.mul(slot, I64(MAX_ROWS)), row), I64(LANES))
    return builder.bitcast(builder.gep(array.data, [at], source_etype=I32), _PARTS.as_pointer())


@intrinsic
def _fold(context: Any, sums: Any, b: Any, w_scale: Any, o: Any, x_scale: Any, row: Any, out: Any, at: Any) -> Any:
    """out[row, at + s] = (Σ sums[s, b]) · (w_scale[o + s] · x_scale[row]) for all `LANES` slots s of `_dots`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        partial, w_scales, outs = (context.make_array(kinds[i])(context, builder, arguments[i]) for i in (0, 2, 6))
        x_scales = context.make_array(kinds[4])(context, builder, arguments[4])
        parts = [
            builder.load(_parts_at(builder, partial, I64(slot), arguments[1]), typ=_PARTS, align=4)
            for slot in range(LANES)
        ]
        whole = builder.sitofp(fold(builder, parts, builder.add), EIGHT)
        row_scale = builder.load(builder.gep(x_scales.data, [arguments[5]], source_etype=F32), typ=F32)
        scale = builder.fmul(load8(builder, w_scales.data, arguments[3]), spread(builder, row_scale))
        begin = builder.mul(arguments[5], builder.extract_value(outs.strides, 0))
        row = builder.gep(outs.data, [begin], source_etype=_I8)
        store8(builder, builder.fmul(whole, scale), row, arguments[7])
        return context.get_dummy_value()

    return types.void(sums, types.int64, w_scale, types.int64, x_scale, types.int64, out, types.int64), generate


_dots1, _dots2, _dots3, _dots4, _dots5, _dots6 = (_dots(n) for n in range(1, MAX_ROWS + 1))


@njit
def partial_sums() -> Any:
    """Working memory of `products`."""
    return np.empty((LANES, MAX_ROWS, LANES), np.int32)


@njit
def matrix_of(stack: Any, i: Any) -> Any:
    """One matrix of a stack."""
    return Matrix(stack.values[i], stack.scales[i])


@njit
def products(w: Any, x: Any, begin: Any, end: Any, out: Any, sums: Any) -> None:
    """out[r, o − begin] = Σ w[o] · x[r] for the outputs o from `begin` to `end` and every row r.

    Args:
        w: a `Matrix`.
        x: `Quantized` rows.
        sums: `partial_sums()`.
    """
    rows = x.values.shape[0]
    for first in range(0, rows, MAX_ROWS):
        n = min(rows - first, MAX_ROWS)
        for o in range(begin, end):
            slot = (o - begin) % LANES
            if n == 1:
                _dots1(w.values, o, x.values, first, sums, slot)
            elif n == 2:
                _dots2(w.values, o, x.values, first, sums, slot)
            elif n == 3:
                _dots3(w.values, o, x.values, first, sums, slot)
            elif n == 4:
                _dots4(w.values, o, x.values, first, sums, slot)
            elif n == 5:
                _dots5(w.values, o, x.values, first, sums, slot)
            else:
                _dots6(w.values, o, x.values, first, sums, slot)
            if slot == LANES - 1:
                for b in range(n):
                    _fold(sums, b, w.scales, o - slot, x.scales, first + b, out, o - begin - slot)
        done = begin + (end - begin) // LANES * LANES
        for o in range(done, end):
            for b in range(n):
                scale = w.scales[o] * x.scales[first + b]
                out[first + b, o - begin] = np.float32(sums[o - done, b].sum()) * scale
