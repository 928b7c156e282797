"""int32 arithmetic modulo 2^32.

TVM marks its own int32 additions and products as never wrapping, and LLVM may take that for granted. Those of LLVM's
``vp`` intrinsics carry no such promise; with all lanes asked for, the plain instruction is what becomes of them.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx

from tvm_qfp8.topi.float_contract import dtype_of, lanes_of, like
from tvm_qfp8.topi.isa import InstructionSet


def wrapping_add(a, b):
    """a + b of int32 vectors."""
    return _call("llvm.vp.add", a, b)


def wrapping_sub(a, b):
    """a - b of int32 vectors."""
    return _call("llvm.vp.sub", a, b)


def wrapping_mul(a, factor: int):
    """a * factor of an int32 vector."""
    return _call("llvm.vp.mul", a, like(factor, a, "int32"))


def with_wrapping_sums(isa: InstructionSet) -> InstructionSet:
    """The instruction set with sums that may leave int32; single products may not."""

    def multiply_add(acc, a, b):
        return wrapping_add(acc, isa.multiply_add(like(0, acc, "int32"), a, b))

    return replace(isa, multiply_add=multiply_add)


def _call(intrinsic: str, a, b):
    lanes = lanes_of(a)
    every = tirx.Broadcast(tirx.const(True, "bool"), lanes)
    return tirx.call_llvm_intrin(dtype_of(a), intrinsic, a, b, every, tirx.const(lanes, "int32"))
