"""Float32 arithmetic that gives the same bits on every target.

LLVM may contract ``a * b + c`` to one fused multiply-add, which rounds once instead of twice, and TVM allows it.
Every product therefore passes through ``llvm.arithmetic.fence``, which no optimisation looks through; where a fused one
is wanted it is asked for. All kernels of this package do their float arithmetic with the functions of this module, on
scalars and vectors alike.

LLVM's intrinsics are called as if they were not pure: TVM's passes would copy a pure call into whatever reads its name,
and that into its readers, and take minutes over a network.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

# 1.5 * 2**23: adding it rounds to an integer (ties to even), which then stands in the low mantissa bits.
ROUND_MAGIC = 12582912.0
ROUND_MAGIC_BITS = 0x4B400000

LANES = 16
"""Accumulators of every float reduction: element i goes to lane i mod 16, whatever the vector width."""


LOWEST = -3.4028234663852886e38
"""The least float32 that is finite. The greatest value of a row starts from it: less it, -infinity stays -infinity."""

SMALLEST_SUM = 2.0**-100
"""Far below any sum of a softmax, the greatest of whose terms is about 1, unless a row holds -infinity alone."""


def dtype_of(expr) -> str:
    """The dtype of a scalar or vector expression, such as ``float32x16``."""
    return str(expr.ty.dtype)


def lanes_of(expr) -> int:
    """The number of lanes of an expression, 1 for a scalar."""
    return int(expr.ty.dtype.lanes)


def with_lanes(dtype: str, lanes: int) -> str:
    """``("float32", 8) -> "float32x8"``; a scalar dtype for one lane."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def like(value: float | int, expr, dtype: str = "float32"):
    """A constant of ``dtype`` with as many lanes as ``expr``."""
    return tirx.const(value, with_lanes(dtype, lanes_of(expr)))


def bind(expr):
    """Name an intermediate value, so that later uses do not repeat its expression.

    Outside an IRBuilder (in TE or in a rewriting pass) the expression itself is returned.
    """
    return T.bind(expr) if IRBuilder.is_in_scope() else expr


def mul(a, b):
    """fl32(a * b), never contracted with a following addition."""
    return _as_it_stands(a * b)


def _as_it_stands(expr):
    """``expr`` behind a fence that neither TVM nor LLVM looks through."""
    return tirx.call_llvm_intrin(dtype_of(expr), "llvm.arithmetic.fence", expr)


def fused_multiply_add(a, b, c):
    """fl32(a * b + c), rounded once."""
    return tirx.call_llvm_intrin(dtype_of(c), "llvm.fma", a, b, c)


def fused_multiply_add_in_float64(a, b, c):
    """``fused_multiply_add`` for processors without it (``reference.fused_multiply_add`` is the NumPy twin).

    The product of two float32 is exact in float64. So that the sum is not rounded twice, it is rounded to odd: where it
    is not exact (Knuth's TwoSum finds by how much) its last bit becomes 1, on the side of what it lacks (Boldo and
    Melquiond, "Emulation of FMA and correctly rounded sums", IEEE Transactions on Computers 57, 2008).
    """
    lanes = lanes_of(c)
    wide, bits = with_lanes("float64", lanes), with_lanes("int64", lanes)
    product, c = bind(mul(a.astype(wide), b.astype(wide))), bind(c.astype(wide))
    total = bind(_as_it_stands(product + c))
    added = bind(_as_it_stands(total - product))
    error = bind((product - bind(_as_it_stands(total - added))) + bind(c - added))
    zero, one = tirx.const(0.0, wide), tirx.const(1, bits)
    pattern = bind(tirx.reinterpret(bits, total))

    def as_bit(condition):
        return tirx.Select(condition, one, tirx.const(0, bits))

    nearer_zero = as_bit(error < zero) ^ as_bit(total < zero)
    inexact = as_bit(error < zero) | as_bit(error > zero)
    even = inexact & (one - (pattern & one))
    odd = bind(pattern + (even - (even & nearer_zero) * tirx.const(2, bits)))
    return tirx.reinterpret(wide, odd).astype(with_lanes("float32", lanes))


def inverse_sum(total):
    """1 / total of a softmax's exponentials, finite for the sum 0 of a row of only -infinity."""
    return bind(like(1.0, total) / bind(tirx.max(like(SMALLEST_SUM, total), total)))


def add(a, b):
    """fl32(a + b)."""
    return a + b


def rounded_by(a, magic):
    """fl32(fl32(a + magic) - magic): ``a`` rounded to the step of ``magic``. Nothing takes the two for no operation."""
    return bind(_as_it_stands(a + magic)) - magic


SMALLEST_NORMAL_FLOAT16 = 2.0**-14


def round_to_float16(x, converts: bool):
    """The float16 nearest to ``x``, ties to even, as float32; ``|x|`` is 65504 at most.

    ``converts``: the target has instructions for it. Without them the bits are found by integers, or below float16's
    smallest normal number, where its steps have one size, by an addition.
    """
    lanes = lanes_of(x)
    if converts:
        return as_float16(x).astype(with_lanes("float32", lanes))
    pattern = bind(tirx.reinterpret(with_lanes("uint32", lanes), x))
    odd = (pattern >> like(13, x, "uint32")) & like(1, x, "uint32")
    normal = (pattern + like(0xFFF, x, "uint32") + odd) & like(0xFFFFE000, x, "uint32")
    small = tirx.reinterpret(with_lanes("uint32", lanes), rounded_by(x, like(0.75, x)))
    signed = small | (pattern & like(0x80000000, x, "uint32"))
    is_small = tirx.abs(x) < like(SMALLEST_NORMAL_FLOAT16, x)
    return tirx.reinterpret(dtype_of(x), tirx.Select(is_small, signed, normal))


def as_float16(x):
    """``x`` in float16; what was rounded before is not converted again."""
    if isinstance(x, tirx.Cast) and str(x.value.ty.dtype).startswith("float16"):
        return x.value
    return bind(x.astype(with_lanes("float16", lanes_of(x))))


BFLOAT16_WORDS = "uint16"
"""What bfloat16 is kept as: not all targets know the dtype."""


def round_to_bfloat16(x):
    """The bfloat16 nearest to ``x``, ties to even, as float32; NaN stays NaN."""
    lanes = lanes_of(x)
    bits = bind(tirx.reinterpret(with_lanes("uint32", lanes), x))
    odd = (bits >> like(16, x, "uint32")) & like(1, x, "uint32")
    # Infinities stay below the wrap of uint32; a NaN might not. TVM takes x != x for false.
    is_nan = (bits & like(0x7FFFFFFF, x, "uint32")) > like(0x7F800000, x, "uint32")
    rounded = tirx.Select(is_nan, like(0x7FC00000, x, "uint32"), bits + odd + like(0x7FFF, x, "uint32"))
    return bind(tirx.reinterpret(dtype_of(x), bind(rounded) & like(0xFFFF0000, x, "uint32")))


def as_bfloat16(x):
    """The words of ``x``, which was rounded to bfloat16 before."""
    bits = tirx.reinterpret(with_lanes("uint32", lanes_of(x)), x)
    return bind((bits >> like(16, x, "uint32")).astype(with_lanes(BFLOAT16_WORDS, lanes_of(x))))


def from_bfloat16(words):
    """The float32 values of bfloat16's words."""
    wide = words.astype(with_lanes("uint32", lanes_of(words))) << like(16, words, "uint32")
    return tirx.reinterpret(with_lanes("float32", lanes_of(words)), wide)


def sub(a, b):
    """fl32(a - b)."""
    return a - b


def rint_to_int(x):
    """x rounded to the nearest integer, ties to even, as int32; |x| < 2**22.

    The magic-number addition stands for ``rint``, which is a libm call on plain SSE2.
    """
    shifted = x + like(ROUND_MAGIC, x)
    bits = tirx.reinterpret(with_lanes("int32", lanes_of(x)), shifted)
    return bits - like(ROUND_MAGIC_BITS, x, "int32")


def to_float(x):
    """int32 to float32, rounded to nearest even."""
    return x.astype(with_lanes("float32", lanes_of(x)))


def tree_sum(vector_parts: list):
    """Combine 16 accumulators, scalars or vectors of such, in the fixed tree 8-4-2-1."""
    parts = list(vector_parts)
    while len(parts) > 1:
        half = len(parts) // 2
        parts = [bind(add(parts[i], parts[i + half])) for i in range(half)]
    return parts[0]
