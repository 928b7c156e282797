"""Depthwise convolution, NHWC codes in: one vector holds neighbouring channels of one pixel.

On x86 a multiply-add sums two products a lane. The slab therefore holds, for each pixel and channel, the pair
(this pixel, next pixel), and the weights the pair (this tap, next tap); an odd last tap is paired with zero.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.codec import decode_expr
from tvm_qfp8.topi.conv2d import ConvShape
from tvm_qfp8.topi.float_contract import with_lanes
from tvm_qfp8.topi.gemm import MIN_PARALLEL_MACS
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.micro_kernel import RegisterTile
from tvm_qfp8.topi.panels import balanced_blocks, decode_run, overlapped_start, zero_run
from tvm_qfp8.topi.prim_func import load, store
from tvm_qfp8.topi.schedules import DepthwiseSchedule


def is_depthwise(isa: InstructionSet, shape: ConvShape) -> bool:
    """One filter per channel, with at least a vector of channels."""
    plain = shape.input_dilation == (1, 1)
    return plain and shape.groups == shape.channels == shape.out_channels and shape.channels >= isa.lanes


def _channel_starts(isa: InstructionSet, channels: int) -> list[int]:
    """First channel of each vector; the last vector overlaps the one before where the channels do not divide."""
    return [min(start, channels - isa.lanes) for start in range(0, channels, isa.lanes)]


def _taps_per_step(isa: InstructionSet, shape: ConvShape) -> int:
    """Taps that one multiply-add covers: neighbours in the row, so only without dilation."""
    return isa.pair if shape.dilation[1] == 1 else 1


def pack_depthwise_weights(isa: InstructionSet, shape: ConvShape, codes: np.ndarray) -> np.ndarray:
    """Codes OHWI ``(channels, kh, kw, 1)`` -> ``(vectors of channels, kh, steps, lanes, pair)``."""
    kernel_h, kernel_w = shape.kernel
    taps = _taps_per_step(isa, shape)
    steps = -(-kernel_w // taps)
    padded = np.zeros((shape.channels, kernel_h, steps, isa.pair), np.uint8)
    for tap in range(kernel_w):
        padded[:, :, tap // taps, tap % taps] = codes[:, :, tap, 0]
    vectors = [padded[start : start + isa.lanes] for start in _channel_starts(isa, shape.channels)]
    return np.ascontiguousarray(np.stack(vectors).transpose(0, 2, 3, 1, 4))


def emit_depthwise(
    isa: InstructionSet,
    shape: ConvShape,
    x,
    weights,
    epilogue: Callable,
    threads: int,
    schedule: DepthwiseSchedule,
) -> None:
    """Emit the loops; ``epilogue(acc, row, column, valid)`` as in conv2d."""
    kernel_h, kernel_w = shape.kernel
    stride_h, stride_w = shape.stride
    activation, weight_layout = shape.layouts()
    taps = _taps_per_step(isa, shape)
    steps = -(-kernel_w // taps)
    vector = isa.lanes * isa.pair
    slab_row = shape.slab_width * vector
    out_h, out_w = shape.out_height, shape.out_width
    reach = shape.dilation[0] * (kernel_h - 1) + 1
    tile_pixels = schedule.tile_pixels

    parallel = (
        threads > 1
        and shape.batch * out_h * out_w * shape.channels * kernel_h * kernel_w >= MIN_PARALLEL_MACS
    )
    block_h = max(1, min(out_h, (schedule.slab_bytes // (2 * slab_row) - reach) // stride_h + 1))
    if parallel and not schedule.channels_outer:
        block_h = min(block_h, max(1, -(-out_h // (2 * threads))))
    block_h, blocks = balanced_blocks(out_h, block_h)
    slab_h = (block_h - 1) * stride_h + reach
    vectors = len(_channel_starts(isa, shape.channels))
    lanes16 = with_lanes("int16", vector)
    lanes32 = with_lanes("int32", isa.lanes)

    def decode_pixels(source, channel, slab, slab_at) -> None:
        """One row: (this pixel, next pixel) in every lane where taps are paired, else (this pixel, 0)."""
        if isa.pair == 1:
            with T.serial(0, shape.width) as pixel:
                codes = load(x, source + pixel * shape.channels + channel, isa.lanes)
                store(slab, slab_at + pixel * vector, decode_expr(codes, activation, "int16", isa), vector)
            return
        low_half = tirx.const(0xFFFF, lanes32)
        previous = T.alloc_buffer((isa.lanes,), "int32", scope="local")
        store(previous, 0, tirx.const(0, lanes32), isa.lanes)
        with T.serial(0, shape.width) as pixel:
            codes = load(x, source + pixel * shape.channels + channel, isa.lanes)
            grid = decode_expr(codes, activation, "int32", isa)
            if taps == 2:
                paired = (load(previous, 0, isa.lanes) & low_half) | (grid << tirx.const(16, lanes32))
                # The pixel before the first one is padding; without any, the slab has no such place.
                before = slab_at + (pixel - 1) * vector
                store(
                    slab,
                    before if shape.padding[1] else tirx.max(before, slab_at),
                    tirx.reinterpret(lanes16, paired),
                    vector,
                )
                store(previous, 0, grid, isa.lanes)
            else:
                store(slab, slab_at + pixel * vector, tirx.reinterpret(lanes16, grid & low_half), vector)
        if taps == 2:
            last = load(previous, 0, isa.lanes) & low_half
            store(slab, slab_at + (shape.width - 1) * vector, tirx.reinterpret(lanes16, last), vector)

    def decode_slab(image, first_out_row, channel, slab) -> None:
        with T.serial(0, slab_h) as r:
            source_row = T.bind(first_out_row * stride_h + r - shape.padding[0])
            with T.If(tirx.And(source_row >= 0, source_row < shape.height)):
                with T.Then():
                    left = shape.padding[1] * vector
                    zero_run(isa, slab, r * slab_row, left)
                    right = shape.padding[3] * vector
                    zero_run(isa, slab, (r + 1) * slab_row - right, right)
                    source = ((image * shape.height + source_row) * shape.width) * shape.channels
                    decode_pixels(source, channel, slab, r * slab_row + left)
                with T.Else():
                    zero_run(isa, slab, r * slab_row, slab_row)

    def tile(slab, row_in_block, first_pixel, out_row_at, channel, decoded) -> None:
        registers = RegisterTile(isa, tile_pixels, 1)
        for kh in range(kernel_h):
            for step in range(steps):
                weight = T.bind(load(decoded, (kh * steps + step) * vector, vector))
                row = (row_in_block * stride_h + kh * shape.dilation[0]) * slab_row
                for i in range(tile_pixels):
                    pixel = (first_pixel + i) * stride_w + step * taps * shape.dilation[1]
                    registers.accumulate_vector(i, load(slab, row + pixel * vector, vector), weight)
        for i in range(tile_pixels):
            epilogue(registers.value(i, 0), out_row_at + first_pixel + i, channel, isa.lanes)

    def channel_vector(image, first_out_row, index) -> None:
        channel = overlapped_start(index, isa.lanes, shape.channels)
        decoded = T.alloc_buffer((kernel_h * steps * vector,), "int16", align=64)
        length = kernel_h * steps * vector
        decode_run(isa, weight_layout, weights, index * length, decoded, 0, length)
        slab = T.alloc_buffer((slab_h * slab_row,), "int16", align=64)
        decode_slab(image, first_out_row, channel, slab)
        with T.serial(0, block_h) as row:
            out_row_at = T.bind((image * out_h + first_out_row + row) * out_w)
            with T.serial(0, -(-out_w // tile_pixels)) as t:
                tile(slab, row, overlapped_start(t, tile_pixels, out_w), out_row_at, channel, decoded)

    with T.serial(0, shape.batch) as image:
        outer, inner = (vectors, blocks) if schedule.channels_outer else (blocks, vectors)
        with (T.parallel if parallel else T.serial)(0, outer) as i:
            with T.serial(0, inner) as j:
                index, block = (i, j) if schedule.channels_outer else (j, i)
                channel_vector(image, overlapped_start(block, block_h, out_h), index)
