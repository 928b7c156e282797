"""Encode with a scale for each row: the dynamic bias found when the data is there.

With the row's values ``y = fl32(x * factors[c])``, rotated if asked (``rotation.py``), and ``m`` their largest
magnitude::

    scale = max(fl32(min(m, largest float32) * fl32(1 / largest G)), 2^-126)
    codes = encode(fl32(y * fl32(1 / scale)))

The float operations are the same everywhere, and a maximum has no order, so every target gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.format import Layout
from tvm_qfp8.topi.codec import encode_expr
from tvm_qfp8.topi.cuda.rows import for_each_row as for_each_cuda_row
from tvm_qfp8.topi.float_contract import LANES, bind, lanes_of, like, mul, with_lanes
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, keep, load, load_float, store, vector_runs
from tvm_qfp8.topi.rotation import emit_rotated_row, rotated_reader
from tvm_qfp8.topi.rows import Row, for_rows_together, like_scalar


def encode_rows_prim_func(
    isa: InstructionSet, threads: int, x: TensorSpec, layout: Layout, rotation: int = 1
) -> tirx.PrimFunc:
    """``(x, factors, codes, scales) -> None`` for ``x (..., channels)`` and float32 scales ``(...,)``.

    ``x`` is float32, or kept as float16 or bfloat16. ``rotation`` is the order of the rotation, 1: none.
    """
    shape = x.shape
    rows, length = math.prod(shape[:-1]), shape[-1]
    factors = TensorSpec((length,), "float32")
    codes, scales = TensorSpec(shape, "uint8"), TensorSpec(shape[:-1], "float32")

    def body(source, factor_buffer, code_buffer, scale_buffer) -> None:
        read = scaled_reader(source, factor_buffer, length)

        def cpu_rows(first, count: int) -> None:
            emit_cpu_rows(read, first, count, length, (layout, rotation), isa, (code_buffer, scale_buffer))

        def cuda_row(row, index) -> None:
            # The walk is over values; magnitudes are seen by the same threads.
            store_encoded_row(row, row.mapped(tirx.abs), index, layout, isa, code_buffer, scale_buffer)

        if isa.name == "cuda":
            for_each_cuda_row(rows, length, rotated_reader(read, length, rotation), cuda_row)
        else:
            for_rows_together(rows, length, threads, cpu_rows)

    return build_prim_func("encode_rows", [x, factors, codes, scales], body)


def scaled_reader(source, factors, length: int) -> Callable:
    """``read(index, offset, lanes)`` of the rows of ``source``, times the factors of their channels."""

    def read(index, offset, lanes: int):
        value = bind(load_float(source, index * length + offset, lanes))
        return bind(mul(value, load(factors, offset, lanes)))

    return read


def emit_cpu_rows(
    read: Callable,
    first,
    count: int,
    length: int,
    encoding: tuple[Layout, int],
    isa: InstructionSet,
    results: tuple,
    place: Callable | None = None,
) -> None:
    """Encode ``count`` rows from ``first`` on, at most ``LANES``, into the buffers ``results`` of codes and scales.

    ``read(row, offset, lanes)`` loads; ``place(index)`` is the row that it gets for the row ``first + index``, that
    itself if it is None. ``encoding`` is the layout, and the order of the rotation. A row waits long for its scale, so
    all that is the same for each row stands in a loop of its own: other rows' steps fill the time.
    """
    (codes, scales), (layout, rotation) = results, encoding
    where = (lambda index: T.bind(first + index)) if place is None else place
    if rotation > 1:
        read, where = _rotated_rows(read, where, count, length, rotation, isa), lambda index: index
    found = T.alloc_buffer((LANES,), "float32", align=64)
    lanes = min(isa.lanes, LANES)
    for at in range(0, LANES, lanes):
        store(found, at, tirx.const(0.0, with_lanes("float32", lanes)), lanes)
    with T.serial(0, count) as index:
        row = where(index)
        magnitudes = Row(isa, length, lambda offset, n: tirx.abs(read(row, offset, n)), pad=0.0)
        store(found, index, magnitudes.first_lane(magnitudes.largest()), 1)
    reciprocals = T.alloc_buffer((LANES,), "float32", align=64)
    for at in range(0, LANES, lanes):
        largest = bind(load(found, at, lanes))
        scale, reciprocal = emit_scale(largest, like(inverse_of(layout), largest))
        store(found, at, scale, lanes)
        store(reciprocals, at, reciprocal, lanes)
    vector_runs(count, isa.lanes, lambda at, n: store(scales, first + at, load(found, at, n), n))
    with T.serial(0, count) as index:
        row, target = where(index), T.bind((first + index) * length)
        Row(isa, length, lambda offset, n: read(row, offset, n), pad=0.0).finish(
            coded(bind(load(reciprocals, index, 1)), layout, isa),
            lambda code, offset, n: store(codes, target + offset, code, n),
        )


def _rotated_rows(
    read: Callable, where: Callable, count: int, length: int, rotation: int, isa: InstructionSet
) -> Callable:
    """Rotate ``count`` rows into scratch memory; ``read(index, offset, lanes)`` of these."""
    scratch = T.alloc_buffer((count * length,), "float32", align=64)
    with T.serial(0, count) as index:
        row = where(index)
        emit_rotated_row(
            lambda offset, n: read(row, offset, n), scratch, index * length, length, rotation, isa.lanes
        )
    return lambda index, offset, n: bind(load(scratch, index * length + offset, n))


def store_encoded_row(values, magnitudes, index, layout: Layout, isa: InstructionSet, codes, scales) -> None:
    """Encode row ``index`` of a GPU's threads into the buffers ``codes`` and ``scales``."""
    largest = magnitudes.first_lane(magnitudes.largest())
    scale, reciprocal = emit_scale(largest, like(inverse_of(layout), largest))
    values.finish(
        coded(reciprocal, layout, isa),
        lambda code, offset, lanes: store(codes, index * values.length + offset, code, lanes),
    )
    store(scales, index, scale, 1)


def inverse_of(layout: Layout) -> float:
    """fl32(1 / largest G)."""
    return float(np.float32(1) / np.float32(layout.max_grid))


def emit_scale(largest, inverse) -> tuple:
    """The scale that puts the magnitude ``largest`` on the largest grid value, and its reciprocal."""
    limits = np.finfo(np.float32)
    finite = keep(tirx.min(largest, like(float(limits.max), largest)))
    scale = keep(tirx.max(bind(mul(finite, inverse)), like(float(limits.tiny), finite)))
    return scale, keep(like(1.0, scale) / scale)


def coded(reciprocal, layout: Layout, isa: InstructionSet) -> Callable:
    """Codes of vectors of values, by the reciprocal of their scale."""
    return lambda value: encode_expr(bind(mul(value, like_scalar(reciprocal, lanes_of(value)))), layout, isa)
