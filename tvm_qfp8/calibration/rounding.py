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
from functools import partial

import numpy as np

from tvm_qfp8.bias_search import MIN_SCALE
from tvm_qfp8.calibration.compensation import compensated, output_error
from tvm_qfp8.calibration.input_rows import InputRows, as_rows, from_rows, geometry
from tvm_qfp8.calibration.linear import Linear
from tvm_qfp8.format import Layout, encode, get_layout, round_to_grid
from tvm_qfp8.quantize import QTensor

DAMPING = 0.01
"""Of the mean of the covariance's diagonal, added to it."""

LAZY_COLUMNS = 128
INVERTED_WHOLE = 64
"""Smaller triangles are not halved."""

LARGEST_DEPTH = 4096
"""Deeper layers are rounded to nearest: the covariance is inverted at a cost of depth^3."""

SHALLOW_DEPTH = 64
"""Up to so many weights to a channel the error jumps from scale to scale, and many scales are tried."""

VALUES_AT_ONCE = 1 << 17
"""Weights times scales that are tried together."""

ONE_SCALE = np.ones(1, np.float32)
SCALES = np.exp2(np.linspace(-0.5, 0.75, 81)).astype(np.float32)
"""Of that of least squared error of the weights."""

Nearest = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""``nearest(values, scale)``: float32 values of a grid times the scale; shapes broadcast."""


def can_round(linear: Linear) -> bool:
    """Matrices and convolutions (OHWI) up to a depth; a transposed convolution is rounded to nearest."""
    operator, attrs = linear.step.operator, linear.step.attrs
    plain = operator == "relax.matmul" or (operator == "relax.nn.conv2d" and attrs.kernel_layout == "OHWI")
    return plain and geometry(linear)[1] <= LARGEST_DEPTH


@dataclass(frozen=True)
class RoundedRows:
    """A weight on a grid: float32 ``values`` ``(groups, channels, depth)`` and ``scale`` ``(groups, channels)``."""

    values: np.ndarray
    scale: np.ndarray
    nearest: Nearest


def rounded_on_data(linear: Linear, nearest: Sequence[QTensor], inputs: InputRows) -> QTensor:
    """Codes, and in shallow layers scales, of small output error, in the layout that errs least with them.

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
    shape = as_rows(linear, linear.weight).shape[:2]
    found = least_output_error(
        linear,
        [
            RoundedRows(
                as_rows(linear, weight.dequantize()),
                np.asarray(weight.scale, np.float32).reshape(shape),
                partial(_nearest, layout=get_layout(weight.layout)),
            )
            for weight in nearest
        ],
        inputs,
    )
    if found is None:
        return nearest[0]
    index, rows = found
    weight, scale = nearest[index], rows.scale.reshape(-1)
    codes = encode(from_rows(linear, rows.values), scale, get_layout(weight.layout), weight.axis)
    return replace(weight, codes=codes, scale=scale)


def least_output_error(
    linear: Linear, candidates: Sequence[RoundedRows], inputs: InputRows, search_scales: bool = True
) -> tuple[int, RoundedRows] | None:
    """Which of ``candidates``, each a grid with the weight rounded to nearest on it, errs least, and how it is rounded.

    Channels count alike: a layer's output error is the sum of those of its channels, each relative to what the channel
    puts out. None where the inputs do not tell. Without ``search_scales`` no channel's scale changes.
    """
    exact = as_rows(linear, linear.weight)
    total = inputs.even + inputs.odd
    covariance, pull = total.covariance(), total.pull(exact)
    del total  # the largest arrays of all
    columns = ColumnRounding.of(covariance)
    if columns is None:
        return None
    aim = compensated(exact, inputs.even, inputs.odd)
    factors = SCALES if search_scales and exact.shape[-1] <= SHALLOW_DEPTH else ONE_SCALE
    energy = output_error(exact, covariance, np.zeros_like(pull))
    used = energy > 0
    best, least = (0, candidates[0]), np.inf

    def error_of(values: np.ndarray) -> np.ndarray:
        repeated = (1, values.shape[1] // exact.shape[1], 1)
        return output_error(values - np.tile(exact, repeated), covariance, np.tile(pull, repeated))

    for index, candidate in enumerate(candidates):
        rows, error = _least_of_channels(columns, aim, candidate, factors, error_of)
        relative = float((error[used] / energy[used]).sum())
        if relative < least:
            best, least = (index, rows), relative
    return best


def _least_of_channels(
    columns: ColumnRounding,
    aim: np.ndarray,
    start: RoundedRows,
    factors: np.ndarray,
    error_of: Callable[[np.ndarray], np.ndarray],
) -> tuple[RoundedRows, np.ndarray]:
    """The best of every channel, and its error: as it starts, or ``aim`` rounded at one of the scales.

    ``error_of(values)`` has all channels, or all of them again and again.
    """
    values, scale, least = start.values, start.scale, error_of(start.values)
    groups, channels, depth = aim.shape
    at_once = max(1, VALUES_AT_ONCE // aim.size)
    for first in range(0, len(factors), at_once):
        some = factors[first : first + at_once]
        tried = np.maximum(start.scale[:, None] * some[:, None], MIN_SCALE)
        # All scales side by side, as if they were channels.
        found = columns.rounded(np.tile(aim, (1, len(some), 1)), tried.reshape(groups, -1), start.nearest)
        errors = error_of(found).reshape(tried.shape)
        index = np.argmin(np.where(np.isnan(errors), np.inf, errors), axis=1)[:, None]
        error, its_scale = (np.take_along_axis(a, index, 1)[:, 0] for a in (errors, tried))
        rows = found.reshape(groups, len(some), channels, depth)
        rows = np.take_along_axis(rows, index[..., None], 1)[:, 0]
        better = error < least
        least, scale = np.where(better, error, least), np.where(better, its_scale, scale)
        values = np.where(better[..., None], rows, values)
    return replace(start, values=values, scale=scale), least


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
        diagonal = np.einsum("gii->gi", covariance)
        order = np.argsort(-diagonal, axis=1, kind="stable")
        mean = diagonal.mean(axis=1)
        if not (np.isfinite(mean).all() and (mean > 0).any()):
            return None
        pick = np.arange(len(covariance))[:, None]
        damped = covariance[pick[:, :, None], order[:, :, None], order[:, None, :]]
        np.einsum("gii->gi", damped)[:] += DAMPING * np.maximum(mean, mean.max() * 1e-9)[:, None]
        # H = R R^T with R upper triangular, a Cholesky factor from the last column to the first: H^-1 = R^-T R^-1.
        try:
            reverse = np.linalg.cholesky(damped[:, ::-1, ::-1])
        except np.linalg.LinAlgError:
            return None
        return cls(order, np.triu(_triangular_inverse(reverse)[:, ::-1, ::-1].astype(np.float32)))

    def rounded(self, weight: np.ndarray, scale: np.ndarray, nearest: Nearest) -> np.ndarray:
        """Values on the grid times the scale.

        Parameters
        ----------
        weight : float32 ``(groups, channels, depth)``
        scale : float32 ``(groups, channels)``
        nearest : Nearest

        Returns
        -------
        float32 in the shape of ``weight``.
        """
        upper, depth = self.upper, weight.shape[-1]
        # Columns first, so that one lies together; each becomes its rounded values in place.
        left = np.take_along_axis(weight.transpose(0, 2, 1), self.order[:, :, None], axis=1)
        for start in range(0, depth, LAZY_COLUMNS):
            end = min(start + LAZY_COLUMNS, depth)
            errors = np.empty_like(left[:, start:end])
            for i in range(start, end):
                values = nearest(left[:, i], scale)
                errors[:, i - start] = error = (left[:, i] - values) / upper[:, i, i, None]
                left[:, i] = values
                left[:, i + 1 : end] -= upper[:, i, i + 1 : end, None] * error[:, None]
            left[:, end:] -= upper[:, start:end, end:].transpose(0, 2, 1) @ errors
        back = np.argsort(self.order, axis=1)
        return np.take_along_axis(left, back[:, :, None], axis=1).transpose(0, 2, 1)


def _triangular_inverse(lower: np.ndarray) -> np.ndarray:
    """Of lower triangular matrices ``(groups, depth, depth)``, by halves; above the diagonal it is not quite zero."""
    half = lower.shape[1] // 2
    if half < INVERTED_WHOLE:
        return np.linalg.inv(lower)
    result = np.zeros_like(lower)
    first, last = _triangular_inverse(lower[:, :half, :half]), _triangular_inverse(lower[:, half:, half:])
    result[:, :half, :half], result[:, half:, half:] = first, last
    result[:, half:, :half] = -last @ (lower[:, half:, :half] @ first)
    return result


def _nearest(values: np.ndarray, scale: np.ndarray, layout: Layout) -> np.ndarray:
    scaled = values / scale
    magnitude = np.minimum(np.abs(scaled), np.float32(layout.max_grid))
    return np.copysign(round_to_grid(np.ascontiguousarray(magnitude), layout), scaled) * scale
