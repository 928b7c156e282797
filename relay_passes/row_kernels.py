"""Kernels whose anchor works on rows or windows: softmax and norms, pooling, embedding look-up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from tvm_qfp8.relay_passes.fuse import op_name, shape_of
from tvm_qfp8.relay_passes.operands import Emitter, Operands, array_of, layout_of
from tvm_qfp8.tables import build_table
from tvm_qfp8.tables.softmax import build_softmax_exp, softmax_exp_error
from tvm_qfp8.topi.embedding import emit_embedding
from tvm_qfp8.topi.float_contract import add, bind, mul
from tvm_qfp8.topi.interpolate import emit_table
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import pad_channels
from tvm_qfp8.topi.pooling import PoolShape, emit_global_mean, emit_pool
from tvm_qfp8.topi.prim_func import load
from tvm_qfp8.topi.rows import Row, emit_layer_norm, emit_rms_norm, for_each_row
from tvm_qfp8.topi.softmax import emit_log_softmax, emit_softmax


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


def _row_shape(x: relax.Expr) -> tuple[int, int]:
    shape = shape_of(x)
    return int(np.prod(shape[:-1], dtype=np.int64)), shape[-1]


def _softmax(call, isa: InstructionSet, threads: int, operands: Operands, max_error: float) -> Emitter:
    rows, length = _row_shape(call.args[0])
    at = operands.tensor(call.args[0])
    logarithmic = op_name(call) == "relax.nn.log_softmax"
    if logarithmic:
        exp_table = build_table("exp", max_error=max_error / 4, domain=(-87.0, 0.0))
    else:
        exp_table = build_softmax_exp(softmax_exp_error(max_error, length))
    log_table = build_table("log", max_error=max_error / 4)

    def body(inputs, finish) -> None:
        def row_at(index) -> Row:
            def read(offset, lanes):
                return load(inputs[at], index * length + offset, lanes)

            return Row(isa, length, read, pad=float("-inf"))

        def exp(v):
            return bind(emit_table(exp_table, v, isa))

        def write(index, value, offset, lanes) -> None:
            finish(value, index, offset, lanes, lanes)

        if logarithmic:

            def log(v):
                return bind(emit_table(log_table, v, isa))

            def one(index) -> None:
                emit_log_softmax(row_at(index), exp, log, lambda *value: write(index, *value))

            for_each_row(rows, length, threads, one)
        else:
            emit_softmax(row_at, rows, length, threads, exp, write)

    return body, (op_name(call), rows, length, max_error)


def _norm(call, isa: InstructionSet, threads: int, operands: Operands, _max_error: float) -> Emitter:
    x, gamma, *beta = call.args
    rows, length = _row_shape(x)
    at = operands.tensor(x)
    scale = operands.constant(pad_channels(array_of(gamma).reshape(-1)))
    shift = operands.constant(pad_channels(array_of(beta[0]).reshape(-1))) if beta else None
    emit = emit_layer_norm if beta else emit_rms_norm

    def body(inputs, finish) -> None:
        def one(index) -> None:
            def scaled(value, offset, lanes) -> None:
                value = bind(mul(value, load(inputs[scale], offset, lanes)))
                if shift is not None:
                    value = bind(add(value, load(inputs[shift], offset, lanes)))
                finish(value, index, offset, lanes, lanes)

            row = Row(
                isa, length, lambda offset, lanes: load(inputs[at], index * length + offset, lanes), pad=0.0
            )
            emit(row, float(call.attrs.epsilon), scaled)

        for_each_row(rows, length, threads, one)

    return body, (op_name(call), rows, length)


def _pool(call, isa: InstructionSet, threads: int, operands: Operands, _max_error: float) -> Emitter:
    at = operands.tensor(call.args[0])
    shape = shape_of(call.args[0])
    described: Any
    if op_name(call) == "relax.mean":
        described = ("global_mean", shape)

        def body(inputs, finish) -> None:
            emit_global_mean(isa, shape, inputs[at], lambda v, r, c, lanes: finish(v, r, c, lanes, lanes))
    else:
        attrs = call.attrs
        batch, height, width, channels = shape
        top, left, bottom, right = (int(v) for v in attrs.padding)
        pool = PoolShape(
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
        described = pool

        def body(inputs, finish) -> None:
            emit_pool(isa, pool, inputs[at], lambda v, r, c, lanes: finish(v, r, c, lanes, lanes), threads)

    return body, described


ROW_ANCHORS: dict[str, Callable] = {
    "relax.qfp8.take": _take,
    "relax.nn.softmax": _softmax,
    "relax.nn.log_softmax": _softmax,
    "relax.nn.layer_norm": _norm,
    "relax.nn.rms_norm": _norm,
    "relax.mean": _pool,
    "relax.nn.max_pool2d": _pool,
    "relax.nn.avg_pool2d": _pool,
}
