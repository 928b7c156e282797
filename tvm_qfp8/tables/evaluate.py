"""How a table is evaluated, written once for NumPy and for kernels.

``evaluate(table, x, ops)`` is a sequence of float32 and int32 operations of ``ops``; with ``numpy_ops`` it is the
twin, with ``topi.interpolate`` it is the TIR of a kernel. Each float operation rounds separately. NaN goes through:
``minimum(a, b)`` is ``a < b ? a : b``, so the constant stands first where a NaN must be kept.

==========  ==================================================================================================
reduction   result
==========  ==================================================================================================
even        max(x, hinge) + p(|x|): GELU, SiLU, softplus
odd         sign(x) * p(|x|): tanh, erf
logistic    0.5 + sign(x) * p(|x|): sigmoid
hinge       max(x, hinge) + p(clamp(x)): Mish, ELU
direct      p(clamp(x)): any function on its domain
exp         2**n * p(t - n), n = rint(t), t = x * log2(e) or, for exp2, x
exp_flush   the same for x <= 0, but 0 where t < -126: log-softmax
exp_square  the same times a constant, with p(r) = (r + a)**2 + b: softmax
exp_split   2**n * p(x - n * ln 2) with ln 2 in two parts: exp at small errors
log         e * ln 2 + p(m - 1), x = m * 2**e, 1 <= m < 2, from the bits
==========  ==================================================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tvm_qfp8.tables.table import Table

MAGIC = 12582912.0
"""1.5 * 2**23: adding it leaves the nearest integer, ties to even, in the low bits."""

SMALLEST_NORMAL = 2.0**-126
LN2 = float(np.float32(np.log(2.0)))
LN2_HIGH = 355.0 / 512.0
LN2_LOW = float(np.float32(np.log(2.0) - LN2_HIGH))
# exp on arguments inside these bounds has normal results.
EXP_NORMAL = (-87.0, 87.0)
# exp: n below this is applied by a second factor, so that denormal results round once.
FIRST_FACTOR_MIN = -90.0


def evaluate(table: Table, x, ops):
    """The table's function of ``x``, float32, in the operations of ``ops``."""
    return REDUCTIONS[table.reduction](table, x, ops)


def _horner(table: Table, index, variable, ops):
    if table.cells == 1:
        values = [ops.const(power[0]) for power in table.coefficients]
    else:
        values = ops.lookup(table.coefficients, index)
    result = values[-1]
    for value in reversed(values[:-1]):
        result = ops.add(ops.mul(result, variable), value)
    return result


def _argument(table: Table, x, ops):
    """min(high, scale * x + offset), keeping NaN."""
    t = x if table.scale == 1.0 else ops.mul(x, ops.const(table.scale))
    if table.offset:
        t = ops.add(t, ops.const(table.offset))
    return ops.minimum(ops.const(table.high), t)


def _signed_argument(table: Table, x, ops):
    return ops.maximum(ops.const(table.low), _argument(table, x, ops))


def _interpolate(table: Table, t, ops):
    magic = ops.const(table.magic)
    shifted = ops.add(t, magic)
    variable = ops.sub(t, ops.sub(shifted, magic)) if table.centred else t
    return _horner(table, ops.bits(shifted), variable, ops)


def _even(table: Table, x, ops):
    residual = _interpolate(table, _argument(table, ops.absolute(x), ops), ops)
    return ops.add(ops.maximum(ops.const(table.hinge), x), residual)


def _odd(table: Table, x, ops):
    magnitude = _interpolate(table, _argument(table, ops.absolute(x), ops), ops)
    return ops.from_bits(ops.bits(magnitude) ^ (ops.bits(x) & ops.int_const(-(2**31))))


def _logistic(table: Table, x, ops):
    return ops.add(_odd(table, x, ops), ops.const(0.5))


def _hinge(table: Table, x, ops):
    residual = _interpolate(table, _signed_argument(table, x, ops), ops)
    return ops.add(ops.maximum(ops.const(table.hinge), x), residual)


def _direct(table: Table, x, ops):
    return _interpolate(table, _signed_argument(table, x, ops), ops)


def _clamped(table: Table, x, ops):
    return ops.maximum(ops.const(table.low), ops.minimum(ops.const(table.high), x))


def _has_normal_results(table: Table) -> bool:
    return table.low >= EXP_NORMAL[0] and table.high <= EXP_NORMAL[1]


def _round(t, ops):
    """(a sum with rint(t) in its low bits, rint(t), t - rint(t))."""
    if ops.scales_by_powers:
        return None, ops.rint(t), ops.fraction(t)
    magic = ops.const(MAGIC)
    shifted = ops.add(t, magic)
    whole = ops.sub(shifted, magic)
    return shifted, whole, ops.sub(t, whole)


def _times_power_of_two(mantissa, shifted, whole, ops, normal: bool):
    """mantissa * 2**whole, rounded once; ``shifted`` is whole + MAGIC."""
    if ops.scales_by_powers:
        return ops.scale(mantissa, whole)
    if normal:
        factor = (ops.bits(shifted) << ops.int_const(23)) + ops.int_const(127 << 23)
        return ops.mul(mantissa, ops.from_bits(factor))
    # 2**(n1 - 2) * 2**(n - n1 + 2): only the last product can round (to a denormal) or overflow.
    first = ops.maximum(ops.const(MAGIC + FIRST_FACTOR_MIN), shifted)
    rest = ops.bits(shifted) - ops.bits(first)
    first_factor = (ops.bits(first) << ops.int_const(23)) + ops.int_const(125 << 23)
    rest_factor = (rest << ops.int_const(23)) + ops.int_const(129 << 23)
    return ops.mul(ops.mul(mantissa, ops.from_bits(first_factor)), ops.from_bits(rest_factor))


def _exp(table: Table, x, ops):
    normal = _has_normal_results(table)
    t = x
    if normal or not ops.scales_by_powers:
        # Without bounds of its own the instruction gives the same: 0 and infinity beyond the table's.
        t = _clamped(table, x, ops)
    if table.scale != 1.0:
        t = ops.mul(t, ops.const(table.scale))
    shifted, whole, fraction = _round(t, ops)
    return _times_power_of_two(_horner(table, None, fraction, ops), shifted, whole, ops, normal)


def _exp_flush(table: Table, x, ops):
    """Quadratics are (r + a)**2 + b: one operation less than Horner's rule, and a constant factor cancels in softmax."""
    t = ops.mul(x, ops.const(table.scale))
    magic = ops.const(MAGIC)
    shifted = ops.add(t, magic)
    fraction = ops.sub(t, ops.sub(shifted, magic))
    factor = (ops.bits(shifted) << ops.int_const(23)) + ops.int_const(127 << 23)
    factor = ops.select(ops.less(t, ops.const(-126.0)), ops.const(0.0), ops.from_bits(factor))
    if table.reduction == "exp_square":
        root = ops.add(fraction, ops.const(table.coefficients[1][0]))
        mantissa = ops.add(ops.mul(root, root), ops.const(table.coefficients[0][0]))
    else:
        mantissa = _horner(table, None, fraction, ops)
    return ops.mul(mantissa, factor)


def _exp_split(table: Table, x, ops):
    clamped = _clamped(table, x, ops)
    magic = ops.const(MAGIC)
    shifted = ops.add(ops.mul(clamped, ops.const(table.scale)), magic)
    n = ops.sub(shifted, magic)
    # Cody and Waite: n * LN2_HIGH and the first difference are exact.
    rest = ops.sub(clamped, ops.mul(n, ops.const(LN2_HIGH)))
    rest = ops.sub(rest, ops.mul(n, ops.const(LN2_LOW)))
    mantissa = _horner(table, None, rest, ops)
    return _times_power_of_two(mantissa, shifted, n, ops, _has_normal_results(table))


def _log(table: Table, x, ops):
    denormal = ops.less(x, ops.const(SMALLEST_NORMAL))
    bits = ops.bits(ops.select(denormal, ops.mul(x, ops.const(2.0**23)), x))
    bias = ops.select(denormal, ops.const(-150.0), ops.const(-127.0))
    exponent = ops.add(ops.to_float(bits >> ops.int_const(23)), bias)
    mantissa = ops.from_bits((bits & ops.int_const(0x007FFFFF)) | ops.int_const(127 << 23))
    cell_bits = table.cells.bit_length() - 1
    index = bits >> ops.int_const(23 - cell_bits)
    fraction = _horner(table, index, ops.sub(mantissa, ops.const(1.0)), ops)
    result = ops.add(ops.mul(exponent, ops.const(LN2)), fraction)
    # +inf and NaN give themselves, 0 gives -inf, less gives NaN.
    result = ops.select(ops.less(x, ops.const(np.inf)), result, x)
    zero = ops.const(0.0)
    below = ops.select(ops.less(x, zero), ops.const(np.nan), ops.const(-np.inf))
    return ops.select(ops.less(x, ops.const(2.0**-149)), below, result)


def _reciprocal(_table: Table, x, ops):
    return ops.divide(ops.const(1.0), x)


def _sqrt(_table: Table, x, ops):
    return ops.sqrt(x)


def _rsqrt(_table: Table, x, ops):
    return ops.divide(ops.const(1.0), ops.sqrt(x))


def _hardsigmoid(_table: Table, x, ops):
    shifted = ops.add(ops.mul(x, ops.const(1.0 / 6.0)), ops.const(0.5))
    return ops.minimum(ops.const(1.0), ops.maximum(ops.const(0.0), shifted))


def _hardswish(table: Table, x, ops):
    # From -3 down the second factor is 0; the first must not be -inf there.
    return ops.mul(ops.maximum(ops.const(-3.0), x), _hardsigmoid(table, x, ops))


REDUCTIONS = {
    "even": _even,
    "odd": _odd,
    "logistic": _logistic,
    "hinge": _hinge,
    "direct": _direct,
    "exp": _exp,
    "exp_flush": _exp_flush,
    "exp_square": _exp_flush,
    "exp_split": _exp_split,
    "log": _log,
    "reciprocal": _reciprocal,
    "sqrt": _sqrt,
    "rsqrt": _rsqrt,
    "hardsigmoid": _hardsigmoid,
    "hardswish": _hardswish,
}
