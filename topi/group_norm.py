"""GroupNorm with channels last: neighbouring channels are normalised together, over all pixels.

A tensor is seen as ``(outer, pixels, channels)``. Each channel is summed as ``columns.py`` sums a column, and the sums
of a group's channels as ``rows.py`` sums a row, so that vectors hold neighbouring channels and nothing is transposed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.float_contract import LANES, add, bind, like, mul, sub, tree_sum, with_lanes
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.prim_func import load, powers_of_two, store
from tvm_qfp8.topi.rows import MIN_PARALLEL_ROW_ELEMENTS, Row, inverse_root, like_scalar

TURNS = 4
"""Pixels that are added to one of a channel's 16 sums between its load and its store."""

BLOCK = 128
"""Channels of a block, at most: two cache lines and more of every pixel come together, sums of all stay in the first
cache."""


@dataclass(frozen=True)
class GroupNormShape:
    """``outer`` images of ``pixels`` pixels and ``groups`` groups of ``size`` channels each."""

    outer: int
    pixels: int
    groups: int
    size: int
    epsilon: float

    @property
    def channels(self) -> int:
        return self.groups * self.size

    def block(self, threads: int) -> int:
        """Neighbouring channels that are normalised together: whole groups in whole vectors, or all there are."""
        whole = math.lcm(self.size, LANES)
        if self.channels % whole:
            return self.channels
        most = min(BLOCK, self.channels * self.outer // threads) // whole
        return whole * max(
            count for count in range(1, max(1, most) + 1) if self.channels // whole % count == 0
        )


def emit_group_norm(
    isa: InstructionSet, threads: int, shape: GroupNormShape, read: Callable, finish: Callable
) -> None:
    """(x - mean) / sqrt(var + epsilon), with the mean and the variance of the group.

    Parameters
    ----------
    isa : InstructionSet
    threads : int
        That images and groups are shared by, where it pays.
    shape : GroupNormShape
    read : callable
        ``read(pixel, channel, lanes)`` loads a vector of neighbouring channels; pixels of all images are counted.
    finish : callable
        ``finish(value, pixel, channel, lanes)`` stores one.
    """
    width = shape.block(threads)
    blocks = shape.channels // width
    turns = shape.outer * blocks

    def one(index) -> None:
        first, start = T.bind(index // blocks * shape.pixels), T.bind(index % blocks * width)
        block = _Block(isa, shape, width, lambda pixel, at, lanes: read(first + pixel, start + at, lanes))
        block.normalize(lambda value, pixel, at, lanes: finish(value, first + pixel, start + at, lanes))

    large = turns * shape.pixels * width >= MIN_PARALLEL_ROW_ELEMENTS
    with (T.parallel if threads > 1 and turns > 1 and large else T.serial)(0, turns) as index:
        one(index)


class _Block:
    """``width`` channels of an image, whole groups; ``read(pixel, channel, lanes)`` loads of them."""

    def __init__(self, isa: InstructionSet, shape: GroupNormShape, width: int, read: Callable) -> None:
        self._isa, self._shape, self._width, self._read = isa, shape, width, read
        self._sums = T.alloc_buffer((LANES * width,), "float32", align=64)

    def _each_vector(self, emit: Callable) -> None:
        """``emit(channel, lanes)`` over the block's channels."""
        lanes = min(self._isa.lanes, LANES)
        whole = self._width // lanes
        if whole == 1:
            emit(0, lanes)
        elif whole:
            with T.serial(0, whole) as index:
                emit(T.bind(index * lanes), lanes)
        for at, part in powers_of_two(self._width - whole * lanes):
            emit(whole * lanes + at, part)

    def normalize(self, finish: Callable) -> None:
        """``finish(value, pixel, channel, lanes)`` stores."""
        mean, factor = (T.alloc_buffer((self._width,), "float32", align=64) for _ in range(2))
        inverse = 1.0 / (self._shape.pixels * self._shape.size)

        def mean_of(total):
            return T.bind(mul(total, like(inverse, total)))

        def centred(pixel, at: int, lanes: int):
            return bind(sub(bind(self._read(pixel, at, lanes)), load(mean, at, lanes)))

        def square(pixel, at: int, lanes: int):
            value = centred(pixel, at, lanes)
            return bind(mul(value, value))

        self._sum_channels(lambda *place: bind(self._read(*place)), mean)
        self._join_groups(mean, mean_of)
        self._sum_channels(square, factor)
        self._join_groups(factor, lambda total: inverse_root(mean_of(total), self._shape.epsilon))
        with T.serial(0, self._shape.pixels) as pixel:
            self._each_vector(
                lambda at, lanes: finish(
                    bind(mul(centred(pixel, at, lanes), load(factor, at, lanes))), pixel, at, lanes
                )
            )

    def _sum_channels(self, value: Callable, target) -> None:
        """``target[channel]`` becomes the sum of ``value(pixel, channel, lanes)`` over the pixels."""
        width, pixels = self._width, self._shape.pixels

        def begin(at, lanes: int) -> None:
            for row in range(LANES):
                store(self._sums, row * width + at, tirx.const(0.0, with_lanes("float32", lanes)), lanes)

        def take(first, rows: int, turns: int, at, lanes: int) -> None:
            """``rows`` neighbouring pixels, and those 16 further on, ``turns`` times."""
            for row in range(rows):
                total = load(self._sums, row * width + at, lanes)
                for turn in range(turns):
                    total = bind(add(total, value(first + turn * LANES + row, at, lanes)))
                store(self._sums, row * width + at, total, lanes)

        def end(at, lanes: int) -> None:
            parts = [bind(load(self._sums, row * width + at, lanes)) for row in range(LANES)]
            store(target, at, tree_sum(parts), lanes)

        self._each_vector(begin)
        done = 0
        for turns in (TURNS, 1):
            step = turns * LANES
            count = (pixels - done) // step
            if count:
                with T.serial(0, count) as index:
                    first = T.bind(done + index * step)
                    self._each_vector(functools.partial(take, first, LANES, turns))
            done += count * step
        if done < pixels:
            self._each_vector(functools.partial(take, done, pixels - done, 1))
        self._each_vector(end)

    def _join_groups(self, sums, function: Callable) -> None:
        """Each channel's sum becomes ``function`` of the sum over the channel's group."""
        size = self._shape.size
        if size == 1:
            self._each_vector(lambda at, lanes: store(sums, at, function(bind(load(sums, at, lanes))), lanes))
            return
        with T.serial(0, self._width // size) as group:
            first = T.bind(group * size)
            row = Row(self._isa, size, lambda offset, lanes: load(sums, first + offset, lanes), pad=0.0)
            value = function(row.sum())
            for at, lanes in powers_of_two(size):
                store(sums, first + at, like_scalar(value, lanes), lanes)
