"""Weights that make up for the error of their input: least squares towards the float32 output.

A quantized layer reads ``q`` where the float32 one reads ``x``: its own rounding of the activation and all errors of
earlier layers lie between. The part of that error which is linear in ``q`` can be taken off by other weights::

    v = argmin |x w - q v|^2 + r |v - w|^2 = w + (H + r I)^-1 C w,   H = cov(q, q), C = cov(q, x - q)

Samples are few and pixels alike, so a small ridge ``r`` fits noise, and how small differs from layer to layer: it is
the one that serves best the samples it is not fitted on (two folds, every other sample), or none at all.
"""

from __future__ import annotations

import numpy as np

RIDGES = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1)
"""Of the mean of the covariance's diagonal, tried in this order until the error rises."""


class Moments:
    """Streaming covariances ``(groups, depth, depth)`` of a layer's input rows and their error."""

    def __init__(self, groups: int, depth: int) -> None:
        self.rows = 0
        self._sum, self._error_sum = np.zeros((2, groups, depth))
        self._products, self._cross = np.zeros((2, groups, depth, depth))

    def add(self, received: np.ndarray, exact: np.ndarray) -> None:
        """Rows ``(groups, rows, depth)`` of one sample, as the quantized and as the float32 layer gets them."""
        error = exact - received
        self.rows += received.shape[1]
        self._sum += received.sum(axis=1, dtype=np.float64)
        self._error_sum += error.sum(axis=1, dtype=np.float64)
        transposed = received.transpose(0, 2, 1)
        self._products += transposed @ received
        self._cross += transposed @ error

    def __add__(self, other: Moments) -> Moments:
        total = Moments(*self._sum.shape)
        for name, value in vars(self).items():
            setattr(total, name, value + getattr(other, name))
        return total

    def covariance(self) -> np.ndarray:
        """Of the received input, times the number of rows."""
        return self._products - self._sum[:, :, None] * (self._sum[:, None, :] / max(self.rows, 1))

    def pull(self, weight: np.ndarray) -> np.ndarray:
        """``C w`` of every channel, for weights ``(groups, channels, depth)``."""
        cross = self._cross - self._sum[:, :, None] * (self._error_sum[:, None, :] / max(self.rows, 1))
        return weight @ cross.transpose(0, 2, 1)


def output_error(change: np.ndarray, covariance: np.ndarray, pull: np.ndarray) -> np.ndarray:
    """What ``change`` of the weights adds to each channel's squared output error, ``(groups, channels)``."""
    return np.einsum("gcd,gcd->gc", change @ covariance - 2 * pull, change, optimize=True)


def compensated(weight: np.ndarray, even: Moments, odd: Moments) -> np.ndarray:
    """Weights ``(groups, channels, depth)`` with the ridge of least error across folds, fitted on both."""
    folds = [(fold.covariance(), fold.pull(weight)) for fold in (even, odd)]
    best, least = None, 0.0
    for ridge in RIDGES:
        error = _held_out_error(folds, ridge)
        if error is None or error >= least:
            break
        best, least = ridge, error
    if best is None:
        return weight
    change = _change(folds[0][0] + folds[1][0], folds[0][1] + folds[1][1], best)
    return weight if change is None else (weight + change).astype(np.float32)


def _held_out_error(folds: list[tuple[np.ndarray, np.ndarray]], ridge: float) -> float | None:
    """Change of the squared error of both folds, each with the weights fitted on the other."""
    total = 0.0
    for fitted, held_out in (folds, folds[::-1]):
        change = _change(*fitted, ridge)
        if change is None:
            return None
        total += float(output_error(change, *held_out).sum())
    return total


def _change(covariance: np.ndarray, pull: np.ndarray, ridge: float) -> np.ndarray | None:
    """``(H + r I)^-1 C w``; None where nothing varies."""
    mean = np.einsum("gii->g", covariance) / covariance.shape[1]
    if not np.isfinite(mean).all() or mean.max() <= 0:
        return None
    damping = ridge * np.maximum(mean, mean.max() * 1e-9)
    damped = covariance + np.eye(covariance.shape[1]) * damping[:, None, None]
    return np.linalg.solve(damped, pull.transpose(0, 2, 1)).transpose(0, 2, 1)
