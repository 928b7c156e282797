"""Operators that reduce the last axis: softmax, log-softmax and LayerNorm, one pass over a row in cache.

Reductions use 16 lane accumulators whatever the vector width, element i in lane i mod 16, combined in a fixed
tree, so that every target gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.float_contract import LANES, add, bind, mul, sub, tree_sum, with_lanes
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.prim_func import load, store

MIN_PARALLEL_ELEMENTS = 65_536


class Row:
    """One row of ``length`` float32 values in a scratch buffer padded to whole groups of 16."""

    def __init__(self, isa: InstructionSet, length: int) -> None:
        self.lanes = min(isa.lanes, LANES)
        self.length = length
        self.groups = -(-length // LANES)
        self.values = T.alloc_buffer((self.groups * LANES,), "float32", align=64)
        self._vector = with_lanes("float32", self.lanes)

    def constant(self, value: float):
        """``value`` in every lane."""
        return tirx.const(value, self._vector)

    def fill(self, read: Callable, pad: float) -> None:
        """Copy the row in: ``read(offset, lanes)`` gives values; the rest of the last group becomes ``pad``."""
        full = self.length // self.lanes
        if full:
            with T.serial(0, full) as i:
                store(self.values, i * self.lanes, read(i * self.lanes, self.lanes), self.lanes)
        for at in range(full * self.lanes, self.groups * LANES):
            store(self.values, at, read(at, 1) if at < self.length else tirx.const(pad, "float32"), 1)

    def set_padding(self, pad: float) -> None:
        """Overwrite the padding after the row."""
        for at in range(self.length, self.groups * LANES):
            store(self.values, at, tirx.const(pad, "float32"), 1)

    def map(self, function: Callable) -> None:
        """Replace every vector by ``function(vector)``."""
        with T.serial(0, self.groups * LANES // self.lanes) as i:
            store(
                self.values,
                i * self.lanes,
                function(load(self.values, i * self.lanes, self.lanes)),
                self.lanes,
            )

    def reduce(self, combine: Callable, start: float, function: Callable = lambda v: v):
        """16 lane accumulators over ``function(vector)``, combined in the tree 8-4-2-1; a float32 scalar."""
        accumulators = T.alloc_buffer((LANES,), "float32", scope="local", align=64)
        parts = LANES // self.lanes
        for part in range(parts):
            store(accumulators, part * self.lanes, self.constant(start), self.lanes)
        with T.serial(0, self.groups) as group:
            for part in range(parts):
                at = part * self.lanes
                value = function(load(self.values, group * LANES + at, self.lanes))
                store(accumulators, at, combine(load(accumulators, at, self.lanes), value), self.lanes)
        lanes = [T.bind(load(accumulators, lane, 1)) for lane in range(LANES)]
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [T.bind(combine(lanes[i], lanes[i + half])) for i in range(half)]
        return lanes[0]

    def splat(self, scalar):
        """A scalar in every lane."""
        return scalar if self.lanes == 1 else tirx.Broadcast(scalar, self.lanes)

    def finish(self, emit: Callable) -> None:
        """``emit(vector, offset, lanes)`` over the row, its last vector by powers of two."""
        full = self.length // self.lanes
        if full:
            with T.serial(0, full) as i:
                emit(bind(load(self.values, i * self.lanes, self.lanes)), i * self.lanes, self.lanes)
        offset = full * self.lanes
        while offset < self.length:
            part = 1 << ((self.length - offset).bit_length() - 1)
            emit(bind(load(self.values, offset, part)), offset, part)
            offset += part


def for_each_row(rows: int, length: int, threads: int, body: Callable) -> None:
    """``body(row)`` over all rows, in parallel where it pays."""
    parallel = threads > 1 and rows > 1 and rows * length >= MIN_PARALLEL_ELEMENTS
    with (T.parallel if parallel else T.serial)(0, rows) as row:
        body(row)


def emit_softmax(row: Row, read: Callable, exp: Callable, log: Callable | None, finish: Callable) -> None:
    """exp(x - max) / sum; with ``log``, x - max - log(sum). A row of only -inf gives NaN, as the definition does."""
    row.fill(read, float("-inf"))
    largest = row.splat(row.reduce(tirx.max, float("-inf")))
    row.map(lambda v: bind(sub(v, largest)))
    if log is not None:
        total = row.reduce(add, 0.0, exp)
        shift = row.splat(T.bind(log(total)))
        row.map(lambda v: bind(sub(v, shift)))
    else:
        row.map(exp)
        row.set_padding(0.0)
        total = row.reduce(add, 0.0)
        factor = row.splat(T.bind(tirx.const(1.0, "float32") / total))
        row.map(lambda v: bind(mul(v, factor)))
    row.finish(finish)


def emit_layer_norm(row: Row, read: Callable, epsilon: float, finish: Callable) -> None:
    """(x - mean) / sqrt(var + epsilon); scale and shift belong to ``finish``."""
    inverse = tirx.const(1.0 / row.length, "float32")
    row.fill(read, 0.0)
    mean = row.splat(T.bind(mul(row.reduce(add, 0.0), inverse)))
    row.map(lambda v: bind(sub(v, mean)))
    row.set_padding(0.0)
    variance = T.bind(mul(row.reduce(add, 0.0, lambda v: bind(mul(v, v))), inverse))
    deviation = T.bind(tirx.sqrt(add(variance, tirx.const(epsilon, "float32"))))
    factor = row.splat(T.bind(tirx.const(1.0, "float32") / deviation))
    row.map(lambda v: bind(mul(v, factor)))
    row.finish(finish)


__all__ = ["Row", "emit_layer_norm", "emit_softmax", "for_each_row", "tree_sum"]
