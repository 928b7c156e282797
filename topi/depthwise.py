"""Depthwise convolution, NHWC codes in: vectors hold neighbouring channels of one pixel.

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
from tvm_qfp8.topi.float_contract import lanes_of, with_lanes
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


def _taps_per_step(isa: InstructionSet, shape: ConvShape) -> int:
    """Taps that one multiply-add covers: neighbours in the row, so only without dilation."""
    return isa.pair if shape.dilation[1] == 1 else 1


def pack_depthwise_weights(
    isa: InstructionSet, shape: ConvShape, codes: np.ndarray, schedule: DepthwiseSchedule
) -> np.ndarray:
    """Codes OHWI ``(channels, kh, kw, 1)`` -> ``(blocks of channels, kh, steps, channels, pair)``.

    The last block overlaps the one before where the channels do not divide.
    """
    kernel_h, kernel_w = shape.kernel
    taps = _taps_per_step(isa, shape)
    steps = -(-kernel_w // taps)
    padded = np.zeros((shape.channels, kernel_h, steps, isa.pair), np.uint8)
    for tap in range(kernel_w):
        padded[:, :, tap // taps, tap % taps] = codes[:, :, tap, 0]
    block = schedule.vectors * isa.lanes
    starts = [min(start, shape.channels - block) for start in range(0, shape.channels, block)]
    blocks = [padded[start : start + block] for start in starts]
    return np.ascontiguousarray(np.stack(blocks).transpose(0, 2, 3, 1, 4))


def _interleave(a, b):
    """a0, b0, a1, b1 ..."""
    lanes = lanes_of(a)
    order = [place for lane in range(lanes) for place in (lane, lanes + lane)]
    return tirx.Shuffle([a, b], [tirx.const(place, "int32") for place in order])


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
    vectors = schedule.vectors
    block_channels = vectors * isa.lanes
    vector = isa.lanes * isa.pair
    pixel_values = vectors * vector
    channel_blocks = -(-shape.channels // block_channels)
    slab_row = shape.slab_width * pixel_values
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
    lanes16 = with_lanes("int16", block_channels)

    def decode_pixels(source, channel, slab, slab_at) -> None:
        """One row: (this pixel, next pixel) in every lane where taps are paired, else (this pixel, 0)."""

        def grid(pixel):
            codes = load(x, source + pixel * shape.channels + channel, block_channels)
            return decode_expr(codes, activation, "int16", isa)

        if isa.pair == 1:
            with T.serial(0, shape.width) as pixel:
                store(slab, slab_at + pixel * pixel_values, grid(pixel), pixel_values)
            return
        zero = tirx.const(0, lanes16)
        if taps == 1:
            with T.serial(0, shape.width) as pixel:
                store(slab, slab_at + pixel * pixel_values, _interleave(grid(pixel), zero), pixel_values)
            return
        previous = T.alloc_buffer((block_channels,), "int16", scope="local")
        store(previous, 0, zero, block_channels)
        with T.serial(0, shape.width) as pixel:
            current = T.bind(grid(pixel))
            pairs = _interleave(load(previous, 0, block_channels), current)
            # The pixel before the first one is padding; without any, the slab has no such place.
            before = slab_at + (pixel - 1) * pixel_values
            store(slab, before if shape.padding[1] else tirx.max(before, slab_at), pairs, pixel_values)
            store(previous, 0, current, block_channels)
        last = _interleave(load(previous, 0, block_channels), zero)
        store(slab, slab_at + (shape.width - 1) * pixel_values, last, pixel_values)

    def decode_slab(image, first_out_row, channel, slab) -> None:
        with T.serial(0, slab_h) as r:
            source_row = T.bind(first_out_row * stride_h + r - shape.padding[0])
            with T.If(tirx.And(source_row >= 0, source_row < shape.height)):
                with T.Then():
                    left = shape.padding[1] * pixel_values
                    zero_run(isa, slab, r * slab_row, left)
                    right = shape.padding[3] * pixel_values
                    zero_run(isa, slab, (r + 1) * slab_row - right, right)
                    source = ((image * shape.height + source_row) * shape.width) * shape.channels
                    decode_pixels(source, channel, slab, r * slab_row + left)
                with T.Else():
                    zero_run(isa, slab, r * slab_row, slab_row)

    def tile(slab, row_in_block, first_pixel, out_row_at, channel, decoded) -> None:
        registers = RegisterTile(isa, tile_pixels * vectors, 1)
        for kh in range(kernel_h):
            for step in range(steps):
                tap = (kh * steps + step) * pixel_values
                weight = [T.bind(load(decoded, tap + j * vector, vector)) for j in range(vectors)]
                row = (row_in_block * stride_h + kh * shape.dilation[0]) * slab_row
                for i in range(tile_pixels):
                    pixel = (first_pixel + i) * stride_w + step * taps * shape.dilation[1]
                    for j in range(vectors):
                        values = load(slab, row + pixel * pixel_values + j * vector, vector)
                        registers.accumulate_vector(i * vectors + j, values, weight[j])
        for i in range(tile_pixels):
            for j in range(vectors):
                total = registers.value(i * vectors + j, 0)
                epilogue(total, out_row_at + first_pixel + i, channel + j * isa.lanes, isa.lanes)

    def channel_block(image, first_out_row, index) -> None:
        channel = overlapped_start(index, block_channels, shape.channels)
        length = kernel_h * steps * pixel_values
        decoded = T.alloc_buffer((length,), "int16", align=64)
        decode_run(isa, weight_layout, weights, index * length, decoded, 0, length)
        slab = T.alloc_buffer((slab_h * slab_row,), "int16", align=64)
        decode_slab(image, first_out_row, channel, slab)
        with T.serial(0, block_h) as row:
            out_row_at = T.bind((image * out_h + first_out_row + row) * out_w)
            with T.serial(0, -(-out_w // tile_pixels)) as t:
                tile(slab, row, overlapped_start(t, tile_pixels, out_w), out_row_at, channel, decoded)

    with T.serial(0, shape.batch) as image:
        outer, inner = (channel_blocks, blocks) if schedule.channels_outer else (blocks, channel_blocks)
        with (T.parallel if parallel else T.serial)(0, outer) as i:
            with T.serial(0, inner) as j:
                index, block = (i, j) if schedule.channels_outer else (j, i)
                channel_block(image, overlapped_start(block, block_h, out_h), index)
