"""Evaluates tables whose range reduction is the float's exponent: exp, log and powers (see ``evaluate``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tvm_qfp8.tables.polynomial import MAGIC, horner

if TYPE_CHECKING:
    from tvm_qfp8.tables.table import Table

SMALLEST_NORMAL = 2.0**-126
LN2 = float(np.float32(np.log(2.0)))
LN2_HIGH = 355.0 / 512.0
LN2_LOW = float(np.float32(np.log(2.0) - LN2_HIGH))
# exp on arguments inside these bounds has normal results.
EXP_NORMAL = (-87.0, 87.0)
# 2**t is 0 below the first and infinite above the second, however t is rounded.
SATURATED = (-151.0, 128.5)
# exp: n below this is applied by a second factor, so that denormal results round once.
FIRST_FACTOR_MIN = -90.0


def _clamped(table: Table, x, ops):
    return ops.maximum(ops.const(table.low), ops.minimum(ops.const(table.high), x))


def _has_normal_results(table: Table) -> bool:
    return table.low >= EXP_NORMAL[0] and table.high <= EXP_NORMAL[1]


def _saturates(table: Table) -> bool:
    """Whether results beyond the bounds are 0 and infinity."""
    return table.low * table.scale <= SATURATED[0] and table.high * table.scale >= SATURATED[1]


def _round(t, ops):
    """(a sum with rint(t) in its low bits, rint(t), t - rint(t))."""
    if ops.scales_by_powers:
        whole = ops.rint(t)
        return None, whole, ops.sub(t, whole)
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
    rest = ops.keep(ops.bits(shifted) - ops.bits(first))
    first_factor = ops.keep((ops.bits(first) << ops.int_const(23)) + ops.int_const(125 << 23))
    rest_factor = ops.keep((rest << ops.int_const(23)) + ops.int_const(129 << 23))
    return ops.mul(ops.mul(mantissa, ops.from_bits(first_factor)), ops.from_bits(rest_factor))


def exp(table: Table, x, ops):
    """Reduction ``exp``."""
    # Beside vscalefps, which gives 0 and infinity itself, only a narrower domain has to be kept.
    saturates = ops.scales_by_powers and _saturates(table)
    t = x if saturates else _clamped(table, x, ops)
    if table.scale != 1.0:
        t = ops.mul(t, ops.const(table.scale))
    if saturates:
        return ops.scale(horner(table, None, ops.fraction(t), ops, table.degree - 1), ops.rint(t))
    shifted, whole, fraction = _round(t, ops)
    mantissa = horner(table, None, fraction, ops, table.degree)
    return _times_power_of_two(mantissa, shifted, whole, ops, _has_normal_results(table))


def exp_flush(table: Table, x, ops):
    """Reductions ``exp_flush`` and ``exp_square``.

    Quadratics are (r + a)**2 + b: one operation less than Horner's rule, and a constant factor cancels in softmax.
    """
    t = ops.mul(x, ops.const(table.scale))
    if not ops.scales_by_powers:
        # Rows are padded and masked with -infinity, whose fraction is NaN. Beside vscalefps its result is flushed.
        t = ops.maximum(ops.const(-127.0), t)
    shifted, whole, fraction = _round(t, ops)
    if table.reduction == "exp_square":
        root = ops.add_on_multipliers(fraction, ops.const(table.coefficients[1][0]))
        mantissa = ops.add_on_multipliers(ops.mul(root, root), ops.const(table.coefficients[0][0]))
    else:
        mantissa = horner(table, None, fraction, ops, table.degree)
    flushed, zero = ops.less(t, ops.const(-126.0)), ops.const(0.0)
    if ops.scales_by_powers:
        return ops.select(flushed, zero, ops.scale(mantissa, whole))
    factor = (ops.bits(shifted) << ops.int_const(23)) + ops.int_const(127 << 23)
    return ops.mul(mantissa, ops.select(flushed, zero, ops.from_bits(factor)))


def exp_split(table: Table, x, ops):
    """Reduction ``exp_split``."""
    clamped = _clamped(table, x, ops)
    magic = ops.const(MAGIC)
    shifted = ops.add(ops.mul(clamped, ops.const(table.scale)), magic)
    n = ops.sub(shifted, magic)
    # Cody and Waite: n * LN2_HIGH and the first difference are exact.
    rest = ops.sub(clamped, ops.mul(n, ops.const(LN2_HIGH)))
    rest = ops.sub(rest, ops.mul(n, ops.const(LN2_LOW)))
    mantissa = horner(table, None, rest, ops)
    return _times_power_of_two(mantissa, shifted, n, ops, _has_normal_results(table))


def _exponent_and_fraction(table: Table, x, ops):
    """(e, p(m - 1)) for x = m * 2**e > 0 and 1 <= m < 2."""
    denormal = ops.less(x, ops.const(SMALLEST_NORMAL))
    bits = ops.keep(ops.bits(ops.select(denormal, ops.mul(x, ops.const(2.0**23)), x)))
    bias = ops.select(denormal, ops.const(-150.0), ops.const(-127.0))
    exponent = ops.add(ops.to_float(bits >> ops.int_const(23)), bias)
    mantissa = ops.from_bits((bits & ops.int_const(0x007FFFFF)) | ops.int_const(127 << 23))
    index = bits >> ops.int_const(23 - (table.cells.bit_length() - 1))
    return exponent, horner(table, index, ops.sub(mantissa, ops.const(1.0)), ops)


def log(table: Table, x, ops):
    """Reduction ``log``."""
    exponent, fraction = _exponent_and_fraction(table, x, ops)
    result = ops.add(ops.mul(exponent, ops.const(LN2)), fraction)
    # +inf and NaN give themselves.
    result = ops.select(ops.less(x, ops.const(np.inf)), result, x)
    return _at_zero_and_below(x, -np.inf, result, ops)


def power(table: Table, x, ops):
    """Reduction ``power``: 2**(exponent * log2 x), log2 by the table ``inner``."""
    assert table.inner is not None
    whole, fraction = _exponent_and_fraction(table.inner, x, ops)
    t = ops.mul(ops.keep(ops.add(whole, fraction)), ops.const(table.scale))
    t = ops.maximum(ops.const(table.low), ops.minimum(ops.const(table.high), t))
    shifted, whole, fraction = _round(ops.keep(t), ops)
    mantissa = ops.keep(horner(table, None, fraction, ops))
    result = ops.keep(_times_power_of_two(mantissa, shifted, whole, ops, normal=False))
    grows = table.scale > 0
    limit = x if grows else ops.divide(ops.const(1.0), x)
    result = ops.select(ops.less(x, ops.const(np.inf)), result, limit)
    return _at_zero_and_below(x, 0.0 if grows else np.inf, result, ops)


def _at_zero_and_below(x, at_zero: float, above, ops):
    below = ops.select(ops.less(x, ops.const(0.0)), ops.const(np.nan), ops.const(at_zero))
    return ops.select(ops.less(x, ops.const(2.0**-149)), below, above)
