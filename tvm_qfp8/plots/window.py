"""Which arguments show a table best, and where its cells end."""

from __future__ import annotations

import math

import numpy as np

from tvm_qfp8.tables import Table
from tvm_qfp8.tables.polynomial import MAGIC

# Of the cells' range, what is shown beyond it: the tail, where the table is constant or linear.
BEYOND = 0.15
FOLDED = ("even", "odd", "logistic", "symmetric")
# Where reductions by exponent, angle or plain arithmetic show what they do.
WINDOWS = {
    "exp": (-10.0, 3.0),
    "exp_split": (-10.0, 3.0),
    "sine": (-2 * math.pi, 2 * math.pi),
    "cosine": (-2 * math.pi, 2 * math.pi),
    "hardsigmoid": (-5.0, 5.0),
    "hardswish": (-5.0, 5.0),
    "hardsigmoid_slope": (-5.0, 5.0),
    "hardswish_slope": (-5.0, 5.0),
}
POSITIVE = ("log", "power", "product", "reciprocal", "sqrt", "rsqrt")
OCTAVES = 4


def window_of(table: Table, domain: tuple[float, float] | None = None) -> tuple[float, float, bool]:
    """``(low, high, logarithmic)`` of the arguments to show."""
    if domain is not None:
        return (*domain, False)
    if table.reduction in POSITIVE:
        return 2.0**-OCTAVES, 2.0**OCTAVES, True
    if table.reduction in WINDOWS:
        return (*WINDOWS[table.reduction], False)
    low, high = ((end - table.offset) / table.scale for end in (table.low, table.high))
    if table.reduction in FOLDED:
        low = -high
    margin = BEYOND * (high - low)
    return low - margin, high + margin, False


def cell_boundaries(table: Table) -> list[float]:
    """Arguments at which one cell ends and the next begins; none where the reduction repeats the cells."""
    if not table.magic or table.reduction in WINDOWS or table.reduction in POSITIVE:
        return []
    step = table.magic / MAGIC
    cells = np.arange(math.floor(table.low / step), math.ceil(table.high / step) + 1)
    t = (cells + 0.5) * step
    x = (t[(t > table.low) & (t < table.high)] - table.offset) / table.scale
    mirrored = [-x[::-1]] if table.reduction in FOLDED else []
    return np.concatenate([*mirrored, x]).tolist()
