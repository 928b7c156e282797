"""The exponential inside softmax: cheaper than exp itself, since only the quotients matter."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from tvm_qfp8.tables.cells import Placement, fit_cells
from tvm_qfp8.tables.exponent import EXP_DEGREES, plain_curve
from tvm_qfp8.tables.fit import fit_polynomial
from tvm_qfp8.tables.functions import FUNCTIONS
from tvm_qfp8.tables.proof import POINTS, U, approximation_error
from tvm_qfp8.tables.search import as_tuples, unreachable
from tvm_qfp8.tables.table import Table

LANES = 16
# Least power of two of a result; what is smaller than that share of the row's largest value is 0.
FLUSH = 126.0


def softmax_exp_error(max_error: float, length: int) -> float:
    """The relative error that exp may have in a softmax over ``length`` values: ``max_error`` is on probabilities.

    With every e_i off by a factor within ``1 +- d``, p_i = e_i / sum e_j is off by at most
    ``p (1 - p) ((1 + d) / (1 - d) - 1) <= d / (2 (1 - d))``. Besides, x - max rounds (``|d| exp(d) u <= u``), a sum
    over 16 lanes has ``length / 16 + 4`` roundings, the reciprocal and the product one each. For a row so long that
    these alone could use up the budget in the worst case, a quarter of it remains for exp.
    """
    rounding = (length / LANES + 8) * U
    budget = max(max_error - rounding, max_error / 4)
    return 2 * budget / (1 + 2 * budget)


@lru_cache(maxsize=64)
def build_softmax_exp(max_error: float) -> Table:
    """A constant times exp(x) for x <= 0: relative error ``max_error`` down to 2**-126, and 0 below.

    Raises
    ------
    TableError
        ``max_error`` is below what float32 reaches.
    """
    scale = float(np.float32(math.log2(math.e)))
    curve, argument_error = plain_curve(FUNCTIONS["exp"], FLUSH, scale, math.log2(math.e))
    placement = Placement(1.0, 0.0, 2.0, curve.low, curve.high, 1)
    for degree in EXP_DEGREES:
        if degree == 2 and (found := _square(max_error - argument_error)) is not None:
            coefficients, bound = found
            proved = bound + argument_error
            return Table("softmax", "exp_square", proved, 0.0, True, as_tuples(coefficients), scale)
        fitted = fit_cells(curve, placement, degree, True, max_error - argument_error)
        if fitted is not None:
            coefficients, bound = fitted
            proved = bound + argument_error
            return Table("softmax", "exp_flush", proved, 0.0, True, as_tuples(coefficients), scale)
    raise unreachable("softmax", max_error)


def _square(budget: float) -> tuple[np.ndarray, float] | None:
    """``((b,), (a,))`` of (r + a)**2 + b, proportional to 2**r on [-0.5, 0.5], and its proved relative error.

    The four roundings add at most ``4 u`` of the value: twice one of ``r + a``, one of the square and one of the sum.
    """
    c = fit_polynomial(np.exp2, -0.5, 0.5, 2, 0.0, weight=lambda r: np.exp2(-r))
    root = np.float32(c[1] / (2 * c[2]))
    rest = np.float32(c[0] / c[2] - (c[1] / (2 * c[2])) ** 2)
    if rest <= 0:
        return None
    lead = float(c[2])
    exact = lead * np.array([float(rest) + float(root) ** 2, 2 * float(root), 1.0])
    r = np.linspace(-0.5, 0.5, POINTS)
    bound = approximation_error(np.exp2(r), r, FUNCTIONS["exp"].curvature, exact, 0.0, "relative") + 4.1 * U
    return (np.array([[rest], [root]], np.float32), bound) if bound <= budget else None
