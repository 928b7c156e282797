"""What quantization does to a linear operator's output: the bias correction and the SQNR."""

from __future__ import annotations

from typing import Any

import numpy as np

from tvm_qfp8.calibration.linear import Linear

SMALLEST_ROW = 2.0**-30
"""Of the mean energy of rows."""


class OutputError:
    """Mean and energy of (quantized - float32) output of a linear operator, before its bias.

    Sums over samples in float64; one sample's pixels or tokens are summed in float32. With ``relative`` the mean
    minimises the error relative to each row's energy: a few tokens may be a thousand times as large as the rest, and
    what corrects them would spoil these.
    """

    def __init__(self, linear: Linear, relative: bool = False) -> None:
        self._linear, self._relative = linear, relative
        self._rows = 0
        self._weight = 0.0
        self._weighted: Any = 0.0
        self._total: Any = 0.0
        self._error = self._signal = 0.0

    def add(self, exact: np.ndarray, rounded: np.ndarray, tokens: np.ndarray | None) -> None:
        """Add one sample's outputs in the operator's own layout; ``tokens`` picks rows."""
        exact = self._linear.rows(exact)
        difference = self._linear.rows(rounded) - exact
        if tokens is not None:
            exact, difference = exact[tokens], difference[tokens]
        total = (np.ones(len(exact), np.float32) @ difference).astype(np.float64)
        weights = row_weights(exact) if self._relative else np.ones(len(exact))
        self._rows += len(exact)
        self._total = self._total + total
        self._weight += float(weights.sum())
        self._weighted = self._weighted + (weights @ difference if self._relative else total)
        self._error += float(np.vdot(difference, difference))
        self._signal += float(np.vdot(exact, exact))

    def correction(self) -> np.ndarray:
        """Mean difference, float32 ``(out_channels,)``, to be taken off the bias."""
        return (self._weighted / self._weight).astype(np.float32)

    def sqnr_db(self) -> float:
        """SQNR of the corrected output, from the sums: |e - c|^2 = |e|^2 - 2 c e + |c|^2."""
        correction = self._weighted / self._weight
        error = self._error + float(correction @ (self._rows * correction - 2 * self._total))
        return float(10 * np.log10(self._signal / error)) if error > 0 else float("inf")


def row_weights(rows: np.ndarray) -> np.ndarray:
    """The inverse of each row's energy, float64 ``(rows,)``; of rows that are next to nothing that of a small one."""
    energy = np.square(rows, dtype=np.float64).sum(axis=-1)
    floor = float(energy.mean()) * SMALLEST_ROW if energy.size else 0.0
    return 1 / np.maximum(energy, floor or 1.0)
