"""Concatenation as copies of whole runs, whatever the data type (TVM's own kernel asks at every element)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tvm import tirx

from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, load, load_float, store, vector_runs
from tvm_qfp8.topi.rows import MIN_PARALLEL_ELEMENTS, for_each_row, for_rows_together


def emit_concat(
    rows: int,
    lengths: Sequence[int],
    lanes: int,
    threads: int,
    place: Callable[..., None],
    around: Callable | None = None,
) -> None:
    """``place(part, index, row, column, lanes)`` for every vector of the result, ``index`` counting in its part.

    ``around(first, count, finish)`` emits what belongs to ``count`` whole rows, and calls ``finish(row)`` for each.
    """

    def join(row) -> None:
        start = 0
        for part, length in enumerate(lengths):

            def one(offset, count: int, part=part, length=length, start=start) -> None:
                place(part, row * length + offset, row, start + offset, count)

            vector_runs(length, lanes, one)
            start += length

    if around is not None:
        for_rows_together(rows, sum(lengths), threads, lambda first, count: around(first, count, join))
        return
    is_small = rows * sum(lengths) < MIN_PARALLEL_ELEMENTS
    for_each_row(rows, sum(lengths), 1 if is_small else threads, join)


def emit_concat_of_floats(
    isa: InstructionSet,
    rows: int,
    lengths: Sequence[int],
    sources: Sequence,
    finish: Callable,
    threads: int,
    around: Callable | None = None,
) -> None:
    """Rows of float32 or two bytes joined; ``finish(value, row, column, lanes)`` for every vector of the result."""

    def place(part: int, index, row, column, lanes: int) -> None:
        finish(load_float(sources[part], index, lanes), row, column, lanes)

    emit_concat(rows, lengths, isa.lanes, threads, place, around)


def concat_prim_func(isa: InstructionSet, parts: list[TensorSpec], axis: int, threads: int) -> tirx.PrimFunc:
    """``(parts ..., result) -> None``: parts of equal dtype joined along ``axis``."""
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    lengths = [math.prod(part.shape[axis:]) for part in parts]
    item_bits = tirx.const(0, parts[0].dtype).ty.dtype.bits
    lanes = isa.lanes * 32 // max(8, item_bits)

    def body(*buffers) -> None:
        *sources, target = buffers

        def place(part: int, index, row, column, lanes: int) -> None:
            store(target, row * sum(lengths) + column, load(sources[part], index, lanes), lanes)

        emit_concat(math.prod(shape[:axis]), lengths, lanes, threads, place)

    return build_prim_func("concat", [*parts, TensorSpec(tuple(shape), parts[0].dtype)], body)
