"""Finds the cheapest cells that meet an error bound."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

from tvm_qfp8.errors import TableError
from tvm_qfp8.tables.cells import Curve, fit_cells, place
from tvm_qfp8.tables.polynomial import MAGIC
from tvm_qfp8.tables.table import Table

CELLS = (8, 16, 32)
DEGREES = (1, 2, 3, 4, 5)


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


def cheapest(table: Table, curve: Curve, max_error: float, reconstruction_error: float) -> Table | None:
    """``table`` filled with the cheapest cells that meet the bound; None if none of them does."""
    forms = [Form(*choice) for choice in itertools.product(CELLS, DEGREES, (True, False), (False, True))]
    for form in sorted(forms, key=lambda form: form.cost):
        placement = place(curve, form.cells, form.exact_scale)
        if placement is None:
            continue
        fitted = fit_cells(curve, placement, form.degree, form.centred, max_error - reconstruction_error)
        if fitted is None:
            continue
        coefficients, bound = fitted
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
        )
    return None


def as_tuples(coefficients: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """``(degree + 1, cells)`` as tuples, which a frozen table can hold."""
    return tuple(tuple(float(c) for c in power) for power in coefficients)


def unreachable(name: str, max_error: float) -> TableError:
    """The error for a bound that no form meets."""
    return TableError(
        f"{name}: no table of up to {CELLS[-1]} cells of degree {DEGREES[-1]} reaches max_error={max_error:g} in "
        "float32; ask for more error or a smaller domain"
    )
