"""Choose the dynamic bias: the scale that loses least, per tensor or per channel.

``mse`` tries ``s_max * 2^(-k/16)``, k = -16 ... 40, where ``s_max`` puts the largest value on the largest grid value,
then narrows the best bracket by golden-section search. The best scale of a Gaussian channel lies below ``s_max``:
clipping the few largest values costs less than the finer steps gain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tvm_qfp8.errors import InputError
from tvm_qfp8.format import Layout, decode, encode, get_layout, real_float32, round_to_grid

STEPS_PER_OCTAVE = 16
STEPS = np.arange(-16, 41)
GOLDEN_STEPS = 12
"""The bracket of two steps of 1/16 octave shrinks to 1/5000 octave: a finer scale changes no measurable error."""

MIN_SCALE = np.float32(2.0**-126)
"""Smallest normal float32; its reciprocal is finite."""

_GOLDEN = (5**0.5 - 1) / 2
# Values per block: its four or five float arrays stay in the second-level cache through all scales.
_BLOCK = 1 << 14


@dataclass(frozen=True)
class QTensor:
    """A quantized tensor.

    Attributes
    ----------
    codes : uint8 array
        The codes, in the shape of the tensor.
    scale : float32 array
        ``()`` for one scale, ``(codes.shape[axis],)`` for one per channel.
    layout : str
        Name of the layout.
    axis : int or None
        The channel axis, not negative.
    """

    codes: NDArray[np.uint8]
    scale: NDArray[np.float32]
    layout: str
    axis: int | None = None

    def dequantize(self) -> NDArray[np.float32]:
        """The float32 numbers that the codes stand for."""
        return decode(self.codes, self.scale, self.layout, self.axis)


def quantize(
    x: ArrayLike, axis: int | None = None, layout: str | Layout = "E2M5", bias: str = "mse"
) -> QTensor:
    """Choose scales for ``x`` and encode it.

    Parameters
    ----------
    x : array of any real dtype
        Finite values.
    axis : int, optional
        Channel axis with a scale per channel; None for one scale.
    layout : str or Layout
        Name of a layout.
    bias : {"mse", "max", "integer"}
        Least squared error; largest value on the largest grid value; least squared error among powers of two
        (for hardware that only shifts). A channel of zeros gets scale 1.

    Raises
    ------
    InputError
        For NaN or infinite values, an unknown layout or bias, an axis that does not exist.
    """
    layout = get_layout(layout)
    values = real_float32(x)
    if axis is not None and not -values.ndim <= axis < values.ndim:
        raise InputError(f"axis {axis} does not exist in a tensor of shape {values.shape}")
    if bias not in _SEARCHES:
        raise InputError(f"bias {bias!r} is not known; use one of {', '.join(_SEARCHES)}")
    if not np.isfinite(values).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise InputError(f"{values[index]!s} at index {index} cannot be quantized; give finite values")
    axis = None if axis is None else axis % values.ndim
    rows = (
        values.reshape(1, -1)
        if axis is None
        else np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    )
    scales = _channel_scales(np.ascontiguousarray(rows), layout, _SEARCHES[bias])
    scale = scales.reshape(()) if axis is None else scales
    return QTensor(encode(values, scale, layout, axis), scale, layout.name, axis)


_Error = Callable[[NDArray[np.float32]], NDArray[np.float64]]
"""Scales ``(channels,)`` to squared errors ``(channels,)``."""


def _channel_scales(rows: NDArray[np.float32], layout: Layout, search: Callable) -> NDArray[np.float32]:
    """Best scale of every row of ``(channels, values)``, found for a cache-sized block of channels at a time."""
    channels, length = rows.shape
    scales = np.ones(channels, np.float32)
    if length == 0:
        return scales
    block = max(1, _BLOCK // length)
    for start in range(0, channels, block):
        part = rows[start : start + block]
        # What an unsigned layout clamps to zero is lost at every scale alike.
        magnitude = np.abs(part) if layout.signed else np.maximum(part, np.float32(0))
        largest = magnitude.max(axis=1)
        used = np.flatnonzero(largest)
        if used.size:
            error = _direct_error(magnitude[used], layout)
            scales[start + used] = search(error, largest[used], layout)
    return scales


def _direct_error(magnitude: NDArray[np.float32], layout: Layout) -> _Error:
    """Squared error of rounding every value of ``(channels, values)``, summed in float64."""

    def error(scales: NDArray[np.float32]) -> NDArray[np.float64]:
        total = np.zeros(len(scales))
        column = scales[:, None]
        factor = np.float32(1) / column
        for start in range(0, magnitude.shape[1], _BLOCK):
            part = magnitude[:, start : start + _BLOCK]
            scaled = part * factor
            np.minimum(scaled, np.float32(layout.max_grid), out=scaled)
            rounded = round_to_grid(scaled, layout)
            rounded *= column
            rounded -= part
            exact = rounded.astype(np.float64)
            total += np.einsum("ij,ij->i", exact, exact)
        return total

    return error


def _max_scale(largest: NDArray[np.float32], layout: Layout) -> NDArray[np.float32]:
    return np.maximum(largest / np.float32(layout.max_grid), MIN_SCALE)


def _search_max(_error: _Error, largest: NDArray[np.float32], layout: Layout) -> NDArray[np.float32]:
    return _max_scale(largest, layout)


def _search_mse(error: _Error, largest: NDArray[np.float32], layout: Layout) -> NDArray[np.float32]:
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


def _search_integer(error: _Error, largest: NDArray[np.float32], layout: Layout) -> NDArray[np.float32]:
    """The power of two of least error within the range that ``mse`` searches."""
    exponent = np.floor(np.log2(_max_scale(largest, layout).astype(np.float64)))
    best = _Best(len(largest))
    with np.errstate(over="ignore"):
        for k in range(-1, 4):
            scales = np.maximum(np.exp2(exponent - k).astype(np.float32), MIN_SCALE)
            best.offer(exponent - k, error(scales))
    return np.maximum(np.exp2(best.step).astype(np.float32), MIN_SCALE)


_SEARCHES = {"mse": _search_mse, "max": _search_max, "integer": _search_integer}


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


def select_activation(
    samples: ArrayLike, layouts: Sequence[str] = ("E2M5", "E3M4", "UE2M6", "UE3M5")
) -> tuple[str, float]:
    """The layout and scale of least squared error for a sample of an activation.

    Parameters
    ----------
    samples : float array
        Finite values, flattened; up to about 2**16 of them take less than 0.1 s.
    layouts : names of layouts
        Candidates; the first one wins a tie.

    Returns
    -------
    (name, scale)
        A sample of nothing but zeros gets the first layout and scale 1.

    Raises
    ------
    InputError
        For values that are not finite, no candidates, or an unknown layout.
    """
    values = real_float32(samples).reshape(-1)
    if not len(layouts):
        raise InputError("no layouts to choose from; give at least one")
    if not np.isfinite(values).all():
        raise InputError("an activation sample holds NaN or infinite values; give finite values")
    best: tuple[float, str, float] | None = None
    for layout in map(get_layout, layouts):
        total, scale = _best_of_sample(values, layout)
        if best is None or total < best[0]:
            best = (total, layout.name, scale)
    assert best is not None
    return best[1], best[2]


def _best_of_sample(values: NDArray[np.float32], layout: Layout) -> tuple[float, float]:
    """(squared error, scale) at the best scale of one layout."""
    magnitude = np.abs(values) if layout.signed else np.maximum(values, np.float32(0))
    negative = 0.0 if layout.signed else float(np.sum(np.minimum(values, 0).astype(np.float64) ** 2))
    largest = magnitude.max(initial=np.float32(0))
    if largest == 0:
        return negative, 1.0
    error = _sorted_error(np.sort(magnitude).astype(np.float64), layout)
    scale = _search_mse(error, np.array([largest]), layout)
    return negative + float(error(scale)[0]), float(scale[0])


def _sorted_error(magnitude: NDArray[np.float64], layout: Layout) -> _Error:
    """Squared error of a sorted sample, from sums over the values that fall to each code.

    With n, S1 and S2 the count, sum and sum of squares of the values rounded to grid value g, their squared error at
    scale s is ``S2 - 2 g s S1 + (g s)^2 n``: 128 or 256 binary searches instead of one rounding per value.
    """
    grid = layout.grid[: 128 if layout.signed else 256].astype(np.float64)
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
