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


BLOCK_ROWS = 1024
"""Rows whose products are summed in float32; as many as repay adding them to the float64 sums."""


class Moments:
    """Streaming covariances ``(groups, depth, depth)`` of a layer's input rows and their error."""

    def __init__(self, groups: int, depth: int) -> None:
        self.weight = 0.0
        self._sum, self._error_sum = np.zeros((2, groups, depth))
        self._products, self._cross = np.zeros((2, groups, depth, depth))
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, received: np.ndarray, exact: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Rows ``(groups, rows, depth)`` of one sample, as the quantized and as the float32 layer gets them.

        ``weights`` float64 ``(rows,)`` say how much each counts; by default 1.
        """
        rows = received.shape[1]
        self._pending.append((received, exact - received, np.ones(rows) if weights is None else weights))
        if sum(part[0].shape[1] for part in self._pending) >= BLOCK_ROWS:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        received, error = (np.concatenate([part[i] for part in self._pending], axis=1) for i in range(2))
        weights = np.concatenate([part[2] for part in self._pending])
        self._pending = []
        self.weight += float(weights.sum())
        self._sum += weights @ received
        self._error_sum += weights @ error
        root = np.sqrt(weights).astype(np.float32)[:, None]
        received, error = received * root, error * root
        transposed = received.transpose(0, 2, 1)
        self._products += transposed @ received
        self._cross += transposed @ error

    def __add__(self, other: Moments) -> Moments:
        total = Moments(*self._sum.shape)
        for part in (self, other):
            part._flush()
            total.weight += part.weight
            for name in ("_sum", "_error_sum", "_products", "_cross"):
                setattr(total, name, getattr(total, name) + getattr(part, name))
        return total

    def covariance(self) -> np.ndarray:
        """Of the received input, times the rows' weight."""
        self._flush()
        return self._products - self._sum[:, :, None] * (self._sum[:, None, :] / (self.weight or 1.0))

    def pull(self, weight: np.ndarray) -> np.ndarray:
        """``C w`` of every channel, for weights ``(groups, channels, depth)``."""
        self._flush()
        cross = self._cross - self._sum[:, :, None] * (self._error_sum[:, None, :] / (self.weight or 1.0))
        return weight @ cross.transpose(0, 2, 1)


def output_error(change: np.ndarray, covariance: np.ndarray, pull: np.ndarray) -> np.ndarray:
    """What ``change`` of the weights adds to each channel's squared output error, ``(groups, channels)``."""
    return np.einsum("gcd,gcd->gc", change @ covariance - 2 * pull, change, optimize=True)


def compensated(weight: np.ndarray, even: Moments, odd: Moments) -> np.ndarray:
    """Weights ``(groups, channels, depth)`` with the ridge of least error across folds, fitted on both."""
    pulls = [fold.pull(weight) for fold in (even, odd)]
    # Ridges lie far apart: float32 tells which is best, of numbers near 1.
    unit = even.covariance().max() or 1.0
    folds = [
        ((fold.covariance() / unit).astype(np.float32), (pull / unit).astype(np.float32))
        for fold, pull in zip((even, odd), pulls, strict=True)
    ]
    best, least = None, 0.0
    for ridge in RIDGES:
        error = _held_out_error(folds, ridge)
        if error is None or error >= least:
            break
        best, least = ridge, error
    if best is None:
        return weight
    change = _change(even.covariance() + odd.covariance(), pulls[0] + pulls[1], best)
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
    damped = covariance.copy()
    np.einsum("gii->gi", damped)[:] += ridge * np.maximum(mean, mean.max() * 1e-9)[:, None]
    return np.linalg.solve(damped, pull.transpose(0, 2, 1)).transpose(0, 2, 1)
