"""Builds the cheapest table that provably meets an error bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from tvm_qfp8.errors import TableError
from tvm_qfp8.tables.angle import PHASE_ERROR
from tvm_qfp8.tables.exponent import build_exp, build_log
from tvm_qfp8.tables.families import find_function
from tvm_qfp8.tables.observe import observe
from tvm_qfp8.tables.on_domain import build_on_domain, check_exact, exact_pins
from tvm_qfp8.tables.periodic import build_periodic
from tvm_qfp8.tables.power import build_power
from tvm_qfp8.tables.proof import U
from tvm_qfp8.tables.reduction import reduced_curve
from tvm_qfp8.tables.search import FREE, cheapest, unreachable
from tvm_qfp8.tables.shape import Shape
from tvm_qfp8.tables.table import Table

MIN_MAX_ERROR = 1e-7
# Of the error budget, what the cut-off tail of a function may take; the next share where that leaves too little.
TAIL_SHARES = (0.97, 0.8, 0.5)
WHOLE_RANGE = (-math.inf, math.inf)
# Their cells may be given a shape; the others are reduced by their exponent or angle, or computed exactly.
SHAPED = ("even", "odd", "logistic", "hinge", "direct", "symmetric", "step")


def build_table(
    function: str | Callable[[np.ndarray], np.ndarray],
    max_error: float = 1e-3,
    domain: tuple[float, float] | None = None,
    relative: bool = False,
    *,
    symmetry: str | None = None,
    period: float | None = None,
    continuous: bool = False,
    exact_at: Sequence[float] = (),
    monotone: bool = False,
) -> Table:
    """The cheapest table of ``function`` whose proved error is at most ``max_error``.

    Parameters
    ----------
    function
        A name of ``tables.FUNCTIONS``, or a smooth NumPy function float64 -> float64, which needs ``domain``.
    max_error
        Bound of ``|y - f(x)| / max(1, |f(x)|)``; of ``|y - f(x)| / |f(x)|`` for exp, exp2, reciprocal, rsqrt, sqrt.
    domain
        Arguments ``(low, high)`` that the table is for; outside, it gives the nearest end's value. A named
        function covers the whole float32 range without one. exp without denormal results is faster:
        ``domain=(-87, 0)`` is what softmax needs.
    relative
        For a callable, or a named function on a domain: bound the relative error.
    symmetry
        Of a callable on a domain ``(-a, a)``, so that cells are spent on one half only: ``"even"``, f(-x) = f(x);
        ``"odd"``, f(-x) = -f(x); ``"logistic"``, f(-x) = 1 - f(x), as sigmoid; ``"rectifier"``, f(x) = x + f(-x), as
        GELU: beyond ``a`` it goes on with slope 1. Checked on a fine grid.
    period
        Of a callable: f(x + period) = f(x), so that cells are spent on one period only. Checked on a fine grid. The
        domain may hold many periods: the bound covers the rounding of the phase. Goes with none of the other options.
    continuous
        Neighbouring cells give the same float32 at their boundary.
    exact_at
        Arguments, rounded to float32, at which the table gives float32(f(x)).
    monotone
        The table rises where the function rises and falls where it falls, checked on the coefficients of every cell;
        ``Table.reversal`` bounds what float32 rounding leaves. Includes ``continuous``.

    Raises
    ------
    TableError
        Unknown name, a pole in the domain, a bound below float32's reach, a symmetry that is none, constraints that
        no table keeps.
    """
    if not (math.isfinite(max_error) and max_error >= MIN_MAX_ERROR):
        raise TableError(
            f"max_error is {max_error}; a float32 table can reach {MIN_MAX_ERROR}: ask for that or more"
        )
    if domain is not None:
        domain = (float(domain[0]), float(domain[1]))
        if not (domain[0] < domain[1] and math.isfinite(domain[1] - domain[0])):
            raise TableError(f"domain is {domain}; give finite (low, high) with low < high")
    shape = Shape(continuous, _exact_points(exact_at, domain), monotone)
    if isinstance(function, str):
        if symmetry is not None or period is not None:
            raise TableError(f"the symmetry of {function} is known; symmetry and period are for a callable")
        return _build_named(function, float(max_error), domain, relative, shape)
    if domain is None:
        raise TableError("a table of a callable needs domain=(low, high)")
    name = getattr(function, "__name__", "function")
    if period is None:
        table = build_on_domain(name, function, float(max_error), domain, relative, symmetry, shape)
    elif relative or symmetry is not None or shape:
        raise TableError(
            "period goes without relative, symmetry, continuous, exact_at and monotone; leave them out"
        )
    else:
        table = build_periodic(name, function, float(max_error), domain, float(period))
    return _finished(table, function, domain, shape)


def _exact_points(exact_at: Sequence[float], domain: tuple[float, float] | None) -> tuple[float, ...]:
    points = tuple(float(np.float32(x)) for x in exact_at)
    low, high = WHOLE_RANGE if domain is None else tuple(float(np.float32(end)) for end in domain)
    for x in points:
        if not (math.isfinite(x) and low <= x <= high):
            raise TableError(f"exact_at holds {x:g}; give finite points of the domain")
    return points


@lru_cache(maxsize=256)
def _build_named(
    name: str, max_error: float, domain: tuple[float, float] | None, relative: bool, shape: Shape
) -> Table:
    function = find_function(name)
    if domain is not None and (function.reduction != "exp" or shape):
        relative = relative or function.relative
        table = build_on_domain(name, function.reference, max_error, domain, relative, None, shape)
        return _finished(table, function.reference, domain, shape)
    if (shape.continuous or shape.monotone) and function.reduction not in SHAPED:
        raise TableError(
            f"{name} has no cells side by side that could be continuous or monotone (it is computed by plain "
            "arithmetic, or reduced to one period or binade); give domain=(low, high)"
        )
    if function.reduction == "exp":
        table = build_exp(function, max_error, domain)
    elif function.reduction == "log":
        table = build_log(function, max_error)
    elif function.reduction == "power":
        table = build_power(function, max_error)
    elif function.reduction == "product":
        # Every multiplication, root and division rounds once, an error in the base counts |exponent| times.
        roundings = 4 * math.ceil(abs(function.exponent)) + 2
        table = Table(name, "product", roundings * U, 0.0, True, scale=function.exponent)
    elif function.core is None:
        # Up to three IEEE operations, each within U of its result.
        table = Table(name, function.reduction, 4 * U, 0.0, function.relative)
    else:
        table = _build_cells(name, max_error, shape if function.reduction in SHAPED else FREE)
    return _finished(table, function.reference, domain or WHOLE_RANGE, shape)


def _finished(
    table: Table,
    reference: Callable[[np.ndarray], np.ndarray],
    domain: tuple[float, float],
    shape: Shape,
) -> Table:
    """The table with its observed error, after a check of the points that it was asked to pass."""
    if shape.exact_at:
        check_exact(table, reference, shape)
    return replace(table, observed_error=observe(table, reference, table.relative, domain))


def _build_cells(name: str, max_error: float, shape: Shape) -> Table:
    function = find_function(name)
    for share in TAIL_SHARES:
        curve, hinge = reduced_curve(function, share * max_error)
        # odd only sets a sign; the others round their last addition once. The clamp at the hinge rounds, too.
        last = 0.0 if function.reduction == "odd" else 1.01 * U * (1.0 + 2.0 * hinge)
        if function.slope != 1.0:
            last += 2.02 * U  # the constant and the product
        if function.reduction in ("sine", "cosine"):
            last = PHASE_ERROR + 0.51 * math.pi * U  # the angle rounds to float32
        slope = float(np.float32(function.slope))
        table = Table(name, function.reduction, 0.0, 0.0, False, hinge=hinge, slope=slope)
        curve = replace(curve, pins=exact_pins(table, curve, function.reference, shape))
        found = cheapest(table, curve, max_error, last, shape)
        if found is not None:
            return found
    raise unreachable(name, max_error, shape)
