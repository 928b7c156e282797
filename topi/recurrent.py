"""Recurrent layers: the loop over time in one kernel.

A step encodes the hidden state, multiplies it with the recurrent weight, adds the input's product, and goes once over
the gates, whose functions are tables. Sums and states stay in cache. The kernels of dense layers do the product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.format import Layout
from tvm_qfp8.recurrent_cell import Cell, Operands
from tvm_qfp8.tables import build_table
from tvm_qfp8.topi.codec import encode_expr
from tvm_qfp8.topi.float_contract import bind, mul, with_lanes
from tvm_qfp8.topi.interpolate import TirOps, emit_table
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.prim_func import load, store, vector_runs


@dataclass(frozen=True)
class RecurrentShape:
    """One direction of a layer; ``state`` is the layout of the hidden state in the product, None for float32."""

    cell: Cell
    steps: int
    batch: int
    hidden: int
    reverse: bool
    state: Layout | None

    @property
    def width(self) -> int:
        """Columns of the recurrent product."""
        return self.cell.gates * self.hidden


@dataclass(frozen=True)
class RecurrentBuffers:
    """Arguments of the kernel, flat, as ``qfp8.recurrent`` has them; ``reciprocal`` is 1 / the state's scale."""

    inputs: object
    lengths: object
    first: Sequence
    """First states."""
    peepholes: object | None
    outputs: object
    states: Sequence
    """Last states, which hold the present ones during the loop."""
    reciprocal: object


def emit_recurrent(
    isa: InstructionSet,
    shape: RecurrentShape,
    buffers: RecurrentBuffers,
    products: Sequence[Callable],
    max_error: float,
) -> None:
    """Emit the loop; ``products[i](operand, finish)`` emits product i of the cell.

    ``operand`` is a buffer ``(batch, hidden)`` of codes or of float32; ``finish(sum, row, column, lanes, valid)``
    receives the sums with their bias.
    """
    cell, size = shape.cell, shape.batch * shape.hidden
    before = [T.alloc_buffer((size,), "float32", align=64) for _ in buffers.states]
    sums = T.alloc_buffer((shape.batch * shape.width,), "float32", align=64)
    operand = T.alloc_buffer((size,), "uint8" if shape.state else "float32", align=64)

    def put_operand(at, value, lanes: int) -> None:
        if shape.state is not None:
            factor = buffers.reciprocal if lanes == 1 else tirx.Broadcast(buffers.reciprocal, lanes)
            scaled = bind(mul(value, factor))
            value = encode_expr(scaled, shape.state, isa)
        store(operand, at, value, lanes)

    def keep_states(at, lanes: int) -> None:
        for old, new in zip(before, buffers.states, strict=True):
            store(old, at, load(new, at, lanes), lanes)
        put_operand(at, bind(load(before[0], at, lanes)), lanes)

    def put_sums(first: int, value, row, column, lanes: int, valid: int) -> None:
        at = row * shape.width + first * shape.hidden + column
        if valid == lanes:
            store(sums, at, value, lanes)
            return
        part = T.alloc_buffer((lanes,), "float32", scope="local")
        store(part, 0, value, lanes)
        for lane in range(valid):
            store(sums, at + lane, load(part, lane, 1), 1)

    def operands(t, row, column, lanes: int) -> Operands:
        def read(buffer, start, gate: int):
            return bind(load(buffer, start + gate * shape.hidden + column, lanes))

        return Operands(
            TirOps(lanes, isa),
            lambda name, x: emit_table(build_table(name, max_error=max_error), x, isa),
            partial(read, sums, row * shape.width),
            partial(read, buffers.inputs, (t * shape.batch + row) * shape.width),
            partial(read, buffers.peepholes, 0),
            tuple(bind(load(state, row * shape.hidden + column, lanes)) for state in before),
        )

    def reset(t, row, column, lanes: int) -> None:
        value = bind(cell.reset_state(operands(t, row, column, lanes)))
        put_operand(row * shape.hidden + column, value, lanes)

    def update(t, row, column, lanes: int) -> None:
        at = row * shape.hidden + column
        found = cell.step(operands(t, row, column, lanes))
        for state, value in zip(buffers.states, found, strict=True):
            store(state, at, value, lanes)
        store(buffers.outputs, t * size + at, found[0], lanes)

    def end(t, row, column, lanes: int) -> None:
        zero = tirx.const(0.0, with_lanes("float32", lanes))
        store(buffers.outputs, t * size + row * shape.hidden + column, zero, lanes)

    def over_columns(body: Callable, t, row) -> None:
        vector_runs(shape.hidden, isa.lanes, partial(body, t, row))

    for first, last in zip(buffers.first, buffers.states, strict=True):
        vector_runs(
            size, isa.lanes, lambda at, lanes, a=first, b=last: store(b, at, load(a, at, lanes), lanes)
        )
    with T.serial(0, shape.steps) as index:
        t = T.bind(shape.steps - 1 - index) if shape.reverse else index
        vector_runs(size, isa.lanes, keep_states)
        for part, (product, (first, _)) in enumerate(zip(products, cell.products, strict=True)):
            if part:
                with T.serial(0, shape.batch) as row:
                    over_columns(reset, t, row)
            product(operand, partial(put_sums, first))
        with T.serial(0, shape.batch) as row:
            with T.If(t < load(buffers.lengths, row, 1)):
                with T.Then():
                    over_columns(update, t, row)
                with T.Else():
                    over_columns(end, t, row)
