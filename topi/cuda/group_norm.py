"""GroupNorm with channels last: 16 threads a group, each summing every 16th pixel of a channel after the other."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.cuda.rows import ThreadRow, for_each_lane
from tvm_qfp8.topi.float_contract import LANES, add, tree_sum
from tvm_qfp8.topi.group_norm import GroupNormShape
from tvm_qfp8.topi.prim_func import load, store
from tvm_qfp8.topi.rows import emit_layer_norm


class _Group:
    """What ``topi.rows`` asks of a row, of a group of channels seen by one of its 16 threads.

    ``read(pixel, channel)`` gives an element of the group.
    """

    def __init__(self, shape: GroupNormShape, read: Callable, place, lane) -> None:
        self.length = shape.pixels * shape.size
        self._shape, self._read, self._place, self._lane = shape, read, place, lane

    def _channel(self, channel) -> ThreadRow:
        row = ThreadRow(
            self._shape.pixels, lambda turn: self._read(row.offset(turn), channel), self._place, self._lane
        )
        return row

    def set_padding(self, value) -> None:
        """There is none."""

    def splat(self, scalar):
        return scalar

    def sum(self, function: Callable = lambda v: v):
        """Of ``function(value)``: of each channel, and of their sums as of a row."""
        zero = tirx.const(0.0, "float32")
        mine = T.alloc_buffer((1,), "float32", scope="local")
        store(mine, 0, zero, 1)
        with T.serial(0, self._shape.size) as channel:
            total = self._channel(channel).sum(function)
            store(mine, 0, add(load(mine, 0, 1), tirx.Select(channel % LANES == self._lane, total, zero)), 1)
        return tree_sum(self._channel(0).shared(load(mine, 0, 1)))

    def finish(self, function: Callable, emit: Callable) -> None:
        with T.serial(0, self._shape.size) as channel:
            self._channel(channel).finish(function, lambda value, pixel, _lanes: emit(value, pixel, channel))


def emit_group_norm(shape: GroupNormShape, read: Callable, finish: Callable) -> None:
    """As ``topi.group_norm.emit_group_norm``, element by element."""

    def one(index, place, lane) -> None:
        first = T.bind(index // shape.groups * shape.pixels)
        start = T.bind(index % shape.groups * shape.size)
        group = _Group(shape, lambda pixel, channel: read(first + pixel, start + channel, 1), place, lane)
        emit_layer_norm(
            group,
            shape.epsilon,
            lambda value, pixel, channel: finish(value, first + pixel, start + channel, 1),
        )

    for_each_lane(shape.outer * shape.groups, one)
