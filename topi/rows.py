"""Operators that reduce the last axis: softmax, log-softmax, LayerNorm and RMSNorm, passes over a row in cache.

Reductions use 16 lane accumulators whatever the vector width, element i in lane i mod 16, combined in a fixed
tree, so that every target gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.float_contract import LANES, add, bind, lanes_of, mul, sub, tree_sum, with_lanes
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.prim_func import load, store

MIN_PARALLEL_ELEMENTS = 65_536


class Row:
    """One row of ``length`` float32 values, read by ``read(offset, lanes)``, and scratch space in whole groups of 16.

    Whole groups are read where they are; the rest of the row is copied to the last group of the scratch buffer once
    and padded there.
    """

    def __init__(self, isa: InstructionSet, length: int, read: Callable, pad: float) -> None:
        self.lanes = min(isa.lanes, LANES)
        self.length = length
        self._read = read
        self._full = length // LANES
        self._rest = length % LANES
        groups = -(-length // LANES)
        self._scratch = T.alloc_buffer((groups * LANES,), "float32", align=64)
        self._tail = T.alloc_buffer((LANES,), "float32", align=64) if self._rest else None
        self._vector = with_lanes("float32", self.lanes)
        for lane in range(LANES if self._rest else 0):
            value = read(self._full * LANES + lane, 1) if lane < self._rest else tirx.const(pad, "float32")
            store(self._tail, lane, value, 1)

    def constant(self, value: float):
        """``value`` in every lane."""
        return tirx.const(value, self._vector)

    def set_padding(self, value) -> None:
        """Overwrite the padding after the row."""
        for lane in range(self._rest, LANES if self._rest else 0):
            store(self._tail, lane, value, 1)

    def splat(self, scalar):
        """A scalar in every lane."""
        return scalar if self.lanes == 1 else tirx.Broadcast(scalar, self.lanes)

    def _groups(self, body: Callable) -> None:
        """``body(source, offset)`` for each group; ``source(lane)`` is a vector of the row, padding included."""
        if self._full:
            with T.serial(0, self._full) as group:
                at = group * LANES
                body(lambda lane: bind(self._read(at + lane, self.lanes)), at)
        if self._rest:
            body(lambda lane: bind(load(self._tail, lane, self.lanes)), self._full * LANES)

    def largest(self):
        """The greatest value, a float32 scalar. The order does not matter, so several vectors are compared at once."""
        width = next(w for w in (4, 2, 1) if self._full % w == 0)
        accumulators = T.alloc_buffer((width * LANES,), "float32", scope="local", align=64)
        lanes = range(0, width * LANES, self.lanes)
        for lane in lanes:
            store(accumulators, lane, self.constant(float("-inf")), self.lanes)

        def take(lane, value) -> None:
            store(accumulators, lane, tirx.max(load(accumulators, lane, self.lanes), value), self.lanes)

        if self._full:
            with T.serial(0, self._full // width) as group:
                for lane in lanes:
                    take(lane, bind(self._read(group * width * LANES + lane, self.lanes)))
        if self._rest:
            for lane in range(0, LANES, self.lanes):
                take(lane, load(self._tail, lane, self.lanes))
        vectors = [bind(load(accumulators, lane, self.lanes)) for lane in lanes]
        while len(vectors) > 1:
            vectors = [bind(tirx.max(a, b)) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        store(accumulators, 0, vectors[0], self.lanes)
        values = [bind(load(accumulators, lane, 1)) for lane in range(self.lanes)]
        while len(values) > 1:
            values = [bind(tirx.max(a, b)) for a, b in zip(values[::2], values[1::2], strict=True)]
        return values[0]

    def sum(self, function: Callable = lambda v: v, keep: bool = False):
        """Of ``function(vector)``, by 16 lane accumulators combined in the tree 8-4-2-1; a float32 scalar.

        With ``keep`` the values are kept for ``finish``.
        """
        accumulators = T.alloc_buffer((LANES,), "float32", scope="local", align=64)
        parts = range(0, LANES, self.lanes)
        for lane in parts:
            store(accumulators, lane, self.constant(0.0), self.lanes)

        def body(source, offset) -> None:
            for lane in parts:
                value = bind(function(source(lane)))
                if keep:
                    store(self._scratch, offset + lane, value, self.lanes)
                store(accumulators, lane, add(load(accumulators, lane, self.lanes), value), self.lanes)

        self._groups(body)
        return tree_sum([T.bind(load(accumulators, lane, 1)) for lane in range(LANES)])

    def finish(self, function: Callable, emit: Callable, kept: bool = False) -> None:
        """``emit(function(vector), offset, lanes)`` over the row or what ``sum`` kept."""
        read = (lambda offset, lanes: load(self._scratch, offset, lanes)) if kept else self._read
        full = self.length // self.lanes
        if full:
            with T.serial(0, full) as i:
                value = bind(function(bind(read(i * self.lanes, self.lanes))))
                emit(value, i * self.lanes, self.lanes)
        offset = full * self.lanes
        while offset < self.length:
            part = 1 << ((self.length - offset).bit_length() - 1)
            emit(bind(function(bind(read(offset, part)))), offset, part)
            offset += part


def for_each_row(rows: int, length: int, threads: int, body: Callable) -> None:
    """``body(row)`` over all rows, in parallel where it pays."""
    parallel = threads > 1 and rows > 1 and rows * length >= MIN_PARALLEL_ELEMENTS
    with (T.parallel if parallel else T.serial)(0, rows) as row:
        body(row)


def emit_softmax(row: Row, exp: Callable, finish: Callable) -> None:
    """exp(x - max) / sum; ``exp`` gives 0 for -infinity, the row's padding. NaN for a row of only -infinity."""
    largest = row.splat(row.largest())
    total = row.sum(lambda v: exp(bind(sub(v, largest))), keep=True)
    factor = T.bind(tirx.const(1.0, "float32") / total)
    row.finish(lambda v: mul(v, like_scalar(factor, v)), finish, kept=True)


def emit_log_softmax(row: Row, exp: Callable, log: Callable, finish: Callable) -> None:
    """x - max - log(sum)."""
    largest = T.bind(row.largest())
    wide = row.splat(largest)
    total = row.sum(lambda v: exp(bind(sub(v, wide))))
    shift = T.bind(log(total))
    row.finish(lambda v: sub(bind(sub(v, like_scalar(largest, v))), like_scalar(shift, v)), finish)


def emit_layer_norm(row: Row, epsilon: float, finish: Callable) -> None:
    """(x - mean) / sqrt(var + epsilon); scale and shift belong to ``finish``. Padding is 0.

    Before the squares are summed the padding becomes the mean, so that it adds nothing.
    """
    inverse = tirx.const(1.0 / row.length, "float32")
    mean = T.bind(mul(row.sum(), inverse))
    row.set_padding(mean)
    wide = row.splat(mean)

    def square(v):
        centred = bind(sub(v, wide))
        return mul(centred, centred)

    variance = T.bind(mul(row.sum(square), inverse))
    deviation = T.bind(tirx.sqrt(add(variance, tirx.const(epsilon, "float32"))))
    factor = T.bind(tirx.const(1.0, "float32") / deviation)
    row.finish(lambda v: mul(bind(sub(v, like_scalar(mean, v))), like_scalar(factor, v)), finish)


def emit_rms_norm(row: Row, epsilon: float, finish: Callable) -> None:
    """x / sqrt(mean(x^2) + epsilon); the scale belongs to ``finish``. Padding is 0."""
    total = row.sum(lambda v: mul(v, v))
    square = T.bind(mul(total, tirx.const(1.0 / row.length, "float32")))
    deviation = T.bind(tirx.sqrt(add(square, tirx.const(epsilon, "float32"))))
    factor = T.bind(tirx.const(1.0, "float32") / deviation)
    row.finish(lambda v: mul(v, like_scalar(factor, v)), finish)


def like_scalar(scalar, vector):
    """A scalar in as many lanes as ``vector`` has."""
    lanes = lanes_of(vector)
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)
