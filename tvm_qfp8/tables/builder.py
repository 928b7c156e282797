"""Builds the cheapest table that provably meets an error bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np

from tvm_qfp8.errors import TableError
from tvm_qfp8.tables.angle import PHASE_ERROR
from tvm_qfp8.tables.cells import Curve
from tvm_qfp8.tables.exponent import build_exp, build_log
from tvm_qfp8.tables.families import find_function
from tvm_qfp8.tables.observe import observe
from tvm_qfp8.tables.power import build_power
from tvm_qfp8.tables.proof import U
from tvm_qfp8.tables.reduction import reduced_curve
from tvm_qfp8.tables.search import cheapest, unreachable
from tvm_qfp8.tables.table import Table

MIN_MAX_ERROR = 1e-7
# Of the error budget, what the cut-off tail of a function may take; the next share where that leaves too little.
TAIL_SHARES = (0.97, 0.8, 0.5)
WHOLE_RANGE = (-math.inf, math.inf)
CURVATURE_POINTS = 65_537


def build_table(
    function: str | Callable[[np.ndarray], np.ndarray],
    max_error: float = 1e-3,
    domain: tuple[float, float] | None = None,
    relative: bool = False,
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

    Raises
    ------
    TableError
        Unknown name, a pole in the domain, a bound below float32's reach.
    """
    if not (math.isfinite(max_error) and max_error >= MIN_MAX_ERROR):
        raise TableError(
            f"max_error is {max_error}; a float32 table can reach {MIN_MAX_ERROR}: ask for that or more"
        )
    if domain is not None:
        domain = (float(domain[0]), float(domain[1]))
        if not (domain[0] < domain[1] and math.isfinite(domain[1] - domain[0])):
            raise TableError(f"domain is {domain}; give finite (low, high) with low < high")
    if isinstance(function, str):
        return _build_named(function, float(max_error), domain, relative)
    if domain is None:
        raise TableError("a table of a callable needs domain=(low, high)")
    name = getattr(function, "__name__", "function")
    return _build_on_domain(name, function, float(max_error), domain, relative)


@lru_cache(maxsize=256)
def _build_named(name: str, max_error: float, domain: tuple[float, float] | None, relative: bool) -> Table:
    function = find_function(name)
    if domain is not None and function.reduction != "exp":
        return _build_on_domain(name, function.reference, max_error, domain, relative or function.relative)
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
        table = _build_cells(name, max_error)
    return _observed(table, function.reference, domain or WHOLE_RANGE)


def _observed(
    table: Table, reference: Callable[[np.ndarray], np.ndarray], domain: tuple[float, float]
) -> Table:
    return replace(table, observed_error=observe(table, reference, table.relative, domain))


def _build_cells(name: str, max_error: float) -> Table:
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
        found = cheapest(table, curve, max_error, last)
        if found is not None:
            return found
    raise unreachable(name, max_error)


def _build_on_domain(
    name: str,
    function: Callable[[np.ndarray], np.ndarray],
    max_error: float,
    domain: tuple[float, float],
    relative: bool,
) -> Table:
    """Cells over the whole domain. The curvature is taken as twice the largest second difference on a fine grid."""
    low, high = (float(np.float32(end)) for end in domain)
    x, gap = np.linspace(low, high, CURVATURE_POINTS, retstep=True)
    with np.errstate(all="ignore"):
        value = np.asarray(function(x), np.float64)
    if not np.isfinite(value).all():
        raise TableError(
            f"{name} is not finite at {x[~np.isfinite(value)][0]:g}; choose a domain without the pole"
        )
    if relative and value.min() <= 0 <= value.max():
        raise TableError(
            f"{name} has a zero in {domain}, where a relative error cannot be kept; use relative=False"
        )
    curvature = 2.0 * float(np.abs(np.diff(value, 2)).max()) / float(gap) ** 2
    curve = Curve(function, curvature, low, high, norm="relative" if relative else "mixed")
    found = cheapest(Table(name, "direct", 0.0, 0.0, relative), curve, max_error, 0.0)
    if found is None:
        raise unreachable(name, max_error)
    return _observed(found, function, (low, high))
