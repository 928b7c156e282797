"""Encode and decode of QFP8 codes as TIR arithmetic, on scalars and vectors (``tvm_qfp8.format`` is the NumPy twin).

Both directions use no table and no branch. With ``m`` mantissa bits, ``mag`` the code without its sign and
``E = mag >> m``, the grid value ``G`` is convex and piecewise linear in ``mag``::

    G = max over k = 0 .. 2**e - 2 of  2**k * (mag - k * 2**m)

so decoding is a few multiplies and maxima in 16-bit lanes. Encoding adds a power of two that depends on the
exponent of the value: the sum is rounded to the grid's step there, ties to even, by the addition itself.
"""

from __future__ import annotations

from tvm import tirx

from tvm_qfp8.format import Layout
from tvm_qfp8.topi.float_contract import bind, dtype_of, lanes_of, like, with_lanes


def decode_expr(codes, layout: Layout, dtype: str = "int16"):
    """Grid values of ``codes`` (uint8, scalar or vector) as ``dtype`` (int16 or int32); code 0x80 reads as 0."""
    wide = bind(codes.astype(with_lanes(dtype, lanes_of(codes))))

    def const(value: int):
        return like(value, codes, dtype)

    magnitude = bind(wide & const(0x7F)) if layout.signed else wide
    step = 1 << layout.mantissa_bits
    if layout.exponent_bits <= 2:
        grid = magnitude
        for k in range(1, (1 << layout.exponent_bits) - 1):
            grid = tirx.max(grid, (magnitude - const(k * step)) << const(k))
    else:
        exponent = bind(magnitude >> const(layout.mantissa_bits))
        shift = bind(tirx.max(exponent, const(1)) - const(1))
        # E == 0 and E == 1 share the step 1, so only the shift's multiple of 2**m has to be taken off.
        grid = (magnitude - shift * const(step)) << shift
    if not layout.signed:
        return bind(grid)
    grid = bind(grid)
    # All ones where the sign bit is set: (g ^ s) - s negates.
    sign = bind(const(0) - (wide >> const(7)))
    return bind((grid ^ sign) - sign)


def encode_expr(v, layout: Layout):
    """Codes (uint8) of ``v``, float32 values already multiplied by ``1 / scale``; NaN becomes 0x00."""
    lanes = lanes_of(v)
    mantissa = layout.mantissa_bits
    if dtype_of(v) == with_lanes("float16", lanes):
        v = bind(v.astype(with_lanes("float32", lanes)))

    def integer(value: int):
        return like(value, v, "int32")

    magnitude = tirx.abs(v) if layout.signed else v
    # max(x, 0) is "x > 0 ? x : 0": it maps NaN to 0.
    magnitude = tirx.max(magnitude, like(0.0, v))
    magnitude = bind(tirx.min(magnitude, like(float(layout.max_grid), v)))
    int_dtype = with_lanes("int32", lanes)
    bits = tirx.reinterpret(int_dtype, magnitude)
    # Exponent bits of the binade, never below the first one whose step is 1.
    binade = bind(tirx.max(bits & integer(0x7F800000), integer((127 + mantissa) << 23)))
    magic_bits = bind(binade + integer((23 - mantissa) << 23))
    rounded = magnitude + tirx.reinterpret(with_lanes("float32", lanes), magic_bits)
    steps = tirx.reinterpret(int_dtype, rounded) - magic_bits
    code = bind(steps + ((binade >> integer(23 - mantissa)) - integer((127 + mantissa) << mantissa)))
    if layout.signed:
        sign = (tirx.reinterpret(int_dtype, v) >> integer(24)) & integer(0x80)
        code = tirx.Select(code > integer(0), code | sign, integer(0))
    return bind(code.astype(with_lanes("uint8", lanes)))
