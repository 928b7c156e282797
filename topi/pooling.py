"""Pooling of NHWC float32 tensors: one vector holds neighbouring channels of one pixel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.float_contract import LANES, add, bind, mul, tree_sum, with_lanes
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.prim_func import load, load_float, store, vector_runs
from tvm_qfp8.topi.rows import MIN_PARALLEL_ELEMENTS


@dataclass(frozen=True)
class PoolShape:
    """A 2-D pooling of ``(batch, height, width, channels)``; padding is top, left, bottom, right."""

    batch: int
    height: int
    width: int
    channels: int
    window: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    kind: str
    """``max`` or ``mean``."""
    count_include_pad: bool

    @property
    def out_height(self) -> int:
        return (self.height + self.padding[0] + self.padding[2] - self.window[0]) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        return (self.width + self.padding[1] + self.padding[3] - self.window[1]) // self.stride[1] + 1


def pooled(shape: PoolShape, x) -> Callable:
    """``pixel(image, oy, ox, channel, lanes)``: one vector of the output; a mean adds its window in 16 lanes."""
    window_h, window_w = shape.window
    out_h, out_w = shape.out_height, shape.out_width
    reciprocals = np.zeros(shape.out_height * shape.out_width, np.float32)
    for oy in range(out_h):
        for ox in range(out_w):
            top, left = oy * shape.stride[0] - shape.padding[0], ox * shape.stride[1] - shape.padding[1]
            rows = min(top + window_h, shape.height) - max(top, 0)
            columns = min(left + window_w, shape.width) - max(left, 0)
            count = window_h * window_w if shape.count_include_pad else rows * columns
            reciprocals[oy * out_w + ox] = np.float32(1.0) / np.float32(max(count, 1))
    uniform = len(set(reciprocals.tolist())) == 1
    neutral = float("-inf") if shape.kind == "max" else 0.0
    size = shape.batch * shape.height * shape.width * shape.channels

    def tap(image, oy, ox, kh: int, kw: int, channel, lanes: int):
        y, x_at = oy * shape.stride[0] + kh - shape.padding[0], ox * shape.stride[1] + kw - shape.padding[1]
        index = ((image * shape.height + y) * shape.width + x_at) * shape.channels + channel
        padded = any(shape.padding)
        value = load_float(x, tirx.max(tirx.min(index, size - lanes), 0) if padded else index, lanes)
        if not padded:
            return bind(value)
        inside = tirx.And(tirx.And(y >= 0, y < shape.height), tirx.And(x_at >= 0, x_at < shape.width))
        mask = tirx.Broadcast(inside, lanes) if lanes > 1 else inside
        return bind(tirx.Select(mask, value, tirx.const(neutral, with_lanes("float32", lanes))))

    def pixel(image, oy, ox, channel, lanes: int):
        taps = [(kh, kw) for kh in range(window_h) for kw in range(window_w)]
        lane_values: list = []
        for index, (kh, kw) in enumerate(taps):
            value = tap(image, oy, ox, kh, kw, channel, lanes)
            if shape.kind == "max":
                lane_values = [bind(tirx.max(lane_values[0], value))] if lane_values else [value]
            elif index < LANES:
                lane_values.append(value)
            else:
                lane_values[index % LANES] = bind(add(lane_values[index % LANES], value))
        if shape.kind == "max":
            return lane_values[0]
        zero = tirx.const(0.0, with_lanes("float32", lanes))
        total = tree_sum(lane_values + [zero] * (LANES - len(lane_values)))
        if uniform:
            factor = tirx.const(float(reciprocals[0]), "float32")
        else:
            rows = _overlap(oy, shape.stride[0], shape.padding[0], window_h, shape.height)
            columns = _overlap(ox, shape.stride[1], shape.padding[1], window_w, shape.width)
            factor = tirx.const(1.0, "float32") / (rows * columns).astype("float32")
        factor = T.bind(factor)
        return bind(mul(total, tirx.Broadcast(factor, lanes) if lanes > 1 else factor))

    return pixel


def emit_pool(isa: InstructionSet, shape: PoolShape, x, finish: Callable, threads: int) -> None:
    """``finish(value, row, channel, lanes)`` for every output vector."""
    pixel = pooled(shape, x)
    out_h, out_w = shape.out_height, shape.out_width
    size = shape.batch * shape.height * shape.width * shape.channels
    parallel = threads > 1 and size >= MIN_PARALLEL_ELEMENTS
    with (T.parallel if parallel else T.serial)(0, shape.batch * out_h) as row:
        image, oy = tirx.floordiv(row, out_h), tirx.floormod(row, out_h)
        with T.serial(0, out_w) as ox:
            vector_runs(
                shape.channels,
                isa.lanes,
                lambda channel, lanes: finish(
                    pixel(image, oy, ox, channel, lanes), row * out_w + ox, channel, lanes
                ),
            )


def _overlap(position, stride: int, padding: int, window: int, extent: int):
    start = position * stride - padding
    return tirx.min(start + window, extent) - tirx.max(start, 0)


def whole_image(shape: tuple[int, ...], kind: str, x) -> Callable:
    """``pooled(image, channel, lanes)`` over height and width; pixel i meets others in lane i mod 16 of its channel."""
    _, height, width, channels = shape
    pixels, is_max = height * width, kind == "max"

    def join(a, b):
        return bind(tirx.max(a, b)) if is_max else add(a, b)

    def one(image, channel, lanes: int):
        vector = with_lanes("float32", lanes)
        partial = T.alloc_buffer((LANES * lanes,), "float32", scope="local", align=64)
        for lane in range(LANES):
            store(partial, lane * lanes, tirx.const(float("-inf") if is_max else 0.0, vector), lanes)

        def accumulate(index, lane: int) -> None:
            value = load_float(x, (image * pixels + index) * channels + channel, lanes)
            store(partial, lane * lanes, join(load(partial, lane * lanes, lanes), value), lanes)

        if pixels >= LANES:
            with T.serial(0, pixels // LANES) as block:
                for lane in range(LANES):
                    accumulate(block * LANES + lane, lane)
        for lane in range(pixels % LANES):
            accumulate(pixels // LANES * LANES + lane, lane)
        values = [bind(load(partial, lane * lanes, lanes)) for lane in range(LANES)]
        if is_max:
            return functools.reduce(join, values)
        return bind(mul(tree_sum(values), tirx.const(float(np.float32(1.0) / np.float32(pixels)), vector)))

    return one


def emit_global_pool(isa: InstructionSet, shape: tuple[int, ...], kind: str, x, finish: Callable) -> None:
    """``finish(value, image, channel, lanes)`` for every vector of channels; ``kind`` is ``max`` or ``mean``."""
    pixels = whole_image(shape, kind, x)
    with T.serial(0, shape[0]) as image:
        vector_runs(
            shape[3],
            isa.lanes,
            lambda channel, lanes: finish(pixels(image, channel, lanes), image, channel, lanes),
        )
