"""Which kernel of ``topi.cuda`` a group of layers gets; as ``linear_kernels`` and ``row_kernels`` do for CPUs."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.relay_passes.conv_kernels import conv_shape, conv_weights
from tvm_qfp8.relay_passes.dense_kernels import scaled_by
from tvm_qfp8.relay_passes.epilogue import Epilogue
from tvm_qfp8.relay_passes.fuse import GLOBAL_POOL, op_name, shape_of
from tvm_qfp8.relay_passes.linear_kernels import product_of, product_scale
from tvm_qfp8.relay_passes.operands import Emitter, Operands, array_of, layout_of
from tvm_qfp8.relay_passes.row_kernels import (
    Rows,
    RowWalk,
    concat_operands,
    emit_group_norm_operator,
    emit_row_operator,
    pool_shape,
)
from tvm_qfp8.topi.codec import decode_expr
from tvm_qfp8.topi.conv2d import ConvShape
from tvm_qfp8.topi.cuda.batch_matmul import emit_batch_matmul
from tvm_qfp8.topi.cuda.direct_conv import emit_float_conv, pack_direct_weights
from tvm_qfp8.topi.cuda.group_norm import emit_group_norm
from tvm_qfp8.topi.cuda.isa import HOPPER, INSTRUCTION_SET
from tvm_qfp8.topi.cuda.launch import BUSY, for_each
from tvm_qfp8.topi.cuda.linear import Described, linear_kernel
from tvm_qfp8.topi.cuda.rows import emit_softmax, for_each_row
from tvm_qfp8.topi.float_contract import bind, mul, to_float
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import pad_channels
from tvm_qfp8.topi.pooling import pooled, whole_image
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, load, store


def _matmul(call, isa: InstructionSet, operands: Operands, _max_error: float) -> Emitter:
    x, weight = call.args[:2]
    rows = int(np.prod(shape_of(x)[:-1], dtype=np.int64))
    columns, depth = shape_of(weight)
    conv = ConvShape(
        1, 1, rows, depth, columns, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, layout_of(x), layout_of(weight)
    )
    return _conv(call, isa, operands, conv, array_of(weight).reshape(columns, 1, 1, depth))


def _conv2d(call, isa: InstructionSet, operands: Operands, _max_error: float) -> Emitter:
    shape = conv_shape(call)
    return _conv(call, isa, operands, shape, conv_weights(call.args[1], shape))


def _conv(call, isa: InstructionSet, operands: Operands, shape: ConvShape, weights: np.ndarray) -> Emitter:
    if shape.activation is None or shape.weight is None:
        return _with_scales(call, operands, shape, pack_direct_weights(weights), emit_float_conv)
    return _with_scales(call, operands, *linear_kernel(shape, weights, isa is HOPPER))


def _with_scales(
    call,
    operands: Operands,
    described: Described,
    weights,
    emit: Callable,
) -> Emitter:
    operands.tensor(call.args[0])
    operands.constant(weights)
    operands.constant(pad_channels(array_of(call.args[2])))
    operands.constant(pad_channels(array_of(call.args[3])))
    epilogue = scaled_by(call, operands)

    def body(inputs, finish) -> None:
        emit(described, inputs[0], inputs[1], epilogue(inputs, inputs[2], inputs[3], finish))

    return body, described


def _batch_matmul(call, _isa: InstructionSet, operands: Operands, _max_error: float) -> Emitter:
    product = product_of(call)
    x_at, y_at = (operands.tensor(argument) for argument in call.args[:2])
    scale = product_scale(call, product, operands)

    def body(inputs, finish) -> None:
        def epilogue(total, row, column, valid) -> None:
            finish(scale(inputs, total, row), row, column, 1, valid)

        emit_batch_matmul(product, inputs[x_at], inputs[y_at], epilogue)

    return body, product


def _take(call, _isa: InstructionSet, operands: Operands, _max_error: float) -> Emitter:
    table, scale, indices = call.args
    layout, (rows, width) = layout_of(table), shape_of(table)
    assert layout is not None
    count = int(np.prod(shape_of(indices), dtype=np.int64))
    table_at, scale_at = operands.constant(array_of(table)), operands.constant(array_of(scale))
    indices_at = operands.tensor(indices)

    def body(inputs, finish) -> None:
        def one(position) -> None:
            row, column = T.bind(position // width), T.bind(position % width)
            index = T.bind(load(inputs[indices_at], row, 1))
            wrapped = tirx.Select(index < 0, index + rows, index)
            picked = T.bind(tirx.max(tirx.min(wrapped, rows - 1), 0))
            grid = to_float(decode_expr(load(inputs[table_at], picked * width + column, 1), layout, "int32"))
            finish(bind(mul(grid, load(inputs[scale_at], picked, 1))), row, column, 1, 1)

        for_each(count * width, one)

    return body, ("embedding", layout, (rows, width), count)


def emit_rows(
    call, _isa: InstructionSet, operands: Operands, max_error: float, after: Callable | None = None
) -> Emitter:
    """Softmax or a norm; ``after(row, index)`` is emitted when a norm's threads have stored their row."""

    def each(rows: Rows, read: Callable, body: Callable) -> None:
        def one(row, index) -> None:
            body(row, index)
            if after is not None:
                after(row, index)

        for_each_row(rows.count, rows.length, read, one)

    def softmax(rows: Rows, read: Callable, exp: Callable, finish: Callable) -> None:
        emit_softmax(rows.count, rows.length, read, exp, finish)

    return emit_row_operator(call, INSTRUCTION_SET, operands, max_error, RowWalk(each, softmax))


def _group_norm(call, _isa: InstructionSet, operands: Operands, _max_error: float) -> Emitter:
    return emit_group_norm_operator(call, operands, emit_group_norm)


def _pool(call, _isa: InstructionSet, operands: Operands, _max_error: float) -> Emitter:
    at = operands.tensor(call.args[0])
    if op_name(call) in GLOBAL_POOL:
        shape, kind = shape_of(call.args[0]), GLOBAL_POOL[op_name(call)]
        channels = shape[3]

        def global_body(inputs, finish) -> None:
            pixels = whole_image(shape, kind, inputs[at])

            def one(index) -> None:
                image, channel = T.bind(index // channels), T.bind(index % channels)
                finish(pixels(image, channel, 1), image, channel, 1, 1)

            for_each(shape[0] * channels, one)

        return global_body, ("global", kind, shape)
    pool = pool_shape(call)

    def body(inputs, finish) -> None:
        pixel = pooled(pool, inputs[at])

        def one(index) -> None:
            row, channel = T.bind(index // pool.channels), T.bind(index % pool.channels)
            image, oy = T.bind(row // (pool.out_height * pool.out_width)), T.bind(row // pool.out_width)
            value = pixel(image, T.bind(oy % pool.out_height), T.bind(row % pool.out_width), channel, 1)
            finish(value, row, channel, 1, 1)

        for_each(pool.batch * pool.out_height * pool.out_width * pool.channels, one)

    return body, pool


def _for_each_of_parts(rows: int, lengths: list[int], place: Callable) -> None:
    """``place(part, index, row, column)`` for each element of a concatenation, ``index`` counting in its part."""
    start = 0
    for part, length in enumerate(lengths):

        def one(index, part=part, length=length, start=start) -> None:
            place(part, index, T.bind(index // length), T.bind(start + index % length))

        for_each(rows * length, one)
        start += length


def _concat(call, _isa: InstructionSet, operands: Operands, _max_error: float) -> Emitter:
    at, lengths = concat_operands(call, operands)
    rows = math.prod(shape_of(call)[:-1])

    def body(inputs, finish) -> None:
        def place(part: int, index, row, column) -> None:
            finish(load(inputs[at[part]], index, 1), row, column, 1, 1)

        _for_each_of_parts(rows, lengths, place)

    return body, ("concat", rows, lengths, at)


def elementwise_body(epilogue: Epilogue) -> Callable:
    """The kernel of a group without an anchor of its own."""

    def body(_inputs, finish) -> None:
        columns, count = epilogue.columns, math.prod(epilogue.shape)
        for_each(
            count,
            lambda index: finish(None, T.bind(index // columns), T.bind(index % columns), 1, 1),
            together=4 if count >= BUSY else 1,
        )

    return body


def concat_prim_func(parts: list[TensorSpec], axis: int) -> tirx.PrimFunc:
    """``(parts ..., result) -> None``: parts of equal dtype joined along ``axis``."""
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    lengths = [math.prod(part.shape[axis:]) for part in parts]

    def body(*buffers) -> None:
        *sources, target = buffers

        def place(part: int, index, row, column) -> None:
            store(target, row * sum(lengths) + column, load(sources[part], index, 1), 1)

        _for_each_of_parts(math.prod(shape[:axis]), lengths, place)

    return build_prim_func("concat", [*parts, TensorSpec(tuple(shape), parts[0].dtype)], body)


CUDA_ANCHORS: dict[str, Callable[..., Emitter]] = {
    "relax.qfp8.matmul": _matmul,
    "relax.qfp8.conv2d": _conv2d,
    "relax.qfp8.batch_matmul": _batch_matmul,
    "relax.qfp8.take": _take,
    "relax.nn.softmax": emit_rows,
    "relax.nn.log_softmax": emit_rows,
    "relax.nn.layer_norm": emit_rows,
    "relax.nn.rms_norm": emit_rows,
    "relax.nn.group_norm": _group_norm,
    "relax.qfp8.l2_normalize": emit_rows,
    **dict.fromkeys(GLOBAL_POOL, _pool),
    "relax.nn.max_pool2d": _pool,
    "relax.nn.avg_pool2d": _pool,
    "relax.concat": _concat,
}
