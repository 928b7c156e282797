"""Tables of functions with a declared period: the argument is brought to the half periods around zero.

``n = rint(x * (1 / P))`` and ``r = (x - n * P1) - n * P2`` (Cody and Waite, 1980), where P1 has so few bits that every
``n * P1`` of the domain is exact, and P2 is the float32 next to the rest of the period. The first difference is exact
for ``n != 0`` up to an argument halfway between two multiples, where it may round once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tvm_qfp8.errors import TableError
from tvm_qfp8.tables.polynomial import MAGIC, interpolate, signed_argument
from tvm_qfp8.tables.proof import U

if TYPE_CHECKING:
    from tvm_qfp8.tables.table import Table

Scalar = Callable[[np.ndarray], np.ndarray]

POINTS = 65_537
APERIODIC = 1e-12
"""A declared period may be off by this, relative to the larger of 1, |x| and |f(x)|, times the function's slope."""
MAX_PERIODS = 1 << 14
"""From zero: the first part of the period keeps at least 9 bits."""


def periodic(table: Table, x, ops):
    """Reduction ``periodic``: p(x - n P), x clamped to the domain."""
    low, high, inverse, first, second = table.period
    x = ops.keep(ops.maximum(ops.const(low), ops.minimum(ops.const(high), x)))
    magic = ops.const(MAGIC)
    count = ops.keep(ops.sub(ops.add(ops.mul(x, ops.const(inverse)), magic), magic))
    rest = ops.sub(x, ops.mul(count, ops.const(first)))
    if second:
        rest = ops.sub(rest, ops.mul(count, ops.const(second)))
    return interpolate(table, signed_argument(table, ops.keep(rest), ops), ops)


def build_periodic(
    name: str, function: Scalar, max_error: float, domain: tuple[float, float], period: float
) -> Table:
    """Cells over one period.

    Raises
    ------
    TableError
        No period, too many of them in the domain, or a bound that no table keeps.
    """
    from tvm_qfp8.tables.cells import Curve
    from tvm_qfp8.tables.search import cheapest, unreachable
    from tvm_qfp8.tables.table import Table

    if not (math.isfinite(period) and period > 0):
        raise TableError(f"period is {period:g}; give a positive number")
    low, high = (float(np.float32(end)) for end in domain)
    reach = max(abs(low), abs(high))
    count = math.floor(reach / period + 0.5) + 1
    if count > MAX_PERIODS:
        raise TableError(
            f"the domain {domain} reaches {count} periods from zero; a float32 argument keeps its phase for "
            f"{MAX_PERIODS}: give a smaller domain"
        )
    inverse = float(np.float32(1.0 / period))
    first, second = _parts(period, count)
    # Of x / P before it is rounded: the constant and the product. So far r may be beyond half a period.
    beyond = period * 3.0 * U * (count + 1)
    edge = period / 2 + beyond
    rest, gap = np.linspace(-edge, edge, POINTS, retstep=True)
    value = _values(name, function, rest)
    curvature = 2.0 * float(np.abs(np.diff(value, 2)).max()) / float(gap) ** 2
    slope = 2.0 * float(np.abs(np.diff(value)).max()) / float(gap)
    asymmetry = _check(name, function, (low, high), period, slope)
    # The two differences and the second product round; what the two parts lack of the period.
    phase = (
        2 * U * (edge + count * abs(second))
        + count * abs(second) * U
        + count * abs(period - first - second)
        + 2.0**-149
    )
    made = Table(name, "periodic", 0.0, 0.0, False, period=(low, high, inverse, first, second))
    curve = Curve(function, curvature, -edge - phase, edge + phase, norm="mixed")
    found = cheapest(made, curve, max_error, slope * phase + asymmetry)
    if found is None:
        raise unreachable(name, max_error)
    return replace(found, name=name)


def _parts(period: float, count: int) -> tuple[float, float]:
    """``(P1, P2)``: P1 times any whole number up to ``count`` is a float32."""
    mantissa, exponent = math.frexp(period)
    bits = 24 - count.bit_length()
    first = math.ldexp(round(math.ldexp(mantissa, bits)), exponent - bits)
    return first, float(np.float32(period - first))


def _values(name: str, function: Scalar, x: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        value = np.asarray(function(x), np.float64)
    if value.shape != x.shape:
        raise TableError(f"{name} gave shape {value.shape} for {x.shape}; pass a function of NumPy arrays")
    if not np.isfinite(value).all():
        raise TableError(
            f"{name} is not finite at {x[~np.isfinite(value)][0]:g}; it needs a whole period without a pole"
        )
    return value


def _check(name: str, function: Scalar, domain: tuple[float, float], period: float, slope: float) -> float:
    """What the declared period may be off by on the domain, having looked at a fine grid."""
    x = np.linspace(*domain, POINTS)
    value = _values(name, function, x)
    reduced = _values(name, function, x - np.rint(x / period) * period)
    allowed = APERIODIC * max(1.0, slope) * np.maximum(np.maximum(np.abs(x), np.abs(value)), 1.0)
    wrong = np.abs(value - reduced) - allowed
    if wrong.max() > 0:
        at = int(wrong.argmax())
        raise TableError(
            f"{name} has no period {period:g}: f(x) is off by {abs(value[at] - reduced[at]):.1e} at {x[at]:g}; "
            "declare none"
        )
    return float(allowed.max())
