"""The polynomials of a table's cells, in the operations of ``ops`` (see ``evaluate``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tvm_qfp8.tables.table import Table

MAGIC = 12582912.0
"""1.5 * 2**23: adding it leaves the nearest integer, ties to even, in the low bits."""


def horner(table: Table, index, variable, ops, on_multipliers: int = 0):
    """The polynomial of cell ``index`` (modulo the number of cells) at ``variable``.

    The first ``on_multipliers`` additions go to the units that multiply, where those that add are busier.
    """
    if table.cells == 1:
        values = [ops.const(power[0]) for power in table.coefficients]
    else:
        values = ops.lookup(table.coefficients, index)
    result = values[-1]
    for step, value in enumerate(reversed(values[:-1])):
        add = ops.add_on_multipliers if step < on_multipliers else ops.add
        result = add(ops.mul(result, variable), value)
    return result


def argument(table: Table, x, ops):
    """min(high, scale * x + offset), keeping NaN."""
    t = x if table.scale == 1.0 else ops.mul(x, ops.const(table.scale))
    if table.offset:
        t = ops.add(t, ops.const(table.offset))
    return ops.minimum(ops.const(table.high), t)


def signed_argument(table: Table, x, ops):
    """The argument, not below ``low`` either."""
    return ops.maximum(ops.const(table.low), argument(table, x, ops))


def interpolate(table: Table, t, ops):
    """The polynomial of the cell that holds ``t``."""
    magic = ops.const(table.magic)
    shifted = ops.add(t, magic)
    variable = ops.sub(t, ops.sub(shifted, magic)) if table.centred else t
    return horner(table, ops.bits(shifted), variable, ops)
