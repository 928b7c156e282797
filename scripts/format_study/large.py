"""Matrices of a large network rounded on data: tvm_qfp8/calibration/rounding.py without its compensation, made fast.

Errors and moments are float32, layers that read the same rows share their moments, and a column lies together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from scipy.linalg import cholesky, lapack

from tvm_qfp8.calibration.rounding import DAMPING, Nearest, RoundedRows

COLUMNS, CHANNELS = 32, 4096
"""Rounded before those behind them make up for it, and at a time."""


class Received:
    """What the layers that read one variable receive, and what they would in float32, ``(rows, depth)``."""

    def __init__(self, received: np.ndarray, exact: np.ndarray) -> None:
        centered = (received - received.mean(0)).T
        self._covariance, self._cross = centered @ centered.T, centered @ (exact - received)

    def rounded(self, weight: np.ndarray, candidates: Sequence[RoundedRows]) -> np.ndarray:
        """``weight`` ``(channels, depth)`` on that grid of ``candidates`` that errs least, as `least_output_error`."""
        tried = []
        for candidate in candidates:
            (values,), (scale,) = candidate.values, candidate.scale
            parts = [slice(i, i + CHANNELS) for i in range(0, len(weight), CHANNELS)]
            found = [self._better(weight[p], values[p], scale[p], candidate.nearest) for p in parts]
            rows, errors = zip(*found, strict=True)
            tried.append((sum(errors), len(tried), rows))
        return np.concatenate(min(tried)[2])

    def _better(
        self, weight: np.ndarray, values: np.ndarray, scale: np.ndarray, nearest: Nearest
    ) -> tuple[np.ndarray, float]:
        """Of every channel ``values`` or what is rounded on data, and the sum of their relative errors."""
        found = self._by_columns(weight, scale, nearest)
        pull = weight @ self._cross.T
        errors = [self._error(rows - weight, pull) for rows in (values, found)]
        energy = self._error(weight, np.zeros_like(pull))
        used = energy > 0
        relative = float((np.minimum(*errors)[used] / energy[used]).sum())
        return np.where((errors[1] < errors[0])[:, None], found, values), relative

    def _error(self, change: np.ndarray, pull: np.ndarray) -> np.ndarray:
        """As `output_error`, ``(channels,)``."""
        return np.asarray(np.einsum("cd,cd->c", change @ self._covariance - 2 * pull, change))

    @cached_property
    def _factor(self) -> tuple[np.ndarray, np.ndarray]:
        """``order`` and ``upper`` of `ColumnRounding`."""
        diagonal = np.diagonal(self._covariance)
        order = np.argsort(-diagonal, kind="stable")
        damped = self._covariance[np.ix_(order, order)].astype(np.float64)
        damped += np.eye(len(damped)) * (DAMPING * diagonal.mean())
        lower = cholesky(damped[::-1, ::-1], lower=True)
        inverse, _ = lapack.dtrtri(lower, lower=1)
        return order, np.ascontiguousarray(inverse[::-1, ::-1], np.float32)

    def _by_columns(self, weight: np.ndarray, scale: np.ndarray, nearest: Nearest) -> np.ndarray:
        """As `ColumnRounding.rounded`."""
        order, upper = self._factor
        left = np.ascontiguousarray(weight.T[order])
        depth = len(left)
        for start in range(0, depth, COLUMNS):
            end = min(start + COLUMNS, depth)
            errors = np.empty_like(left[start:end])
            for i in range(start, end):
                values = nearest(left[i], scale)
                errors[i - start] = error = (left[i] - values) / upper[i, i]
                left[i] = values
                left[i + 1 : end] -= upper[i, i + 1 : end, None] * error
            left[end:] -= upper[start:end, end:].T @ errors
        return left[np.argsort(order)].T
