"""Tables for exp, exp2 and log, whose range reduction is the float's exponent."""

from __future__ import annotations

import itertools
import math

import numpy as np

from tvm_qfp8.tables.cells import Curve, Placement, fit_cells
from tvm_qfp8.tables.exponent_bits import LN2_LOW
from tvm_qfp8.tables.functions import Function
from tvm_qfp8.tables.proof import U
from tvm_qfp8.tables.search import CELLS, DEGREES, Form, as_tuples, unreachable
from tvm_qfp8.tables.table import Table

# Results of arguments beyond these are 0 or infinite. In powers of two, with room for the polynomial.
EXP_LOW, EXP_HIGH = -160.0, 129.0
# Beyond 2**-150 and 2**128 the result is 0 or infinite however t is rounded.
EXP_REACH = 150.5
EXP_DEGREES = range(1, 8)


def build_exp(function: Function, max_error: float, domain: tuple[float, float] | None) -> Table:
    """One polynomial for 2**f on [-0.5, 0.5] or e**v on [-ln 2 / 2, ln 2 / 2], scaled by 2**n."""
    log2_base = math.log2(math.e) if function.name == "exp" else 1.0
    scale = float(np.float32(log2_base))
    low, high = EXP_LOW / log2_base, EXP_HIGH / log2_base
    if domain is not None:
        low, high = max(low, domain[0]), min(high, domain[1])
    reach = min(max(abs(low), abs(high)) * log2_base, EXP_REACH)
    choices = [("exp", *plain_curve(function, reach, scale, log2_base))]
    if scale != 1.0:
        choices.append(("exp_split", *_split(reach)))
    for (reduction, curve, argument_error), degree in itertools.product(choices, EXP_DEGREES):
        placement = Placement(1.0, 0.0, 2.0, curve.low, curve.high, 1)
        fitted = fit_cells(curve, placement, degree, True, max_error - argument_error)
        if fitted is None:
            continue
        coefficients, bound = fitted
        return Table(
            function.name,
            reduction,
            bound + argument_error,
            0.0,
            True,
            as_tuples(coefficients),
            scale,
            low=float(np.float32(low)),
            high=float(np.float32(high)),
        )
    raise unreachable(function.name, max_error)


def plain_curve(function: Function, reach: float, scale: float, log2_base: float) -> tuple[Curve, float]:
    """2**(t - n). The error is ln 2 times that of t, by its product and by the constant."""
    curve = Curve(np.exp2, function.curvature, -0.5, 0.5, ((0.0, 1.0),), norm="relative")
    if scale == 1.0:
        return curve, 0.0
    return curve, 1.01 * math.log(2.0) * reach * (U + abs(scale / log2_base - 1.0))


def _split(reach: float) -> tuple[Curve, float]:
    """e**(x - n ln 2). Product, constant and last difference of the argument round; n may be off by the error of t."""
    end = math.log(2.0) / 2 + 3e-5
    curve = Curve(np.exp, 1.5, -end, end, ((0.0, 1.0),), norm="relative")
    return curve, 1.01 * U * (2.0 * reach * abs(LN2_LOW) + 2.0 * end)


def build_log(function: Function, max_error: float) -> Table:
    """log(1 + v) on cells given by the leading mantissa bits, plus e * ln 2."""
    # The constant, the product and the last addition round, and |e| ln 2 <= |f| + ln 2.
    last = 1.01 * U * (1.0 + 2.0 * (1.0 + math.log(2.0)))
    curve = Curve(np.log1p, function.curvature, 0.0, 1.0, ((0.0, 0.0),))
    for form in sorted(
        (Form(*choice) for choice in itertools.product(CELLS, DEGREES)), key=lambda form: form.cost
    ):
        placement = Placement(1.0, 0.0, 1.0 / form.cells, 0.0, 1.0 - 2.0**-23, form.cells, shift=0.0)
        fitted = fit_cells(curve, placement, form.degree, False, max_error - last)
        if fitted is not None:
            coefficients, bound = fitted
            return Table("log", "log", bound + last, 0.0, False, as_tuples(coefficients))
    raise unreachable("log", max_error)
