"""What the processor can do that kernels are compiled for: this machine's, or the one in Numba's settings."""

from __future__ import annotations

import re
from functools import cache

import llvmlite.binding as llvm
from numba.core.registry import cpu_target

_PROBE = """
declare <8 x float> @llvm.fma.v8f32(<8 x float>, <8 x float>, <8 x float>)
define <8 x float> @multiply_and_add(<8 x float> %a, <8 x float> %b, <8 x float> %c) {
  %r = call <8 x float> @llvm.fma.v8f32(<8 x float> %a, <8 x float> %b, <8 x float> %c)
  ret <8 x float> %r
}
define <8 x i32> @add(<8 x i32> %a, <8 x i32> %b) {
  %r = add <8 x i32> %a, %b
  ret <8 x i32> %r
}
"""


@cache
def _assembly() -> str:
    """`_PROBE` as machine code. The name of a processor implies features that no list of features gives."""
    triple, name, features = cpu_target.target_context.codegen().magic_tuple()
    module = llvm.parse_assembly(_PROBE)
    module.triple = triple
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=name, features=features)
    assembly: str = machine.emit_assembly(module)
    return assembly


def has_fma() -> bool:
    """Whether a fused multiply-add is an instruction and not a call of the C library."""
    return "fmaf" not in _assembly()


def has_avx2() -> bool:
    """Whether there are instructions for eight 32-bit integers at once, as in AVX2."""
    return re.search(r"vpaddd.*%ymm", _assembly()) is not None
