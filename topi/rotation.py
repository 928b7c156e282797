"""Rotation of rows: channels become signed sums of several, so that none stands out and all are spread alike.

With a Hadamard matrix ``H`` of ``order`` rows, a power of two, and ``step = channels / order``::

    y[j * step + i] = sum over k of H[j, k] * x[k * step + i]

``H @ H`` is ``order`` times the identity: a weight that meets ``y`` is ``H @ weight / order``, and the product is the
same as before (Ashkboos et al., "QuaRot", NeurIPS 2024, section 3, there of whole rows). A few channels of ``y`` come
from far apart, so whole vectors are added and no lane moves.

The sums are taken in log2(order) stages of float32 additions, those of the farthest channels first, as every kernel and
the NumPy functions here take them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from tvm import tirx

from tvm_qfp8.topi.float_contract import add, bind, sub
from tvm_qfp8.topi.prim_func import store, vector_runs

HIGH, LOW = 16, 8
"""Orders. Higher ones spread outliers hardly better, and their vectors do not fit the registers; lower ones spread
little."""

LEAST_STEP = 4
"""Channels that are added together lie a vector of the shortest registers apart at least."""


def largest_order(channels: int) -> int:
    """The order for rows of so many channels; 1 where there is none.

    The high one only for steps of whole vectors: the rest of a step takes as long as a vector.
    """
    if channels % (HIGH * LEAST_STEP) == 0:
        return HIGH
    return LOW if channels % LOW == 0 and channels // LOW >= LEAST_STEP else 1


def rotated(x: np.ndarray, order: int) -> np.ndarray:
    """Rows of the float32 array ``x (..., channels)``, rotated."""
    step = x.shape[-1] // order
    values = x.reshape(math.prod(x.shape[:-1]), order, step)
    half = order // 2
    while half:
        pairs = values.reshape(len(values), order // (2 * half), 2, half, step)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        with np.errstate(over="ignore", invalid="ignore"):
            values = np.stack([first + second, first - second], axis=2).reshape(values.shape)
        half //= 2
    return values.reshape(x.shape)


def restored(y: np.ndarray, order: int) -> np.ndarray:
    """What was rotated, but for rounding."""
    return rotated(y, order) / np.float32(order)


def emit_rotated_row(read: Callable, scratch, start, length: int, order: int, lanes: int) -> None:
    """Write one row, of which ``read(offset, lanes)`` gives vectors, into ``scratch`` from ``start`` on."""
    step = length // order

    def emit(offset, n: int) -> None:
        values = [bind(read(part * step + offset, n)) for part in range(order)]
        half = order // 2
        while half:
            for first in (index for index in range(order) if not index & half):
                a, b = values[first], values[first + half]
                values[first], values[first + half] = bind(add(a, b)), bind(sub(a, b))
            half //= 2
        for part, value in enumerate(values):
            store(scratch, start + part * step + offset, value, n)

    vector_runs(step, lanes, emit)


def rotated_reader(read: Callable, length: int, order: int) -> Callable:
    """``read(index, offset, 1)`` of rotated rows by one of the rows themselves, for threads that see all of a row."""
    if order == 1:
        return read
    step = length // order

    def rotated_read(index, offset, lanes: int):
        assert lanes == 1
        place, part = tirx.floormod(offset, step), tirx.floordiv(offset, step)
        values = [bind(read(index, k * step + place, 1)) for k in range(order)]
        while len(values) > 1:
            half = len(values) // 2
            is_difference = tirx.bitwise_and(part, half) != 0
            values = [
                bind(tirx.Select(is_difference, sub(a, b), add(a, b)))
                for a, b in zip(values[:half], values[half:], strict=True)
            ]
        return values[0]

    return rotated_read
