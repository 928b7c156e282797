"""Tables of a function on a finite domain: a user's own, or a named one where only a part of it is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tvm_qfp8.errors import TableError
from tvm_qfp8.tables.cells import Curve
from tvm_qfp8.tables.proof import U
from tvm_qfp8.tables.search import cheapest, unreachable
from tvm_qfp8.tables.shape import Shape
from tvm_qfp8.tables.table import Table

CURVATURE_POINTS = 65_537
# A declared symmetry may be off by this, relative to the larger of 1, |x| and |f(x)|: float64 rounding of the callable.
ASYMMETRY = 1e-12

Scalar = Callable[[np.ndarray], np.ndarray]

SYMMETRIES: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], np.ndarray], str]] = {
    "even": ("symmetric", lambda x, mirrored: mirrored, "f(-x) = f(x)"),
    "odd": ("odd", lambda x, mirrored: -mirrored, "f(-x) = -f(x)"),
    "logistic": ("logistic", lambda x, mirrored: 1.0 - mirrored, "f(-x) = 1 - f(x)"),
    "rectifier": ("even", lambda x, mirrored: x + mirrored, "f(x) = x + f(-x)"),
}
"""By name: the table's reduction, f(x) from x and f(-x), and the rule in words."""


def build_on_domain(
    name: str,
    function: Scalar,
    max_error: float,
    domain: tuple[float, float],
    relative: bool,
    symmetry: str | None,
    shape: Shape,
) -> Table:
    """Cells over the whole domain, or its positive half where a symmetry gives the other.

    The curvature is taken as twice the largest second difference on a fine grid.
    """
    low, high = (float(np.float32(end)) for end in domain)
    x, gap = np.linspace(low, high, CURVATURE_POINTS, retstep=True)
    with np.errstate(all="ignore"):
        value = np.asarray(function(x), np.float64)
    if value.shape != x.shape:
        raise TableError(f"{name} gave shape {value.shape} for {x.shape}; pass a function of NumPy arrays")
    if not np.isfinite(value).all():
        raise TableError(
            f"{name} is not finite at {x[~np.isfinite(value)][0]:g}; choose a domain without the pole"
        )
    if relative and value.min() <= 0 <= value.max():
        raise TableError(
            f"{name} has a zero in {domain}, where a relative error cannot be kept; use relative=False"
        )
    curvature = 2.0 * float(np.abs(np.diff(value, 2)).max()) / float(gap) ** 2
    norm = "relative" if relative else "mixed"
    if symmetry is None:
        curve, reduction, last = Curve(function, curvature, low, high, norm=norm), "direct", 0.0
    else:
        curve, reduction, last = _half(name, function, curvature, x, value, norm, symmetry)
    empty = Table(name, reduction, 0.0, 0.0, relative)
    curve = replace(curve, pins=exact_pins(empty, curve, function, shape))
    found = cheapest(empty, curve, max_error, last, shape)
    if found is None:
        raise unreachable(name, max_error, shape)
    return found


def _half(
    name: str, function: Scalar, curvature: float, x: np.ndarray, value: np.ndarray, norm: str, symmetry: str
) -> tuple[Curve, str, float]:
    """The curve on ``x >= 0``, the reduction that makes the rest of it, and the error that this adds."""
    if symmetry not in SYMMETRIES:
        raise TableError(f"symmetry {symmetry!r} is unknown; there are {', '.join(SYMMETRIES)}")
    reduction, from_mirrored, rule = SYMMETRIES[symmetry]
    low, high = float(x[0]), float(x[-1])
    if low != -high:
        raise TableError(f"symmetry needs a domain (-a, a), not ({low:g}, {high:g})")
    size = np.maximum(np.maximum(np.abs(value), np.abs(x)), 1.0)
    wrong = np.abs(value - from_mirrored(x, value[::-1])) / size
    if wrong.max() > ASYMMETRY:
        raise TableError(
            f"{name} is not {symmetry}: {rule} is off by {wrong.max():.1e} at {x[wrong.argmax()]:g}; declare none"
        )
    last = ASYMMETRY * max(1.0, high)
    if symmetry == "even":
        return Curve(function, curvature, 0.0, high, norm=norm), reduction, last
    if symmetry == "odd":
        return Curve(function, curvature, 0.0, high, ((0.0, 0.0),), norm), reduction, last
    # The last addition rounds once; what is added to the core may be smaller than f, so the error is absolute.
    last += 1.01 * U
    if norm == "relative":
        raise TableError(f"symmetry {symmetry!r} keeps no relative error; use relative=False or declare none")
    if symmetry == "logistic":
        return Curve(lambda c: function(c) - 0.5, curvature, 0.0, high, ((0.0, 0.0),)), reduction, last
    return Curve(lambda c: function(-c), curvature, 0.0, high), reduction, last


def exact_pins(
    table: Table, curve: Curve, reference: Scalar, shape: Shape
) -> tuple[tuple[float, float], ...]:
    """``exact_at`` as points of the curve that ``table`` will hold, without those that it passes already."""
    pins: dict[float, float] = dict(curve.pins)
    for x in shape.exact_at:
        c = abs(x) if table.reduction in FOLDED else x
        if curve.low <= c <= curve.high and c not in pins:
            expected = np.float32(reference(np.asarray(x, np.float64)))
            pins[c] = _pinned(table, np.float32(x), np.float32(curve.function(np.asarray(c))), expected)
    return tuple(pins.items())


FOLDED = ("even", "odd", "logistic", "symmetric")
"""Reductions whose curve is a function of the magnitude."""


def _pinned(table: Table, x: np.float32, core: np.float32, expected: np.float32) -> float:
    """The float32 next to ``core`` from which the table's last addition makes ``expected``, if there is one."""
    near = core + np.arange(-8, 9, dtype=np.float32) * np.spacing(np.abs(core))
    near = near[np.argsort(np.abs(near - core), kind="stable")]
    one_cell = replace(table, coefficients=((0.0,),), magic=1.0)
    good = [value for value in near if replace(one_cell, coefficients=((float(value),),))(x) == expected]
    return float(good[0] if good else core)


def check_exact(table: Table, function: Scalar, shape: Shape) -> None:
    """Refuse a table that misses a point which it was asked to pass.

    Raises
    ------
    TableError
        Naming the point.
    """
    x = np.array(shape.exact_at, np.float32)
    with np.errstate(all="ignore"):
        expected = np.asarray(function(x.astype(np.float64)), np.float64).astype(np.float32)
    wrong = np.flatnonzero(~((table(x) == expected) | (np.isnan(table(x)) & np.isnan(expected))))
    if len(wrong):
        at = x[wrong[0]]
        raise TableError(
            f"{table.name} cannot be exact at {at:g}: it gives {table(at):.9g} instead of {expected[wrong[0]]:.9g}, "
            "what follows its polynomial rounds, or the point is in its cut-off tail; "
            "give a domain or leave the point out"
        )
