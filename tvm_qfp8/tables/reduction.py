"""Cuts a function's reduced curve to a finite interval."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tvm_qfp8.tables.cells import Curve
from tvm_qfp8.tables.functions import Function

# Every function of functions.py is within the smallest error of its limits here.
FAR = 64.0
GRID = 4096


def reduced_curve(function: Function, tail: float) -> tuple[Curve, float]:
    """The curve, cut where it is and stays within ``tail`` of its limits, and the hinge."""
    core = function.core
    assert core is not None
    high, low = function.high, function.low
    if high is None:
        limit = function.high_limit
        high = _cut(lambda c: np.abs(core(c) - (c if limit is None else limit)), tail)
    if low is None:
        low = -_cut(lambda c: np.abs(core(-c) - function.low_limit), tail, function.stretch)
    hinge = high if function.reduction == "hinge" else 0.0
    high_value = 0.0 if function.high_limit is None else function.high_limit
    curve = Curve(
        lambda c: core(c) - hinge,
        function.curvature,
        low,
        high,
        tuple((pin, float(np.float32(core(np.asarray(pin)) - hinge))) for pin in function.pins),
        low_value=function.low_limit - hinge if function.low is None else None,
        high_value=high_value if function.high is None else None,
        high_free=function.low is not None,
    )
    return curve, hinge


def _cut(tail: Callable[[np.ndarray], np.ndarray], budget: float, stretch: float = 1.0) -> float:
    """The least c, a float32, from which ``tail``, decreasing from its last maximum on, stays within ``budget``."""
    grid = np.linspace(0.0, FAR * stretch, GRID + 1)
    above = np.flatnonzero(tail(grid) > budget)
    outside = grid[above[-1]] if len(above) else 0.0
    inside = outside + FAR * stretch / GRID
    for _ in range(50):
        middle = (inside + outside) / 2
        if tail(np.asarray(middle)) <= budget:
            inside = middle
        else:
            outside = middle
    # Not below it, so that rounding to float32 keeps the tail within the budget.
    return float(np.nextafter(np.float32(inside), np.float32(np.inf)))
