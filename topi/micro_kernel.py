"""The register tile of every kernel of linear layers: ``rows x (vectors * lanes)`` accumulators.

One reduction step reads ``pair`` grid values of each row, repeats them over a vector, and multiplies and
adds them to ``vectors`` weight vectors. The accumulators live in a local buffer with constant indices, which LLVM
keeps in registers. Where the instruction set multiplies int8 parts, every product of parts has accumulators of its own
and is summed in a pass of its own. Exactness: products and sums are int32, and the caller has proved that no partial
sum overflows (``overflow.py``); in float32 (``isa/floats.py``) each sum is taken in the order of the steps.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.float_contract import with_lanes
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.prim_func import load, store


def reduce_steps(steps: int, unroll: int, step: Callable) -> None:
    """``step(index)`` for every reduction step, ``unroll`` of them written out in the loop."""
    unroll = min(unroll, steps)
    with T.serial(0, steps // unroll) as outer:
        for i in range(unroll):
            step(outer * unroll + i)
    for rest in range(steps // unroll * unroll, steps):
        step(rest)


class RegisterTile:
    """Accumulators of one micro-kernel tile."""

    def __init__(self, isa: InstructionSet, rows: int, vectors: int) -> None:
        self.isa, self.rows, self.vectors = isa, rows, vectors
        count = rows * vectors * isa.products
        self._buffer = T.alloc_buffer((count * isa.lanes,), isa.accumulator_dtype, scope="local")
        zero = tirx.const(0, with_lanes(isa.accumulator_dtype, isa.lanes))
        for index in range(count):
            store(self._buffer, index * isa.lanes, zero, isa.lanes)

    def _at(self, row: int, vector: int, product: int = 0) -> int:
        return ((product * self.rows + row) * self.vectors + vector) * self.isa.lanes

    def reduce(
        self,
        activations,
        row_starts: list,
        steps: int,
        unroll: int,
        load_weights: Callable[..., tirx.PrimExpr],
        product: int = 0,
    ) -> None:
        """Add ``steps`` reduction steps: ``activations[row_starts[i]:]`` times ``load_weights(step, vector)``.

        ``unroll`` of them are written out in the loop, or as many as a row's vector holds.
        """
        isa, element = self.isa, self.isa.element

        def one_step(step) -> None:
            starts = [start + step * isa.pair for start in row_starts]
            self._multiply(step, lambda row: isa.broadcast(activations, starts[row]), load_weights, product)

        if element is None:
            reduce_steps(steps, unroll, one_step)
            return
        whole = steps // isa.row_steps
        with T.serial(0, whole) as chunk:
            first = T.bind(chunk * isa.row_steps)
            lanes = isa.row_steps * isa.pair
            rows = [T.bind(load(activations, start + first * isa.pair, lanes)) for start in row_starts]
            for step in range(isa.row_steps):
                self._multiply(
                    first + step, lambda row, step=step: element(rows[row], step), load_weights, product
                )
        for rest in range(whole * isa.row_steps, steps):
            one_step(rest)

    def _multiply(self, step, activation: Callable, load_weights: Callable, product: int) -> None:
        lanes = self.isa.lanes
        weights = [load_weights(step, vector) for vector in range(self.vectors)]
        for row in range(self.rows):
            repeated = T.bind(activation(row))
            for vector, weight in enumerate(weights):
                at = self._at(row, vector, product)
                total = self.isa.multiply_add(load(self._buffer, at, lanes), repeated, weight)
                store(self._buffer, at, total, lanes)

    def accumulate_vector(self, row: int, a, b, vector: int = 0) -> None:
        """Multiply two vectors of operands lane by lane into one accumulator of the row."""
        lanes, at = self.isa.lanes, self._at(row, vector)
        store(self._buffer, at, self.isa.multiply_add(load(self._buffer, at, lanes), a, b), lanes)

    def value(self, row: int, vector: int):
        """The dot products of one row."""
        products = [
            load(self._buffer, self._at(row, vector, product), self.isa.lanes)
            for product in range(self.isa.products)
        ]
        return self.isa.split.combine(products) if self.isa.split else products[0]
