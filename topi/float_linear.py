"""Linear layers whose activations stay float32: weights-only quantization, and layers left out by choice.

Slower than the integer kernels, but just as reproducible: reduction element i, counted over taps and channels
padded to a multiple of 16, is added in accumulator i mod 16, and the 16 accumulators in the tree 8-4-2-1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.format import Layout
from tvm_qfp8.topi.codec import decode_expr
from tvm_qfp8.topi.conv2d import ConvShape
from tvm_qfp8.topi.float_contract import LANES, add, bind, mul, to_float, tree_sum, with_lanes
from tvm_qfp8.topi.gemm import MIN_PARALLEL_MACS
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import balanced_blocks, overlapped_start, pack_panels, round_up
from tvm_qfp8.topi.prim_func import load, store, vector_runs
from tvm_qfp8.topi.schedules import SCRATCH_BYTES


class LaneAccumulators:
    """16 float32 vectors: one output vector's accumulators."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self._buffer = T.alloc_buffer((LANES * lanes,), "float32", scope="local", align=64)
        zero = tirx.const(0.0, with_lanes("float32", lanes))
        for lane in range(LANES):
            store(self._buffer, lane * lanes, zero, lanes)

    def add_products(self, x, x_at, weights, weights_at) -> None:
        """16 reduction elements: ``x[x_at + l] * weights[weights_at + l * lanes :]`` in accumulator l."""
        for lane in range(LANES):
            factor = tirx.Broadcast(load(x, x_at + lane, 1), self.lanes)
            self.add(lane, mul(factor, load(weights, weights_at + lane * self.lanes, self.lanes)))

    def add(self, lane: int, value) -> None:
        """Add one vector in accumulator ``lane``."""
        at = lane * self.lanes
        store(self._buffer, at, add(load(self._buffer, at, self.lanes), value), self.lanes)

    def total(self):
        """The sum of all accumulators."""
        return tree_sum([bind(load(self._buffer, lane * self.lanes, self.lanes)) for lane in range(LANES)])


@dataclass(frozen=True)
class FloatConvShape:
    """A convolution with float32 activations; ``weight`` is None for float32 weights. A dense layer is a 1x1
    convolution over one row of pixels."""

    conv: ConvShape
    weight: Layout | None

    @property
    def depthwise(self) -> bool:
        plain = self.conv.input_dilation == (1, 1)
        return plain and self.conv.groups == self.conv.channels == self.conv.out_channels

    @property
    def slab_channels(self) -> int:
        return round_up(self.conv.channels // self.conv.groups, LANES)


def pack_float_weights(isa: InstructionSet, shape: FloatConvShape, weight: np.ndarray) -> np.ndarray:
    """OHWI codes or float32 -> ``(groups, panels, depth, lanes)``; depthwise -> ``(kh * kw, channels)``."""
    conv = shape.conv
    if shape.depthwise:
        taps = np.ascontiguousarray(weight.reshape(conv.channels, -1).T)
        return np.pad(taps, ((0, 0), (0, round_up(conv.channels, isa.lanes) - conv.channels)))
    padding = shape.slab_channels - weight.shape[3]
    padded = np.pad(weight, ((0, 0), (0, 0), (0, 0), (0, padding)))
    groups = padded.reshape(conv.groups, conv.out_channels // conv.groups, -1)
    as_bytes = [pack_panels(group, isa.lanes, 1) for group in groups]
    return np.stack(as_bytes)[..., 0]


def _weight_vector(shape: FloatConvShape, weights, at, lanes: int):
    value = load(weights, at, lanes)
    return bind(to_float(decode_expr(value, shape.weight, "int32")) if shape.weight else value)


def emit_float_conv2d(
    isa: InstructionSet, shape: FloatConvShape, x, weights, epilogue: Callable, threads: int
) -> None:
    """Emit the loops; ``epilogue(sum float32xL, row, column, valid)``."""
    if shape.depthwise:
        _emit_depthwise(isa, shape, x, weights, epilogue)
        return
    conv, lanes = shape.conv, isa.lanes
    kernel_h, kernel_w = conv.kernel
    channels, out_channels = conv.channels // conv.groups, conv.out_channels // conv.groups
    padded = shape.slab_channels
    slab_row = conv.slab_width * padded
    depth = kernel_h * kernel_w * padded
    out_h, out_w = conv.out_height, conv.out_width
    reach = conv.dilation[0] * (kernel_h - 1) + 1
    block_h = max(1, min(out_h, (SCRATCH_BYTES // (4 * slab_row) - reach) // conv.stride[0] + 1))
    block_h, blocks = balanced_blocks(out_h, block_h)
    slab_h = (block_h - 1) * conv.stride[0] + reach
    panel_count = -(-out_channels // lanes)
    parallel = threads > 1 and conv.batch * out_h * out_w * conv.out_channels * depth >= MIN_PARALLEL_MACS

    def zero(target, at, length: int) -> None:
        if length:
            vector_runs(
                length,
                lanes,
                lambda o, n: store(target, at + o, tirx.const(0.0, with_lanes("float32", n)), n),
            )

    def fill_slab(image, first_out_row, group, slab) -> None:
        with T.serial(0, slab_h) as r:
            slab_at = T.bind(first_out_row * conv.stride[0] + r - conv.padding[0])
            source_row = tirx.floordiv(slab_at, conv.input_dilation[0])
            between = tirx.floormod(slab_at, conv.input_dilation[0])
            zero(slab, r * slab_row, slab_row)
            with T.If(tirx.And(tirx.And(slab_at >= 0, source_row < conv.height), between == 0)):
                with T.Then():
                    source = (
                        (image * conv.height + source_row) * conv.width
                    ) * conv.channels + group * channels
                    with T.serial(0, conv.width) as pixel:
                        at = r * slab_row + (pixel * conv.input_dilation[1] + conv.padding[1]) * padded
                        vector_runs(
                            channels,
                            lanes,
                            lambda o, n: store(
                                slab, at + o, load(x, source + pixel * conv.channels + o, n), n
                            ),
                        )

    def panel(image, first_out_row, group, slab, index) -> None:
        decoded = T.alloc_buffer((depth * lanes,), "float32", align=64)
        start = (group * panel_count + index) * depth * lanes
        with T.serial(0, depth) as k:
            store(decoded, k * lanes, _weight_vector(shape, weights, start + k * lanes, lanes), lanes)
        column = group * out_channels + overlapped_start(index, lanes, out_channels)

        def pixels(valid: int) -> None:
            with T.serial(0, block_h) as row:
                with T.serial(0, out_w) as pixel:
                    sums = LaneAccumulators(lanes)
                    with T.serial(0, kernel_h) as kh:
                        with T.serial(0, kernel_w) as kw:
                            with T.serial(0, padded // LANES) as c:
                                y = row * conv.stride[0] + kh * conv.dilation[0]
                                x_at = pixel * conv.stride[1] + kw * conv.dilation[1]
                                step = ((kh * kernel_w + kw) * padded + c * LANES) * lanes
                                sums.add_products(
                                    slab, y * slab_row + x_at * padded + c * LANES, decoded, step
                                )
                    out = (image * out_h + first_out_row + row) * out_w + pixel
                    epilogue(sums.total(), out, column, valid)

        pixels(min(lanes, out_channels))

    with T.serial(0, conv.batch) as image:
        with T.serial(0, conv.groups) as group:
            with T.serial(0, blocks) as block:
                first_out_row = overlapped_start(block, block_h, out_h)
                slab = T.alloc_buffer((slab_h * slab_row,), "float32", align=64)
                fill_slab(image, first_out_row, group, slab)
                with (T.parallel if parallel and panel_count > 1 else T.serial)(0, panel_count) as index:
                    panel(image, first_out_row, group, slab, index)


def _emit_depthwise(isa: InstructionSet, shape: FloatConvShape, x, weights, epilogue: Callable) -> None:
    """Tap t of a pixel in accumulator t mod 16; vectors along the channels."""
    conv = shape.conv
    stored = round_up(conv.channels, isa.lanes)

    def vector(image, oy, ox, channel, lanes: int) -> None:
        sums = LaneAccumulators(lanes)
        for kh in range(conv.kernel[0]):
            for kw in range(conv.kernel[1]):
                tap = kh * conv.kernel[1] + kw
                y = oy * conv.stride[0] + kh * conv.dilation[0] - conv.padding[0]
                x_at = ox * conv.stride[1] + kw * conv.dilation[1] - conv.padding[1]
                inside = tirx.And(tirx.And(y >= 0, y < conv.height), tirx.And(x_at >= 0, x_at < conv.width))
                with T.If(inside):
                    with T.Then():
                        at = ((image * conv.height + y) * conv.width + x_at) * conv.channels + channel
                        weight = _weight_vector(shape, weights, tap * stored + channel, lanes)
                        sums.add(tap % LANES, mul(load(x, at, lanes), weight))
        row = (image * conv.out_height + oy) * conv.out_width + ox
        epilogue(sums.total(), row, channel, lanes)

    with T.serial(0, conv.batch) as image:
        with T.serial(0, conv.out_height) as oy:
            with T.serial(0, conv.out_width) as ox:
                vector_runs(
                    conv.channels, isa.lanes, lambda channel, lanes: vector(image, oy, ox, channel, lanes)
                )
