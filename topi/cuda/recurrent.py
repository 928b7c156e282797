"""Recurrent layers: the loop over time in one kernel, a block of threads for each sequence of the batch.

A thread has columns of its own: it adds up their recurrent products, and keeps their states. What the products of all
threads read, the hidden state as codes or float32, is shared. Sequences of one batch run side by side; steps cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.format import Layout
from tvm_qfp8.recurrent_cell import Operands
from tvm_qfp8.tables import build_table
from tvm_qfp8.topi.codec import decode_expr, encode_expr
from tvm_qfp8.topi.cuda.float_sum import FloatSum
from tvm_qfp8.topi.cuda.isa import INSTRUCTION_SET
from tvm_qfp8.topi.cuda.launch import THREADS
from tvm_qfp8.topi.float_contract import add, bind, mul, to_float
from tvm_qfp8.topi.interpolate import TirOps, emit_table
from tvm_qfp8.topi.prim_func import load, store
from tvm_qfp8.topi.recurrent import RecurrentBuffers, RecurrentShape


def emit_recurrent(
    shape: RecurrentShape, buffers: RecurrentBuffers, weight, layout: Layout | None, a, bias, max_error: float
) -> None:
    """Emit the kernel; ``weight`` ``(hidden, gates * hidden)`` holds codes, or float32 without a layout."""
    cell, hidden, width = shape.cell, shape.hidden, shape.width
    size = shape.batch * hidden
    exact = shape.state is not None and layout is not None

    def operand_of(value):
        """What the products read: a grid value, or float32."""
        if shape.state is None:
            return value
        code = encode_expr(bind(mul(value, buffers.reciprocal)), shape.state, INSTRUCTION_SET)
        return decode_expr(code, shape.state, "int32")

    def weight_at(depth, column):
        value = load(weight, depth * width + column, 1)
        if layout is None:
            return value
        grid = decode_expr(bind(value), layout, "int32")
        return grid if exact else to_float(grid)

    def product(shared, column):
        """The sum of one column, scaled, with its bias."""
        if exact:
            total = T.alloc_buffer((1,), "int32", scope="local")
            store(total, 0, tirx.const(0, "int32"), 1)
            with T.serial(0, hidden) as depth:
                store(total, 0, load(total, 0, 1) + load(shared, depth, 1) * weight_at(depth, column), 1)
            value = to_float(T.bind(load(total, 0, 1)))
        else:
            sums = FloatSum()
            with T.serial(0, hidden) as depth:
                sums.add_product(load(shared, depth, 1), bind(weight_at(depth, column)))
            value = sums.value()
        return bind(add(bind(mul(value, load(a, column, 1))), load(bias, column, 1)))

    def operands(t, row, column, shared: list) -> Operands:
        def of_gate(gate: int):
            return product(shared[-1 if gate >= cell.products[-1][0] else 0], gate * hidden + column)

        def read(buffer, start, gate: int):
            return bind(load(buffer, start + gate * hidden + column, 1))

        return Operands(
            TirOps(1, INSTRUCTION_SET),
            lambda name, x: emit_table(build_table(name, max_error=max_error), x, INSTRUCTION_SET),
            of_gate,
            partial(read, buffers.inputs, (t * shape.batch + row) * width),
            partial(read, buffers.peepholes, 0),
            tuple(bind(load(state, row * hidden + column, 1)) for state in buffers.states),
        )

    with T.launch_thread("blockIdx.x", shape.batch) as row, T.launch_thread("threadIdx.x", THREADS) as thread:

        def columns(body: Callable) -> None:
            """``body(column)`` for the thread's own columns."""
            with T.serial(0, -(-hidden // THREADS)) as part:
                column = T.bind(part * THREADS + thread)
                with T.If(column < hidden), T.Then():
                    body(column)

        kind = "float32" if shape.state is None else "int32"
        shared = [T.alloc_buffer((hidden,), kind, scope="shared") for _ in cell.products]

        def start(column) -> None:
            for first, state in zip(buffers.first, buffers.states, strict=True):
                store(state, row * hidden + column, load(first, row * hidden + column, 1), 1)

        def share_state(column) -> None:
            state = bind(load(buffers.states[0], row * hidden + column, 1))
            store(shared[0], column, operand_of(state), 1)

        def share_reset(t, column) -> None:
            store(
                shared[1], column, operand_of(bind(cell.reset_state(operands(t, row, column, shared[:1])))), 1
            )

        def update(t, column) -> None:
            at = row * hidden + column
            with T.If(t < load(buffers.lengths, row, 1)):
                with T.Then():
                    found = cell.step(operands(t, row, column, shared))
                    for state, value in zip(buffers.states, found, strict=True):
                        store(state, at, value, 1)
                    store(buffers.outputs, t * size + at, found[0], 1)
                with T.Else():
                    store(buffers.outputs, t * size + at, tirx.const(0.0, "float32"), 1)

        columns(start)
        with T.serial(0, shape.steps) as index:
            t = T.bind(shape.steps - 1 - index) if shape.reverse else index
            columns(share_state)
            if cell.resets_state:
                columns(partial(share_reset, t))
            columns(partial(update, t))
