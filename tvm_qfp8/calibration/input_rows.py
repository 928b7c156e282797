"""The rows that a layer multiplies its weights with, and their moments over calibration samples."""

from __future__ import annotations

import numpy as np

from tvm_qfp8.calibration.compensation import Moments
from tvm_qfp8.calibration.convolution import input_windows
from tvm_qfp8.calibration.linear import Linear
from tvm_qfp8.calibration.output_error import row_weights
from tvm_qfp8.calibration.plan import ActivationQuantization

ROWS_PER_COLUMN = 8
"""Input rows for each column of the covariance; more change no measurable error."""


class InputRows:
    """Moments of a layer's input patches as ``activation`` (if given) rounds them, even and odd samples apart."""

    def __init__(
        self, linear: Linear, samples: int, activation: ActivationQuantization | None = None, seed: int = 0
    ) -> None:
        self.linear, self._activation, self._rng = linear, activation, np.random.default_rng(seed)
        groups, depth = geometry(linear)
        self._most = -(-max(ROWS_PER_COLUMN * depth, 4096) // samples)
        self._samples = 0
        self.even, self.odd = Moments(groups, depth), Moments(groups, depth)

    def add(self, received: np.ndarray, exact: np.ndarray, tokens: np.ndarray | None) -> None:
        """One sample's input in the quantized and the float32 flow; ``tokens`` picks rows of a matmul."""
        seed = int(self._rng.integers(1 << 31))  # the same rows of both
        activation, weights = self._activation, None
        if activation is not None and activation.changes_weights:
            if not activation.by_rows:
                received = activation.rounded(received)
            exact = activation.prepared(exact)
        rows = [
            _patches(self.linear, x, tokens, self._most, np.random.default_rng(seed))
            for x in (received, exact)
        ]
        # Rounded after the picking where that is the same: with many samples few rows of each are picked.
        if activation is not None and (activation.by_rows or activation.factors is None):
            rows[0] = activation.rounded(rows[0])
        if activation is not None and activation.by_rows:
            weights = row_weights(rows[1][0])  # a token counts as much as any other, however large it is
        (self.odd if self._samples % 2 else self.even).add(rows[0], rows[1], weights)
        self._samples += 1


def geometry(linear: Linear) -> tuple[int, int]:
    """(groups, reduction steps of one output) of a matrix or a convolution."""
    weight, attrs = linear.weight, linear.step.attrs
    groups = 1 if linear.step.operator == "relax.matmul" else int(attrs.groups)
    outputs = weight.shape[linear.weight_axis]
    return groups, weight.size // outputs


def as_rows(linear: Linear, weight: np.ndarray) -> np.ndarray:
    """A weight as ``(groups, channels of a group, depth)``."""
    groups, depth = geometry(linear)
    return np.moveaxis(weight, linear.weight_axis, 0).reshape(groups, -1, depth)


def from_rows(linear: Linear, rows: np.ndarray) -> np.ndarray:
    """The inverse of ``as_rows``."""
    shape = np.moveaxis(linear.weight, linear.weight_axis, 0).shape
    return np.moveaxis(rows.reshape(shape), 0, linear.weight_axis)


def _patches(
    linear: Linear, x: np.ndarray, tokens: np.ndarray | None, most: int, rng: np.random.Generator
) -> np.ndarray:
    """At most ``most`` input rows of one sample, float32 ``(groups, rows, depth)``, in the weight's order."""
    if linear.step.operator == "relax.matmul":
        rows = x.reshape(-1, x.shape[-1])
        rows = rows[tokens] if tokens is not None else rows
        return rows[_some(len(rows), most, rng)][None]
    _, height, width, _ = linear.weight.shape
    windows = input_windows(linear.step.attrs, x, (height, width))
    batch, out_h, out_w, kernel_h, kernel_w, channels = windows.shape
    index = np.unravel_index(_some(batch * out_h * out_w, most, rng), (batch, out_h, out_w))
    groups, depth = geometry(linear)
    picked = windows[index].reshape(len(index[0]), kernel_h * kernel_w, groups, channels // groups)
    return np.ascontiguousarray(picked.transpose(2, 0, 1, 3)).reshape(groups, -1, depth)


def _some(count: int, most: int, rng: np.random.Generator) -> np.ndarray:
    return np.arange(count) if count <= most else rng.choice(count, most, replace=False)
