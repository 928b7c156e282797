"""Kernels of convolutions: which one fits, with weights packed for the instruction set."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.calibration.contents import contents
from tvm_qfp8.relay_passes.dense_kernels import (
    dense_kernel,
    for_floats,
    in_bytes_if_faster,
    scaled_by,
    with_scales,
)
from tvm_qfp8.relay_passes.fuse import shape_of
from tvm_qfp8.relay_passes.operands import Emitter, Operands, array_of, layout_of
from tvm_qfp8.topi.amx.conv2d import emit_tile_conv, plan_tile_conv, takes_tiles
from tvm_qfp8.topi.conv2d import ConvShape, emit_conv2d, merged_groups, pack_conv_weights
from tvm_qfp8.topi.depthwise import emit_depthwise, is_depthwise, pack_depthwise_weights
from tvm_qfp8.topi.few_outputs import columns_of_taps, emit_in_columns, in_columns
from tvm_qfp8.topi.float_contract import LANES
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import pad_channels
from tvm_qfp8.topi.prim_func import load
from tvm_qfp8.topi.schedules import (
    ConvSchedule,
    DepthwiseSchedule,
    ScheduleChooser,
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
    shape = ConvShape(
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
    return shape.column_as_row() if shape.is_column else shape


def conv_weights(weight, shape: ConvShape) -> np.ndarray:
    """Constant weights, OHWI ``(out_channels, *shape.kernel, channels / groups)``."""
    array = array_of(weight)
    return array.reshape(len(array), *shape.kernel, array.shape[3])


def conv2d_kernel(
    call, isa: InstructionSet, threads: int, operands: Operands, choose: ScheduleChooser
) -> Emitter:
    shape = conv_shape(call)
    x, weight, a, bias = call.args[:4]
    codes = conv_weights(weight, shape)
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
            isa, choose = for_floats(isa, choose)
        in_bytes = in_bytes_if_faster(isa, pixels, codes, shape.activation, shape.weight, dense=False)
        if operands.memory is not None and not takes_tiles(isa, shape):
            plan = plan_winograd(shape, codes, isa.rate, in_bytes.rate)
            if plan is not None:
                return _winograd(call, plan, isa, threads, operands)
        phases = phases_of(shape)
        if phases:
            packed, emit, described = _in_phases(isa, in_bytes, phases, codes, threads, choose)
        else:
            packed, emit, described = _windowed(isa, in_bytes, shape, codes, threads, choose)
    return with_scales(call, operands, packed, emit), described


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
