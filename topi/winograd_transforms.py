"""The matrices of ``winograd_tiling.py`` as vector expressions, one column or row at a time.

Inputs and filters are int16, whose plain arithmetic wraps around in TVM: what lies between may leave the range that
the results keep to. Sums are int32 modulo 2^32.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm_qfp8.topi.float_contract import bind, dtype_of, like
from tvm_qfp8.topi.winograd_tiling import Tiling
from tvm_qfp8.topi.wrapping import wrapping_add, wrapping_mul, wrapping_sub


def in_both_directions(transform: Callable[[list], list], values: list[list]) -> list[list]:
    """``values[row][column]`` transformed column by column, then row by row."""
    columns = [transform([row[column] for row in values]) for column in range(len(values[0]))]
    return [transform([column[row] for column in columns]) for row in range(len(columns[0]))]


def transform_inputs(tiling: Tiling, d: list) -> list:
    """B^T d of int16 vectors."""
    if tiling.outputs == 2:
        return [bind(v) for v in (d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3])]
    far, near = bind(d[4] - d[2]), bind(d[3] - d[1])
    even, odd, twice = bind(_times(d[2], 2) - d[4]), bind(_times(d[1], 2) - d[3]), bind(_times(near, 1))
    ends = (_times(d[0] - d[2], 2) + far, d[5] - d[3] - _times(near, 2))
    return [bind(v) for v in (ends[0], even + odd, even - odd, far + twice, far - twice, ends[1])]


def transform_filters(tiling: Tiling, g: list) -> list:
    """G g of int16 vectors."""
    ends = bind(g[0] + g[2])
    if tiling.outputs == 2:
        return [bind(v) for v in (_times(g[0], 1), ends + g[1], ends - g[1], _times(g[2], 1))]
    even, odd = bind(g[0] + _times(g[2], 2)), bind(_times(g[1], 1))
    six = [bind(_times(end, 2) + _times(end, 1)) for end in (g[0], g[2])]
    return [six[0], *(bind(v) for v in (ends + g[1], ends - g[1], even + odd, even - odd)), six[1]]


def transform_outputs(tiling: Tiling, m: list) -> list:
    """A^T m of int32 vectors."""
    if tiling.outputs == 2:
        outputs = [_sum(m[0], m[1], m[2]), wrapping_sub(wrapping_sub(m[1], m[2]), m[3])]
        return [bind(v) for v in outputs]
    near, far = bind(wrapping_add(m[1], m[2])), bind(wrapping_add(m[3], m[4]))
    near_odd, far_odd = bind(wrapping_sub(m[1], m[2])), bind(_times(wrapping_sub(m[3], m[4]), 1))
    outputs = [
        _sum(m[0], far, _times(near, 2)),
        wrapping_add(_times(near_odd, 2), far_odd),
        _times(wrapping_add(near, far), 2),
        _times(_sum(near_odd, far_odd, m[5]), 2),
    ]
    return [bind(v) for v in outputs]


def divide_outputs(tiling: Tiling, value):
    """The convolution, of ``divisor`` times it modulo 2^32."""
    if tiling.inverse != 1:
        value = bind(wrapping_mul(value, tiling.inverse))
    return bind(value >> like(tiling.shift, value, "int32"))


def _sum(a, b, c):
    return wrapping_add(wrapping_add(a, b), c)


def _times(value, power: int):
    """Times a power of two; a shift makes no promises about its result."""
    return value << like(power, value, dtype_of(value).split("x")[0])
