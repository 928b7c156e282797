"""The sums of a panel of columns: products of tiles, block by block of the reduction, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.amx.plan import TilePlan
from tvm_qfp8.topi.amx.tiles import ROWS
from tvm_qfp8.topi.float_contract import bind
from tvm_qfp8.topi.prim_func import load, store


def emit_sums(
    plan: TilePlan,
    groups: int,
    rows: Sequence[int],
    columns: int,
    prepare: Callable,
    operands: Callable,
    finish: Callable,
) -> None:
    """All products of ``groups`` blocks of tiles that share a panel of weights.

    Parameters
    ----------
    rows : sequence of int
        Rows of each tile of a block that ``finish`` gets.
    columns : int
        Vectors of columns that it gets.
    prepare : (block of the reduction) -> weights
        Emitted before that block's products.
    operands : (weights, group, product of the block, product) -> (rows of tiles, columns of tiles)
        Where the operands of one product lie, as ``TileRegisters.multiply`` takes them.
    finish : (group, tile) -> (row, column, vector of sums) -> None
    """
    registers = plan.registers
    size = registers.all_rows * registers.width
    sums = T.alloc_buffer((size,), plan.kind.sums, align=64)

    def products(weights, group, reduction) -> None:
        registers.clear()
        with T.serial(0, plan.block) as index:
            product = index
            if plan.blocks > 1:
                # What is beyond the last has weights of zero.
                product = T.bind(tirx.min(reduction * plan.block + index, plan.real_products - 1))
            registers.multiply(*operands(weights, group, index, product))
        registers.write(sums)

    def finish_all(buffer, group, start) -> None:
        for tile, count in enumerate(rows):
            finish_row = finish(group, tile)
            with T.serial(0, count) as row:
                for column in range(columns):
                    at = start + (tile * plan.rows + row) * registers.width + column * ROWS
                    finish_row(row, column, T.bind(load(buffer, at, ROWS)))

    if plan.blocks == 1:
        weights = prepare(0)
        with T.serial(0, groups) as group:
            products(weights, group, 0)
            finish_all(sums, group, 0)
        return
    totals = T.alloc_buffer((groups * size,), "int32", align=64)

    def add_to_totals(group, first: bool) -> None:
        with T.serial(0, size // ROWS) as vector:
            at = group * size + vector * ROWS
            found = bind(load(sums, vector * ROWS, ROWS).astype("int32x16"))
            store(totals, at, found if first else found + load(totals, at, ROWS), ROWS)

    with T.serial(0, plan.blocks) as reduction:
        weights = prepare(reduction)
        with T.serial(0, groups) as group:
            products(weights, group, reduction)
            with T.If(reduction == 0):
                with T.Then():
                    add_to_totals(group, first=True)
                with T.Else():
                    add_to_totals(group, first=False)
    with T.serial(0, groups) as group:
        finish_all(totals, group, group * size)
