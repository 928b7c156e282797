"""Convolutions over windows on tiles: a row of a tile is a window's stretch of neighbouring input pixels.

Input rows that a block of output rows needs become operands in a padded slab, from which tiles are read where they
lie: neighbouring output pixels are rows at equal distances. Groups are walked one after the other, each reading its
channels of the pixels; narrow ones are merged, with zeros as the weights between them, to fill the tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.amx.decode import decode_for_tiles
from tvm_qfp8.topi.amx.panels import WeightPanels, pack_tile_weights
from tvm_qfp8.topi.amx.plan import SCRATCH_BYTES, TilePlan, fits_tiles, plan_tiles, shares_rows
from tvm_qfp8.topi.amx.sums import emit_sums, sum_buffers
from tvm_qfp8.topi.amx.tiles import ROW_BYTES, ROWS, tile_buffer, with_tiles
from tvm_qfp8.topi.conv2d import ConvShape, merged_groups
from tvm_qfp8.topi.depthwise import is_depthwise
from tvm_qfp8.topi.gemm import MIN_PARALLEL_MACS
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import overlapped_start, round_up, zero_run
from tvm_qfp8.topi.sharing import rows_of_block
from tvm_qfp8.topi.slab import slab_filler, slab_rows


def _slab_channels(shape: ConvShape) -> int:
    """Planes are interleaved by fours; other pixels need no padding."""
    return round_up(shape.channels, 4) if shape.channels_first else shape.channels


def _rows_are_runs(shape: ConvShape) -> bool:
    """Whether the values that meet a row of a filter lie beside each other."""
    return shape.dilation[1] == 1 and shape.groups == 1


def _runs(shape: ConvShape, codes: np.ndarray) -> np.ndarray:
    """OHWI codes as ``(columns, runs, run)``."""
    padding = _slab_channels(shape) - shape.channels
    padded = np.pad(codes, ((0, 0), (0, 0), (0, 0), (0, padding)))
    runs = shape.kernel[0] * (1 if _rows_are_runs(shape) else shape.kernel[1])
    return padded.reshape(shape.out_channels, runs, -1)


def takes_tiles(isa: InstructionSet, shape: ConvShape) -> bool:
    """Whether no other kernel is better."""
    operands, extents = (shape.activation, shape.weight), (shape.batch, shape.channels, shape.out_channels)
    return not is_depthwise(isa, shape) and fits_tiles(isa, operands, *extents)


def plan_tile_conv(
    isa: InstructionSet, shape: ConvShape, codes: np.ndarray
) -> tuple[ConvShape, TilePlan, np.ndarray] | None:
    """The convolution, with groups merged, its plan and packed weights; None where other kernels are better."""
    if not takes_tiles(isa, shape):
        return None
    if shape.groups > 1:
        shape, codes = merged_groups(shape, codes, ROW_BYTES, ROWS, most_inputs=ROW_BYTES)
    layouts, runs = shape.layouts(), _runs(shape, codes)
    plan = plan_tiles(runs, layouts, shape.out_width, shape.out_height, shape.groups)
    packed = [pack_tile_weights(plan, layouts[1], group) for group in np.split(runs, shape.groups)]
    return shape, plan, np.stack(packed)


def emit_tile_conv(
    isa: InstructionSet, shape: ConvShape, plan: TilePlan, x, packed, epilogue: Callable, threads: int
) -> None:
    """Emit the kernel; ``epilogue(acc, row, column, valid)`` with ``row`` the flattened output pixel."""
    kind, registers = plan.kind, plan.registers
    activation, weight = shape.layouts()
    inputs, outputs = shape.channels // shape.groups, shape.out_channels // shape.groups
    panels = WeightPanels(plan, outputs, weight)
    weights_of_group = panels.count * plan.blocks * panels.unit
    stride_h, stride_w = shape.stride
    out_h, out_w = shape.out_height, shape.out_width
    channels = _slab_channels(shape)
    slab_row = shape.slab_width * channels

    macs = shape.batch * out_h * out_w * shape.out_channels * plan.run * plan.runs
    parallel = threads > 1 and macs >= MIN_PARALLEL_MACS
    pixels = shape.batch * shape.height * shape.width
    by_rows = (
        parallel
        and out_h >= 2 * threads
        and shares_rows(shape.out_channels * plan.run * plan.runs, pixels * channels)
    )
    most_rows = SCRATCH_BYTES // (slab_row * kind.element_bytes * plan.parts)
    most_block = rows_of_block(out_h, threads) if by_rows else out_h
    in_slab = slab_rows(shape, most_rows, most_block, threads if by_rows else 1)
    slab_size = in_slab.rows * slab_row
    tap_row = shape.dilation[0] // in_slab.step * slab_row

    tiles_of_row = -(-out_w // plan.rows)
    tiles = in_slab.block * tiles_of_row
    groups = -(-tiles // plan.row_tiles)

    # A product's last steps may lie beyond the slab; their weights are zero, but not what NaN times zero is.
    part_size = slab_size + plan.steps

    def filler(part) -> Callable:
        def bring(source_at, target, target_at, length: int) -> None:
            decode_for_tiles(kind, activation, x, source_at, target, target_at, length, part)

        return slab_filler(isa, replace(shape, groups=1), x, in_slab, channels, kind.dtype, bring)

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
        if _rows_are_runs(shape):
            return run * tap_row + chunk
        row = T.bind(run // shape.kernel[1])
        tap = run - row * shape.kernel[1]
        return row * tap_row + tap * (shape.dilation[1] * channels) + chunk

    def products(panel_range: tuple, image, first_out_row, slab, sums: tuple, section=0) -> None:
        """Of a ``section``, a group of channels."""
        own = packed
        if shape.groups > 1:
            at = section * weights_of_group
            own = T.decl_buffer(
                (weights_of_group,), "uint8", data=packed.data, elem_offset=packed.elem_offset + at
            )

        def rows_of(group, product, part):
            offset = T.bind(part * part_size + section * inputs + run_start(product))

            def of_tile(tile):
                row, pixel = place(group, tile)
                corner = row * (stride_h * slab_row) + pixel * (stride_w * channels)
                return slab, corner + offset, stride_w * channels

            return of_tile

        def finish(panel, group, row):
            first_column = overlapped_start(panel, registers.width, outputs) + section * outputs
            tile = T.bind(row // plan.rows) if plan.row_tiles > 1 else 0
            out_row, pixel = place(group, tile)
            at = T.bind((image * out_h + first_out_row + out_row) * out_w + pixel + row - tile * plan.rows)
            return lambda column, total: epilogue(
                total, at, first_column + panels.starts[column], panels.valid[column]
            )

        emit_sums(
            panels,
            own,
            panel_range,
            sums,
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
        first_out_row = overlapped_start(index, in_slab.block, out_h)

        def part(first, count) -> None:
            # Each thread fills a slab for itself: to wait for another's cache takes longer.
            slab, sums = slab_of(image, first_out_row), sum_buffers(plan, groups)
            if shape.groups == 1:
                products((first, count), image, first_out_row, slab, sums)
                return
            with T.serial(0, count) as index:
                products((0, panels.count), image, first_out_row, slab, sums, T.bind(first + index))

        shared = panels.count if shape.groups == 1 else shape.groups
        registers.share(shared, threads if parallel and not by_rows else 1, part)

    def body() -> None:
        with T.serial(0, shape.batch) as image:
            if in_slab.blocks == 1:
                block(image, 0)
                return
            with (T.parallel if by_rows else T.serial)(0, in_slab.blocks) as index:
                block(image, index)

    with_tiles(body)
