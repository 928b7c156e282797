"""Fits the polynomials of all cells and bounds their error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tvm_qfp8.tables.fit import fit_polynomial
from tvm_qfp8.tables.proof import cell_bound

# Cells end this far (in cells) before the next one's boundary, so that a rounded argument stays inside.
MARGIN = 2.0**-12


@dataclass(frozen=True)
class Curve:
    """What the polynomials stand for, in the reduced argument ``c``."""

    function: Callable[[np.ndarray], np.ndarray]
    curvature: float
    low: float
    high: float
    pins: tuple[tuple[float, float], ...] = ()
    """Points ``(c, value)`` where the table is exact; value is a float32."""
    norm: str = "absolute"
    """The error is divided by 1 (absolute), max(1, |g|) (mixed) or |g| (relative)."""
    low_value: float | None = None
    """float32 value that the table takes exactly at its lower end, and so below it."""
    high_value: float | None = None
    high_free: bool = False
    """The upper end may move up: the function is near its limit there."""


@dataclass(frozen=True)
class Placement:
    """Where the cells are: ``t = scale * c + offset``, cell ``n`` is ``[(n - shift) step, (n + 1 - shift) step]``."""

    scale: float
    offset: float
    step: float
    low: float
    high: float
    """Clamps of ``t``."""
    cells: int
    shift: float = 0.5

    def cell(self, t: float) -> int:
        """The cell that holds ``t``."""
        return math.floor(t / self.step + self.shift)

    def intervals(self) -> list[tuple[int, float, float]]:
        """``(n, low, high)`` of each cell in use."""
        return [
            (n, max(self.low, (n - self.shift) * self.step), min(self.high, (n + 1 - self.shift) * self.step))
            for n in range(self.cell(self.low), self.cell(self.high) + 1)
        ]

    @property
    def argument_error(self) -> float:
        """How far rounding moves ``t``."""
        u = 2.0**-24
        product = max(abs(self.low - self.offset), abs(self.high - self.offset)) if self.scale != 1.0 else 0.0
        total = max(abs(self.low), abs(self.high)) if self.offset else 0.0
        return u * (product + total) * (1 + 2 * u)


def place(curve: Curve, cells: int, exact_scale: bool) -> Placement | None:
    """The finest placement of ``cells`` cells over the curve's interval.

    With ``exact_scale`` the step is a power of two and ``t`` is the argument itself, which saves a multiplication.
    None if 0 is outside the interval then, since that needs an offset.
    """
    low, high = curve.low, curve.high
    if low > 0 or high < 0:
        if exact_scale:
            return None
        scale = _float32((cells - 2 * MARGIN) / (high - low))
        offset = _float32(MARGIN - 0.5 - low * scale)
        ends = (_float32(low * scale + offset), _float32(high * scale + offset))
        return Placement(scale, offset, 1.0, *ends, cells)
    # n cells begin below 0: the best n, for a grid with a cell centred at 0.
    room = [
        min(
            (n + 0.5 - MARGIN) / -low if low < 0 else np.inf,
            (cells - n - 0.5 - MARGIN) / high if high > 0 else np.inf,
        )
        for n in range(cells)
    ]
    scale = max(room)
    if exact_scale:
        step = 2.0 ** -np.floor(np.log2(scale))
        end = (cells - 0.5 - MARGIN) * step if curve.high_free else high
        return Placement(1.0, 0.0, step, low, end, cells)
    scale = _float32(scale)
    end = cells - 0.5 - MARGIN if curve.high_free else _float32(high * scale)
    return Placement(scale, 0.0, 1.0, _float32(low * scale), end, cells)


def _float32(value: float) -> float:
    return float(np.float32(value))


def fit_cells(
    curve: Curve, placement: Placement, degree: int, centred: bool, budget: float
) -> tuple[np.ndarray, float] | None:
    """float32 coefficients ``(degree + 1, cells)`` and their proved bound; None when a cell exceeds ``budget``."""
    scale, offset = placement.scale, placement.offset

    def in_t(t: np.ndarray) -> np.ndarray:
        return curve.function((t - offset) / scale)

    intervals = placement.intervals()
    # A domain that ends on a boundary leaves a cell of one point, which nothing can be fitted to.
    if len(intervals) > placement.cells or any(low == high for _, low, high in intervals):
        return None
    coefficients = np.zeros((degree + 1, placement.cells), np.float32)
    pins = [
        (float(np.float32(np.float32(scale) * np.float32(c) + np.float32(offset))), v) for c, v in curve.pins
    ]
    ends = ((placement.low, curve.low_value), (placement.high, curve.high_value))
    pins += [(t, value) for t, value in ends if value is not None]
    worst = 0.0
    # The most curved cells come last or first; checking from both ends finds a hopeless form soon.
    for n, low, high in sorted(
        intervals, key=lambda cell: min(cell[0] - intervals[0][0], intervals[-1][0] - cell[0])
    ):
        centre = n * placement.step if centred else 0.0
        inside = [(t, value) for t, value in pins if placement.cell(t) == n]
        fitted = fit_rounded(in_t, low, high, degree, centre, inside, curve.norm)
        bound = np.inf
        if fitted is not None:
            bound = cell_bound(
                in_t,
                curve.curvature / scale**2,
                fitted,
                low,
                high,
                centre,
                curve.norm,
                placement.argument_error,
            )
        if bound > budget:
            return None
        worst = max(worst, bound)
        coefficients[:, n % placement.cells] = fitted
    return coefficients, worst


def fit_rounded(
    function: Callable[[np.ndarray], np.ndarray],
    low: float,
    high: float,
    degree: int,
    centre: float,
    pins: Sequence[tuple[float, float]],
    norm: str,
) -> np.ndarray | None:
    """A fit in float32 coefficients whose float32 evaluation gives the pinned value, at most one; else None."""
    weight = None if norm == "absolute" else lambda t: 1.0 / _floor(function(t), norm)
    exact = fit_polynomial(function, low, high, degree, centre, pins, weight)
    rounded = exact.astype(np.float32)
    if not np.isfinite(rounded).all() or len(pins) > 1:
        return None
    for t, value in pins:
        variable = np.float32(t - centre)
        product = np.float32(0.0)
        for c in rounded[:0:-1]:
            product = np.float32(np.float32(c + product) * variable)
        constant = np.float32(np.float32(value) - product)
        near = (
            constant,
            np.nextafter(constant, np.float32(np.inf)),
            np.nextafter(constant, np.float32(-np.inf)),
        )
        good = [c for c in near if np.float32(c + product) == np.float32(value)]
        if not good:
            return None
        rounded[0] = good[0]
    return rounded


def _floor(value: np.ndarray, norm: str) -> np.ndarray:
    return np.maximum(np.abs(value), 1.0 if norm == "mixed" else 1e-300)
