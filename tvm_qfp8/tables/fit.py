"""Minimax polynomial fits on one cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

NODES = 48
ITERATIONS = 40


def fit_polynomial(
    function: Callable[[np.ndarray], np.ndarray],
    low: float,
    high: float,
    degree: int,
    centre: float,
    pins: Sequence[tuple[float, float]] = (),
    weight: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Nearly the best polynomial of ``degree`` on ``[low, high]`` in the greatest weighted error.

    Lawson's algorithm: least squares, each point's weight multiplied by its error until the errors level out.
    ``pins`` are points ``(t, value)`` that the polynomial passes through exactly.

    Returns
    -------
    float64 array ``(degree + 1,)``: ascending powers of ``t - centre``.
    """
    z = np.cos(np.pi * (np.arange(NODES) + 0.5) / NODES)
    z = np.concatenate([z, [-1.0, 1.0]])
    middle, half = (high + low) / 2, (high - low) / 2
    t = middle + half * z
    target = function(t)
    scale = np.ones_like(t) if weight is None else weight(t)
    basis = np.polynomial.chebyshev.chebvander(z, degree)
    pinned = np.polynomial.chebyshev.chebvander(np.array([(p - middle) / half for p, _ in pins]), degree)
    values = np.array([value for _, value in pins])
    lawson = np.full(len(t), 1.0 / len(t))
    best, best_error = np.zeros(degree + 1), np.inf
    for _ in range(ITERATIONS):
        coefficients = _constrained_least_squares(basis, target, lawson * scale**2, pinned, values)
        error = np.abs(basis @ coefficients - target) * scale
        if error.max() < best_error:
            best, best_error = coefficients, error.max()
        if error.max() < 1e-15:
            break
        lawson = lawson * error
        lawson /= lawson.sum()
        lawson = np.maximum(lawson, 1e-12)
    series = np.polynomial.Chebyshev(best, domain=[low, high])
    shifted = series.convert(kind=np.polynomial.Polynomial, domain=[-1, 1], window=[-1, 1])
    moved = shifted(np.polynomial.Polynomial([centre, 1.0])).coef
    return np.pad(moved, (0, degree + 1 - len(moved)))


def _constrained_least_squares(basis, target, weights, pinned, values) -> np.ndarray:
    """argmin sum weights * (basis @ c - target)**2 subject to pinned @ c = values."""
    size, pins = basis.shape[1], len(values)
    system = np.zeros((size + pins, size + pins))
    system[:size, :size] = 2 * basis.T @ (weights[:, None] * basis)
    system[:size, size:] = pinned.T
    system[size:, :size] = pinned
    right = np.concatenate([2 * basis.T @ (weights * target), values])
    return np.linalg.lstsq(system, right, rcond=None)[0][:size]
