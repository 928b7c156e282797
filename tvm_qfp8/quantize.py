"""Quantize a tensor: choose the dynamic bias per tensor or per channel, then encode.

Weights are quantized with :func:`quantize`, one scale per output channel; the layout and scale of an activation are
chosen from a sample with :func:`select_activation`. The search itself is in ``bias_search``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tvm_qfp8.bias_search import BLOCK, SEARCHES, direct_error, search_mse, sorted_error
from tvm_qfp8.errors import InputError
from tvm_qfp8.format import Layout, decode, encode, get_layout, real_float32


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
    if bias not in SEARCHES:
        raise InputError(f"bias {bias!r} is not known; use one of {', '.join(SEARCHES)}")
    if not np.isfinite(values).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise InputError(f"{values[index]!s} at index {index} cannot be quantized; give finite values")
    axis = None if axis is None else axis % values.ndim
    rows = (
        values.reshape(1, -1)
        if axis is None
        else np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    )
    scales = _channel_scales(np.ascontiguousarray(rows), layout, SEARCHES[bias])
    scale = scales.reshape(()) if axis is None else scales
    return QTensor(encode(values, scale, layout, axis), scale, layout.name, axis)


def _channel_scales(rows: NDArray[np.float32], layout: Layout, search: Callable) -> NDArray[np.float32]:
    """Best scale of every row of ``(channels, values)``, found for a cache-sized block of channels at a time."""
    channels, length = rows.shape
    scales = np.ones(channels, np.float32)
    if length == 0:
        return scales
    block = max(1, BLOCK // length)
    for start in range(0, channels, block):
        part = rows[start : start + block]
        # What an unsigned layout clamps to zero is lost at every scale alike.
        magnitude = np.abs(part) if layout.signed else np.maximum(part, np.float32(0))
        largest = magnitude.max(axis=1)
        used = np.flatnonzero(largest)
        if used.size:
            error = direct_error(magnitude[used], layout)
            scales[start + used] = search(error, largest[used], layout)
    return scales


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
    error = sorted_error(np.sort(magnitude).astype(np.float64), layout)
    scale = search_mse(error, np.array([largest]), layout)
    return negative + float(error(scale)[0]), float(scale[0])
