"""What ``rows.py`` does along the last axis, along an axis before it: softmax, log-softmax and norms of columns.

A tensor is seen as ``(outer, length, inner)``; a vector holds neighbouring columns, so that nothing is transposed and
no step works across lanes. Element i of a column still goes to accumulator i mod 16, and the 16 are combined in the
tree 8-4-2-1: the bits are those of the row kernels on the transposed tensor.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.float_contract import LANES, LOWEST, add, bind, inverse_sum, mul, sub, tree_sum, with_lanes
from tvm_qfp8.topi.panels import overlapped_start
from tvm_qfp8.topi.prim_func import load, store
from tvm_qfp8.topi.rows import MIN_PARALLEL_ROW_ELEMENTS

BLOCK = 16
"""Columns of a block: a cache line of every row, whatever the registers hold."""


class Column:
    """``lanes`` neighbouring columns of ``length`` float32 values; ``read(i)`` is the vector of their i-th ones.

    Stands for a ``Row``: what is one number of a row is a vector here.
    """

    def __init__(self, length: int, lanes: int, read: Callable) -> None:
        self.length, self.lanes, self._read = length, lanes, read
        self._vector = with_lanes("float32", lanes)

    def _constant(self, value: float):
        return tirx.const(value, self._vector)

    def set_padding(self, value) -> None:
        """A column has no padding."""

    def splat(self, vector):
        return vector

    def first_lane(self, vector):
        return vector

    def largest(self):
        """The greatest value of each column."""
        found = T.alloc_buffer((self.lanes,), "float32", scope="local", align=64)
        store(found, 0, self._constant(LOWEST), self.lanes)
        with T.serial(0, self.length) as i:
            greatest = tirx.max(load(found, 0, self.lanes), bind(self._read(i)))
            store(found, 0, greatest, self.lanes)
        return bind(load(found, 0, self.lanes))

    def sum(self, function: Callable = lambda v: v, keep=None):
        """Of ``function(vector)``; with ``keep``, a buffer of ``length * lanes``, the values are kept there."""
        sums = T.alloc_buffer((LANES * self.lanes,), "float32", align=64)
        for lane in range(LANES):
            store(sums, lane * self.lanes, self._constant(0.0), self.lanes)
        with T.serial(0, self.length) as i:
            value = bind(function(bind(self._read(i))))
            if keep is not None:
                store(keep, i * self.lanes, value, self.lanes)
            place = T.bind(i % LANES * self.lanes)
            store(sums, place, add(load(sums, place, self.lanes), value), self.lanes)
        parts = [bind(load(sums, lane * self.lanes, self.lanes)) for lane in range(LANES)]
        return tree_sum(parts)

    def finish(self, function: Callable, emit: Callable) -> None:
        """``emit(function(vector), i, lanes)`` down the columns."""
        with T.serial(0, self.length) as i:
            emit(bind(function(bind(self._read(i)))), i, self.lanes)


def for_each_columns(shape: tuple[int, int, int], threads: int, body: Callable[..., None]) -> None:
    """``body(outer, start, lanes)`` for all blocks of columns of ``(outer, length, inner)``, in parallel where it pays.

    The last block overlaps the one before it: input and output must not alias.
    """
    outer, length, inner = shape
    whole = inner >= BLOCK
    blocks = -(-inner // BLOCK) if whole else 1
    turns = outer * blocks
    parallel = threads > 1 and turns > 1 and outer * length * inner >= MIN_PARALLEL_ROW_ELEMENTS

    def one_block(index) -> None:
        if whole:
            body(T.bind(index // blocks), overlapped_start(T.bind(index % blocks), BLOCK, inner), BLOCK)
            return
        start = 0
        while start < inner:
            part = 1 << ((inner - start).bit_length() - 1)
            body(index, start, part)
            start += part

    if not parallel:
        with T.serial(0, turns) as index:
            one_block(index)
        return
    # Each thread takes its scratch once, for all of its blocks.
    share = -(-turns // threads)
    with T.parallel(0, -(-turns // share)) as thread:
        first = overlapped_start(thread, share, turns)
        with T.serial(0, share) as index:
            one_block(T.bind(first + index))


def emit_column_softmax(column: Column, exp: Callable, finish: Callable) -> None:
    """exp(x - max) / sum; ``finish(value, i, lanes)`` stores. 0 for a column of only -infinity."""
    largest = column.largest()
    kept = T.alloc_buffer((column.length * column.lanes,), "float32", align=64)
    total = column.sum(lambda v: exp(bind(sub(v, largest))), keep=kept)
    factor = inverse_sum(total)
    with T.serial(0, column.length) as i:
        value = load(kept, i * column.lanes, column.lanes)
        finish(bind(mul(value, factor)), i, column.lanes)
