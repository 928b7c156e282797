"""The products of a layer on tiles, with everything else between them.

The unit that multiplies tiles works by itself for 16 cycles an instruction. So while it takes the products of one
block of tiles, the same instruction stream finishes the sums of the block before and decodes the weights that come
next: slices of both stand between the products. A processor alone could not look ahead so far.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.amx.panels import Panels
from tvm_qfp8.topi.amx.plan import TilePlan
from tvm_qfp8.topi.amx.tiles import ROWS, tile_buffer
from tvm_qfp8.topi.float_contract import bind
from tvm_qfp8.topi.prim_func import load, store


def sum_buffers(plan: TilePlan, groups: int) -> tuple:
    """(sums of two blocks of tiles, totals of all where a sum is taken in several passes), for ``emit_sums``."""
    size = plan.registers.all_rows * plan.registers.width
    sums = tile_buffer(2 * size, plan.kind.sums)
    return sums, tile_buffer(groups * size, "int32") if plan.blocks * plan.parts > 1 else None


def emit_sums(
    panels: Panels,
    packed,
    panel_range: tuple,
    buffers: tuple,
    groups: int,
    rows: int,
    rows_of: Callable,
    finish: Callable,
) -> None:
    """All products of ``groups`` blocks of tiles with the panels of a range.

    Parameters
    ----------
    panel_range : (first, count)
        Panels of weights; expressions.
    buffers : (sums, totals)
        Of ``sum_buffers``.
    rows : int
        Rows of a block of tiles that ``finish`` gets.
    rows_of : (group, product, part of the activations) -> (tile) -> (buffer, index, elements from row to row)
        Where the tiles of activations lie.
    finish : (panel, group, row) -> (column, vector of sums) -> None
    """
    plan = panels.plan
    registers, block, passes = plan.registers, plan.block, plan.blocks * plan.parts
    first_panel, count = panel_range
    size = registers.all_rows * registers.width
    sums, totals = buffers
    columns = len(panels.valid)
    weights = panels.start(packed, first_panel, count)
    slices = groups * plan.parts * block

    def place_of(stage) -> tuple:
        """(pass over a panel's reduction, block of tiles) of a stage."""
        inner = count if panels.resident else groups
        outer = T.bind(stage // inner)
        rest = T.bind(stage - outer * inner)
        return (rest, outer) if panels.resident else (outer, rest)

    def multiply(one_pass, group, index) -> None:
        part = T.bind(one_pass % plan.parts) if plan.parts > 1 else 0
        unit = T.bind(one_pass // plan.parts)
        product = index
        if plan.blocks > 1:
            # What is beyond the last has weights of zero.
            product = T.bind(tirx.min(unit % plan.blocks * block + index, plan.real_products - 1))
        registers.multiply(rows_of(group, product, part), panels.tiles(weights, first_panel, unit, index))
        panels.next_slice(packed, weights, first_panel, unit, (part * groups + group) * block + index, slices)

    def finish_slice(stage, index) -> None:
        """Rows of the sums of a stage that is over."""
        one_pass, group = place_of(stage)
        at = T.bind(stage % 2 * size)
        lowest, beyond = T.bind(index * rows // block), T.bind((index + 1) * rows // block)

        def each_row(body: Callable) -> None:
            with T.serial(0, beyond - lowest) as i:
                row = T.bind(lowest + i)
                for column in range(columns):
                    place = row * registers.width + column * ROWS
                    body(row, column, place, T.bind(load(sums, at + place, ROWS)))

        def last(row, column, place, value) -> None:
            if totals is not None:
                value = bind(value.astype("int32x16") + load(totals, group * size + place, ROWS))
            finish(first_panel + one_pass // passes, group, row)(column, value)

        if totals is None:
            each_row(last)
            return
        reduction = T.bind(one_pass % passes)
        # The low part comes after the high one, so that the last pass adds sums as they are.
        shift = (1 - reduction % 2) * plan.shift if plan.parts > 1 else 0

        def add_to_totals(first: bool) -> Callable:
            def add(row, column, place, value) -> None:
                value = value.astype("int32x16")
                if plan.parts > 1:
                    value = value << tirx.Broadcast(shift, ROWS)
                place = group * size + place
                store(totals, place, value if first else value + load(totals, place, ROWS), ROWS)

            return add

        with T.If(reduction == passes - 1):
            with T.Then():
                each_row(last)
            with T.Else():
                with T.If(reduction == 0):
                    with T.Then():
                        each_row(add_to_totals(first=True))
                    with T.Else():
                        each_row(add_to_totals(first=False))

    stages = count * (passes * groups)
    with T.serial(0, stages + 1) as stage:
        one_pass, group = place_of(stage)
        registers.clear()
        with T.serial(0, block) as index:
            with T.If(stage < stages):
                with T.Then():
                    multiply(one_pass, group, index)
            with T.If(stage > 0):
                with T.Then():
                    finish_slice(T.bind(stage - 1), index)
        registers.write(sums, T.bind(stage % 2 * size))
