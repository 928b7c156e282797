"""What quantization does to a linear operator's output: the bias correction and the SQNR."""

from __future__ import annotations

from typing import Any

import numpy as np

from tvm_qfp8.calibration.linear import Linear


class OutputError:
    """Mean and energy of (quantized - float32) output of a linear operator, before its bias.

    Sums over samples in float64; one sample's pixels or tokens are summed in float32.
    """

    def __init__(self, linear: Linear) -> None:
        self._linear = linear
        self._rows = 0
        self._total: Any = 0.0
        self._error = self._signal = 0.0

    def add(self, exact: np.ndarray, rounded: np.ndarray, tokens: np.ndarray | None) -> None:
        """Add one sample's outputs in the operator's own layout; ``tokens`` picks rows."""
        exact = self._linear.rows(exact)
        difference = self._linear.rows(rounded) - exact
        if tokens is not None:
            exact, difference = exact[tokens], difference[tokens]
        self._rows += len(exact)
        self._total = self._total + (np.ones(len(exact), np.float32) @ difference).astype(np.float64)
        self._error += float(np.vdot(difference, difference))
        self._signal += float(np.vdot(exact, exact))

    def correction(self) -> np.ndarray:
        """Mean difference, float32 ``(out_channels,)``, to be taken off the bias."""
        return (self._total / self._rows).astype(np.float32)

    def sqnr_db(self) -> float:
        """SQNR of the corrected output: taking the mean off takes rows * mean^2 off the error."""
        error = self._error - self._rows * float(np.square(self._total / self._rows).sum())
        return float(10 * np.log10(self._signal / error)) if error > 0 else float("inf")
