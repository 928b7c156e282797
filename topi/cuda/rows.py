"""Softmax and norms: 16 threads a row, one for each of the 16 accumulators that the float contract prescribes."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.cuda.launch import MANY_BLOCKS, THREADS
from tvm_qfp8.topi.float_contract import LANES, LOWEST, add, bind, inverse_sum, mul, sub, tree_sum
from tvm_qfp8.topi.prim_func import load, store

KEPT = 64
"""Most elements of a row that a thread keeps in registers."""
ROWS_TOGETHER = (THREADS // LANES, 8, 4, 2)
"""Rows of a block: the most that keep a GPU busy, or two, a warp."""


class ThreadRow:
    """What ``topi.rows`` asks of a row, seen by one of its 16 threads; padding adds nothing.

    ``get(group)`` gives the thread's element of 16 neighbours, ``group`` counting them.
    """

    def __init__(self, length: int, get: Callable, place, lane) -> None:
        self.length, self._get, self._place, self._lane = length, get, place, lane
        self._groups = -(-length // LANES)

    @classmethod
    def loaded(cls, length: int, read: Callable, place, lane) -> ThreadRow:
        """The row of which ``read(offset, lanes)`` gives elements: kept in registers, or read each time if long."""
        row = cls(length, lambda group: bind(read(row.offset(group), 1)), place, lane)
        return row.kept()

    def again(self, read: Callable) -> ThreadRow:
        """The row of what this row's threads have stored meanwhile, each reading its own elements."""
        return ThreadRow.loaded(self.length, read, self._place, self._lane)

    def offset(self, group):
        """The place of the thread's element in the row; after the last one it is repeated."""
        return T.bind(tirx.min(group * LANES + self._lane, self.length - 1))

    def kept(self) -> ThreadRow:
        """The same row, its elements computed here and kept in registers unless they are too many."""
        if self._groups > KEPT:
            return self
        values = T.alloc_buffer((self._groups,), "float32", scope="local")
        with T.unroll(0, self._groups) as group:
            store(values, group, self._get(group), 1)
        return ThreadRow(self.length, lambda group: load(values, group, 1), self._place, self._lane)

    def mapped(self, function: Callable) -> ThreadRow:
        """The row of ``function(value)``."""
        return ThreadRow(self.length, lambda group: function(bind(self._get(group))), self._place, self._lane)

    def set_padding(self, value) -> None:
        """The padding is never read."""

    def splat(self, scalar):
        return scalar

    def first_lane(self, value):
        return value

    def _each(self, body: Callable) -> None:
        """``body(value, offset, inside)`` for the thread's elements; after the last one it is repeated, not inside."""
        loop = T.unroll if self._groups <= KEPT else T.serial
        with loop(0, self._groups) as group:
            inside = group * LANES + self._lane < self.length
            body(bind(self._get(group)), self.offset(group), inside)

    def shared(self, value) -> list:
        """The values that the row's 16 threads have."""
        buffer = T.alloc_buffer((THREADS,), "float32", scope="shared")
        store(buffer, self._place * LANES + self._lane, value, 1)
        return [T.bind(load(buffer, self._place * LANES + lane, 1)) for lane in range(LANES)]

    def largest(self):
        found = T.alloc_buffer((1,), "float32", scope="local")
        store(found, 0, tirx.const(LOWEST, "float32"), 1)
        self._each(lambda value, _offset, _inside: store(found, 0, tirx.max(load(found, 0, 1), value), 1))
        values = self.shared(load(found, 0, 1))
        while len(values) > 1:
            values = [bind(tirx.max(a, b)) for a, b in zip(values[::2], values[1::2], strict=True)]
        return values[0]

    def sum(self, function: Callable = lambda v: v):
        total = T.alloc_buffer((1,), "float32", scope="local")
        store(total, 0, tirx.const(0.0, "float32"), 1)

        def take(value, _offset, inside) -> None:
            part = tirx.Select(inside, bind(function(value)), tirx.const(0.0, "float32"))
            store(total, 0, add(load(total, 0, 1), part), 1)

        self._each(take)
        return tree_sum(self.shared(load(total, 0, 1)))

    def finish(self, function: Callable, emit: Callable) -> None:
        self._each(lambda value, offset, _inside: emit(bind(function(value)), offset, 1))


def for_each_row(rows: int, length: int, read: Callable, body: Callable) -> None:
    """``body(row, index)`` with a ``ThreadRow`` for each row; ``read(index, offset, lanes)`` loads."""

    def one(index, place, lane) -> None:
        body(ThreadRow.loaded(length, lambda *position: read(index, *position), place, lane), index)

    for_each_lane(rows, one)


def for_each_lane(rows: int, body: Callable) -> None:
    """``body(index, place, lane)`` for the 16 threads of each row, the ``place``-th of its block."""
    per_block = next((n for n in ROWS_TOGETHER if -(-rows // n) >= MANY_BLOCKS), ROWS_TOGETHER[-1])
    with T.launch_thread("blockIdx.x", -(-rows // per_block)) as block:
        with T.launch_thread("threadIdx.x", per_block * LANES) as thread:
            place, lane = T.bind(thread // LANES), T.bind(thread % LANES)
            body(T.bind(tirx.min(block * per_block + place, rows - 1)), place, lane)


def emit_softmax(rows: int, length: int, read: Callable, exp: Callable, finish: Callable) -> None:
    """exp(x - max) / sum, 0 for a row of only -infinity."""

    def one(row: ThreadRow, index) -> None:
        largest = row.largest()
        exponentials = row.mapped(lambda v: bind(exp(bind(sub(v, largest))))).kept()
        factor = inverse_sum(exponentials.sum())
        exponentials.finish(lambda v: mul(v, factor), lambda *value: finish(index, *value))

    for_each_row(rows, length, read, one)
