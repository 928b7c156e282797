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
hinge       slope * max(x, hinge) + p(clamp(x)): Mish, ELU, CELU, SELU
direct      p(clamp(x)): any function on its domain
symmetric   p(|x|): derivatives of tanh and sigmoid
step        slope above 0, else p(clamp(x)): derivatives of ELU, CELU, SELU
exp         2**n * p(t - n), n = rint(t), t = x * log2(e) or, for exp2, x
exp_flush   the same for x <= 0, but 0 where t < -126: log-softmax
exp_square  the same times a constant, with p(r) = (r + a)**2 + b: softmax
exp_split   2**n * p(x - n * ln 2) with ln 2 in two parts: exp at small errors
sine        p(|g|) with the sign of g; g in [-1, 1] is the angle in quarter turns, folded (see ``angle``); cosine
log         e * ln 2 + p(m - 1), x = m * 2**e, 1 <= m < 2, from the bits
periodic    p(x - n P), n = rint(x / P): a function with a declared period (see ``periodic``)
power       2**n * p(t - n), t = a * (e + q(m - 1)): powers with a constant exponent
product     repeated multiplication, root and reciprocal: powers with an exponent of whole or half numbers
==========  ==================================================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm_qfp8.tables.angle import cosine, sine
from tvm_qfp8.tables.exponent_bits import exp, exp_flush, exp_split, log, power
from tvm_qfp8.tables.periodic import periodic
from tvm_qfp8.tables.polynomial import argument, interpolate, signed_argument

if TYPE_CHECKING:
    from tvm_qfp8.tables.table import Table


def evaluate(table: Table, x, ops):
    """The table's function of ``x``, float32, in the operations of ``ops``."""
    return REDUCTIONS[table.reduction](table, x, ops)


def _even(table: Table, x, ops):
    residual = interpolate(table, argument(table, ops.absolute(x), ops), ops)
    return ops.add(ops.maximum(ops.const(table.hinge), x), residual)


def _odd(table: Table, x, ops):
    magnitude = interpolate(table, argument(table, ops.absolute(x), ops), ops)
    return ops.from_bits(ops.bits(magnitude) ^ (ops.bits(x) & ops.int_const(-(2**31))))


def _logistic(table: Table, x, ops):
    return ops.add(_odd(table, x, ops), ops.const(0.5))


def _hinge(table: Table, x, ops):
    residual = interpolate(table, signed_argument(table, x, ops), ops)
    linear = ops.maximum(ops.const(table.hinge), x)
    if table.slope != 1.0:
        linear = ops.mul(linear, ops.const(table.slope))
    return ops.add(linear, residual)


def _direct(table: Table, x, ops):
    return interpolate(table, signed_argument(table, x, ops), ops)


def _symmetric(table: Table, x, ops):
    return interpolate(table, argument(table, ops.absolute(x), ops), ops)


def _step(table: Table, x, ops):
    below = interpolate(table, signed_argument(table, x, ops), ops)
    return ops.select(ops.less(ops.const(0.0), x), ops.const(table.slope), below)


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


def _hardsigmoid_slope(_table: Table, x, ops):
    magnitude = ops.absolute(x)
    # NaN is neither below 3 nor above 1.
    outside = ops.select(ops.less(ops.const(1.0), magnitude), ops.const(0.0), x)
    return ops.select(ops.less(magnitude, ops.const(3.0)), ops.const(1.0 / 6.0), outside)


def _hardswish_slope(_table: Table, x, ops):
    inside = ops.add(ops.mul(x, ops.const(1.0 / 3.0)), ops.const(0.5))
    low = ops.select(ops.less(ops.const(-3.0), x), inside, ops.const(0.0))
    high = ops.select(ops.less(ops.const(1.0), x), ops.const(1.0), x)
    return ops.select(ops.less(x, ops.const(3.0)), low, high)


def _product(table: Table, x, ops):
    exponent = table.scale
    base = ops.divide(ops.const(1.0), x) if exponent < 0 else x
    result = ops.sqrt(base) if exponent % 1 else None
    count = int(abs(exponent))
    while count:
        if count % 2:
            result = base if result is None else ops.mul(result, base)
        count //= 2
        if count:
            base = ops.mul(base, base)
    return result


REDUCTIONS = {
    "even": _even,
    "odd": _odd,
    "logistic": _logistic,
    "hinge": _hinge,
    "direct": _direct,
    "symmetric": _symmetric,
    "step": _step,
    "exp": exp,
    "exp_flush": exp_flush,
    "exp_square": exp_flush,
    "exp_split": exp_split,
    "log": log,
    "power": power,
    "periodic": periodic,
    "product": _product,
    "sine": sine,
    "cosine": cosine,
    "reciprocal": _reciprocal,
    "sqrt": _sqrt,
    "rsqrt": _rsqrt,
    "hardsigmoid": _hardsigmoid,
    "hardswish": _hardswish,
    "hardsigmoid_slope": _hardsigmoid_slope,
    "hardswish_slope": _hardswish_slope,
}
