"""Float32 arithmetic with the same bits on every machine: fused multiply-add, order, e^x and the logarithm.

An operation on floats is rounded as IEEE 754 says, alone or as one of a vector. What could differ is the order of a sum
and whether a product is rounded before it is added. The order is written down where sums are made (`rows`, `products`),
and a fused multiply-add is asked for by name (`fma`). No fast-math flag lets LLVM reorder or fuse: with such flags a
process that compiled the kernels computed other bits than one that loaded them from disk. No C library is called, since
those differ; e^x and the logarithm are polynomials.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .processor import has_fma

LANES = 8  # float32 in a vector
I32, I64, F32, F64 = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()
EIGHT = ir.VectorType(F32, LANES)
# With this error model a division by zero raises nothing, so loops with divisions become vectors.
ieee = njit(error_model="numpy")
LOWEST = np.int32(-(2**31))  # no number has a lower `order`


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once, of float32 or vectors of them; the same bits with and without an instruction for it."""
    if has_fma():
        kind = ir.FunctionType(a.type, [a.type] * 3)
        name = f"llvm.fma.v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "llvm.fma.f32"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b, c])
    # In float64 the product is exact. The sum is rounded to odd; then rounding it to float32 gives the same as rounding
    # once (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", IEEE ToC 57, 2008).
    count = a.type.count if isinstance(a.type, ir.VectorType) else 0
    wide, bits = (ir.VectorType(kind, count) if count else kind for kind in (F64, I64))

    def whole(value: int) -> Any:
        return ir.Constant(bits, [value] * count if count else value)

    x = builder.fmul(builder.fpext(a, wide), builder.fpext(b, wide))
    y = builder.fpext(c, wide)
    total = builder.fadd(x, y)
    part = builder.fsub(total, x)
    lost = builder.fadd(builder.fsub(x, builder.fsub(total, part)), builder.fsub(y, part))  # Knuth's TwoSum: exact
    inexact = builder.fcmp_ordered("!=", lost, ir.Constant(wide, [0.0] * count if count else 0.0))
    total_bits = builder.bitcast(total, bits)
    even = builder.icmp_signed("==", builder.and_(total_bits, whole(1)), whole(0))
    larger = builder.icmp_signed(">=", builder.xor(total_bits, builder.bitcast(lost, bits)), whole(0))  # in magnitude
    odd = builder.add(total_bits, builder.select(larger, whole(1), whole(-1)))
    total_bits = builder.select(builder.and_(inexact, even), odd, total_bits)
    return builder.fptrunc(builder.bitcast(total_bits, wide), a.type)


@intrinsic
def fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c of float32, rounded once."""
    signature = types.float32(types.float32, types.float32, types.float32)
    return signature, lambda context, builder, signature, arguments: fused(builder, *arguments)


@intrinsic
def bits_of(context: Any, x: Any) -> Any:
    """The bits of a float32 as int32. Among non-negative floats the order is kept, with NaN above all."""
    return types.int32(types.float32), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], I32)


@intrinsic
def float_of(context: Any, bits: Any) -> Any:
    """The float32 with these bits."""
    return types.float32(types.int32), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], F32)


@intrinsic
def floor(context: Any, x: Any) -> Any:
    """⌊x⌋ of a float32 as int32. Unlike `math.floor`, which gives 64 bits, it becomes a vector operation."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(F32, [F32])
        whole = builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.floor.f32"), arguments)
        return builder.fptosi(whole, I32)

    return types.int32(types.float32), generate


@njit(inline="always")
def order(x: Any) -> Any:
    """An int32 for a float32, in the same order. −0 is below 0; NaN is above +inf or, with a sign, below −inf."""
    bits = bits_of(x)
    return bits if bits >= 0 else bits ^ np.int32(0x7FFFFFFF)


@njit(inline="always")
def unordered(bits: Any) -> Any:
    """The float32 whose `order` is `bits`."""
    return float_of(bits if bits >= 0 else bits ^ np.int32(0x7FFFFFFF))


@njit(inline="always", error_model="numpy")
def exp(x: Any) -> Any:
    """e^x for x ≤ 88, with a relative error below 3e-7: 2^n · e^r, where e^r is a polynomial."""
    x = max(x, np.float32(-87.0))
    whole = floor(fma(x, np.float32(1.4426950408889634), np.float32(0.5)))
    n = np.float32(whole)
    r = fma(n, np.float32(-0.693145751953125), x)
    r = fma(n, np.float32(-1.42860682030941723e-6), r)
    p = fma(np.float32(1.9875691500e-4), r, np.float32(1.3981999507e-3))
    p = fma(p, r, np.float32(8.3334519073e-3))
    p = fma(p, r, np.float32(4.1665795894e-2))
    p = fma(p, r, np.float32(1.6666665459e-1))
    p = fma(p, r, np.float32(5.0000001201e-1))
    power = float_of((whole + np.int32(127)) << np.int32(23))  # 2^n
    return (fma(p, r * r, r) + np.float32(1.0)) * power


@njit(inline="always", error_model="numpy")
def log(x: Any) -> Any:
    """The natural logarithm of a normal positive float32, with an error of at most about two units in the last
    place."""
    bits = bits_of(x)
    exponent = (bits >> np.int32(23)) - np.int32(126)
    m = float_of((bits & np.int32(0x007FFFFF)) | np.int32(0x3F000000))  # in [0.5, 1)
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


def load8(builder: Any, base: Any, at: Any) -> Any:
    """`LANES` float32 of memory, from `at` on."""
    place = builder.gep(base, [at], source_etype=F32)
    return builder.load(place, typ=EIGHT, align=4)


def store8(builder: Any, value: Any, base: Any, at: Any) -> None:
    """Writes a vector to memory, from `at` on."""
    place = builder.gep(base, [at], source_etype=F32)
    builder.store(value, builder.bitcast(place, EIGHT.as_pointer()), align=4)


def spread(builder: Any, value: Any) -> Any:
    """A vector of one float32, repeated."""
    one = builder.insert_element(ir.Constant(EIGHT, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, LANES), [0] * LANES))
