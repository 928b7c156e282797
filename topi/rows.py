"""Operators that reduce the last axis, as passes over a row in cache; LayerNorm, RMSNorm, L2 normalisation.

Reductions use 16 lane accumulators whatever the vector width, element i in lane i mod 16, combined in a fixed
tree, so that every target gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.float_contract import LANES, LOWEST, add, bind, lanes_of, like, mul, sub, with_lanes
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import balanced_blocks, overlapped_start
from tvm_qfp8.topi.prim_func import keep, load, powers_of_two, store, stores_last

MIN_PARALLEL_ELEMENTS, MIN_PARALLEL_ROW_ELEMENTS = 65_536, 20_000
"""Below, operators stay serial: those that go over their elements once, and those on rows, as softmax and norms. A
parallel region costs 2 to 7 us, as so many elements do."""

BLOCKS_OF_THREAD = 4
"""So that fewer threads than compiled for share them evenly, too."""


class Row:
    """One row of ``length`` float32 values, read by ``read(offset, lanes)`` in whole groups of 16.

    The rest of the row is read once, in pieces, and padded in registers.
    """

    def __init__(self, isa: InstructionSet, length: int, read: Callable, pad: float) -> None:
        self.lanes = min(isa.lanes, LANES)
        self._at_once = isa.vectors_at_once
        self.length = length
        self._read = read
        self._full = length // LANES
        self._rest = length % LANES
        self._vector = with_lanes("float32", self.lanes)
        self._tail = [self._padded(lane, pad) for lane in range(0, LANES, self.lanes)] if self._rest else []

    def _padded(self, lane: int, pad: float):
        """The vector at ``lane`` of the last group."""
        start, vectors = self._full * LANES + lane, []
        missing = self.lanes
        for at, lanes in powers_of_two(min(self.lanes, max(0, self._rest - lane))):
            vectors.append(bind(self._read(start + at, lanes)))
            missing -= lanes
        if missing:
            vectors.append(tirx.const(pad, with_lanes("float32", missing)))
        return vectors[0] if len(vectors) == 1 else bind(tirx.Shuffle(vectors, _indices(range(self.lanes))))

    def constant(self, value: float):
        """``value`` in every lane."""
        return tirx.const(value, self._vector)

    def set_padding(self, value) -> None:
        """Put a scalar into the padding after the row."""
        wide = self.splat(value)
        for part, vector in enumerate(self._tail):
            real = min(self.lanes, max(0, self._rest - part * self.lanes))
            if real < self.lanes:
                order = [lane if lane < real else self.lanes + lane for lane in range(self.lanes)]
                self._tail[part] = bind(tirx.Shuffle([vector, wide], _indices(order))) if real else wide

    def splat(self, scalar):
        """A scalar in every lane."""
        return scalar if self.lanes == 1 else tirx.Broadcast(scalar, self.lanes)

    def first_lane(self, vector):
        """The first lane of a vector of ``lanes``, a scalar."""
        return vector if self.lanes == 1 else bind(tirx.Shuffle([vector], [tirx.const(0, "int32")]))

    def _groups(self, body: Callable) -> None:
        """``body(source, offset)`` for each group; ``source(lane)`` is a vector of the row, padding included."""

        def whole(at) -> None:
            body(lambda lane: bind(self._read(at + lane, self.lanes)), at)

        parts = LANES // self.lanes
        self._together(self._full, max(1, self._at_once // parts), lambda group: whole(group * LANES))
        if self._rest:
            body(lambda lane: self._tail[lane // self.lanes], self._full * LANES)

    @staticmethod
    def _together(count: int, together: int, emit: Callable) -> None:
        """``emit(index)`` of ``count``, so many at a time that their stores come last."""
        whole = count // together
        if whole:
            with T.serial(0, whole) as index:
                with stores_last():
                    for part in range(together):
                        emit(index * together + part)
        if count % together:
            with T.serial(0, count % together) as index:
                emit(whole * together + index)

    def vector(self, offset, lane: int):
        """The vector at ``lane`` of the group at ``offset``, padding included."""
        in_tail = isinstance(offset, int) and offset >= self._full * LANES
        return self._tail[lane // self.lanes] if in_tail else self._read(offset + lane, self.lanes)

    def largest(self):
        """The greatest value in every lane. The order does not matter, so several vectors are compared at once."""
        width = next(w for w in (4, 2, 1) if self._full % w == 0)
        accumulators = T.alloc_buffer((width * LANES,), "float32", scope="local", align=64)
        lanes = range(0, width * LANES, self.lanes)
        for lane in lanes:
            store(accumulators, lane, self.constant(LOWEST), self.lanes)

        def take(lane, value) -> None:
            store(accumulators, lane, tirx.max(load(accumulators, lane, self.lanes), value), self.lanes)

        if self._full:
            with T.serial(0, self._full // width) as group:
                for lane in lanes:
                    take(lane, bind(self._read(group * width * LANES + lane, self.lanes)))
        if self._rest:
            for part, vector in enumerate(self._tail):
                take(part * self.lanes, vector)
        return self.greatest_of([bind(load(accumulators, lane, self.lanes)) for lane in lanes])

    def greatest_of(self, vectors: list):
        """The greatest value of vectors, in every lane."""
        while len(vectors) > 1:
            vectors = [bind(tirx.max(a, b)) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        greatest, distance = vectors[0], self.lanes // 2
        while distance:
            greatest = bind(tirx.max(greatest, _rotated(greatest, distance)))
            distance //= 2
        return greatest

    def sum(
        self, function: Callable = lambda v: v, keep: tuple | None = None, beside: Callable | None = None
    ):
        """Of ``function(vector)``, by 16 lane accumulators combined in the tree 8-4-2-1; a float32 scalar.

        With ``keep``, a buffer and a start in it, the values are kept there. ``beside(offset)`` is emitted next to
        each group of 16.
        """
        accumulators = T.alloc_buffer((LANES,), "float32", scope="local", align=64)
        parts = range(0, LANES, self.lanes)
        for lane in parts:
            store(accumulators, lane, self.constant(0.0), self.lanes)

        def body(source, offset) -> None:
            # Loads come before stores: rows are often 4 KiB apart, where a load seems to read what was just stored.
            read = [source(lane) for lane in parts]
            if beside is not None:
                beside(offset)
            for lane, vector in zip(parts, read, strict=True):
                value = bind(function(vector))
                if keep is not None:
                    store(keep[0], keep[1] + offset + lane, value, self.lanes)
                store(accumulators, lane, add(load(accumulators, lane, self.lanes), value), self.lanes)

        self._groups(body)
        return self._tree_sum([bind(load(accumulators, lane, self.lanes)) for lane in parts])

    def _tree_sum(self, vectors: list):
        """The tree 8-4-2-1 on whole vectors; which of two is the first does not matter to a sum."""
        while len(vectors) > 1:
            half = len(vectors) // 2
            vectors = [bind(add(vectors[i], vectors[i + half])) for i in range(half)]
        total, distance = vectors[0], self.lanes // 2
        while distance:
            total = bind(add(total, _rotated(total, distance)))
            distance //= 2
        return keep(self.first_lane(total))

    def pieces(self, offset) -> list[tuple]:
        """(offset, lanes) of the vectors that cover the group at ``offset``, its padding not.

        Where the last one would be in several pieces it overlaps the one before it, if there is one.
        """
        in_tail = isinstance(offset, int) and offset >= self._full * LANES
        end = self._rest if in_tail else LANES
        whole = end // self.lanes * self.lanes
        last = [(offset + whole + at, lanes) for at, lanes in powers_of_two(end - whole)]
        if len(last) > 1 and self.length >= self.lanes:
            last = [(self.length - self.lanes, self.lanes)]
        return [(offset + at, self.lanes) for at in range(0, whole, self.lanes)] + last

    def finish(self, function: Callable, emit: Callable) -> None:
        """``emit(function(vector), offset, lanes)`` over the row."""

        def piece(offset, lanes: int) -> None:
            emit(bind(function(bind(self._read(offset, lanes)))), offset, lanes)

        vectors = self._full * LANES // self.lanes
        self._together(vectors, self._at_once, lambda index: piece(index * self.lanes, self.lanes))
        for offset, lanes in self.pieces(self._full * LANES) if self._rest else []:
            piece(offset, lanes)


def _indices(order: Iterable[int]) -> list:
    return [tirx.const(lane, "int32") for lane in order]


def _rotated(vector, distance: int):
    lanes = lanes_of(vector)
    return tirx.Shuffle([vector], _indices((lane + distance) % lanes for lane in range(lanes)))


TOGETHER_ELEMENTS = 4096
"""Of rows that go through several steps together, in the first cache: each step of a row waits for the one before."""


def for_rows_together(rows: int, length: int, threads: int, emit: Callable, most: int = LANES) -> None:
    """``emit(first, count)`` over all rows, ``count`` at a time and at most ``most``, in parallel where it pays."""

    def block(start, size: int) -> None:
        count = max(1, min(size, most, TOGETHER_ELEMENTS // max(1, length)))
        with T.serial(0, -(-size // count)) as index:
            emit(T.bind(start + overlapped_start(index, count, size)), count)

    if threads == 1 or rows == 1 or rows * length < MIN_PARALLEL_ROW_ELEMENTS:
        block(0, rows)
        return
    # Each turn of a parallel loop takes its scratch from the heap, which short rows would wait for.
    size, blocks = balanced_blocks(rows, -(-rows // (BLOCKS_OF_THREAD * threads)), 1)
    with T.parallel(0, blocks) as index:
        block(overlapped_start(index, size, rows), size)


def for_each_row(rows: int, length: int, threads: int, finish: Callable) -> None:
    """``finish(row)`` over all rows, in parallel where it pays."""
    for_rows_together(rows, length, threads, lambda first, _count: finish(first), most=1)


def inverse_root(mean_square, epsilon: float):
    """1 / sqrt(mean_square + epsilon)."""
    root = T.bind(tirx.sqrt(add(mean_square, like(epsilon, mean_square))))
    return T.bind(like(1.0, root) / root)


def emit_layer_norm(row: Any, epsilon: float, finish: Callable) -> None:
    """(x - mean) / sqrt(var + epsilon); scale and shift belong to ``finish``. Padding is 0.

    ``row`` is a ``Row``, or what stands for one: columns, or a GPU's threads. Before the squares are summed the padding
    becomes the mean, so that it adds nothing.
    """
    total = row.sum()
    inverse = like(1.0 / row.length, total)
    mean = T.bind(mul(total, inverse))
    row.set_padding(mean)
    wide = row.splat(mean)

    def square(v):
        centred = bind(sub(v, wide))
        return mul(centred, centred)

    variance = T.bind(mul(row.sum(square), inverse))
    factor = inverse_root(variance, epsilon)
    row.finish(
        lambda v: mul(bind(sub(v, like_scalar(mean, lanes_of(v)))), like_scalar(factor, lanes_of(v))), finish
    )


def emit_rms_norm(row: Row, epsilon: float, finish: Callable) -> None:
    """x / sqrt(mean(x^2) + epsilon); the scale belongs to ``finish``. Padding is 0."""
    total = row.sum(lambda v: mul(v, v))
    square = T.bind(mul(total, like(1.0 / row.length, total)))
    factor = inverse_root(square, epsilon)
    row.finish(lambda v: mul(v, like_scalar(factor, lanes_of(v))), finish)


def emit_l2_normalize(row: Row, floor: float, finish: Callable) -> None:
    """x / max(sqrt(sum(x^2)), floor). Padding is 0."""
    length = T.bind(tirx.sqrt(row.sum(lambda v: mul(v, v))))
    # The constant first: so a NaN stays.
    least = like(floor, length)
    divisor = T.bind(tirx.Select(least > length, least, length))
    factor = T.bind(like(1.0, divisor) / divisor)
    row.finish(lambda v: mul(v, like_scalar(factor, lanes_of(v))), finish)


def like_scalar(scalar, lanes: int):
    """A scalar in every lane; what has so many lanes already is returned as it is."""
    return scalar if lanes == lanes_of(scalar) else tirx.Broadcast(scalar, lanes)
