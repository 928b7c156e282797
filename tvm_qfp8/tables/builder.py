"""Builds the cheapest table that provably meets an error bound."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from tvm_qfp8.errors import TableError
from tvm_qfp8.tables.cells import Curve, Placement, fit_cells, place
from tvm_qfp8.tables.evaluate import LN2, MAGIC
from tvm_qfp8.tables.functions import FUNCTIONS, Function
from tvm_qfp8.tables.observe import observe
from tvm_qfp8.tables.proof import U
from tvm_qfp8.tables.table import Table

MIN_MAX_ERROR = 1e-7
# Of the error budget, what the cut-off tail of a function may take.
TAIL_SHARE = 0.97
CELLS = (8, 16, 32)
DEGREES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Form:
    """A way to write a table; ``cost`` counts vector operations on a machine with 8-entry register look-up."""

    cells: int
    degree: int
    exact_scale: bool
    centred: bool

    @property
    def cost(self) -> float:
        look_up = {1: 0, 8: 1, 16: 3, 32: 7}[self.cells]
        return (self.degree + 1) * look_up + 2 * self.degree + (not self.exact_scale) + 2 * self.centred


def build_table(
    function: str | Callable[[np.ndarray], np.ndarray],
    max_error: float = 1e-3,
    domain: tuple[float, float] | None = None,
    relative: bool | None = None,
) -> Table:
    """The cheapest table of ``function`` whose proved error is at most ``max_error``.

    Parameters
    ----------
    function
        A name of ``tables.FUNCTIONS``, or a smooth NumPy function float64 -> float64 (then ``domain`` is needed).
    max_error
        Bound of ``|y - f(x)| / max(1, |f(x)|)``, or of ``|y - f(x)| / |f(x)|`` where ``relative``.
    domain
        Arguments ``(low, high)`` that the table is for; outside, the nearest end's value is given. A named
        function covers the whole float32 range without it; exp takes it to drop the denormal results.
    relative
        Default: True for exp, exp2, reciprocal, rsqrt and sqrt, else False.

    Raises
    ------
    TableError
        Unknown name, a pole or a value that is not finite in the domain, a bound below float32's reach.
    """
    if not (math.isfinite(max_error) and max_error >= MIN_MAX_ERROR):
        raise TableError(f"max_error is {max_error}; a float32 table can reach {MIN_MAX_ERROR}: ask for more")
    if domain is not None:
        domain = (float(domain[0]), float(domain[1]))
        if not domain[0] < domain[1]:
            raise TableError(f"domain is {domain}; give (low, high) with low < high")
    if isinstance(function, str):
        if function not in FUNCTIONS:
            raise TableError(f"function {function!r} is not known; known are {', '.join(FUNCTIONS)}; or pass a callable")
        return _build_named(function, float(max_error), domain, relative)
    if domain is None:
        raise TableError("a table of a callable needs domain=(low, high)")
    return _build_callable(function, float(max_error), domain, bool(relative))


@lru_cache(maxsize=256)
def _build_named(
    name: str, max_error: float, domain: tuple[float, float] | None, relative: bool | None
) -> Table:
    function = FUNCTIONS[name]
    if function.reduction == "exp":
        return _build_exp(function, max_error, domain)
    if domain is not None:
        return _build_callable(function.reference, max_error, domain, bool(relative), name)
    if function.core is None:
        return _arithmetic(function)
    if function.reduction == "log":
        return _build_log(function, max_error)
    curve, hinge = _reduced_curve(function, max_error)
    table = Table(name, function.reduction, 0.0, 0.0, False, hinge=hinge)
    # odd reconstructs exactly; the others round their last addition once. The clamp at the hinge rounds, too.
    last = 0.0 if function.reduction == "odd" else 1.01 * U * (1.0 + 2.0 * hinge)
    return _observed(_cheapest(table, curve, max_error, last), function.reference)


def _observed(table: Table, reference, domain: tuple[float, float] = (-np.inf, np.inf)) -> Table:
    return replace(table, observed_error=observe(table, reference, table.relative, domain))


def _arithmetic(function: Function) -> Table:
    """reciprocal, sqrt, rsqrt and the hard functions: up to three IEEE operations, each within U of its result."""
    table = Table(function.name, function.reduction, 4 * U, 0.0, function.relative)
    return _observed(table, function.reference)


def _reduced_curve(function: Function, max_error: float) -> tuple[Curve, float]:
    """The curve on its finite interval, tails cut where they are within the budget, and the hinge."""
    core = function.core
    assert core is not None
    tail = TAIL_SHARE * max_error
    high = function.high
    if high is None:
        if function.high_limit is None:
            high = _cut(lambda c: np.abs(core(c) - c), tail)
        else:
            limit = function.high_limit
            high = _cut(lambda c: np.abs(core(c) - limit), tail)
    low = function.low
    if low is None:
        low = -_cut(lambda c: np.abs(core(-c) - function.low_limit), tail)
    low, high = float(np.float32(low)), float(np.float32(high))
    hinge = high if function.reduction == "hinge" else 0.0
    pins = [(pin, float(np.float32(core(np.float64(pin)) - hinge))) for pin in function.pins]
    high_value = 0.0 if function.high_limit is None else function.high_limit
    curve = Curve(
        lambda c: core(c) - hinge,
        function.curvature,
        low,
        high,
        tuple(pins),
        low_value=function.low_limit - hinge if function.low is None else None,
        high_value=high_value if function.high is None else None,
        high_free=function.reduction != "hinge",
    )
    return curve, hinge


def _cut(tail: Callable[[float], float], budget: float) -> float:
    """The least c from which ``tail``, decreasing from its last maximum on, stays within ``budget``."""
    grid = np.linspace(0.0, 64.0, 4097)
    with np.errstate(all="ignore"):
        above = np.flatnonzero(tail(grid) > budget)
    start = grid[above[-1]] if len(above) else 0.0
    inside, outside = start + 64.0 / 4096, start
    for _ in range(50):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if tail(np.float64(middle)) <= budget else (inside, middle)
    # A float32 not below it, so that rounding to float32 keeps the tail within the budget.
    return float(np.nextafter(np.float32(inside), np.float32(np.inf)))


def _cheapest(table: Table, curve: Curve, max_error: float, last: float) -> Table:
    """``table`` filled with the cheapest cells that meet the bound."""
    forms = [Form(*choice) for choice in itertools.product(CELLS, DEGREES, (True, False), (False, True))]
    for form in sorted(forms, key=lambda form: form.cost):
        placement = place(curve, form.cells, form.exact_scale)
        if placement is None:
            continue
        fitted = fit_cells(curve, placement, form.degree, form.centred, max_error - last)
        if fitted is None:
            continue
        coefficients, bound = fitted
        return replace(
            table,
            max_error=bound + last,
            coefficients=tuple(tuple(float(c) for c in power) for power in coefficients),
            scale=placement.scale,
            offset=placement.offset,
            low=placement.low,
            high=placement.high,
            magic=MAGIC * placement.step,
            centred=form.centred,
        )
    raise TableError(
        f"{table.name}: no table of up to {CELLS[-1]} cells of degree {DEGREES[-1]} reaches max_error={max_error}; "
        "ask for more error or a smaller domain"
    )


def _build_exp(function: Function, max_error: float, domain: tuple[float, float] | None) -> Table:
    """One polynomial for 2**f on [-0.5, 0.5], scaled by 2**n."""
    base_e = function.name == "exp"
    scale = float(np.float32(math.log2(math.e))) if base_e else 1.0
    low, high = (-160.0, 129.0)
    if domain is not None:
        low, high = max(low, domain[0] * scale), min(high, domain[1] * scale)
    low, high = float(np.float32(low)), float(np.float32(high))
    # Beyond these the result is 0 or infinite in float32 whatever the rounding of t.
    reach = min(max(abs(low), abs(high)), 150.5)
    moved = reach * (U + abs(scale / math.log2(math.e) - 1.0)) * 1.01 if base_e else 0.0
    curve = Curve(np.exp2, function.curvature, -0.5, 0.5, ((0.0, 1.0),), norm="relative")
    for degree in range(1, 8):
        fitted = fit_cells(curve, Placement(1.0, 0.0, 2.0, -0.5, 0.5, 1), degree, True, max_error)
        if fitted is None or fitted[1] + math.log(2.0) * moved * 1.01 > max_error:
            continue
        table = Table(
            function.name,
            "exp",
            fitted[1] + math.log(2.0) * moved * 1.01,
            0.0,
            True,
            tuple(tuple(float(c) for c in power) for power in fitted[0]),
            scale,
            low=low,
            high=high,
            magic=MAGIC,
        )
        return _observed(table, function.reference, domain or (-np.inf, np.inf))
    raise TableError(f"{function.name}: float32 arithmetic does not reach max_error={max_error}; ask for more error")


def _build_log(function: Function, max_error: float) -> Table:
    """log(1 + v) on cells given by the leading mantissa bits."""
    # e * ln 2: the constant, the product and the last addition round, and |e| ln 2 <= |f| + ln 2.
    last = U * (1.0 + 2.0 * (1.0 + math.log(2.0))) * 1.01
    curve = Curve(np.log1p, function.curvature, 0.0, 1.0, ((0.0, 0.0),))
    for cells, degree in sorted(itertools.product(CELLS, DEGREES), key=lambda f: Form(*f, True, False).cost):
        placement = Placement(1.0, 0.0, 1.0 / cells, 0.0, 1.0 - 2.0**-23, cells, shift=0.0)
        fitted = fit_cells(curve, placement, degree, False, max_error - last)
        if fitted is None:
            continue
        table = Table(
            "log", "log", fitted[1] + last, 0.0, False, tuple(tuple(float(c) for c in power) for power in fitted[0])
        )
        return _observed(table, function.reference)
    raise TableError(f"log: float32 arithmetic does not reach max_error={max_error}; ask for more error")


def _build_callable(
    function: Callable[[np.ndarray], np.ndarray],
    max_error: float,
    domain: tuple[float, float],
    relative: bool,
    name: str | None = None,
) -> Table:
    """Cells over the whole domain; the curvature is twice the largest second difference on a fine grid."""
    name = name or getattr(function, "__name__", "function")
    low, high = (float(np.float32(end)) for end in domain)
    x = np.linspace(low, high, 65_537)
    with np.errstate(all="ignore"):
        value = np.asarray(function(x), np.float64)
    if not np.isfinite(value).all():
        raise TableError(f"{name} is not finite at {x[~np.isfinite(value)][0]:g}; choose a domain without the pole")
    if relative and (value.min() <= 0 <= value.max()):
        raise TableError(f"{name} has a zero in {domain}, where a relative error cannot be kept; use relative=False")
    curvature = 2.0 * float(np.abs(np.diff(value, 2)).max()) / (x[1] - x[0]) ** 2
    curve = Curve(function, curvature, low, high, (), norm="relative" if relative else "mixed")
    table = Table(name, "direct", 0.0, 0.0, relative)
    return _observed(_cheapest(table, curve, max_error, 0.0), function, (low, high))
