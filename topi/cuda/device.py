"""Functions in CUDA C that kernels call: decoding codes to float16, and one step of a tensor core.

With ``m`` mantissa bits, float16's bits ``S 0..0 E..E M..M 0..0`` (exponent field E, mantissa M at its upper end) stand
for ``(-1)^S * 2**(E-15) * (1 + M / 2**m)``, or for E = 0 ``(-1)^S * 2**-14 * M / 2**m``. Both are the grid value
``G * 2**-(14+m)``, subnormal numbers included. Code 0x80 becomes -0.
"""

from __future__ import annotations

import zlib

import numpy as np
from tvm import tirx
from tvm.backend.cuda.op import cuda_func_call

from tvm_qfp8.format import Layout

# One step multiplies 16 x 16 by 16 x 8 float16. A thread of a warp, with group = lane / 4 and place = lane % 4,
# holds of the left operand the rows group and group + 8, of the right one the column group, and four values k of each;
# of the result the columns 2 * place and 2 * place + 1 of these rows. Which k it holds does not matter as long as both
# operands agree.
_MMA = """
__forceinline__ __device__ void qfp8_mma(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                         unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
"""
MMA_ROWS, MMA_COLUMNS, MMA_DEPTH = 16, 8, 16


def _integer_source(kind: str) -> str:
    return f"""
__forceinline__ __device__ void qfp8_mma_{kind}(int* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                            unsigned b0, unsigned b1) {{
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.{kind}.s8.s32 "
               "{{%0,%1,%2,%3}},{{%4,%5,%6,%7}},{{%8,%9}},{{%0,%1,%2,%3}};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}}
"""


def mma_integers(totals, index, left: list, right: list, signed: bool):
    """Add to four int32 ``totals[index:]`` a product of 16 x 32 int8, or uint8, by 32 x 8 int8; operands as in ``mma``.

    A word holds four values.
    """
    kind = "s8" if signed else "u8"
    return cuda_func_call(
        f"qfp8_mma_{kind}",
        tirx.address_of(totals[index]),
        *left,
        *right,
        source_code=_integer_source(kind),
        return_type="void",
    )


def integers_of(codes):
    """Four codes E1M6, sign and magnitude, as four int8."""
    ones = codes >> tirx.const(7, "uint32") & tirx.const(0x01010101, "uint32")
    magnitudes = codes & tirx.const(0x7F7F7F7F, "uint32")
    # No code is -0, so that no byte carries into the next.
    return (magnitudes ^ (ones * tirx.const(255, "uint32"))) + ones


def mma(accumulators, index, left: list, right: list):
    """Add a product to the four float32 ``accumulators[index:]``; operands are float16 pairs in uint32.

    ``left`` holds (row group, first pair), (row group + 8, first), (group, second), (group + 8, second); ``right``
    the pairs of column ``group``.
    """
    return cuda_func_call(
        "qfp8_mma", tirx.address_of(accumulators[index]), *left, *right, source_code=_MMA, return_type="void"
    )


# The same from a start of 1.5 * 2**23 units, so that the sum's last 23 bits count units: an integer addition keeps it.
_MMA_COUNT = """
__forceinline__ __device__ void qfp8_mma_count(int* total, float start, unsigned a0, unsigned a1, unsigned a2,
                                               unsigned a3, unsigned b0, unsigned b1) {
  float c0, c1, c2, c3;
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%10,%10,%10};"
               : "=f"(c0), "=f"(c1), "=f"(c2), "=f"(c3)
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(start));
  total[0] += __float_as_int(c0), total[1] += __float_as_int(c1);
  total[2] += __float_as_int(c2), total[3] += __float_as_int(c3);
}
"""
COUNTED = 2**22
"""Sums that stay below can be counted."""


def counting_start(exponent: int) -> float:
    """Where sums of products in units of ``2**-exponent`` start from to be counted."""
    return 1.5 * 2.0 ** (23 - exponent)


def mma_count(totals, start: float, left: list, right: list):
    """Add to the four int32 ``totals`` a product as units, and the bits of ``start``; operands as in ``mma``."""
    arguments = tirx.address_of(totals[0]), tirx.const(start, "float32"), *left, *right
    return cuda_func_call("qfp8_mma_count", *arguments, source_code=_MMA_COUNT, return_type="void")


def look_up(coefficients: list, index, _lanes: int) -> list:
    """One coefficient of each list at ``index``, from tables that stay in the first-level cache."""
    found = []
    for values in coefficients:
        bits = np.asarray(values, np.float32).view(np.uint32).tolist()
        name = f"qfp8_table_{zlib.crc32(repr(bits).encode()):08x}"
        body = ", ".join(f"0x{word:08x}u" for word in bits)
        source = f"""
__forceinline__ __device__ unsigned {name}(int i) {{
  static const unsigned values[{len(bits)}] = {{{body}}};
  return values[i];
}}
"""
        # The index may have bits above those that count.
        place = index & tirx.const(len(bits) - 1, "int32")
        word = cuda_func_call(name, place, source_code=source, return_type="uint32")
        found.append(tirx.reinterpret("float32", word))
    return found


def grid_exponent(layout: Layout) -> int:
    """``k`` such that a decoded float16 value is ``G * 2**-k``."""
    return 14 + layout.mantissa_bits


def decode_pairs(codes, layout: Layout) -> tuple:
    """Four codes (uint32) as two float16 pairs (uint32 each): codes 0 and 2, and codes 1 and 3."""
    shift = 10 - layout.mantissa_bits
    magnitude = 0x7F if layout.signed else 0xFF
    mask = (magnitude << shift) * 0x10001
    even = codes << tirx.const(shift, "uint32")
    odd = codes >> tirx.const(8 - shift, "uint32")
    pairs = []
    for value, signs in ((even, codes << tirx.const(8, "uint32")), (odd, codes)):
        pair = value & tirx.const(mask, "uint32")
        if layout.signed:
            pair = pair | (signs & tirx.const(0x80008000, "uint32"))
        pairs.append(pair)
    return tuple(pairs)
