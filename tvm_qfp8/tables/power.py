"""Tables for powers with a constant exponent: 2**(a * log2 x)."""

from __future__ import annotations

import itertools
import math

import numpy as np

from tvm_qfp8.tables.cells import Curve, Placement, fit_cells
from tvm_qfp8.tables.exponent import EXP_DEGREES, EXP_HIGH, EXP_LOW, EXP_REACH
from tvm_qfp8.tables.functions import FUNCTIONS, Function
from tvm_qfp8.tables.proof import U
from tvm_qfp8.tables.search import CELLS, DEGREES, Form, as_tuples, unreachable
from tvm_qfp8.tables.table import Table

# Of the error budget left after rounding, what the logarithm may take.
LOG_SHARE = 0.5
LOG_REACH = 150.0


def build_power(function: Function, max_error: float) -> Table:
    """Two tables, each with its share of the relative error.

    ``t = fl(a) * fl(e + q)`` is off by three roundings: of the constant, the sum and the product, each ``u |t|``, where
    only ``|t| <= 150.5`` gives a result that is neither 0 nor infinite. An error of t counts ln 2 times.
    """
    exponent = float(np.float32(function.exponent))
    constant = abs(exponent / function.exponent - 1.0)
    rounding = 1.02 * math.log(2.0) * (EXP_REACH * (constant + 2 * U) + abs(exponent) * U)
    left = max_error - rounding
    inner = (
        _log2(function.name, LOG_SHARE * left / (1.02 * math.log(2.0) * abs(exponent))) if left > 0 else None
    )
    if inner is None:
        raise unreachable(function.name, max_error)
    spent = rounding + 1.02 * math.log(2.0) * abs(exponent) * inner.max_error
    curve = Curve(np.exp2, FUNCTIONS["exp2"].curvature, -0.5, 0.5, ((0.0, 1.0),), norm="relative")
    placement = Placement(1.0, 0.0, 2.0, curve.low, curve.high, 1)
    for degree in EXP_DEGREES:
        fitted = fit_cells(curve, placement, degree, True, max_error - spent)
        if fitted is not None:
            coefficients, bound = fitted
            return Table(
                function.name,
                "power",
                bound + spent,
                0.0,
                True,
                as_tuples(coefficients),
                exponent,
                low=EXP_LOW,
                high=EXP_HIGH,
                inner=inner,
            )
    raise unreachable(function.name, max_error)


def _log2(name: str, max_error: float) -> Table | None:
    """log2(1 + v), 0 <= v < 1, absolute error ``max_error``."""
    curve = Curve(lambda v: np.log2(1.0 + v), 1.45, 0.0, 1.0, ((0.0, 0.0),))
    forms = (Form(*choice) for choice in itertools.product(CELLS, DEGREES))
    for form in sorted(forms, key=lambda form: form.cost):
        placement = Placement(1.0, 0.0, 1.0 / form.cells, 0.0, 1.0 - 2.0**-23, form.cells, shift=0.0)
        fitted = fit_cells(curve, placement, form.degree, False, max_error)
        if fitted is not None:
            coefficients, bound = fitted
            return Table(name, "log", bound, 0.0, False, as_tuples(coefficients))
    return None
