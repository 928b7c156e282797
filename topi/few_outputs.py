"""Convolutions of few output channels, as the last ones of networks that make images: taps of a row are columns.

Three channels fill three lanes of a vector. The products of a pixel with all taps of a window's row fill many: each is
summed over the window's height and the channels, and an output adds up those of neighbouring pixels. All sums are of
integers, so it is the same number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.conv2d import ConvShape, emit_conv2d
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import round_up
from tvm_qfp8.topi.prim_func import load, store
from tvm_qfp8.topi.schedules import ConvSchedule

LEAST_SAVED = 1.5
"""So many times fewer multiply-adds pay for keeping the sums and adding them up."""

OVERHEAD = 2
"""Instructions for each sum that is kept or added."""


def in_columns(isa: InstructionSet, shape: ConvShape) -> ConvShape | None:
    """A convolution by windows of one column, with an output for each tap of a row; None where it saves little."""
    plain = shape.groups == 1 and shape.stride[1] == 1 and shape.input_dilation == (1, 1)
    if not plain or shape.channels_first or shape.activation is None or shape.kernel[1] == 1:
        return None
    kernel_h, kernel_w = shape.kernel
    steps = kernel_h * -(-shape.channels // isa.pair) * isa.products

    def vectors(columns: int) -> int:
        return -(-columns // isa.lanes)

    columns = kernel_w * shape.out_channels
    wider = shape.slab_width / shape.out_width
    ours = wider * vectors(columns) * (steps + OVERHEAD) + OVERHEAD * kernel_w * vectors(shape.out_channels)
    if ours * LEAST_SAVED > kernel_w * steps * vectors(shape.out_channels):
        return None
    dilation = shape.dilation[0], 1
    return replace(shape, kernel=(kernel_h, 1), out_channels=columns, dilation=dilation)


def columns_of_taps(codes: np.ndarray) -> np.ndarray:
    """Weights OHWI as those of ``in_columns``: ``(kernel_w * out_channels, kernel_h, 1, channels)``."""
    taps = codes.transpose(2, 0, 1, 3)
    return taps.reshape(-1, codes.shape[1], 1, codes.shape[3])


def emit_in_columns(
    isa: InstructionSet,
    shape: ConvShape,
    by_columns: ConvShape,
    x,
    panels,
    epilogue: Callable,
    threads: int,
    schedule: ConvSchedule,
) -> None:
    """Emit the loops; ``epilogue(acc, row, column, valid)`` with ``row`` the flattened output pixel."""
    lanes, outputs, (kernel_w, step) = isa.lanes, shape.out_channels, (shape.kernel[1], shape.dilation[1])
    width = by_columns.out_width
    stride = round_up(by_columns.out_channels, lanes)

    def of_block(first_pixel, rows: int) -> tuple[Callable, Callable]:
        sums = T.alloc_buffer((rows * width * stride + lanes,), "int32", align=64)

        def keep(total, pixel, column, _valid) -> None:
            store(sums, (pixel - first_pixel) * stride + column, total, lanes)

        def add_up() -> None:
            first_row = T.bind(first_pixel // width)
            with T.serial(0, rows) as row:
                with T.serial(0, shape.out_width) as across:
                    start = T.bind((row * width + across) * stride)
                    target = T.bind((first_row + row) * shape.out_width + across)
                    for column in range(0, outputs, lanes):
                        total = None
                        for tap in range(kernel_w):
                            at = start + (tap * step) * stride + tap * outputs + column
                            part = load(sums, at, lanes)
                            total = T.bind(part if total is None else total + part)
                        epilogue(total, target, column, min(lanes, outputs - column))

        return keep, add_up

    emit_conv2d(isa, by_columns, x, panels, epilogue, threads, schedule, of_block)
