"""The parts of encode and decode for which an instruction set has something better than plain arithmetic.

Same bits as ``codec.py``, which calls these and does the arithmetic itself where they return None.
"""

from __future__ import annotations

import numpy as np
from tvm import tirx

from tvm_qfp8.format import Layout, decode_grid
from tvm_qfp8.topi.float_contract import bind, dtype_of, lanes_of
from tvm_qfp8.topi.interpolate import constant_vector
from tvm_qfp8.topi.isa import InstructionSet

FIRST_EXPONENT = 125
"""Biased exponent of ``codec.ROUNDS_TO_ZERO``; the greatest grid value has at most 138."""


def _addends(layout: Layout, first: int, count: int) -> list[float]:
    """The addend of each biased exponent from ``first``, placed at its low bits."""
    found = [0.0] * count
    for exponent in range(first, first + count):
        k = min(max(exponent - 127 - layout.mantissa_bits, 0), 20)
        found[exponent % count] = float(2**k * (2**23 + k * 2**layout.mantissa_bits))
    return found


def addend(bits, layout: Layout, isa: InstructionSet):
    """The addend of ``codec.encode_expr`` for values with these bits, float32; one ``vpermps`` finds it."""
    exponent = bind(bits >> tirx.const(23, dtype_of(bits)))
    if isa.name == "avx512" and lanes_of(bits) == 16:
        values = constant_vector(_addends(layout, FIRST_EXPONENT, 16))
        return bind(tirx.call_llvm_intrin("float32x16", "llvm.x86.avx512.permvar.sf.512", values, exponent))
    if isa.name == "avx2" and lanes_of(bits) == 8:
        first = 127 + layout.mantissa_bits
        values = constant_vector(_addends(layout, first, 8))
        exponent = bind(tirx.max(exponent, tirx.const(first, dtype_of(bits))))
        return bind(tirx.call_llvm_intrin("float32x8", "llvm.x86.avx2.permps", values, exponent))
    return None


def encode_linear(v, layout: Layout, isa: InstructionSet, limit=None):
    """``codec.encode_expr`` for layouts of one step, by the conversion to integers; None where that is no better."""
    if isa.name != "avx512" or lanes_of(v) != 16:
        return None
    if not layout.signed:
        # What is beyond int32 converts to -2**31, which is above 255 without a sign.
        least = bind(tirx.max(v, tirx.const(0.0, "float32x16")))
        number = _to_integers(least if limit is None else bind(tirx.min(least, limit)))
        return _saturated_bytes(number)
    # min(c, x) is "c < x ? c : x", which keeps NaN: that converts to -2**31, whose low byte is 0.
    least, greatest = (tirx.const(float(s * layout.max_grid), "float32x16") for s in (-1, 1))
    clamped = bind(tirx.max(least, bind(tirx.min(greatest, v))))
    number = _to_integers(clamped)
    code = bind(tirx.abs(number) | (number & tirx.const(0x80, "int32x16")))
    return bind((code & tirx.const(0xFF, "int32x16")).astype("uint8x16"))


def _to_integers(x):
    """vcvtps2dq, ties to even; NaN and what does not fit become -2**31."""
    arguments = tirx.const(0, "int32x16"), tirx.const(-1, "int16"), tirx.const(4, "int32")
    return bind(tirx.call_llvm_intrin("int32x16", "llvm.x86.avx512.mask.cvtps2dq.512", x, *arguments))


def _saturated_bytes(numbers):
    """vpmovusdb: the least of 255 and each number, both without sign."""
    arguments = tirx.const(0, "uint8x16"), tirx.const(-1, "int16")
    return bind(tirx.call_llvm_intrin("uint8x16", "llvm.x86.avx512.mask.pmovus.db.512", numbers, *arguments))


def with_sign(grid, wide, isa: InstructionSet | None):
    """``grid``, negated where bit 7 of the zero-extended code ``wide`` is set; zero stays zero."""
    dtype = dtype_of(grid)
    if isa is not None and isa.name == "avx512":
        # A mask register and one masked subtraction.
        negative = (wide & tirx.const(0x80, dtype)) != tirx.const(0, dtype)
        return tirx.Select(negative, tirx.const(0, dtype) - grid, grid)
    if isa is not None and isa.name == "avx2" and dtype == "int16x16":
        # vpsignw takes the sign of the other operand, and gives 0 where that is 0: there the grid value is 0 too.
        code_as_sign = wide << tirx.const(8, dtype)
        return tirx.call_llvm_intrin(dtype, "llvm.x86.avx2.psign.w", grid, code_as_sign)
    # All ones where the sign bit is set: (g ^ s) - s negates.
    sign = bind(tirx.const(0, dtype) - (wide >> tirx.const(7, dtype)))
    return (grid ^ sign) - sign


def decode(wide, layout: Layout, isa: InstructionSet):
    """Grid values of zero-extended codes, int16, by byte look-ups; None where there is no good one."""
    if not layout.signed:
        return None
    if isa.byte_permute and lanes_of(wide) == 32:
        return _decode_avx512_vbmi(wide, layout, isa)
    if isa.name == "avx2" and lanes_of(wide) == 16 and layout.exponent_bits == 3:
        return _decode_avx2(wide, layout, isa)
    return None


def _decode_avx512_vbmi(wide, layout: Layout, isa: InstructionSet):
    """``vpermi2b`` reads a table of 128 bytes by the low seven bits of each byte.

    The high byte of a lane is zero and reads the first entry, which is zero. Grid values beyond a byte are the
    product of two looked-up bytes: the mantissa with its hidden bit, and the power of two.
    """
    grid = decode_grid(np.arange(128, dtype=np.uint8), layout)
    if grid.max() < 256:
        found = _look_up_128(wide, grid)
    else:
        exponent = np.arange(128) >> layout.mantissa_bits
        power = 1 << np.maximum(exponent - 1, 0)
        # Entry 0 of the powers is read for the high byte too: any power will do where the mantissa is zero.
        power[0] = 0
        found = bind(_look_up_128(wide, grid // np.maximum(power, 1)) * _look_up_128(wide, power))
    return bind(with_sign(found, wide, isa))


def look_up_128(codes, table: np.ndarray):
    """``vpermi2b``: the entries of a table of 128 bytes for the low seven bits of 64 codes."""
    low, high = (constant_vector(half, "uint8") for half in np.asarray(table, np.uint8).reshape(2, 64))
    return bind(tirx.call_llvm_intrin("uint8x64", "llvm.x86.avx512.vpermi2var.qi.512", low, codes, high))


def _look_up_128(wide, table: np.ndarray):
    found = look_up_128(tirx.reinterpret("uint8x64", wide), table)
    return bind(tirx.reinterpret("int16x32", found))


def _decode_avx2(wide, layout: Layout, isa: InstructionSet):
    """``vpshufb`` reads tables of 16 bytes by exponent: what to take off the code, and the power of two."""

    def const(value: int):
        return tirx.const(value, "int16x16")

    magnitude = bind(wide & const(0x7F))
    # A set top bit makes the high byte of each lane zero.
    exponent = bind((magnitude >> const(layout.mantissa_bits)) | const(-0x8000))
    shift = np.maximum(np.arange(16) - 1, 0) * (np.arange(16) < 8)

    def look_up(values: np.ndarray):
        table = constant_vector(np.tile(values.astype(np.uint8), 2), "uint8")
        places = tirx.reinterpret("uint8x32", exponent)
        found = tirx.call_llvm_intrin("uint8x32", "llvm.x86.avx2.pshuf.b", table, places)
        return bind(tirx.reinterpret("int16x16", found))

    mantissa = magnitude - look_up(shift << layout.mantissa_bits)
    return bind(with_sign(bind(mantissa * look_up(1 << shift)), wide, isa))
