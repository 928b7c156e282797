"""Codes to the bytes that are multiplied (``split.py``), for more than one product with NEON's shifts by register.

A magnitude is ``M << shift`` with ``M`` of at most seven bits. So its high part is one rounding shift of ``M`` by
``shift - bits``, to either side, and its low part is what is left, which bytes that wrap around hold exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx

from tvm_qfp8.format import Layout
from tvm_qfp8.topi.float_contract import bind, lanes_of, with_lanes
from tvm_qfp8.topi.split import HIGH, LOW, SUM, WHOLE, Split

NEON_BYTES = 8
"""Bytes of the shortest vector that NEON shifts by register."""


def decode_parts(codes, layout: Layout, split: Split, names: Sequence[str]) -> list:
    """The named parts of ``codes`` (uint8, vectors), each int8; code 0x80 reads as 0.

    An offset may make bytes of 128 to 255, which int8 holds as they are.
    """
    lanes = lanes_of(codes)
    signed = with_lanes("int8", lanes)

    def const(value: int):
        return tirx.const(value, signed)

    def shift(name: str, value, by):
        if lanes >= NEON_BYTES:
            intrinsic = f"llvm.aarch64.neon.{name}.v{lanes}i8"
            return tirx.call_llvm_intrin(signed, intrinsic, value, by)
        return _plain_shift(value, by, rounds=name == "urshl")

    code = bind(tirx.reinterpret(signed, codes))
    sign = bind(code >> const(7))
    magnitude = bind(code & const(0x7F)) if layout.signed else code

    def with_sign(value):
        return bind((value ^ sign) - sign) if layout.signed else value

    if names[0] == WHOLE:
        # int8 has no 128; -128 is the same byte.
        whole = with_sign(magnitude)
        return [bind(whole ^ const(-128)) if split.offset else whole] * len(names)
    exponent = bind(shift("ushl", magnitude, const(-layout.mantissa_bits)))
    by = bind(tirx.max(exponent, const(1)) - const(1))
    # E == 0 and E == 1 share the step 1, so only the shift's multiple of 2**m has to be taken off.
    mantissa = bind(magnitude - (by << const(layout.mantissa_bits)))
    high = bind(shift("urshl", mantissa, bind(by - const(split.bits))))
    low = bind(shift("ushl", mantissa, by) - (high << const(split.bits)))
    parts = {HIGH: with_sign(high), LOW: with_sign(low)}
    parts[SUM] = bind(parts[HIGH] + parts[LOW])
    return [parts[name] for name in names]


def _plain_shift(value, by, rounds: bool):
    """The same of bytes that stand for 0 to 255, in ordinary arithmetic."""
    lanes = lanes_of(value)
    dtype = with_lanes("int32", lanes)
    wide = tirx.reinterpret(with_lanes("uint8", lanes), value).astype(dtype)
    left = bind(by.astype(dtype))
    right = bind(tirx.max(tirx.const(0, dtype) - left, tirx.const(0, dtype)))
    if rounds:
        wide = wide + ((tirx.const(1, dtype) << right) >> tirx.const(1, dtype))
    shifted = (wide << tirx.max(left, tirx.const(0, dtype))) >> right
    return shifted.astype(with_lanes("int8", lanes))
