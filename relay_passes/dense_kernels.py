"""Kernels of dense layers, and what all linear kernels share: scales, and the instructions that fit a layer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.format import Layout, decode_grid
from tvm_qfp8.relay_passes.fuse import shape_of
from tvm_qfp8.relay_passes.operands import Emitter, Operands, array_of, layout_of
from tvm_qfp8.topi.amx.gemm import emit_tile_gemm, plan_tile_gemm
from tvm_qfp8.topi.amx.panels import pack_tile_weights
from tvm_qfp8.topi.few_rows import emit_few_rows, multiplies_magnitudes, pack_few_rows
from tvm_qfp8.topi.float_contract import add, bind, dtype_of, lanes_of, mul, to_float
from tvm_qfp8.topi.gemm import GemmShape, emit_gemm
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.isa.floats import in_floats
from tvm_qfp8.topi.overflow import INT32_LIMIT
from tvm_qfp8.topi.panels import pack_weights, pad_channels
from tvm_qfp8.topi.prim_func import load
from tvm_qfp8.topi.rows import like_scalar
from tvm_qfp8.topi.schedules import (
    REGISTER_DECODE_ROWS,
    GemmSchedule,
    ScheduleChooser,
    default_schedule,
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


def with_scales(call, operands: Operands, packed: np.ndarray, emit: Callable) -> Callable:
    """The body of a linear kernel; ``operands`` has its activation already."""
    operands.constant(packed)
    operands.constant(pad_channels(array_of(call.args[2])))
    operands.constant(pad_channels(array_of(call.args[3])))
    epilogue = scaled_by(call, operands)

    def body(inputs, finish) -> None:
        emit(inputs[0], inputs[1], epilogue(inputs, inputs[2], inputs[3], finish))

    return body


def for_floats(isa: InstructionSet, choose: ScheduleChooser) -> tuple[InstructionSet, ScheduleChooser]:
    """For activations that are not quantized; no log has schedules of such layers."""
    return in_floats(isa), default_schedule


def in_bytes_if_faster(
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


def matmul_kernel(
    call, isa: InstructionSet, threads: int, operands: Operands, choose: ScheduleChooser
) -> Emitter:
    x, weight = call.args[:2]
    rows = int(np.prod(shape_of(x)[:-1], dtype=np.int64))
    operands.tensor(x)
    packed, emit, described = dense_kernel(
        isa, rows, array_of(weight), layout_of(x), layout_of(weight), threads, choose
    )
    return with_scales(call, operands, packed, emit), described


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
        isa, choose = for_floats(isa, choose)
    plan = plan_tile_gemm(isa, shape, weight)
    if plan is not None:
        packed = pack_tile_weights(plan, shape.layouts()[1], weight[:, None])
        return packed, functools.partial(emit_tile_gemm, isa, shape, plan, threads=threads), (shape, plan)
    isa = in_bytes_if_faster(isa, rows, weight, activation, layout)
    if isa.split is None and multiplies_magnitudes(isa, shape, weight):
        packed = pack_few_rows(isa, shape, weight)
        return packed, functools.partial(emit_few_rows, isa, shape, threads=threads), (shape, "few rows")
    schedule = choose(GemmSchedule, isa, shape, threads)
    packed = pack_weights(isa, layout, weight, schedule.vectors)
    emit = functools.partial(emit_gemm, isa, shape, threads=threads, schedule=schedule)
    return packed, emit, (shape, isa.label)
