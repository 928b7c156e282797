"""Data-driven rounding of weights: what is minimised is a layer's output error, not the weights' own.

First the weights are changed to make up for the error of the layer's input (``compensation``), then rounded: rounding
the weights of one output channel by ``dw`` changes the layer's output, its mean apart (which the bias correction takes
off), by ``dw^T H dw`` on the calibration data, with ``H`` the covariance of the layer's input. The columns are rounded
one after the other, and what each loses is made up for by those not rounded yet: Frantar et al., "GPTQ" (ICLR 2023),
algorithm 1, here onto the QFP8 grid with every channel's scale fixed before. A channel whose output nearest rounding
brings closer to the float32 output keeps it, so no channel gets worse on these data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tvm_qfp8.bias_search import MIN_SCALE
from tvm_qfp8.calibration.compensation import Moments, compensated, output_error
from tvm_qfp8.calibration.convolution import input_windows
from tvm_qfp8.calibration.linear import Linear
from tvm_qfp8.calibration.output_error import row_weights
from tvm_qfp8.calibration.plan import ActivationQuantization
from tvm_qfp8.format import Layout, encode, get_layout, round_to_grid
from tvm_qfp8.quantize import QTensor

ROWS_PER_COLUMN = 8
"""Input rows for each column of the covariance; more change no measurable error."""

DAMPING = 0.01
"""Of the mean of the covariance's diagonal, added to it."""

LAZY_COLUMNS = 128
LARGEST_DEPTH = 4096
"""Deeper layers are rounded to nearest: the covariance is inverted at a cost of depth^3."""

SHALLOW_DEPTH = 64
"""Up to so many weights to a channel the error jumps from scale to scale, and many scales are tried."""

ONE_SCALE = np.ones(1, np.float32)
SCALES = np.exp2(np.linspace(-0.5, 0.75, 81)).astype(np.float32)
"""Of that of least squared error of the weights."""


class InputRows:
    """Moments of a layer's input patches as ``activation`` (if given) rounds them, even and odd samples apart."""

    def __init__(
        self, linear: Linear, samples: int, activation: ActivationQuantization | None = None, seed: int = 0
    ) -> None:
        self.linear, self._activation, self._rng = linear, activation, np.random.default_rng(seed)
        groups, depth = _geometry(linear)
        self._most = -(-max(ROWS_PER_COLUMN * depth, 4096) // samples)
        self._samples = 0
        self.even, self.odd = Moments(groups, depth), Moments(groups, depth)

    def add(self, received: np.ndarray, exact: np.ndarray, tokens: np.ndarray | None) -> None:
        """One sample's input in the quantized and the float32 flow; ``tokens`` picks rows of a matmul."""
        seed = int(self._rng.integers(1 << 31))  # the same rows of both
        activation, weights = self._activation, None
        if activation is not None and activation.factors is not None:
            if not activation.by_rows:
                received = activation.rounded(received)
            exact = exact * activation.factors
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


def can_round(linear: Linear) -> bool:
    """Matrices and convolutions (OHWI) up to a depth; a transposed convolution is rounded to nearest."""
    operator, attrs = linear.step.operator, linear.step.attrs
    plain = operator == "relax.matmul" or (operator == "relax.nn.conv2d" and attrs.kernel_layout == "OHWI")
    return plain and _geometry(linear)[1] <= LARGEST_DEPTH


def rounded_on_data(linear: Linear, nearest: Sequence[QTensor], inputs: InputRows) -> QTensor:
    """Codes, and in shallow layers scales, of small output error, in the layout that errs least with them.

    Channels count alike: a layer's output error is the sum of those of its channels, each relative to what the channel
    puts out.

    Parameters
    ----------
    linear : Linear
        With the weight that meets the activation as it is rounded: divided by its factors.
    nearest : sequence of QTensor
        The weight rounded to nearest, in each layout that it may have.
    inputs : InputRows

    Returns
    -------
    QTensor; the first of ``nearest`` itself where the inputs do not tell.
    """
    exact = _as_rows(linear, linear.weight)
    total = inputs.even + inputs.odd
    covariance, pull = total.covariance(), total.pull(exact)
    columns = ColumnRounding.of(covariance)
    if columns is None:
        return nearest[0]
    aim = compensated(exact, inputs.even, inputs.odd)
    energy = output_error(exact, covariance, np.zeros_like(pull))
    used = energy > 0
    best, least = nearest[0], np.inf
    for weight in nearest:
        values, scale, error = _least_error(
            columns,
            aim,
            _as_rows(linear, weight.dequantize()),
            np.asarray(weight.scale, np.float32).reshape(exact.shape[:2]),
            get_layout(weight.layout),
            lambda rounded: output_error(rounded - exact, covariance, pull),
        )
        relative = float((error[used] / energy[used]).sum())
        if relative < least:
            codes = encode(
                _from_rows(linear, values), scale.reshape(-1), get_layout(weight.layout), weight.axis
            )
            best, least = replace(weight, codes=codes, scale=scale.reshape(-1)), relative
    return best


def _least_error(
    columns: ColumnRounding,
    aim: np.ndarray,
    nearest: np.ndarray,
    scale: np.ndarray,
    layout: Layout,
    error_of: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, scales and errors of every channel: of ``nearest``, or of ``aim`` rounded at the best scale tried."""
    values, chosen, least = nearest, scale, error_of(nearest)
    for factor in SCALES if aim.shape[-1] <= SHALLOW_DEPTH else ONE_SCALE:
        tried = np.maximum(scale * factor, MIN_SCALE)
        found = columns.rounded(aim, tried, layout)
        error = error_of(found)
        better = error < least
        least, chosen = np.where(better, error, least), np.where(better, tried, chosen)
        values = np.where(better[..., None], found, values)
    return values, chosen, least


@dataclass(frozen=True)
class ColumnRounding:
    """Algorithm 1 of GPTQ for all groups and channels at once, for inputs of one covariance.

    Attributes
    ----------
    order : int array ``(groups, depth)``
        Columns in the order of rounding: the largest variance first.
    upper : float32 ``(groups, depth, depth)``
        Cholesky factor of the inverse covariance, upper triangular, columns in that order.
    """

    order: np.ndarray
    upper: np.ndarray

    @classmethod
    def of(cls, covariance: np.ndarray) -> ColumnRounding | None:
        """For a float64 covariance ``(groups, depth, depth)``; None where it is degenerate."""
        groups, depth, _ = covariance.shape
        diagonal = np.einsum("gii->gi", covariance)
        order = np.argsort(-diagonal, axis=1, kind="stable")
        mean = diagonal.mean(axis=1)
        if not (np.isfinite(mean).all() and (mean > 0).any()):
            return None
        pick = np.arange(groups)[:, None]
        sorted_covariance = covariance[pick[:, :, None], order[:, :, None], order[:, None, :]]
        damped = (
            sorted_covariance + np.eye(depth) * (DAMPING * np.maximum(mean, mean.max() * 1e-9))[:, None, None]
        )
        try:
            inverse = np.linalg.inv(damped)
            upper = np.linalg.cholesky((inverse + inverse.transpose(0, 2, 1)) / 2).transpose(0, 2, 1)
        except np.linalg.LinAlgError:
            return None
        return cls(order, upper.astype(np.float32))

    def rounded(self, weight: np.ndarray, scale: np.ndarray, layout: Layout) -> np.ndarray:
        """Values on the grid times the scale.

        Parameters
        ----------
        weight : float32 ``(groups, channels, depth)``
        scale : float32 ``(groups, channels)``
        layout : Layout

        Returns
        -------
        float32 in the shape of ``weight``.
        """
        upper, depth = self.upper, weight.shape[-1]
        left = np.take_along_axis(weight, self.order[:, None, :], axis=2)
        result = np.empty_like(left)
        for start in range(0, depth, LAZY_COLUMNS):
            end = min(start + LAZY_COLUMNS, depth)
            block = left[:, :, start:end].copy()
            errors = np.empty_like(block)
            for i in range(end - start):
                column = start + i
                result[:, :, column] = _nearest(block[:, :, i], scale, layout)
                error = (block[:, :, i] - result[:, :, column]) / upper[:, column, column][:, None]
                block[:, :, i:] -= error[:, :, None] * upper[:, None, column, column:end]
                errors[:, :, i] = error
            left[:, :, end:] -= errors @ upper[:, start:end, end:]
        back = np.argsort(self.order, axis=1)
        return np.take_along_axis(result, back[:, None, :], axis=2)


def _nearest(values: np.ndarray, scale: np.ndarray, layout: Layout) -> np.ndarray:
    scaled = values / scale
    magnitude = np.minimum(np.abs(scaled), np.float32(layout.max_grid))
    return np.copysign(round_to_grid(np.ascontiguousarray(magnitude), layout), scaled) * scale


def _geometry(linear: Linear) -> tuple[int, int]:
    """(groups, reduction steps of one output)."""
    weight, attrs = linear.weight, linear.step.attrs
    groups = 1 if linear.step.operator == "relax.matmul" else int(attrs.groups)
    outputs = weight.shape[linear.weight_axis]
    return groups, weight.size // outputs


def _as_rows(linear: Linear, weight: np.ndarray) -> np.ndarray:
    """A weight as ``(groups, channels of a group, depth)``."""
    groups, depth = _geometry(linear)
    return np.moveaxis(weight, linear.weight_axis, 0).reshape(groups, -1, depth)


def _from_rows(linear: Linear, rows: np.ndarray) -> np.ndarray:
    """The inverse of ``_as_rows``."""
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
    groups, depth = _geometry(linear)
    picked = windows[index].reshape(len(index[0]), kernel_h * kernel_w, groups, channels // groups)
    return np.ascontiguousarray(picked.transpose(2, 0, 1, 3)).reshape(groups, -1, depth)


def _some(count: int, most: int, rng: np.random.Generator) -> np.ndarray:
    return np.arange(count) if count <= most else rng.choice(count, most, replace=False)
