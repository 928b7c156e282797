"""Depthwise convolution, NHWC codes in: vectors hold neighbouring channels of one pixel.

On x86 a multiply-add sums two products a lane. The slab therefore holds, for each channel, pairs of neighbouring
pixels, and the weights pairs of neighbouring taps. A pixel is in one pair only: for outputs that start at the second
pixel of a pair the taps are paired from one place further, behind a zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.conv2d import ConvShape
from tvm_qfp8.topi.float_contract import bind, dtype_of, lanes_of, with_lanes
from tvm_qfp8.topi.gemm import MIN_PARALLEL_MACS
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.micro_kernel import RegisterTile
from tvm_qfp8.topi.panels import decode_run, operand_expr, overlapped_start, zero_run
from tvm_qfp8.topi.prim_func import load, load_float, store
from tvm_qfp8.topi.schedules import DepthwiseSchedule
from tvm_qfp8.topi.sharing import rows_of_block, shared_blocks


def is_depthwise(isa: InstructionSet, shape: ConvShape) -> bool:
    """One filter per channel."""
    plain = shape.input_dilation == (1, 1)
    return plain and shape.groups == shape.channels == shape.out_channels and shape.channels > 1


def _taps_per_step(isa: InstructionSet, shape: ConvShape) -> int:
    """Taps that one multiply-add covers: neighbours in the row, so only without dilation."""
    return isa.pair if shape.dilation[1] == 1 else 1


def _phases(taps: int, shape: ConvShape) -> int:
    """Places in a pair of pixels at which an output may start."""
    return taps if shape.stride[1] % taps else 1


def _steps(taps: int, shape: ConvShape) -> list[int]:
    """Multiply-adds for one row of the filter, by phase."""
    return [-(-(shape.kernel[1] + phase) // taps) for phase in range(_phases(taps, shape))]


def pack_depthwise_weights(
    isa: InstructionSet, shape: ConvShape, codes: np.ndarray, schedule: DepthwiseSchedule
) -> np.ndarray:
    """Codes OHWI ``(channels, kh, kw, 1)`` -> ``(blocks of channels, kh, phases, steps, channels, pair)``.

    The last block overlaps the one before where the channels do not divide; a lone narrower one has zeros behind them.
    """
    kernel_h, kernel_w = shape.kernel
    taps = _taps_per_step(isa, shape)
    phases, steps = _phases(taps, shape), _steps(taps, shape)
    block = schedule.vectors * isa.lanes
    channels = max(shape.channels, block)
    padded = np.zeros((channels, kernel_h, phases, max(steps), isa.pair), codes.dtype)
    for phase in range(phases):
        for tap in range(kernel_w):
            step, place = divmod(phase + tap, taps)
            padded[: len(codes), :, phase, step, place] = codes[:, :, tap, 0]
    starts = [min(start, channels - block) for start in range(0, channels, block)]
    blocks = [padded[start : start + block] for start in starts]
    return np.ascontiguousarray(np.stack(blocks).transpose(0, 2, 3, 4, 1, 5))


def _whole_tiles(tile_pixels: int, width: int, phases: int) -> tuple[int, int]:
    """(pixels, step) of tiles that cover ``width`` outputs, the last one overlapping; all start at phase 0."""
    if tile_pixels >= width or phases == 1:
        return min(tile_pixels, width), tile_pixels
    if width % phases == 0:
        even = max(phases, tile_pixels - tile_pixels % phases)
        return even, even
    # The last tile starts at phase 0 if its pixels are odd too; the step is even all the same.
    odd = max(phases + 1, tile_pixels - (tile_pixels + 1) % phases)
    return odd, odd - 1


def _interleave(a, b):
    """a0, b0, a1, b1 ..."""
    lanes = lanes_of(a)
    order = [place for lane in range(lanes) for place in (lane, lanes + lane)]
    return tirx.Shuffle([a, b], [tirx.const(place, "int32") for place in order])


def _widened(values, lanes: int):
    """Neighbouring values of a pixel, with zeros behind them up to a vector."""
    missing = lanes - lanes_of(values)
    if not missing:
        return values
    zeros = tirx.const(0, with_lanes(dtype_of(values).partition("x")[0], missing))
    return tirx.Shuffle([values, zeros], [tirx.const(lane, "int32") for lane in range(lanes)])


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
    taps = _taps_per_step(isa, shape)
    phases, steps = _phases(taps, shape), _steps(taps, shape)
    vectors = schedule.vectors
    block_channels = vectors * isa.lanes
    valid = min(block_channels, shape.channels)
    vector = isa.lanes * isa.pair
    pixel_values = vectors * vector
    channel_blocks = -(-shape.channels // block_channels)
    slab_row = -(-shape.slab_width // taps) * pixel_values
    out_h, out_w = shape.out_height, shape.out_width
    reach = shape.dilation[0] * (kernel_h - 1) + 1
    tile_pixels, tile_step = _whole_tiles(schedule.tile_pixels, out_w, phases)
    tiles = -(-(out_w - tile_pixels) // tile_step) + 1

    parallel = (
        threads > 1
        and shape.batch * out_h * out_w * shape.channels * kernel_h * kernel_w >= MIN_PARALLEL_MACS
    )
    block_h = max(
        1, min(out_h, (schedule.slab_bytes // (isa.operand_bytes * slab_row) - reach) // stride_h + 1)
    )
    by_rows = parallel and not schedule.channels_outer
    if by_rows:
        block_h = min(block_h, rows_of_block(out_h, threads))
    block_h, blocks = shared_blocks(out_h, block_h, threads if by_rows else 1)
    slab_h = (block_h - 1) * stride_h + reach

    def decode_row(source, channel, slab, slab_at) -> None:
        """One row with its padding, in places of ``taps`` pixels; where taps are not paired, (pixel, 0) on x86."""
        zero = tirx.const(0, with_lanes(isa.operand, block_channels))

        def grid(pixel):
            at = source + pixel * shape.channels + channel
            values = bind(load_float(x, at, valid))
            return T.bind(operand_expr(isa, shape.activation, _widened(values, block_channels)))

        def put(place, *pixels) -> None:
            paired = _interleave(*pixels) if isa.pair > 1 else pixels[0]
            store(slab, slab_at + place * pixel_values, paired, pixel_values)

        left, end = shape.padding[1], shape.padding[1] + shape.width
        first, last = -(-left // taps), end // taps
        zero_run(isa, slab, slab_at, left // taps * pixel_values)
        if left % taps:
            put(left // taps, zero, grid(0))
        if last > first:
            with T.serial(0, last - first) as index:
                pixel = T.bind(index * taps + (first * taps - left))
                put(index + first, grid(pixel), grid(pixel + 1) if taps > 1 else zero)
        if end % taps:
            put(last, grid(shape.width - 1), zero)
        after = slab_row - -(-end // taps) * pixel_values
        zero_run(isa, slab, slab_at + slab_row - after, after)

    def decode_slab(image, first_out_row, channel, slab) -> None:
        with T.serial(0, slab_h) as r:
            source_row = T.bind(first_out_row * stride_h + r - shape.padding[0])
            with T.If(tirx.And(source_row >= 0, source_row < shape.height)):
                with T.Then():
                    source = ((image * shape.height + source_row) * shape.width) * shape.channels
                    decode_row(source, channel, slab, r * slab_row)
                with T.Else():
                    zero_run(isa, slab, r * slab_row, slab_row)

    def tile(slab, row_in_block, first_pixel, out_row_at, channel, decoded) -> None:
        registers = RegisterTile(isa, tile_pixels * vectors, 1)
        first_place = T.bind(first_pixel * stride_w // taps)
        distance = 1 if taps > 1 else shape.dilation[1]
        for kh in range(kernel_h):
            row = (row_in_block * stride_h + kh * shape.dilation[0]) * slab_row
            for phase, step, j in itertools.product(range(phases), range(max(steps)), range(vectors)):
                if step >= steps[phase]:
                    continue
                tap = ((kh * phases + phase) * max(steps) + step) * pixel_values
                weight = T.bind(load(decoded, tap + j * vector, vector))
                for i in range(phase, tile_pixels, phases):
                    place = first_place + (i * stride_w // taps + step * distance)
                    values = load(slab, row + place * pixel_values + j * vector, vector)
                    registers.accumulate_vector(i * vectors + j, values, weight)
        for i in range(tile_pixels):
            for j in range(vectors):
                total = registers.value(i * vectors + j, 0)
                epilogue(total, out_row_at + first_pixel + i, channel + j * isa.lanes, min(valid, isa.lanes))

    def channel_block(image, first_out_row, index) -> None:
        channel = overlapped_start(index, block_channels, shape.channels)
        length = kernel_h * phases * max(steps) * pixel_values
        decoded = T.alloc_buffer((length,), isa.operand, align=64)
        decode_run(isa, shape.weight, weights, index * length, decoded, 0, length)
        slab = T.alloc_buffer((slab_h * slab_row,), isa.operand, align=64)
        decode_slab(image, first_out_row, channel, slab)
        with T.serial(0, block_h) as row:
            out_row_at = T.bind((image * out_h + first_out_row + row) * out_w)
            with T.serial(0, tiles) as t:
                first_pixel = T.bind(tirx.min(t * tile_step, out_w - tile_pixels))
                tile(slab, row, first_pixel, out_row_at, channel, decoded)

    with T.serial(0, shape.batch) as image:
        outer, inner = (channel_blocks, blocks) if schedule.channels_outer else (blocks, channel_blocks)
        with (T.parallel if parallel else T.serial)(0, outer) as i:
            with T.serial(0, inner) as j:
                index, block = (i, j) if schedule.channels_outer else (j, i)
                channel_block(image, overlapped_start(block, block_h, out_h), index)
