"""Convolutions that tensor cores do not fit: depthwise and grouped ones, few channels, transposed ones, float32.

One thread makes one value. Threads side by side have channels side by side, so their loads fall together.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.codec import decode_expr
from tvm_qfp8.topi.conv2d import ConvShape
from tvm_qfp8.topi.cuda.float_sum import FloatSum
from tvm_qfp8.topi.cuda.launch import for_each
from tvm_qfp8.topi.float_contract import bind, to_float
from tvm_qfp8.topi.prim_func import load, load_float, store


def pack_direct_weights(weight: np.ndarray) -> np.ndarray:
    """OHWI codes or float32 ``(out_channels, kh, kw, channels / groups)`` -> ``(kh * kw * channels / groups, out)``."""
    return np.ascontiguousarray(weight.reshape(len(weight), -1).T)


def _for_each_tap(shape: ConvShape, row, body: Callable) -> None:
    """``body(pixel, tap)`` for the input pixels under the filter of output pixel ``row``, those outside left out."""
    out_w, pixels = shape.out_width, shape.out_height * shape.out_width
    image = T.bind(row // pixels)
    top = T.bind(row % pixels // out_w * shape.stride[0] - shape.padding[0])
    side = T.bind(row % out_w * shape.stride[1] - shape.padding[1])

    def tap(kh, kw) -> None:
        y = T.bind(top + kh * shape.dilation[0])
        x = T.bind(side + kw * shape.dilation[1])
        inside = tirx.And(y >= 0, x >= 0)
        for position, step, extent in (
            (y, shape.input_dilation[0], shape.height),
            (x, shape.input_dilation[1], shape.width),
        ):
            inside = tirx.And(inside, tirx.And(position < extent * step, tirx.floormod(position, step) == 0))
        with T.If(inside):
            with T.Then():
                pixel = (image, y // shape.input_dilation[0], x // shape.input_dilation[1])
                body(pixel, kh * shape.kernel[1] + kw)

    with T.serial(0, shape.kernel[0]) as kh:
        with T.serial(0, shape.kernel[1]) as kw:
            tap(kh, kw)


def _address(shape: ConvShape, pixel: tuple, channel):
    image, y, x = pixel
    if shape.channels_first:
        return ((image * shape.channels + channel) * shape.height + y) * shape.width + x
    return ((image * shape.height + y) * shape.width + x) * shape.channels + channel


def emit_direct_conv(shape: ConvShape, x, weights, epilogue: Callable) -> None:
    """Exact int32 sums of codes; ``epilogue(sum, row, column, valid)``."""
    activation, weight = shape.layouts()
    channels, outputs = shape.channels // shape.groups, shape.out_channels // shape.groups

    def one(index) -> None:
        row, column = T.bind(index // shape.out_channels), T.bind(index % shape.out_channels)
        first = T.bind(column // outputs * channels)
        total = T.alloc_buffer((1,), "int32", scope="local")
        store(total, 0, tirx.const(0, "int32"), 1)

        def add_tap(pixel, tap) -> None:
            with T.serial(0, channels) as channel:
                left = decode_expr(load(x, _address(shape, pixel, first + channel), 1), activation, "int32")
                at = (tap * channels + channel) * shape.out_channels + column
                right = decode_expr(load(weights, at, 1), weight, "int32")
                store(total, 0, load(total, 0, 1) + left * right, 1)

        _for_each_tap(shape, row, add_tap)
        epilogue(T.bind(load(total, 0, 1)), row, column, 1)

    for_each(shape.batch * shape.out_height * shape.out_width * shape.out_channels, one)


def emit_float_conv(shape: ConvShape, x, weights, epilogue: Callable) -> None:
    """float32 activations; ``epilogue(sum, row, column, valid)``."""
    channels, outputs = shape.channels // shape.groups, shape.out_channels // shape.groups

    def factor(at):
        value = load(weights, at, 1)
        return bind(to_float(decode_expr(value, shape.weight, "int32")) if shape.weight else value)

    def one(index) -> None:
        row, column = T.bind(index // shape.out_channels), T.bind(index % shape.out_channels)
        first = T.bind(column // outputs * channels)
        total = FloatSum()

        def add_tap(pixel, tap) -> None:
            with T.serial(0, channels) as channel:
                at = (tap * channels + channel) * shape.out_channels + column
                total.add_product(load_float(x, _address(shape, pixel, first + channel), 1), factor(at))

        _for_each_tap(shape, row, add_tap)
        epilogue(total.value(), row, column, 1)

    for_each(shape.batch * shape.out_height * shape.out_width * shape.out_channels, one)
