"""Embedding look-up: rows of a table of codes, decoded and scaled as they are read."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.format import Layout
from tvm_qfp8.topi.codec import decode_expr
from tvm_qfp8.topi.float_contract import bind, mul, to_float
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.prim_func import load, vector_runs


def emit_embedding(
    isa: InstructionSet,
    layout: Layout,
    table_shape: tuple[int, int],
    count: int,
    table,
    scales,
    indices,
    finish: Callable,
) -> None:
    """``finish(value, row, column, lanes)``: row i is ``fl32(G) * scales[indices[i]]``.

    A negative index counts from the end; one outside the table reads its first or last row, never foreign memory.
    """
    rows, width = table_shape
    with T.serial(0, count) as row:
        index = T.bind(load(indices, row, 1))
        wrapped = tirx.Select(index < 0, index + rows, index)
        picked = T.bind(tirx.max(tirx.min(wrapped, rows - 1), 0))
        scale = T.bind(load(scales, picked, 1))

        def emit(column, lanes, row=row, picked=picked, scale=scale) -> None:
            codes = load(table, picked * width + column, lanes)
            grid = to_float(decode_expr(codes, layout, "int32"))
            value = bind(mul(grid, tirx.Broadcast(scale, lanes) if lanes > 1 else scale))
            finish(value, row, column, lanes)

        vector_runs(width, isa.lanes, emit)
