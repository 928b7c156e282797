"""Kernels whose anchor is a linear operator: which one fits, with weights packed for the instruction set."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.calibration.contents import contents
from tvm_qfp8.format import Layout, decode_grid
from tvm_qfp8.relay_passes.fuse import shape_of
from tvm_qfp8.relay_passes.operands import Emitter, Operands, array_of, layout_of
from tvm_qfp8.relay_passes.qfp8_ops import HEADS_INSIDE, logical_shapes, product_scales
from tvm_qfp8.topi.amx.batch_matmul import emit_tile_products, plan_tile_products
from tvm_qfp8.topi.amx.conv2d import emit_tile_conv, plan_tile_conv
from tvm_qfp8.topi.amx.gemm import emit_tile_gemm, plan_tile_gemm
from tvm_qfp8.topi.amx.panels import pack_tile_weights
from tvm_qfp8.topi.batch_matmul import BatchMatmulShape, Product, emit_batch_matmul
from tvm_qfp8.topi.conv2d import ConvShape, emit_conv2d, merged_groups, pack_conv_weights
from tvm_qfp8.topi.depthwise import emit_depthwise, is_depthwise, pack_depthwise_weights
from tvm_qfp8.topi.few_outputs import columns_of_taps, emit_in_columns, in_columns
from tvm_qfp8.topi.few_rows import emit_few_rows, multiplies_magnitudes, pack_few_rows
from tvm_qfp8.topi.float_contract import LANES, add, bind, dtype_of, lanes_of, mul, to_float
from tvm_qfp8.topi.gemm import GemmShape, emit_gemm
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.isa.floats import in_floats
from tvm_qfp8.topi.overflow import INT32_LIMIT
from tvm_qfp8.topi.panels import pack_weights, pad_channels
from tvm_qfp8.topi.prim_func import load
from tvm_qfp8.topi.rows import like_scalar
from tvm_qfp8.topi.schedules import (
    REGISTER_DECODE_ROWS,
    BatchMatmulSchedule,
    ConvSchedule,
    DepthwiseSchedule,
    GemmSchedule,
    ScheduleChooser,
    default_schedule,
)
from tvm_qfp8.topi.static_memory import Filler
from tvm_qfp8.topi.transposed import Phase, phases_of
from tvm_qfp8.topi.winograd import emit_winograd, filter_function
from tvm_qfp8.topi.winograd_plan import (
    WinogradPlan,
    offset_products,
    pack_winograd_weights,
    plan_winograd,
)


def scaled(a, bias, finish: Callable, scales=None, rows_of_scale: int = 1) -> Callable:
    """fl32(acc) -> * a[c] -> * s[row], if rows have scales -> + bias[c], the fixed start of every linear epilogue.

    So many rows in a row share a scale: 1, or the pixels of a sample.
    """

    def epilogue(total, row, column, valid) -> None:
        lanes = lanes_of(total)
        value = to_float(total) if dtype_of(total).startswith("int32") else total
        value = bind(mul(value, load(a, column, lanes)))
        if scales is not None:
            at = row if rows_of_scale == 1 else T.bind(row // rows_of_scale)
            value = bind(mul(value, like_scalar(bind(load(scales, at, 1)), lanes)))
        value = bind(add(value, load(bias, column, lanes)))
        finish(value, row, column, lanes, valid)

    return epilogue


def scaled_by(call, operands: Operands) -> Callable:
    """``scaled`` of a linear call, as ``function(inputs, a, bias, finish)``; its scales become an operand."""
    if len(call.args) <= 4:
        return lambda _inputs, a, bias, finish: scaled(a, bias, finish)
    scales_at = operands.tensor(call.args[4])
    scales, rows = (math.prod(shape) for shape in (shape_of(call.args[4]), shape_of(call)[:-1]))
    return lambda inputs, a, bias, finish: scaled(a, bias, finish, inputs[scales_at], rows // scales)


def _in_floats(isa: InstructionSet, choose: ScheduleChooser) -> tuple[InstructionSet, ScheduleChooser]:
    """For activations that are not quantized; no log has schedules of such layers."""
    return in_floats(isa), default_schedule


def _in_bytes(
    isa: InstructionSet,
    rows: int,
    codes: np.ndarray,
    activation: Layout | None,
    weight: Layout | None,
    dense: bool = True,
) -> InstructionSet:
    """The variant of the instruction set that multiplies int8 parts, where it is faster and no sum overflows.

    With few rows decoding weights takes the time, and a value has more parts than halves; but where weights are stored
    as the bytes to multiply there is nothing to decode.
    """
    if activation is None or weight is None:
        return isa
    variant = isa.in_bytes(activation, weight, dense)
    if variant.split is None or (rows <= REGISTER_DECODE_ROWS and not variant.split.weights_ready):
        return isa
    grid = decode_grid(codes, weight)
    return variant if variant.split.largest_sum(grid, activation) < INT32_LIMIT else isa


def _matmul(call, isa: InstructionSet, threads: int, operands: Operands, choose: ScheduleChooser) -> Emitter:
    x, weight = call.args[:2]
    rows = int(np.prod(shape_of(x)[:-1], dtype=np.int64))
    operands.tensor(x)
    packed, emit, described = dense_kernel(
        isa, rows, array_of(weight), layout_of(x), layout_of(weight), threads, choose
    )
    return _with_scales(call, operands, packed, emit), described


def dense_kernel(
    isa: InstructionSet,
    rows: int,
    weight: np.ndarray,
    activation: Layout | None,
    layout: Layout | None,
    threads: int,
    choose: ScheduleChooser,
) -> tuple[np.ndarray, Callable, object]:
    """Weights ``(columns, depth)`` packed for the kernel that fits, ``emit(x, packed, epilogue)``, its description."""
    columns, depth = weight.shape
    shape = GemmShape(rows, columns, depth, activation, layout)
    if activation is None:
        isa, choose = _in_floats(isa, choose)
    plan = plan_tile_gemm(isa, shape, weight)
    if plan is not None:
        packed = pack_tile_weights(plan, shape.layouts()[1], weight[:, None])
        return packed, functools.partial(emit_tile_gemm, isa, shape, plan, threads=threads), (shape, plan)
    isa = _in_bytes(isa, rows, weight, activation, layout)
    if isa.split is None and multiplies_magnitudes(isa, shape, weight):
        packed = pack_few_rows(isa, shape, weight)
        return packed, functools.partial(emit_few_rows, isa, shape, threads=threads), (shape, "few rows")
    schedule = choose(GemmSchedule, isa, shape, threads)
    packed = pack_weights(isa, layout, weight, schedule.vectors)
    emit = functools.partial(emit_gemm, isa, shape, threads=threads, schedule=schedule)
    return packed, emit, (shape, isa.label)


def conv_shape(call) -> ConvShape:
    """The static description of a ``qfp8.conv2d`` call."""
    x, weight = call.args[:2]
    out_channels, kernel_h, kernel_w, _ = shape_of(weight)
    attrs = call.attrs
    channels_first = bool(attrs["channels_first"])
    batch, height, width, channels = shape_of(x)
    if channels_first:
        batch, channels, height, width = shape_of(x)

    def pair(name: str) -> tuple[int, int]:
        return int(attrs[name][0]), int(attrs[name][1])

    top, left, bottom, right = (int(p) for p in attrs["padding"])
    return ConvShape(
        batch,
        height,
        width,
        channels,
        out_channels,
        kernel=(kernel_h, kernel_w),
        stride=pair("strides"),
        padding=(top, left, bottom, right),
        dilation=pair("dilation"),
        groups=int(attrs["groups"]),
        activation=layout_of(x),
        weight=layout_of(weight),
        input_dilation=pair("input_dilation"),
        channels_first=channels_first,
    )


def _conv2d(call, isa: InstructionSet, threads: int, operands: Operands, choose: ScheduleChooser) -> Emitter:
    shape = conv_shape(call)
    x, weight, a, bias = call.args[:4]
    codes = array_of(weight)
    operands.tensor(x)
    pixels = shape.batch * shape.out_height * shape.out_width
    described: object
    if shape.spreads_pixels and shape.out_channels % LANES == 0:
        packed, emit, described = _spread_pixels(isa, shape, codes, threads, choose)
    elif shape.is_pointwise:
        flat = codes.reshape(shape.out_channels, -1)
        layouts = shape.activation, shape.weight
        packed, emit, described = dense_kernel(isa, pixels, flat, *layouts, threads, choose)
    else:
        if shape.activation is None:
            isa, choose = _in_floats(isa, choose)
        in_bytes = _in_bytes(isa, pixels, codes, shape.activation, shape.weight, dense=False)
        if operands.memory is not None and plan_tile_conv(isa, shape, codes) is None:
            plan = plan_winograd(shape, codes, isa.rate, in_bytes.rate)
            if plan is not None:
                return _winograd(call, plan, isa, threads, operands)
        phases = phases_of(shape)
        if phases:
            packed, emit, described = _in_phases(isa, in_bytes, phases, codes, threads, choose)
        else:
            packed, emit, described = _windowed(isa, in_bytes, shape, codes, threads, choose)
    return _with_scales(call, operands, packed, emit), described


def _with_scales(call, operands: Operands, packed: np.ndarray, emit: Callable) -> Callable:
    """The body of a linear kernel; ``operands`` has its activation already."""
    operands.constant(packed)
    operands.constant(pad_channels(array_of(call.args[2])))
    operands.constant(pad_channels(array_of(call.args[3])))
    epilogue = scaled_by(call, operands)

    def body(inputs, finish) -> None:
        emit(inputs[0], inputs[1], epilogue(inputs, inputs[2], inputs[3], finish))

    return body


def _spread_pixels(
    isa: InstructionSet, shape: ConvShape, codes: np.ndarray, threads: int, choose: ScheduleChooser
) -> tuple[np.ndarray, Callable, tuple]:
    """As ``dense_kernel``, with a column for each channel of a window's pixels; no vector of columns is of two."""
    high, wide = shape.kernel
    # The first output of a window meets the last tap.
    taps = codes[:, ::-1, ::-1].transpose(1, 2, 0, 3).reshape(-1, shape.channels)
    pixels = shape.batch * shape.height * shape.width
    packed, emit_dense, described = dense_kernel(
        isa, pixels, taps, shape.activation, shape.weight, threads, choose
    )

    def emit(x, panels, epilogue: Callable) -> None:
        def place(total, pixel, column, valid) -> None:
            tap, row = T.bind(column // shape.out_channels), T.bind(pixel // shape.width)
            down = T.bind(tap // wide)
            across = (pixel - row * shape.width) * wide + (tap - down * wide)
            target = T.bind((row * high + down) * (shape.width * wide) + across)
            epilogue(total, target, T.bind(column - tap * shape.out_channels), valid)

        emit_dense(x, panels, place)

    return packed, emit, (shape, described)


def _windowed(
    isa: InstructionSet,
    in_bytes: InstructionSet,
    shape: ConvShape,
    codes: np.ndarray,
    threads: int,
    choose: ScheduleChooser,
) -> tuple[np.ndarray, Callable, tuple]:
    """As ``dense_kernel``, for convolutions over windows."""
    tiles = plan_tile_conv(isa, shape, codes)
    if tiles is not None:
        merged, tile_plan, packed = tiles
        emit = functools.partial(emit_tile_conv, isa, merged, tile_plan, threads=threads)
        return packed, emit, (merged, tile_plan)
    if is_depthwise(isa, shape):
        by_channel = choose(DepthwiseSchedule, isa, shape, threads)
        packed = pack_depthwise_weights(isa, shape, codes, by_channel)
        emit = functools.partial(emit_depthwise, isa, shape, threads=threads, schedule=by_channel)
        return packed, emit, (shape, isa.label)
    if shape.groups > 1 and shape.activation is not None:  # zeros meet no infinity
        shape, codes = merged_groups(shape, codes, in_bytes.pair, in_bytes.lanes)
    by_columns = in_columns(in_bytes, shape)
    if by_columns is not None:
        schedule = choose(ConvSchedule, in_bytes, by_columns, threads)
        packed = pack_conv_weights(in_bytes, by_columns, columns_of_taps(codes), schedule)
        emit = functools.partial(
            emit_in_columns, in_bytes, shape, by_columns, threads=threads, schedule=schedule
        )
        return packed, emit, (shape, in_bytes.label, "columns")
    schedule = choose(ConvSchedule, in_bytes, shape, threads)
    packed = pack_conv_weights(in_bytes, shape, codes, schedule)
    emit = functools.partial(emit_conv2d, in_bytes, shape, threads=threads, schedule=schedule)
    return packed, emit, (shape, in_bytes.label)


def _in_phases(
    isa: InstructionSet,
    in_bytes: InstructionSet,
    phases: list[Phase],
    codes: np.ndarray,
    threads: int,
    choose: ScheduleChooser,
) -> tuple[np.ndarray, Callable, tuple]:
    """As ``dense_kernel``, for transposed convolutions."""
    found = [_windowed(isa, in_bytes, phase.shape, phase.codes(codes), threads, choose) for phase in phases]
    flat = [packed.reshape(-1) for packed, _, _ in found]
    starts = np.cumsum([0, *(len(part) for part in flat)])

    def emit(x, panels, epilogue: Callable) -> None:
        for phase, (_, emit_phase, _), part, start in zip(phases, found, flat, starts[:-1], strict=True):
            own = T.decl_buffer((len(part),), str(panels.dtype), data=panels.data, elem_offset=int(start))
            emit_phase(x, own, phase.placed(epilogue))

    return (
        np.concatenate(flat),
        emit,
        tuple((phase, described) for phase, (*_, described) in zip(phases, found, strict=True)),
    )


def _winograd(call, plan: WinogradPlan, isa: InstructionSet, threads: int, operands: Operands) -> Emitter:
    """A 3x3 convolution whose transformed filters stay in memory."""
    memory = operands.memory
    assert memory is not None
    _, weight, a, bias = call.args[:4]
    codes = pack_winograd_weights(isa, plan, array_of(weight))
    corrections = offset_products(isa, plan, array_of(weight))
    # Filters do not depend on the image's size: a module for several shares them.
    key = plan.tiling, plan.parts, plan.vectors(isa), layout_of(weight), contents(codes)
    offset = memory.part(
        key,
        plan.filter_values(isa),
        lambda at: Filler(repr(plan), lambda: filter_function(isa, plan, codes), (codes, at)),
    )
    operands.constant(codes)
    operands.constant(pad_channels(array_of(a)))
    operands.constant(pad_channels(array_of(bias)))
    offset_at = operands.constant(offset)
    corrections_at = operands.constant(corrections) if corrections.size else None
    epilogue = scaled_by(call, operands)

    def body(inputs, finish) -> None:
        x, packed, scale, shift = inputs[:4]
        filters = load(inputs[offset_at], 0, 1)
        taken = None if corrections_at is None else inputs[corrections_at]
        finished = epilogue(inputs, scale, shift, finish)
        emit_winograd(isa, plan, x, packed, taken, filters, finished, threads)

    return body, plan


def product_of(call) -> Product:
    """The static description of a ``qfp8.batch_matmul`` call."""
    x, y = call.args[:2]
    x_shape, y_shape = ([int(extent) for extent in shape] for shape in logical_shapes(call))
    transpose = bool(call.attrs["transpose_y"])
    shape = BatchMatmulShape(
        int(np.prod(x_shape[:-2], dtype=np.int64)),
        x_shape[-2],
        y_shape[-2] if transpose else y_shape[-1],
        x_shape[-1],
        layout_of(x),
        layout_of(y),
        transpose,
    )
    inside = [bool(call.attrs[name]) for name in HEADS_INSIDE]
    return Product(shape, x_shape[1] if any(inside) else 1, *inside)


def _batch_matmul(
    call, isa: InstructionSet, threads: int, operands: Operands, choose: ScheduleChooser
) -> Emitter:
    x, y = call.args[:2]
    product = product_of(call)
    shape = product.shape
    x_at, y_at = operands.tensor(x), operands.tensor(y)
    scale = product_scale(call, product, operands)
    plan = plan_tile_products(isa, shape)
    if plan is not None:
        emit = functools.partial(emit_tile_products, isa, product, plan, threads=threads)
    else:
        variant, chooser = _in_floats(isa, choose) if shape.x is None else (isa, choose)
        schedule = chooser(BatchMatmulSchedule, variant, shape, threads)
        emit = functools.partial(emit_batch_matmul, variant, product, threads=threads, schedule=schedule)

    def body(inputs, finish) -> None:
        def epilogue(total, row, column, valid) -> None:
            finish(scale(inputs, total, row), row, column, isa.lanes, valid)

        emit(inputs[x_at], inputs[y_at], epilogue)

    return body, (product, plan)


def product_scale(call, product: Product, operands: Operands) -> Callable:
    """``(inputs, sums, row of the result) -> values``: what the sums of a product of two activations are multiplied by.

    The scalar, then the scale of x's row or sample, then that of y's sample.
    """
    scalar = operands.scalar(float(call.attrs["scale"]))
    scales = [
        None if found is None else (operands.tensor(found), math.prod(shape_of(found)))
        for found in product_scales(call)
    ]
    rows = product.shape.batch * product.shape.rows

    def scaled_sums(inputs, total, row):
        lanes = lanes_of(total)
        value = bind(mul(total, like_scalar(load(inputs[-1], scalar, 1), lanes)))
        for found in scales:
            if found is not None:
                argument, count = found
                at = product.line_of_result(row) if count == rows else T.bind(row // (rows // count))
                value = bind(mul(value, like_scalar(bind(load(inputs[argument], at, 1)), lanes)))
        return value

    return scaled_sums


LINEAR_ANCHORS: dict[str, Callable] = {
    "relax.qfp8.matmul": _matmul,
    "relax.qfp8.conv2d": _conv2d,
    "relax.qfp8.batch_matmul": _batch_matmul,
}
