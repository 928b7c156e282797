"""Search for the scale of least squared error, of many channels at once.

``mse`` tries ``s_max * 2^(-k/16)``, k = -16 ... 40, where ``s_max`` puts the largest value on the largest grid value,
then narrows the best bracket by golden-section search. The best scale of a Gaussian channel lies below ``s_max``:
clipping the few largest values costs less than the finer steps gain. Channels of zeros are the caller's business.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tvm_qfp8.format import Layout

STEPS_PER_OCTAVE = 16
STEPS = np.arange(-16, 41)
GOLDEN_STEPS = 12
"""Scales tried within the bracket, which shrinks from 1/8 to 1/1000 octave: finer changes no measurable error."""

MIN_SCALE = np.float32(2.0**-126)
"""Smallest normal float32; its reciprocal is finite."""

BLOCK = 1 << 17
"""Values of a block, which stay in the second-level cache through all scales."""

_GOLDEN = (5**0.5 - 1) / 2

Error = Callable[[NDArray[np.float32]], NDArray[np.float64]]
"""Scales ``(channels,)`` to squared errors ``(channels,)``."""


def direct_error(magnitude: NDArray[np.float32], layout: Layout) -> Error:
    """Squared error of rounding every value of ``(channels, values)``, summed in float64."""
    kernel, lanes = _rounding_error()
    channels, length = magnitude.shape
    padded = np.zeros((channels, -(-length // lanes) * lanes), np.float32)  # zeros have no error
    padded[:, :length] = magnitude
    mantissa = layout.mantissa_bits
    numbers = float(layout.max_grid), (127 + mantissa) << 23, (23 - mantissa) << 23

    def error(scales: NDArray[np.float32]) -> NDArray[np.float64]:
        total = np.empty(channels)
        kernel(*numbers, padded, scales, total)
        return total

    return error


@functools.cache
def _rounding_error() -> tuple[Callable, int]:
    """The kernel, compiled when it is first needed, and the number that divides the lengths it takes."""
    from tvm_qfp8.native_kernel import compile_native
    from tvm_qfp8.topi.rounding_error import LANES, rounding_error

    return compile_native(lambda _isa: rounding_error()), LANES


def sorted_error(magnitude: NDArray[np.float64], layout: Layout) -> Error:
    """Squared error of a sorted sample, from sums over the values that fall to each code.

    With n, S1 and S2 the count, sum and sum of squares of the values rounded to grid value g, their squared error at
    scale s is ``S2 - 2 g s S1 + (g s)^2 n``: 128 or 256 binary searches instead of one rounding per value.
    """
    grid = layout.grid[: layout.magnitudes].astype(np.float64)
    middles = (grid[1:] + grid[:-1]) / 2
    sums = np.concatenate([[0.0], np.cumsum(magnitude)])
    squares = float(np.sum(magnitude * magnitude))

    def error(scales: NDArray[np.float32]) -> NDArray[np.float64]:
        total = np.empty(len(scales))
        for i, scale in enumerate(scales.astype(np.float64)):
            edges = np.concatenate([[0], np.searchsorted(magnitude, middles * scale), [len(magnitude)]])
            levels = grid * scale
            total[i] = squares + np.dot(levels, levels * np.diff(edges) - 2 * np.diff(sums[edges]))
        return total

    return error


def _max_scale(largest: NDArray[np.float32], layout: Layout) -> NDArray[np.float32]:
    return np.maximum(largest / np.float32(layout.max_grid), MIN_SCALE)


def search_max(_error: Error, largest: NDArray[np.float32], layout: Layout) -> NDArray[np.float32]:
    """The largest value on the largest grid value."""
    return _max_scale(largest, layout)


def search_mse(error: Error, largest: NDArray[np.float32], layout: Layout) -> NDArray[np.float32]:
    """Grid of steps, then golden-section search between the neighbours of the best step."""
    largest_scale = _max_scale(largest, layout).astype(np.float64)

    def scale_at(step: NDArray[np.float64]) -> NDArray[np.float32]:
        return np.maximum((largest_scale * np.exp2(-step / STEPS_PER_OCTAVE)).astype(np.float32), MIN_SCALE)

    best = _Best(len(largest))
    with np.errstate(over="ignore"):
        for k in STEPS:
            best.offer(np.full(len(largest), float(k)), error(scale_at(np.array(float(k)))))
        _golden_section(lambda step: error(scale_at(step)), best)
    return scale_at(best.step)


def search_integer(error: Error, largest: NDArray[np.float32], layout: Layout) -> NDArray[np.float32]:
    """The power of two of least error within the range that ``mse`` searches."""
    exponent = np.floor(np.log2(_max_scale(largest, layout).astype(np.float64)))
    best = _Best(len(largest))
    with np.errstate(over="ignore"):
        for k in range(-1, 4):
            scales = np.maximum(np.exp2(exponent - k).astype(np.float32), MIN_SCALE)
            best.offer(exponent - k, error(scales))
    return np.maximum(np.exp2(best.step).astype(np.float32), MIN_SCALE)


SEARCHES = {"mse": search_mse, "max": search_max, "integer": search_integer}


class _Best:
    """Step of least error of every channel; the first one offered wins a tie."""

    def __init__(self, channels: int) -> None:
        self.step = np.zeros(channels)
        self.error = np.full(channels, np.inf)

    def offer(self, step: NDArray[np.float64], error: NDArray[np.float64]) -> None:
        better = error < self.error
        self.step = np.where(better, step, self.step)
        self.error = np.where(better, error, self.error)


def _golden_section(error: Callable, best: _Best) -> None:
    """Narrow the bracket one step either side of ``best``, all channels at once, one new scale each per turn."""
    low, high = np.maximum(best.step - 1, STEPS[0]), np.minimum(best.step + 1, STEPS[-1])
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    left_error, right_error = error(left), error(right)
    best.offer(left, left_error)
    best.offer(right, right_error)
    for _ in range(GOLDEN_STEPS - 2):
        keep_left = left_error <= right_error
        low, high = np.where(keep_left, low, left), np.where(keep_left, right, high)
        probe = np.where(keep_left, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        probe_error = error(probe)
        best.offer(probe, probe_error)
        left, right = np.where(keep_left, probe, right), np.where(keep_left, left, probe)
        left_error, right_error = (
            np.where(keep_left, probe_error, right_error),
            np.where(keep_left, left_error, probe_error),
        )
