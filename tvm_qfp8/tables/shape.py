"""What a table's cells must keep beside the error bound: meet each other, be exact at points, turn where f turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

GRID = 16_385
# Differences of float64 values below this share of the largest value are rounding.
NOISE = 2.0**-50


@dataclass(frozen=True)
class Shape:
    """The options of ``build_table`` that constrain the cells."""

    continuous: bool = False
    exact_at: tuple[float, ...] = ()
    """float32 arguments of the function."""
    monotone: bool = False

    def __bool__(self) -> bool:
        return self.continuous or self.monotone or bool(self.exact_at)

    @property
    def joined(self) -> bool:
        """Whether neighbouring cells meet; a step at a boundary may go the wrong way."""
        return self.continuous or self.monotone


@dataclass(frozen=True)
class Course:
    """Where a function rises and falls."""

    turns: tuple[float, ...]
    """Arguments at which it turns, ascending."""
    first_sign: float
    """+1 where it rises before the first turn, -1 where it falls, 0 where it is constant everywhere."""

    def sign(self, t: np.ndarray) -> np.ndarray:
        """+1 where the function rises, -1 where it falls."""
        return self.first_sign * (-1.0) ** np.searchsorted(np.array(self.turns), t)


def course_of(function: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> Course:
    """The turns of ``function`` on ``[low, high]``: extremes of a fine grid, refined by a parabola."""
    t = np.linspace(low, high, GRID)
    value = function(t)
    step = np.diff(value)
    step[np.abs(step) <= NOISE * np.abs(value).max()] = 0.0
    moving = np.flatnonzero(step)
    if not len(moving):
        return Course((), 0.0)
    signs = np.sign(step[moving])
    turns = []
    for k in np.flatnonzero(np.diff(signs)):
        i, j = moving[k] + 1, moving[k + 1]
        if i == j:
            left, right = step[i - 1], step[i]
            turns.append(float(t[i] + (t[1] - t[0]) / 2 * (left + right) / (left - right)))
        else:
            # Constant between i and j.
            turns.append(float((t[i] + t[j]) / 2))
    return Course(tuple(turns), float(signs[0]))


def reversal(coefficients: np.ndarray, low: float, high: float, centre: float, course: Course) -> float:
    """How far a polynomial goes against ``course`` on ``[low, high]`` at most, in real arithmetic.

    ``coefficients`` are ascending powers of ``t - centre``. Between the roots of the derivative and the turns the
    polynomial goes one way, so its values there tell all.
    """
    polynomial = np.polynomial.Polynomial(np.asarray(coefficients, np.float64))
    roots = polynomial.deriv().roots() if len(coefficients) > 1 else np.array([])
    places = [float(root.real) + centre for root in roots if abs(root.imag) < 1e-6 * max(1.0, abs(root))]
    inner = [p for p in (*places, *course.turns) if low < p < high]
    ends = np.array([low, *sorted(inner), high])
    moved = np.diff(polynomial(ends - centre)) * course.sign((ends[1:] + ends[:-1]) / 2)
    worst = total = 0.0
    for way in moved.tolist():
        total = min(0.0, total + way) if way > 0 else total + way
        worst = min(worst, total)
    return -worst
