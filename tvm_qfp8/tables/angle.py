"""Evaluates sine and cosine: range reduction in integers, right for every float32 (after Payne and Hanek, 1983).

``x = M * 2**(E - 150)`` with a 24-bit integer M. The turns are ``x / (2 pi)``; their fraction in units of 2**-32 is
``M * Q mod 2**32``, where Q are those 64 bits of ``1 / (2 pi)`` that matter at the exponent E: what stands before them
makes whole turns, what comes after adds less than one unit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tvm_qfp8.tables.polynomial import argument, interpolate

if TYPE_CHECKING:
    from tvm_qfp8.tables.table import Table

_WORDS = (0, 0, 0x28BE60DB, 0x9391054A, 0x7F09D5F4, 0x7D4D3770, 0x36D8A566, 0x4F10E410)
# 64 zero bits, then floor(2**192 / (2 pi)), as float32 values of these bits; none is a NaN.
_FLOAT_WORDS = tuple(float(word) for word in np.array(_WORDS, np.uint32).view(np.float32))
# Of |x| below 2**-41 the fraction is 0.
_LEAST_EXPONENT = 86
PHASE_ERROR = 2.0**-31 * np.pi
"""Bound of the error of the angle, in radians: two units."""


def sine(table: Table, x, ops):
    """Reduction ``sine``."""
    y = _folded_sine(table, _turns(x, ops), ops)
    y = ops.from_bits(ops.bits(y) ^ (ops.bits(x) & ops.int_const(-(2**31))))
    return _nan_unless_finite(x, y, ops)


def cosine(table: Table, x, ops):
    """Reduction ``cosine``: the sine a quarter turn later."""
    turns = _turns(x, ops) + ops.wide_const(2**30)
    return _nan_unless_finite(x, _folded_sine(table, turns, ops), ops)


def _nan_unless_finite(x, y, ops):
    return ops.select(ops.less(ops.absolute(x), ops.const(np.inf)), y, ops.const(np.nan))


def _turns(x, ops):
    """Turns of ``|x|`` in units of 2**-32, 64-bit integers of which only the low 32 bits count."""
    bits = ops.keep(ops.bits(ops.absolute(x)))
    # As a float, so that the maximum is one of floats like all others.
    exponent = ops.maximum(ops.const(_LEAST_EXPONENT), ops.to_float(bits >> ops.int_const(23)))
    place = ops.keep(ops.bits(ops.add(exponent, ops.const(2.0**23 - _LEAST_EXPONENT))) & ops.int_const(255))
    word, shift = ops.keep(place >> ops.int_const(5)), ops.keep(place & ops.int_const(31))
    tables = [_FLOAT_WORDS[k:] + (0.0,) * k for k in range(3)]
    first, second, third = (ops.keep(ops.bits(found)) for found in ops.lookup(tables, word))
    mantissa = ops.keep(ops.wide((bits & ops.int_const(0x007FFFFF)) | ops.int_const(0x00800000)))
    high = ops.keep(ops.wide(_window(first, second, shift, ops)))
    low = ops.keep(ops.wide(_window(second, third, shift, ops)))
    return ops.keep(mantissa * high + ((mantissa * low) >> ops.wide_const(32)))


def _window(first, second, shift, ops):
    """32 bits of two words, ``shift`` bits after the start of the first."""
    rest = (second >> ops.int_const(1)) & ops.int_const(0x7FFFFFFF)
    return ops.keep((first << shift) | (rest >> (ops.int_const(31) - shift)))


def _folded_sine(table: Table, turns, ops):
    """The sine of an angle given in units of 2**-32 turns: sin(pi - a) = sin(a) leaves a quarter turn on each side."""
    angle = ops.keep(ops.narrow(turns))
    mirrored = ops.keep(ops.narrow(ops.wide_const(2**31) - turns))
    beyond = ops.keep((angle ^ (angle << ops.int_const(1))) >> ops.int_const(31))
    folded = ops.keep(angle ^ ((angle ^ mirrored) & beyond))
    quarters = ops.mul(ops.to_float(folded), ops.const(2.0**-30))
    magnitude = interpolate(table, argument(table, ops.absolute(quarters), ops), ops)
    return ops.from_bits(ops.bits(magnitude) ^ (ops.bits(quarters) & ops.int_const(-(2**31))))
