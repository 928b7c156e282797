"""Cells under the constraints of a ``Shape``, in float32 and with their proved bound."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tvm_qfp8.tables.cells import Curve, Placement, fit_cells
from tvm_qfp8.tables.proof import U, cell_bound, horner_error
from tvm_qfp8.tables.shape import Course, Shape, course_of, reversal
from tvm_qfp8.tables.shaped_fit import Interval, fit_shaped
from tvm_qfp8.tables.table import Table

# How far the results of a monotone table may go the wrong way: some roundings, relative to the largest value or 1.
WRONG_WAY = 2.0**-20
# Changes of a slope, the smallest first.
NUDGES = np.array(sorted(range(-2048, 2049), key=abs))

Pin = tuple[float, float]


def fit_shaped_cells(
    table: Table,
    curve: Curve,
    placement: Placement,
    degree: int,
    centred: bool,
    budget: float,
    shape: Shape,
) -> tuple[np.ndarray, float, float | None] | None:
    """float32 coefficients ``(degree + 1, cells)``, their proved bound, and how far results may go the wrong way.

    ``table`` says what is done with the polynomial. None when a constraint, or ``budget``, cannot be kept.
    """
    unconstrained = Curve(curve.function, curve.curvature, curve.low, curve.high, norm=curve.norm)
    if fit_cells(unconstrained, placement, degree, centred, budget) is None:
        return None
    scale, offset = placement.scale, placement.offset

    def in_t(t: np.ndarray) -> np.ndarray:
        return curve.function((t - offset) / scale)

    def weight(t: np.ndarray) -> np.ndarray:
        if curve.norm == "absolute":
            return np.ones_like(t)
        return 1.0 / np.maximum(np.abs(in_t(t)), 1.0 if curve.norm == "mixed" else 1e-300)

    rising = table.reduction == "even"
    course = course_of(in_t, placement.low, placement.high) if shape.monotone else None
    cells = [
        Interval(low, high, tuple(_pins_in(curve, placement, n, low, high, shape.joined)))
        for n, low, high in placement.intervals()
    ]
    fitted = fit_shaped(in_t, cells, degree, weight, shape.joined, course)
    if fitted is None:
        return None
    coefficients = np.zeros((degree + 1, placement.cells), np.float32)
    worst = wrong_way = rounding = 0.0
    met: list[Pin] = []
    for (n, low, high), cell, series in zip(placement.intervals(), cells, fitted, strict=True):
        centre = n * placement.step if centred else 0.0
        rounded = pass_through(_powers(series, degree, centre), centre, [*met, *cell.pins])
        if rounded is None:
            return None
        curvature = curve.curvature / scale**2
        error = placement.argument_error
        worst = max(worst, cell_bound(in_t, curvature, rounded, low, high, centre, curve.norm, error))
        if worst > budget:
            return None
        if course is not None:
            # A fall may go on in the next cell.
            wrong_way += _reversal(rounded, low, high, centre, course, rising and scale)
            if degree > 1 or rising:
                rounding = max(
                    rounding, horner_error(np.asarray(rounded, np.float64), max(high - centre, centre - low))
                )
        if shape.joined:
            met = [(high, float(_horner(rounded, np.float32(high - centre))))]
        coefficients[:, n % placement.cells] = rounded
    if course is None:
        return coefficients, worst, None
    largest = float(np.abs(in_t(np.linspace(placement.low, placement.high, 257))).max())
    added = {"even": abs(placement.high / scale), "hinge": abs(table.slope * table.hinge), "logistic": 0.5}
    if table.reduction in added:
        largest += added[table.reduction]
        if degree > 1 or rising:
            rounding += 1.01 * U * largest
    wrong_way += 2 * rounding
    return (coefficients, worst, wrong_way) if wrong_way <= WRONG_WAY * max(1.0, largest) else None


def _pins_in(curve: Curve, placement: Placement, n: int, low: float, high: float, joined: bool) -> list[Pin]:
    """The points that cell ``n`` takes exactly; a joined cell those of its neighbour at their boundary, too."""
    scale, offset = np.float32(placement.scale), np.float32(placement.offset)
    pins = [(float(np.float32(scale * np.float32(c) + offset)), value) for c, value in curve.pins]
    ends = ((placement.low, curve.low_value), (placement.high, curve.high_value))
    pins += [(t, value) for t, value in ends if value is not None]
    return [
        (t, value)
        for t, value in dict(pins).items()
        if np.rint(t / placement.step) == n or (joined and t in (low, high))
    ]


def _powers(series, degree: int, centre: float) -> np.ndarray:
    """float32 coefficients of powers of ``t - centre``."""
    polynomial = series.convert(kind=np.polynomial.Polynomial, domain=[-1, 1], window=[-1, 1])
    moved = polynomial(np.polynomial.Polynomial([centre, 1.0])).coef
    return np.pad(moved, (0, degree + 1 - len(moved))).astype(np.float32)


def _horner(coefficients: Sequence | np.ndarray, variable) -> np.ndarray:
    """As a kernel does it, for arrays of coefficients, too."""
    result = coefficients[-1]
    for c in coefficients[-2::-1]:
        result = np.add(np.multiply(result, variable, dtype=np.float32), c, dtype=np.float32)
    return result


def pass_through(coefficients: np.ndarray, centre: float, pins: Sequence[Pin]) -> np.ndarray | None:
    """``coefficients`` moved by some units in the last place so that their float32 evaluation gives each pin.

    The constant serves the first pin, changes of the slope a second one. None for more, or where rounding leaves none.
    """
    points = [(np.float32(t - centre), np.float32(value)) for t, value in dict(pins).items()]
    if len(points) > 2 or not np.isfinite(coefficients).all():
        return None
    if not points:
        return coefficients
    (variable, value), (other, other_value) = points[0], points[-1]
    exact_slope = float(coefficients[1])
    apart = float(other) - float(variable)
    if apart:
        rest = np.polynomial.Polynomial([0.0, 0.0, *coefficients[2:].astype(np.float64)])
        drop = float(rest(float(other)) - rest(float(variable)))
        exact_slope = (float(other_value) - float(value) - drop) / apart
    largest = max(np.spacing(np.abs(y)) for _, y in points)
    unit = max(np.spacing(np.abs(np.float32(exact_slope))), largest / (8 * (abs(apart) or 1.0)))
    slope = (exact_slope + NUDGES * unit).astype(np.float32)
    higher = list(coefficients[2:])
    product = _horner([np.float32(0.0), slope, *higher], variable)
    for towards in (None, np.inf, -np.inf):
        constant = np.subtract(value, product, dtype=np.float32)
        if towards is not None:
            constant = np.nextafter(constant, np.float32(towards))
        good = np.ones(len(slope), bool)
        for v, y in points:
            good &= _horner([constant, slope, *higher], v) == y
        if good.any():
            k = int(np.argmax(good))
            return np.array([constant[k], slope[k], *higher], np.float32)
    return None


def _reversal(rounded, low: float, high: float, centre: float, course: Course, scale: float) -> float:
    """How far a cell goes the wrong way; with ``scale`` also after adding ``x = t / scale``."""
    found = reversal(rounded, low, high, centre, course)
    if scale:
        with_x = np.asarray(rounded, np.float64).copy()
        with_x[1] += 1.0 / scale
        found = max(found, reversal(with_x, low, high, centre, Course((), 1.0)))
    return found
