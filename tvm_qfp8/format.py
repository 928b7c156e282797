"""The QFP8 number formats: what a code stands for, and encode and decode in NumPy.

A code is one byte: sign (bit 7, signed layouts only), exponent field ``E`` of ``e`` bits, mantissa field ``M`` of
``m`` bits. Its *grid value* is an integer::

    G = (-1)^S * (M                        if E == 0
                  (2^m + M) * 2^(E - 1)    otherwise)

and the number it stands for is ``fl32(G * scale)``. The scale is one float32 per tensor or per channel: the dynamic
bias ``b`` of the format is ``scale = 2^-b``. In signed layouts code 0x80 is NaN, so there is one zero.

======== == == ======== ==============================================================
layout   e  m  max G    use
======== == == ======== ==============================================================
E1M6     1  6  127      linear, symmetric int8
E2M5     2  5  252      weights
E3M4     3  4  1984     activations with outliers
E4M3     4  3  245760   comparisons; the grid of ``ml_dtypes.float8_e4m3fnuz``
UE1M7    1  7  255      linear uint8
UE2M6    2  6  508      activations that are never negative
UE3M5    3  5  4032     the same, with outliers
======== == == ======== ==============================================================

Every number in this table follows from ``(e, m, signed)``. The twin of this module inside kernels is
``tvm_qfp8.topi.codec``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tvm_qfp8.errors import InputError

NAN_CODE = 0x80

# Encoding makes about ten passes over the data: blocks of this many values keep them in the second-level cache.
_BLOCK = 1 << 14


@dataclass(frozen=True)
class Layout:
    """How the 8 bits of a code are divided; everything else is derived."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    signed: bool

    @property
    def max_grid(self) -> int:
        """Largest grid value: all exponent and mantissa bits set."""
        return ((2 << self.mantissa_bits) - 1) << ((1 << self.exponent_bits) - 2)

    @property
    def magnitudes(self) -> int:
        """How many grid values are not negative; their codes come first, in rising order."""
        return 1 << (self.exponent_bits + self.mantissa_bits)

    @property
    def nan_code(self) -> int | None:
        """The code of NaN; None where all 256 codes are numbers."""
        return NAN_CODE if self.signed else None

    @property
    def ir_dtype(self) -> str:
        """Name of the data type in TVM's IR, such as ``custom[qfp8_e2m5]8``."""
        return f"custom[qfp8_{self.name.lower()}]8"

    @cached_property
    def grid(self) -> NDArray[np.int32]:
        """Grid value of every code, int32 ``(256,)``, read-only; the code of NaN reads as 0."""
        codes = np.arange(256, dtype=np.int32)
        magnitude = codes & 0x7F if self.signed else codes
        exponent = magnitude >> self.mantissa_bits
        mantissa = magnitude & ((1 << self.mantissa_bits) - 1)
        normal = (mantissa + (1 << self.mantissa_bits)) << np.maximum(exponent - 1, 0)
        grid = np.where(exponent == 0, mantissa, normal).astype(np.int32)
        if self.signed:
            grid = np.where(codes >= 0x80, -grid, grid)
        grid.flags.writeable = False
        return grid

    @cached_property
    def numbers(self) -> NDArray[np.float32]:
        """``grid`` as float32 ``(256,)`` with NaN where the code is NaN, read-only."""
        numbers = self.grid.astype(np.float32)
        if self.nan_code is not None:
            numbers[self.nan_code] = np.nan
        numbers.flags.writeable = False
        return numbers


def _layout(exponent_bits: int, mantissa_bits: int) -> Layout:
    signed = exponent_bits + mantissa_bits == 7
    prefix = "" if signed else "U"
    return Layout(f"{prefix}E{exponent_bits}M{mantissa_bits}", exponent_bits, mantissa_bits, signed)


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (_layout(e, m) for e, m in ((1, 6), (2, 5), (3, 4), (4, 3), (1, 7), (2, 6), (3, 5)))
}


def get_layout(name: str | Layout) -> Layout:
    """The layout of that name (any case).

    Raises
    ------
    InputError
        If there is no such layout.
    """
    if isinstance(name, Layout):
        return name
    layout = LAYOUTS.get(str(name).upper())
    if layout is None:
        raise InputError(f"layout {name!r} is not known; use one of {', '.join(LAYOUTS)}")
    return layout


def encode(
    x: ArrayLike, scale: ArrayLike = 1.0, layout: str | Layout = "E2M5", axis: int | None = None
) -> NDArray[np.uint8]:
    """Codes of ``x``: the nearest value of the grid times ``scale``, ties to the even code.

    In float32: ``r = fl32(1 / scale)``, ``v = fl32(x * r)``, clamped to the largest grid value (unsigned layouts:
    negatives to 0), rounded on the grid. Infinities clamp; NaN becomes 0x80; -0 and what rounds to zero from below
    become 0x00.

    Parameters
    ----------
    x : array of any real dtype
        Converted to float32 first.
    scale : float or array ``(x.shape[axis],)``
        One per tensor (``axis=None``) or per channel.
    layout : str or Layout
        Name of a layout.
    axis : int, optional
        The channel axis that ``scale`` runs along.

    Returns
    -------
    uint8 array of the shape of ``x``, in C order.

    Raises
    ------
    InputError
        For an unknown layout, a scale that is not positive or has no finite float32 reciprocal, a scale of the wrong
        length, data that are not real numbers, and NaN in an unsigned layout (which has no code for it).
    """
    layout = get_layout(layout)
    values = real_float32(x)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = values * broadcast_scale(reciprocal(scale), values.shape, axis)
    # A product of 0-d arrays is a NumPy scalar, and one of transposed arrays is not in C order.
    scaled = np.ascontiguousarray(scaled, np.float32).reshape(values.shape)
    codes = np.empty(scaled.shape, np.uint8)
    flat, flat_codes = scaled.reshape(-1), codes.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        _encode_block(flat[start : start + _BLOCK], layout, flat_codes[start : start + _BLOCK])
    return codes


def decode(
    codes: ArrayLike, scale: ArrayLike = 1.0, layout: str | Layout = "E2M5", axis: int | None = None
) -> NDArray[np.float32]:
    """The numbers that uint8 ``codes`` stand for: ``fl32(G * scale)``; code 0x80 of a signed layout is NaN.

    Shapes and errors as in :func:`encode`.
    """
    layout = get_layout(layout)
    codes = _codes(codes)
    with np.errstate(over="ignore"):
        return np.asarray(layout.numbers[codes] * broadcast_scale(checked_scale(scale), codes.shape, axis))


def decode_grid(codes: ArrayLike, layout: str | Layout = "E2M5") -> NDArray[np.int32]:
    """Grid values of uint8 ``codes``, int32 of the same shape; code 0x80 of a signed layout reads as 0."""
    return np.asarray(get_layout(layout).grid[_codes(codes)])


def round_to_grid(magnitude: NDArray[np.float32], layout: Layout) -> NDArray[np.float32]:
    """Nearest grid values, ties to the even code, of float32 values in ``[0, layout.max_grid]``, as float32."""
    magic = _binade(magnitude, layout)
    magic += np.int32((23 - layout.mantissa_bits) << 23)
    addend = magic.view(np.float32)
    rounded = magnitude + addend
    rounded -= addend
    return rounded


def _binade(magnitude: NDArray[np.float32], layout: Layout) -> NDArray[np.int32]:
    """Exponent bits of each value, but never below those of the first binade, whose step is 1."""
    binade = magnitude.view(np.int32) & np.int32(0x7F800000)
    return np.maximum(binade, np.int32((127 + layout.mantissa_bits) << 23), out=binade)


def _encode_block(values: NDArray[np.float32], layout: Layout, out: NDArray[np.uint8]) -> None:
    """Encode 1-D contiguous float32 values that are already divided by the scale.

    In a binade whose grid step is ``2^k`` the sum with ``2^(23+k)`` is rounded to that step, ties to even, by the
    addition itself; the distance between the two bit patterns is then the number of steps.
    """
    mantissa = layout.mantissa_bits
    nan = np.isnan(values)
    has_nan = bool(nan.any())
    if has_nan and not layout.signed:
        raise InputError(
            f"NaN has no code in the unsigned layout {layout.name}; use a signed layout or remove it"
        )
    magnitude = np.abs(values) if layout.signed else np.maximum(values, np.float32(0))
    np.minimum(magnitude, np.float32(layout.max_grid), out=magnitude)
    binade = _binade(magnitude, layout)
    magic = binade + np.int32((23 - mantissa) << 23)
    magnitude += magic.view(np.float32)
    code = magnitude.view(np.int32)
    code -= magic
    binade >>= np.int32(23 - mantissa)
    code += binade
    code -= np.int32((127 + mantissa) << mantissa)
    # In an unsigned layout -0 may be left by the maximum; its code is 0 all the same.
    if layout.signed:
        sign = values.view(np.int32) >> np.int32(24)
        sign &= np.int32(0x80)
        sign *= code != 0
        code |= sign
    out[...] = code
    if has_nan:
        out[nan] = NAN_CODE


def real_float32(x: ArrayLike) -> NDArray[np.float32]:
    """``x`` as float32; values beyond its range become infinities.

    Raises
    ------
    InputError
        If ``x`` does not hold real numbers.
    """
    array = np.asarray(x)
    if np.issubdtype(array.dtype, np.complexfloating):
        raise InputError(f"data of dtype {array.dtype} are not real numbers; give float or integer data")
    try:
        with np.errstate(over="ignore"):
            return array.astype(np.float32, copy=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"data of dtype {array.dtype} are not numbers; give float or integer data"
        ) from error


def checked_scale(scale: ArrayLike) -> NDArray[np.float32]:
    """``scale`` as float32, if all of it is usable.

    Raises
    ------
    InputError
        If a scale is not positive and finite, or so small that its float32 reciprocal is infinite.
    """
    scales = real_float32(scale)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        usable = (scales > 0) & np.isfinite(scales) & np.isfinite(np.float32(1) / scales)
    if not usable.all():
        found = scales[~usable].reshape(-1)[0]
        raise InputError(f"scale {found!s} cannot be used; it must be positive, finite and above 2**-128")
    return scales


def reciprocal(scale: ArrayLike) -> NDArray[np.float32]:
    """``fl32(1 / scale)``; errors as in :func:`checked_scale`."""
    return np.asarray(np.float32(1) / checked_scale(scale))


def broadcast_scale(
    scale: NDArray[np.float32], shape: tuple[int, ...], axis: int | None
) -> NDArray[np.float32]:
    """``scale`` in a shape that broadcasts along ``axis`` of a tensor of ``shape``.

    Raises
    ------
    InputError
        If their lengths do not fit, or ``axis`` is not an axis of the tensor.
    """
    if scale.size == 1:
        return scale.reshape(())
    if axis is None:
        raise InputError(f"{scale.size} scales but no axis; give the axis that they run along")
    if not -len(shape) <= axis < len(shape):
        raise InputError(f"axis {axis} does not exist in a tensor of shape {shape}")
    if scale.shape != (shape[axis],):
        raise InputError(
            f"scale of shape {scale.shape} for axis {axis} of shape {shape}; give one per channel"
        )
    return scale.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])


def _codes(codes: ArrayLike) -> NDArray[np.uint8]:
    array = np.asarray(codes)
    if array.dtype != np.uint8:
        raise InputError(f"codes of dtype {array.dtype}; codes are uint8")
    return array
