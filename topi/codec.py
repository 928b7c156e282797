"""Encode and decode of QFP8 codes as TIR arithmetic, on scalars and vectors (``tvm_qfp8.format`` is the NumPy twin).

Neither direction has a branch. With ``m`` mantissa bits and ``mag`` the code without its sign, the grid value ``G``
is convex and piecewise linear in ``mag``: its slope is 1 up to ``2 * 2**m`` and doubles at every further multiple
of ``2**m``, so for layouts of two exponent bits three saturating subtractions and additions decode.

Encoding adds a power of two that depends on the exponent of the value: the sum is rounded to the grid's step there,
ties to even, by the addition itself. The low mantissa bits of that addend hold the code at which the binade starts,
so that the low byte of the sum is the code. Vector look-ups, where the instruction set has them
(``codec_lookup.py``), give the same bits in fewer instructions.
"""

from __future__ import annotations

from tvm import tirx

from tvm_qfp8.format import Layout
from tvm_qfp8.topi import codec_lookup
from tvm_qfp8.topi.float_contract import bind, dtype_of, lanes_of, like, with_lanes
from tvm_qfp8.topi.isa import InstructionSet

ROUNDS_TO_ZERO = 0.25
"""Stands for every smaller magnitude: rounds to code 0, and keeps the exponents of all values near each other."""


def decode_expr(codes, layout: Layout, dtype: str = "int16", isa: InstructionSet | None = None):
    """Grid values of ``codes`` (uint8, scalar or vector) as ``dtype`` (int16 or int32); code 0x80 reads as 0.

    Instructions of ``isa`` are used where it has better ones than plain arithmetic.
    """
    wide = bind(codes.astype(with_lanes(dtype, lanes_of(codes))))
    if isa is not None and dtype == "int16":
        found = codec_lookup.decode(wide, layout, isa)
        if found is not None:
            return found

    def const(value: int):
        return like(value, codes, dtype)

    magnitude = bind(wide & const(0x7F)) if layout.signed else wide
    step = 1 << layout.mantissa_bits
    if layout.exponent_bits <= 2:
        grid = magnitude
        for k in range(1, (1 << layout.exponent_bits) - 1):
            beyond = bind(_saturating_sub(magnitude, const((k + 1) * step)))
            for _ in range(1 << (k - 1)):
                grid = grid + beyond
    else:
        exponent = bind(magnitude >> const(layout.mantissa_bits))
        shift = bind(tirx.max(exponent, const(1)) - const(1))
        # E == 0 and E == 1 share the step 1, so only the shift's multiple of 2**m has to be taken off.
        grid = (magnitude - shift * const(step)) << shift
    grid = bind(grid)
    return bind(codec_lookup.with_sign(grid, wide, isa)) if layout.signed else grid


def _saturating_sub(a, b):
    """max(a - b, 0) of values that are never negative."""
    if lanes_of(a) == 1 or not dtype_of(a).startswith("int16"):
        return tirx.max(a - b, like(0, a, dtype_of(a).partition("x")[0]))
    return tirx.call_llvm_intrin(dtype_of(a), "llvm.usub.sat", a, b)


def encode_expr(v, layout: Layout, isa: InstructionSet | None = None, limit=None):
    """Codes (uint8) of ``v``, float32 values already multiplied by ``1 / scale``; NaN becomes 0x00.

    ``limit``, a scalar or vector of at least ``ROUNDS_TO_ZERO`` and at most the layout's greatest grid value, takes
    the place of the latter: a clip that precedes the encode.
    """
    lanes = lanes_of(v)
    if dtype_of(v) == with_lanes("float16", lanes):
        v = bind(v.astype(with_lanes("float32", lanes)))
    if isa is not None and layout.exponent_bits == 1:
        found = codec_lookup.encode_linear(v, layout, isa, limit)
        if found is not None:
            return found
    int_dtype = with_lanes("int32", lanes)
    # max(x, c) is "x > c ? x : c": it maps NaN to c.
    magnitude = tirx.max(tirx.abs(v) if layout.signed else v, like(ROUNDS_TO_ZERO, v))
    magnitude = bind(tirx.min(magnitude, like(float(layout.max_grid), v) if limit is None else limit))
    bits = bind(tirx.reinterpret(int_dtype, magnitude))
    addend = None
    if layout.exponent_bits == 1:
        # One step everywhere.
        addend = like(2.0**23, v)
    elif isa is not None:
        addend = codec_lookup.addend(bits, layout, isa)
    if addend is None:
        addend = tirx.reinterpret(with_lanes("float32", lanes), _addend_bits(bits, layout))
    code = bind(tirx.reinterpret(int_dtype, magnitude + addend))
    if layout.signed:
        # From -0.5 on negative values round to zero, which has no sign.
        code = tirx.Select(v < like(-0.5, v), code | like(0x80, v, "int32"), code)
    return bind((code & like(0xFF, v, "int32")).astype(with_lanes("uint8", lanes)))


def _addend_bits(bits, layout: Layout):
    """Bits of ``2**k * (2**23 + k * 2**m)`` where ``k`` is the binade of the value, 0 for the first two."""
    mantissa = layout.mantissa_bits

    def integer(value: int):
        return tirx.const(value, dtype_of(bits))

    binade = bind(tirx.max(bits & integer(0x7F800000), integer((127 + mantissa) << 23)))
    start = binade >> integer(23 - mantissa)
    return bind(binade + start + integer(((23 - mantissa) << 23) - ((127 + mantissa) << mantissa)))
