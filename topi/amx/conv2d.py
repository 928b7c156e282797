"""Convolutions over windows on tiles: a row of a tile is a window's stretch of neighbouring input pixels.

Input rows that a block of output rows needs become operands in a padded slab, from which tiles are read where they
lie: neighbouring output pixels are rows at equal distances.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.amx.decode import decode_for_tiles
from tvm_qfp8.topi.amx.panels import WeightPanels
from tvm_qfp8.topi.amx.plan import SCRATCH_BYTES, TilePlan, fits_tiles, plan_tiles, shares_rows
from tvm_qfp8.topi.amx.sums import emit_sums, sum_buffers
from tvm_qfp8.topi.amx.tiles import ROWS, tile_buffer, with_tiles
from tvm_qfp8.topi.conv2d import ConvShape
from tvm_qfp8.topi.gemm import MIN_PARALLEL_MACS
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import balanced_blocks, overlapped_start, round_up, zero_run
from tvm_qfp8.topi.slab import slab_filler


def _slab_channels(shape: ConvShape) -> int:
    """Planes are interleaved by fours; other pixels need no padding."""
    return round_up(shape.channels, 4) if shape.channels_first else shape.channels


def _runs(shape: ConvShape, codes: np.ndarray) -> np.ndarray:
    """OHWI codes as ``(columns, runs, run)``: taps of a row lie beside each other unless they are dilated."""
    padding = _slab_channels(shape) - shape.channels
    padded = np.pad(codes, ((0, 0), (0, 0), (0, 0), (0, padding)))
    runs = shape.kernel[0] * (1 if shape.dilation[1] == 1 else shape.kernel[1])
    return padded.reshape(shape.out_channels, runs, -1)


def plan_tile_conv(
    isa: InstructionSet, shape: ConvShape, codes: np.ndarray
) -> tuple[TilePlan, np.ndarray] | None:
    """(plan, codes ``(columns, runs, run)``) of a convolution of one group; None where other kernels are better."""
    operands, extents = (shape.activation, shape.weight), (shape.batch, shape.channels, shape.out_channels)
    if shape.groups > 1 or not fits_tiles(isa, operands, *extents):
        return None
    layouts, runs = shape.layouts(), _runs(shape, codes)
    return plan_tiles(runs, layouts, shape.out_width, shape.out_height), runs


def emit_tile_conv(
    isa: InstructionSet, shape: ConvShape, plan: TilePlan, x, packed, epilogue: Callable, threads: int
) -> None:
    """Emit the kernel; ``epilogue(acc, row, column, valid)`` with ``row`` the flattened output pixel."""
    kind, registers = plan.kind, plan.registers
    activation, weight = shape.layouts()
    panels = WeightPanels(plan, shape.out_channels, weight)
    stride_h, stride_w = shape.stride
    out_h, out_w = shape.out_height, shape.out_width
    channels = _slab_channels(shape)
    slab_row = shape.slab_width * channels
    reach = shape.dilation[0] * (shape.kernel[0] - 1) + 1

    macs = shape.batch * out_h * out_w * shape.out_channels * plan.run * plan.runs
    parallel = threads > 1 and macs >= MIN_PARALLEL_MACS
    pixels = shape.batch * shape.height * shape.width
    by_rows = (
        parallel
        and out_h >= 2 * threads
        and shares_rows(shape.out_channels * plan.run * plan.runs, pixels * channels)
    )
    most = max(
        1, min(out_h, (SCRATCH_BYTES // (slab_row * kind.element_bytes * plan.parts) - reach) // stride_h + 1)
    )
    if by_rows:
        most = min(most, -(-out_h // (2 * threads)))
    block_h, blocks = balanced_blocks(out_h, most)
    slab_h = (block_h - 1) * stride_h + reach
    slab_size = slab_h * slab_row

    tiles_of_row = -(-out_w // plan.rows)
    tiles = block_h * tiles_of_row
    groups = -(-tiles // plan.row_tiles)

    # A product's last steps may lie beyond the slab; their weights are zero, but not what NaN times zero is.
    part_size = slab_size + plan.steps

    def filler(part) -> Callable:
        def bring(source_at, target, target_at, length: int) -> None:
            decode_for_tiles(kind, activation, x, source_at, target, target_at, length, part)

        return slab_filler(isa, shape, x, slab_h, channels, kind.dtype, bring)

    def place(group, tile) -> tuple:
        """(output row of the block, first pixel) of a tile; the last block computes the last tile again."""
        index = group * plan.row_tiles + tile
        if tiles % plan.row_tiles:
            index = T.bind(tirx.min(index, tiles - 1))
        if tiles_of_row == 1:
            return index, 0
        row = T.bind(index // tiles_of_row)
        return row, overlapped_start(index - row * tiles_of_row, plan.rows, out_w)

    def run_start(product):
        """Where the stretch of a product begins, from the window's corner."""
        run = T.bind(product // plan.chunks) if plan.chunks > 1 else product
        chunk = (product - run * plan.chunks) * plan.steps if plan.chunks > 1 else 0
        if shape.dilation[1] == 1:
            return run * (shape.dilation[0] * slab_row) + chunk
        row = T.bind(run // shape.kernel[1])
        tap = run - row * shape.kernel[1]
        return row * (shape.dilation[0] * slab_row) + tap * (shape.dilation[1] * channels) + chunk

    def products(panel_range: tuple, image, first_out_row, slab) -> None:
        def rows_of(group, product, part):
            offset = T.bind(part * part_size + run_start(product))

            def of_tile(tile):
                row, pixel = place(group, tile)
                corner = row * (stride_h * slab_row) + pixel * (stride_w * channels)
                return slab, corner + offset, stride_w * channels

            return of_tile

        def finish(panel, group, row):
            first_column = overlapped_start(panel, registers.width, shape.out_channels)
            tile = T.bind(row // plan.rows) if plan.row_tiles > 1 else 0
            out_row, pixel = place(group, tile)
            at = T.bind((image * out_h + first_out_row + out_row) * out_w + pixel + row - tile * plan.rows)
            return lambda column, total: epilogue(
                total, at, first_column + column * ROWS, panels.valid[column]
            )

        emit_sums(
            panels,
            packed,
            panel_range,
            sum_buffers(plan, groups),
            groups,
            registers.all_rows,
            rows_of,
            finish,
        )

    def slab_of(image, first_out_row):
        slab = tile_buffer(plan.parts * part_size, kind.dtype)
        for number, part in enumerate(plan.decoded_parts):
            filler(part)(image, first_out_row, 0, slab, number * part_size)
            zero_run(isa, slab, number * part_size + slab_size, plan.steps)
        return slab

    def block(image, index) -> None:
        first_out_row = overlapped_start(index, block_h, out_h)

        def part(*panel_range) -> None:
            # Each thread fills a slab for itself: to wait for another's cache takes longer.
            products(panel_range, image, first_out_row, slab_of(image, first_out_row))

        registers.share(panels.count, threads if parallel and not by_rows else 1, part)

    def body() -> None:
        with T.serial(0, shape.batch) as image:
            if blocks == 1:
                block(image, 0)
                return
            with (T.parallel if by_rows else T.serial)(0, blocks) as index:
                block(image, index)

    with_tiles(body)
