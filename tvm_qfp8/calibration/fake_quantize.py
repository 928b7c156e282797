"""decode(encode(x)) in one go: what a kernel makes of an activation, in float32, without the codes.

Rounding to the grid is one addition and one subtraction: in the binade of the grid value the step is a power
of two, and adding 1.5 * 2^23 steps leaves no bits below it (round to nearest, ties to even, which is also the
even code). The result is bit-identical with ``format.decode(format.encode(x))``, at a tenth of its cost.
"""

from __future__ import annotations

import numpy as np

from tvm_qfp8.format import get_layout

_BLOCK = 1 << 15  # elements worked on at a time: three float32 temporaries stay in cache
_EXPONENT = np.int32(0x7F800000)


def fake_quantize(x: np.ndarray, layout: str, scale: float) -> np.ndarray:
    """Round ``x`` to the values ``G * scale`` of a layout.

    Parameters
    ----------
    x : float32 array, any shape, no NaN
    layout : str
        Name of a layout, as in ``tvm_qfp8.format.LAYOUTS``.
    scale : float
        float32 scale of the whole tensor.

    Returns
    -------
    float32 array of the shape of ``x``.
    """
    found = get_layout(layout)
    scale32 = np.float32(scale)
    reciprocal = np.float32(1) / scale32
    top = np.float32(found.max_grid)
    bottom = -top if found.signed else np.float32(0)
    smallest = np.float32(2.0**found.mantissa_bits)  # below 2^(m+1) the step is 1, as it is in [2^m, 2^(m+1))
    magic = np.float32(1.5 * 2.0 ** (23 - found.mantissa_bits))
    flat = np.ascontiguousarray(x, np.float32).reshape(-1)
    out = np.empty_like(flat)
    scratch = np.empty(min(_BLOCK, flat.size), np.int32)
    for start in range(0, flat.size, _BLOCK):
        value = out[start : start + _BLOCK]
        bits = scratch[: value.size]
        np.multiply(flat[start : start + _BLOCK], reciprocal, out=value)
        np.maximum(value, bottom, out=value)
        np.minimum(value, top, out=value)
        np.bitwise_and(value.view(np.int32), _EXPONENT, out=bits)
        shift = bits.view(np.float32)
        np.maximum(shift, smallest, out=shift)
        shift *= magic
        value += shift
        value -= shift
        value *= scale32
    return out.reshape(np.shape(x))


def row_scales(x: np.ndarray, layout: str) -> np.ndarray:
    """The scale that each row of ``x`` gets at run time, float32 ``(..., 1)`` (``topi.encode_rows``).

    ``max(fl32(m * fl32(1 / largest G)), 2^-126)`` for the row's largest magnitude ``m``.
    """
    limits = np.finfo(np.float32)
    largest = np.fmax.reduce(np.abs(x), axis=-1, keepdims=True, initial=0.0)
    inverse = np.float32(1) / np.float32(get_layout(layout).max_grid)
    return np.maximum(np.minimum(largest, limits.max) * inverse, limits.tiny)


def fake_quantize_rows(x: np.ndarray, layout: str) -> np.ndarray:
    """Round each row of the float32 array ``x`` to a layout, with a scale of its own."""
    scale = row_scales(x, layout)
    return fake_quantize(x * (np.float32(1) / scale), layout, 1.0) * scale
