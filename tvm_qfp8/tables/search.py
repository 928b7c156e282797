"""Finds the cheapest cells that meet an error bound."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

from tvm_qfp8.errors import TableError
from tvm_qfp8.tables.cells import Curve, Placement, fit_cells, place
from tvm_qfp8.tables.polynomial import MAGIC
from tvm_qfp8.tables.shape import Shape
from tvm_qfp8.tables.table import Table

CELLS = (8, 16, 32)
DEGREES = (1, 2, 3, 4, 5)
FREE = Shape()


@dataclass(frozen=True)
class Form:
    """A way to write a table."""

    cells: int
    degree: int
    exact_scale: bool = True
    centred: bool = False

    @property
    def cost(self) -> float:
        """Vector operations on a machine that looks up 8 entries of a register in one (AVX2)."""
        look_up = {8: 1, 16: 3, 32: 7}[self.cells]
        return (self.degree + 1) * look_up + 2 * self.degree + (not self.exact_scale) + 2 * self.centred


def cheapest(
    table: Table,
    curve: Curve,
    max_error: float,
    reconstruction_error: float,
    shape: Shape = FREE,
) -> Table | None:
    """``table`` filled with the cheapest cells that meet the bound and keep ``shape``; None if none of them does."""
    forms = [Form(*choice) for choice in itertools.product(CELLS, DEGREES, (True, False), (False, True))]
    for form in sorted(forms, key=lambda form: form.cost):
        placement = place(curve, form.cells, form.exact_scale)
        if placement is None:
            continue
        fitted = _fit(table, curve, placement, form, max_error - reconstruction_error, shape)
        if fitted is None:
            continue
        coefficients, bound, reversal = fitted
        return replace(
            table,
            max_error=bound + reconstruction_error,
            coefficients=as_tuples(coefficients),
            scale=placement.scale,
            offset=placement.offset,
            low=placement.low,
            high=placement.high,
            magic=MAGIC * placement.step,
            centred=form.centred,
            continuous=shape.joined,
            reversal=reversal,
        )
    return None


def _fit(table: Table, curve: Curve, placement: Placement, form: Form, budget: float, shape: Shape):
    if not shape:
        fitted = fit_cells(curve, placement, form.degree, form.centred, budget)
        return None if fitted is None else (*fitted, None)
    # Its solver takes a while to import, and only these options need it.
    from tvm_qfp8.tables.shaped_cells import fit_shaped_cells

    return fit_shaped_cells(table, curve, placement, form.degree, form.centred, budget, shape)


def as_tuples(coefficients: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """``(degree + 1, cells)`` as tuples, which a frozen table can hold."""
    return tuple(tuple(float(c) for c in power) for power in coefficients)


def unreachable(name: str, max_error: float, shape: Shape = FREE) -> TableError:
    """The error for a bound that no form meets."""
    asked = [
        *(["continuous"] if shape.continuous else []),
        *(["monotone"] if shape.monotone else []),
        *([f"exact at {', '.join(f'{x:g}' for x in shape.exact_at)}"] if shape.exact_at else []),
    ]
    constrained = f" and is {' and '.join(asked)}" if asked else ""
    return TableError(
        f"{name}: no table of up to {CELLS[-1]} cells of degree {DEGREES[-1]} reaches max_error={max_error:g}"
        f"{constrained} in float32; ask for more error{', fewer constraints' if asked else ''} or a smaller domain"
    )
