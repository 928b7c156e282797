"""The proof of a table's error bound.

Let ``p`` be the polynomial of a cell with its float32 coefficients, ``g`` the function it stands for, both in the
variable ``t``, and ``u = 2**-24``. The error has these parts; each is bounded, and the bounds are added.

1. Approximation, ``sup |p - g|`` on the closed cell. ``e = p - g`` is evaluated in float64 at points ``d`` apart.
   Between two points ``e`` differs from its chord by at most ``d**2 / 8 * sup |e''|``, and
   ``|e''| <= |g''| + |p''|``: the first is the function's stated curvature, the second is bounded by
   ``sum j (j - 1) |c_j| V**(j - 2)`` with ``V = max |variable|``. The maximum over points plus that term is a bound.
2. Argument: ``t = fl(fl(scale * x) + offset)`` is off by at most ``u`` of each rounded value, which moves ``g`` by
   ``sup |g'|`` times that; ``|g'|`` is at most the steepest chord between those points plus ``d * sup |g''|``.
   ``scale`` itself is no error: it only places the cells.
   The cell number is exact: ``t + magic`` rounds to the nearest multiple of the step, and cells are closed.
3. Horner: if ``r`` is a partial result of magnitude ``R`` with error ``E``, the next one has the error
   ``E V + u (R + E) V`` from the product and ``u`` times its magnitude from the sum.
4. Reconstruction: the last addition rounds once (``u`` of the result); exp multiplies by powers of two exactly
   and moves ``t`` by the rounding of ``x * log2(e)``; log adds ``e * ln 2`` with three roundings.

Every rounding adds at most ``2**-150`` more where it is denormal. Float64 rounding of the reference is covered by
``REFERENCE_ERROR``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

U = 2.0**-24
POINTS = 4097
REFERENCE_ERROR = 1e-14
DENORMAL = 2.0**-140


def approximation_error(
    value: np.ndarray, t: np.ndarray, curvature: float, coefficients: np.ndarray, centre: float, norm: str
) -> float:
    """Part 1 from ``value = g(t)``, divided by 1, max(1, |g|) or |g| (``norm``: absolute, mixed, relative)."""
    gap = float(t[1] - t[0])
    error = np.abs(np.polynomial.polynomial.polyval(t - centre, coefficients) - value)
    reach = max(abs(t[0] - centre), abs(t[-1] - centre))
    second = sum(j * (j - 1) * abs(c) * reach ** (j - 2) for j, c in enumerate(coefficients) if j >= 2)
    between = np.maximum(error[1:], error[:-1]) + gap**2 / 8 * (curvature + second) + REFERENCE_ERROR
    if norm == "absolute":
        return float(between.max())
    # |g| between two points of one sign is at least the smaller end less the chord's error.
    same_sign = value[1:] * value[:-1] > 0
    smaller = np.minimum(np.abs(value[1:]), np.abs(value[:-1])) - gap**2 / 8 * curvature
    floor = np.where(same_sign, np.maximum(smaller, 0.0), 0.0)
    if norm == "mixed":
        floor = np.maximum(floor, 1.0)
    with np.errstate(divide="ignore"):
        return float((between / floor).max())


def horner_error(coefficients: np.ndarray, reach: float) -> float:
    """Part 3: rounding of Horner's rule for a variable of at most ``reach`` in magnitude."""
    magnitude, error = abs(coefficients[-1]), 0.0
    for c in coefficients[-2::-1]:
        product = (magnitude + error) * reach
        error = error * reach + U * product + DENORMAL
        magnitude = abs(c) + magnitude * reach
        error += U * (magnitude + error) + DENORMAL
    return float(error)


def slope_bound(value: np.ndarray, gap: float, curvature: float) -> float:
    """A bound of ``|g'|`` from the values of g at points ``gap`` apart, and as far outside them."""
    return float(np.abs(np.diff(value)).max() / gap + 2 * gap * curvature)


def cell_bound(
    function: Callable[[np.ndarray], np.ndarray],
    curvature: float,
    coefficients: np.ndarray,
    low: float,
    high: float,
    centre: float,
    norm: str,
    argument_error: float,
) -> float:
    """Parts 1 to 3 for one cell, in the norm asked for."""
    exact = np.asarray(coefficients, np.float64)
    reach = max(abs(low - centre), abs(high - centre))
    t, gap = np.linspace(low, high, POINTS, retstep=True)
    value = function(t)
    rounding = horner_error(exact, reach)
    if argument_error:
        rounding += argument_error * (slope_bound(value, float(gap), curvature) + argument_error * curvature)
    if norm == "relative":
        smallest = float(np.abs(value).min()) - float(gap) ** 2 / 8 * curvature
        rounding = rounding / smallest if smallest > 0 else np.inf
    return approximation_error(value, t, curvature, exact, centre, norm) + rounding
