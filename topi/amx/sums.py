"""The sums of a block of tiles: products of all steps, in exact blocks, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.amx.plan import TilePlan
from tvm_qfp8.topi.amx.tiles import ROWS
from tvm_qfp8.topi.float_contract import bind
from tvm_qfp8.topi.prim_func import load, store


def sums_buffer(plan: TilePlan) -> tuple:
    """(what tiles are stored to, totals of several blocks or None)."""
    registers = plan.registers
    size = registers.all_rows * registers.width
    sums = T.alloc_buffer((size,), plan.kind.sums, align=64)
    totals = T.alloc_buffer((size,), "int32", align=64) if plan.block < plan.products else None
    return sums, totals


def add_products(plan: TilePlan, buffers: tuple, rows: Callable, columns: Callable) -> None:
    """All products; ``rows(product)(tile)`` and ``columns(product)(tile)`` say where operands lie."""
    registers = plan.registers
    sums, totals = buffers

    def block(first, count: int) -> None:
        registers.clear()
        with T.serial(0, count) as index:
            product = T.bind(first + index)
            registers.multiply(rows(product), columns(product))
        registers.write(sums)

    if totals is None:
        block(0, plan.products)
        return

    def add_to_totals(start: bool) -> None:
        with T.serial(0, registers.all_rows * registers.width // ROWS) as vector:
            total = bind(load(sums, vector * ROWS, ROWS).astype("int32x16"))
            if not start:
                total = total + load(totals, vector * ROWS, ROWS)
            store(totals, vector * ROWS, total, ROWS)

    whole, rest = divmod(plan.products, plan.block)
    block(0, plan.block)
    add_to_totals(start=True)
    if whole > 1:
        with T.serial(1, whole) as index:
            block(index * plan.block, plan.block)
            add_to_totals(start=False)
    if rest:
        block(whole * plan.block, rest)
        add_to_totals(start=False)


def for_each_sum(plan: TilePlan, buffers: tuple, rows, columns: int, finish: Callable) -> None:
    """``finish(row, column tile, vector of sums)`` for the first ``rows`` rows and ``columns`` column tiles."""
    sums, totals = buffers
    with T.serial(0, rows) as row:
        for column in range(columns):
            at = row * plan.registers.width + column * ROWS
            finish(row, column, T.bind(load(totals if totals is not None else sums, at, ROWS)))
