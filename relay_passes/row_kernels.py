"""Kernels whose anchor works on rows or windows: softmax and norms, pooling, concatenation, embedding look-up."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import tirx

from tvm_qfp8.relay_passes.fuse import GLOBAL_POOL, normalized_axis, op_name, parts_of, shape_of
from tvm_qfp8.relay_passes.operands import Emitter, Operands, array_of, layout_of
from tvm_qfp8.tables import build_table
from tvm_qfp8.tables.softmax import build_softmax_exp, softmax_exp_error
from tvm_qfp8.topi.columns import Column, emit_column_softmax, for_each_columns
from tvm_qfp8.topi.concat import emit_concat_of_floats
from tvm_qfp8.topi.embedding import emit_embedding
from tvm_qfp8.topi.float_contract import add, bind, mul
from tvm_qfp8.topi.group_norm import GroupNormShape, emit_group_norm
from tvm_qfp8.topi.interpolate import emit_table, lanes_from
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import pad_channels
from tvm_qfp8.topi.pooling import PoolShape, emit_global_pool, emit_pool
from tvm_qfp8.topi.prim_func import load
from tvm_qfp8.topi.rows import (
    Row,
    emit_l2_normalize,
    emit_layer_norm,
    emit_rms_norm,
    for_each_row,
    for_rows_together,
    like_scalar,
)
from tvm_qfp8.topi.softmax import emit_log_softmax, emit_softmax

if TYPE_CHECKING:
    from tvm_qfp8.relay_passes.encoded_rows import EncodedRows


def _take(call, isa: InstructionSet, threads: int, operands: Operands, _max_error: float) -> Emitter:
    table, scale, indices = call.args
    layout, shape = layout_of(table), shape_of(table)
    assert layout is not None
    count = int(np.prod(shape_of(indices), dtype=np.int64))
    table_at, scale_at = operands.constant(array_of(table)), operands.constant(array_of(scale))
    indices_at = operands.tensor(indices)

    def body(inputs, finish) -> None:
        emit_embedding(
            isa,
            layout,
            (shape[0], shape[1]),
            count,
            inputs[table_at],
            inputs[scale_at],
            inputs[indices_at],
            lambda value, row, column, lanes: finish(value, row, column, lanes, lanes),
        )

    return body, ("embedding", layout, shape, count)


@dataclass(frozen=True)
class Rows:
    """The rows that an operator works on: ``length`` elements, ``inner`` apart, in a tensor ``(outer, length, inner)``.

    Rows along the last axis have an index; others are columns, with an index ``(outer, inner)``.
    """

    outer: int
    length: int
    inner: int
    last: bool
    """Along the last axis."""

    @classmethod
    def of(cls, call) -> Rows:
        """Of a row operator."""
        shape, axis = shape_of(call.args[0]), normalized_axis(call)
        assert axis is not None
        return cls(math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]), axis == len(shape) - 1)

    @property
    def count(self) -> int:
        return self.outer * self.inner

    def place(self, index, offset) -> tuple:
        """Row and column of an element of the output, as an epilogue counts them."""
        if self.last:
            return index, offset
        outer, column = (
            index if isinstance(index, tuple) else (index // self.inner, tirx.floormod(index, self.inner))
        )
        return outer * self.length + offset, column

    def read(self, buffer) -> Callable:
        """``read(index, offset, lanes)`` of the input."""
        columns = self.length if self.last else self.inner

        def read(index, offset, lanes: int):
            row, column = self.place(index, offset)
            return load(buffer, row * columns + column, lanes)

        return read

    def per_element(self, buffer, offset, lanes: int):
        """What belongs to the elements from ``offset`` of a row."""
        return load(buffer, offset, lanes) if self.last else like_scalar(load(buffer, offset, 1), lanes)


@dataclass(frozen=True)
class RowWalk:
    """How a machine walks over the rows of a tensor; ``read(index, offset, lanes)`` loads."""

    each: Callable
    """``each(rows, read, body)``: ``body(row, index)`` for all rows."""
    softmax: Callable
    """``softmax(rows, read, exp, finish)``: ``finish(index, value, offset, lanes)`` stores."""


def emit_row_operator(
    call, isa: InstructionSet, operands: Operands, max_error: float, walk: RowWalk
) -> Emitter:
    """Softmax, log-softmax or a norm."""
    if op_name(call) in ("relax.nn.softmax", "relax.nn.log_softmax"):
        return _softmax(call, isa, operands, max_error, walk)
    if op_name(call) == "relax.qfp8.l2_normalize":
        return _l2_normalize(call, operands, isa, walk)
    return _norm(call, operands, isa, walk)


def _on_cpu(
    call,
    isa: InstructionSet,
    threads: int,
    operands: Operands,
    max_error: float,
    encoded: EncodedRows | None = None,
) -> Emitter:
    """``encoded`` is what encodes the rows of a norm or softmax, too."""
    if not Rows.of(call).last:
        return emit_row_operator(call, isa, operands, max_error, _columns(threads))
    pad = float("-inf") if "softmax" in op_name(call) else 0.0

    def row_at(length: int, read: Callable, index) -> Row:
        return Row(isa, length, lambda offset, lanes: read(index, offset, lanes), pad=pad)

    def each(rows: Rows, read: Callable, body: Callable) -> None:
        def finish(index) -> None:
            body(row_at(rows.length, read, index), index)

        if encoded is None:
            for_each_row(rows.count, rows.length, threads, finish)
        else:
            for_rows_together(
                rows.count,
                rows.length,
                threads,
                lambda first, count: encoded.around(first, count, finish),
            )

    def softmax(rows: Rows, read: Callable, exp: Callable, finish: Callable) -> None:
        rows_of = functools.partial(row_at, rows.length, read)
        if encoded is None:
            emit_softmax(rows_of, rows.count, rows.length, threads, exp, finish)
        else:
            emit_softmax(rows_of, rows.count, rows.length, threads, exp, encoded.code, encoded.begin)

    return emit_row_operator(call, isa, operands, max_error, RowWalk(each, softmax))


def _columns(threads: int) -> RowWalk:
    def each(rows: Rows, read: Callable, body: Callable) -> None:
        def block(outer, start, lanes: int) -> None:
            column = Column(rows.length, lanes, lambda offset: read((outer, start), offset, lanes))
            body(column, (outer, start))

        for_each_columns((rows.outer, rows.length, rows.inner), threads, block)

    def softmax(rows: Rows, read: Callable, exp: Callable, finish: Callable) -> None:
        def one(column: Column, index) -> None:
            emit_column_softmax(column, exp, lambda *value: finish(index, *value))

        each(rows, read, one)

    return RowWalk(each, softmax)


def _writer(rows: Rows, isa: InstructionSet, finish: Callable) -> Callable:
    """``write(index, value, offset, lanes)`` by way of an epilogue, which takes a register at a time."""

    def write(index, value, offset, lanes: int) -> None:
        row, column = rows.place(index, offset)
        for start in range(0, lanes, isa.lanes):
            width = min(isa.lanes, lanes)
            part = value if width == lanes else lanes_from(value, start, width)
            finish(part, row, column + start if start else column, width, width)

    return write


def _softmax(call, isa: InstructionSet, operands: Operands, max_error: float, walk: RowWalk) -> Emitter:
    rows = Rows.of(call)
    at = operands.tensor(call.args[0])
    logarithmic = op_name(call) == "relax.nn.log_softmax"
    if logarithmic:
        exp_table = build_table("exp", max_error=max_error / 4, domain=(-87.0, 0.0))
    else:
        exp_table = build_softmax_exp(softmax_exp_error(max_error, rows.length))
    log_table = build_table("log", max_error=max_error / 4)

    def exp(v):
        return bind(emit_table(exp_table, v, isa))

    def log(v):
        return bind(emit_table(log_table, v, isa))

    def body(inputs, finish) -> None:
        read, write = rows.read(inputs[at]), _writer(rows, isa, finish)

        def one(row, index) -> None:
            emit_log_softmax(row, exp, log, lambda *value: write(index, *value))

        if logarithmic:
            walk.each(rows, read, one)
        else:
            walk.softmax(rows, read, exp, write)

    return body, (op_name(call), rows, max_error)


def _norm(call, operands: Operands, isa: InstructionSet, walk: RowWalk) -> Emitter:
    x, gamma, *beta = call.args
    rows = Rows.of(call)
    at = operands.tensor(x)
    scale = operands.constant(pad_channels(array_of(gamma).reshape(-1)))
    shift = operands.constant(pad_channels(array_of(beta[0]).reshape(-1))) if beta else None
    emit = emit_layer_norm if beta else emit_rms_norm

    def body(inputs, finish) -> None:
        write = _writer(rows, isa, finish)

        def one(row, index) -> None:
            def scaled(value, offset, lanes) -> None:
                value = bind(mul(value, rows.per_element(inputs[scale], offset, lanes)))
                if shift is not None:
                    value = bind(add(value, rows.per_element(inputs[shift], offset, lanes)))
                write(index, value, offset, lanes)

            emit(row, float(call.attrs.epsilon), scaled)

        walk.each(rows, rows.read(inputs[at]), one)

    return body, (op_name(call), rows)


def _l2_normalize(call, operands: Operands, isa: InstructionSet, walk: RowWalk) -> Emitter:
    x, floor = call.args[0], float(call.args[1].value)
    rows = Rows.of(call)
    at = operands.tensor(x)

    def body(inputs, finish) -> None:
        write = _writer(rows, isa, finish)

        def one(row, index) -> None:
            emit_l2_normalize(row, floor, lambda *value: write(index, *value))

        walk.each(rows, rows.read(inputs[at]), one)

    return body, (op_name(call), rows, floor)


def emit_group_norm_operator(call, operands: Operands, emit: Callable) -> Emitter:
    """GroupNorm by ``emit(shape, read, finish)``."""
    at, (batch, height, width, channels) = operands.tensor(call.args[0]), shape_of(call.args[0])
    groups = int(call.attrs.num_groups)
    shape = GroupNormShape(batch, height * width, groups, channels // groups, float(call.attrs.epsilon))

    def body(inputs, finish) -> None:
        def read(row, column, lanes: int):
            return load(inputs[at], row * channels + column, lanes)

        emit(shape, read, lambda value, row, column, lanes: finish(value, row, column, lanes, lanes))

    return body, shape


def _group_norm(call, isa: InstructionSet, threads: int, operands: Operands, _max_error: float) -> Emitter:
    return emit_group_norm_operator(call, operands, functools.partial(emit_group_norm, isa, threads))


def pool_shape(call) -> PoolShape:
    """The static description of a max_pool2d or avg_pool2d call."""
    attrs = call.attrs
    batch, height, width, channels = shape_of(call.args[0])
    top, left, bottom, right = (int(v) for v in attrs.padding)
    return PoolShape(
        batch,
        height,
        width,
        channels,
        window=(int(attrs.pool_size[0]), int(attrs.pool_size[1])),
        stride=(int(attrs.strides[0]), int(attrs.strides[1])),
        padding=(top, left, bottom, right),
        kind="max" if op_name(call) == "relax.nn.max_pool2d" else "mean",
        count_include_pad=bool(attrs.count_include_pad),
    )


def _pool(call, isa: InstructionSet, threads: int, operands: Operands, _max_error: float) -> Emitter:
    at = operands.tensor(call.args[0])
    shape = shape_of(call.args[0])
    described: Any
    if op_name(call) in GLOBAL_POOL:
        kind = GLOBAL_POOL[op_name(call)]
        described = ("global", kind, shape)

        def body(inputs, finish) -> None:
            emit_global_pool(
                isa, shape, kind, inputs[at], lambda v, r, c, lanes: finish(v, r, c, lanes, lanes)
            )
    else:
        pool = pool_shape(call)
        described = pool

        def body(inputs, finish) -> None:
            emit_pool(isa, pool, inputs[at], lambda v, r, c, lanes: finish(v, r, c, lanes, lanes), threads)

    return body, described


def concat_operands(call, operands: Operands) -> tuple[list[int], list[int]]:
    """(arguments, channels) of the parts that a concatenation joins."""
    parts = parts_of(call)
    return [operands.tensor(part) for part in parts], [shape_of(part)[-1] for part in parts]


def _concat(
    call,
    isa: InstructionSet,
    threads: int,
    operands: Operands,
    _max_error: float,
    encoded: EncodedRows | None = None,
) -> Emitter:
    at, lengths = concat_operands(call, operands)
    rows = math.prod(shape_of(call)[:-1])

    def body(inputs, finish) -> None:
        sources = [inputs[index] for index in at]
        emit_concat_of_floats(
            isa,
            rows,
            lengths,
            sources,
            lambda v, r, c, lanes: finish(v, r, c, lanes, lanes),
            threads,
            None if encoded is None else encoded.around,
        )

    return body, ("concat", rows, lengths, at)


ROW_ANCHORS: dict[str, Callable] = {
    "relax.qfp8.take": _take,
    "relax.nn.softmax": _on_cpu,
    "relax.nn.log_softmax": _on_cpu,
    "relax.nn.layer_norm": _on_cpu,
    "relax.nn.rms_norm": _on_cpu,
    "relax.nn.group_norm": _group_norm,
    "relax.qfp8.l2_normalize": _on_cpu,
    **dict.fromkeys(GLOBAL_POOL, _pool),
    "relax.nn.max_pool2d": _pool,
    "relax.nn.avg_pool2d": _pool,
    "relax.concat": _concat,
}
