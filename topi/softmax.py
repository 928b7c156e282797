"""Softmax and log-softmax over the last axis.

Softmax reads a row three times: for its greatest value, for the exponentials and their sum, and to divide. One loop
does all three, each for another row: beside the exponentials of a row it looks for the greatest value of the next one
and divides those of the row before. So no step waits for a sum over its own row, and a row comes from memory while
another one is computed.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.float_contract import LANES, LOWEST, bind, inverse_sum, lanes_of, mul, sub
from tvm_qfp8.topi.panels import overlapped_start
from tvm_qfp8.topi.prim_func import keep, load, store
from tvm_qfp8.topi.rows import MIN_PARALLEL_ROW_ELEMENTS, Row, like_scalar


def emit_softmax(
    row_at: Callable[..., Row],
    rows: int,
    length: int,
    threads: int,
    exp: Callable,
    finish: Callable,
    begin: Callable | None = None,
) -> None:
    """exp(x - max) / sum of all rows; ``finish(row, value, offset, lanes)`` stores.

    With ``begin(row, greatest result) -> scalar``, called before the results of a row come, ``finish`` gets its scalar,
    too.

    ``exp`` gives 0 for -infinity, the rows' padding. 0 for a row of only -infinity,
    as attention asks for where a mask leaves nothing.
    """
    parallel = threads > 1 and rows > 1 and rows * length >= MIN_PARALLEL_ROW_ELEMENTS
    block = -(-rows // threads) if parallel else rows

    def one_block(first) -> None:
        pipeline = _Pipeline(row_at(first), exp, finish, begin)
        with T.serial(0, block) as index:
            current = T.bind(first + index)
            pipeline.step(
                index,
                current,
                row_at(current),
                row_at(T.bind(tirx.min(current + 1, first + block - 1))),
                # The first row has none before it: what is written in its place is written again.
                T.bind(tirx.max(current - 1, first)),
            )
        pipeline.divide_all(first + block - 1, (block - 1) % 2)

    if not parallel:
        one_block(0)
        return
    with T.parallel(0, -(-rows // block)) as index:
        one_block(overlapped_start(index, block, rows))


class _Pipeline:
    """What one row hands to the next: the greatest value of the row to come, the last row's exponentials and factor."""

    def __init__(self, row: Row, exp: Callable, finish: Callable, begin: Callable | None) -> None:
        self.exp, self.finish, self.begin, self.lanes = exp, finish, begin, row.lanes
        self.row = row
        self.size = -(-row.length // LANES) * LANES
        self.kept = T.alloc_buffer((2 * self.size,), "float32", align=64)
        self.greatest = T.alloc_buffer((LANES,), "float32", scope="local", align=64)
        self.factor = T.alloc_buffer((LANES,), "float32", scope="local", align=64)
        store(self.greatest, 0, row.largest(), self.lanes)
        store(self.factor, 0, row.constant(0.0), self.lanes)
        self.begun = T.alloc_buffer((1,), "float32", scope="local")
        store(self.begun, 0, tirx.const(0.0, "float32"), 1)

    def step(self, index, current, row: Row, following: Row, previous) -> None:
        """Exponentials and sum of row ``current``, the greatest value of the next, the results of ``previous``."""
        largest = bind(load(self.greatest, 0, self.lanes))
        factor, begun = bind(load(self.factor, 0, self.lanes)), bind(load(self.begun, 0, 1))
        place, other = T.bind(index % 2 * self.size), T.bind((index + 1) % 2 * self.size)
        found = T.alloc_buffer((LANES,), "float32", scope="local", align=64)
        parts = range(0, LANES, self.lanes)
        for lane in parts:
            store(found, lane, row.constant(LOWEST), self.lanes)

        def beside(offset) -> None:
            for lane in parts:
                vector = bind(following.vector(offset, lane))
                store(found, lane, tirx.max(load(found, lane, self.lanes), vector), self.lanes)
            for at, lanes in row.pieces(offset):
                self._divide(previous, other, at, lanes, factor, begun)

        top = T.alloc_buffer((LANES,), "float32", scope="local", align=64)
        store(top, 0, row.constant(0.0), self.lanes)

        def exponential(v):
            value = bind(self.exp(bind(sub(v, largest))))
            if self.begin is not None:
                store(top, 0, tirx.max(load(top, 0, self.lanes), value), self.lanes)
            return value

        total = row.sum(exponential, keep=(self.kept, place), beside=beside)
        vectors = [bind(load(found, lane, self.lanes)) for lane in parts]
        store(self.greatest, 0, row.greatest_of(vectors), self.lanes)
        inverse = inverse_sum(total)
        store(self.factor, 0, row.splat(inverse), self.lanes)
        if self.begin is not None:
            # Rounding keeps the order: the greatest result is that of the greatest exponential.
            greatest = row.first_lane(row.greatest_of([bind(load(top, 0, self.lanes))]))
            store(self.begun, 0, self.begin(current, keep(mul(greatest, inverse))), 1)

    def divide_all(self, index, parity: int) -> None:
        """The results of the last row."""
        factor, begun = bind(load(self.factor, 0, self.lanes)), bind(load(self.begun, 0, 1))
        full = self.row.length // LANES
        if full:
            with T.serial(0, full) as group:
                for at, lanes in self.row.pieces(group * LANES):
                    self._divide(index, parity * self.size, at, lanes, factor, begun)
        if self.row.length % LANES:
            for at, lanes in self.row.pieces(full * LANES):
                self._divide(index, parity * self.size, at, lanes, factor, begun)

    def _divide(self, index, place, at, lanes: int, factor, begun) -> None:
        scale = factor if lanes == self.lanes else like_scalar(self.row.first_lane(factor), lanes)
        value = bind(mul(load(self.kept, place + at, lanes), scale))
        self.finish(index, value, at, lanes, *([] if self.begin is None else [begun]))


def emit_log_softmax(row: Row, exp: Callable, log: Callable, finish: Callable) -> None:
    """x - max - log(sum); -infinity for a row of nothing else."""
    wide = keep(row.largest())
    total = row.sum(lambda v: exp(bind(sub(v, wide))))
    shift = T.bind(log(total))
    largest = row.first_lane(wide)

    def result(v):
        lanes = lanes_of(v)
        return sub(bind(sub(v, like_scalar(largest, lanes))), like_scalar(shift, lanes))

    row.finish(result, finish)
