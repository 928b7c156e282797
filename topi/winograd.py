"""Convolution 3x3 with stride 1 by Winograd's algorithm, bit-equal with the direct form (``winograd_tiling.py``).

Filters are transformed to int16 at the first call and kept in memory that the module owns. A block of tiles is
decoded and transformed into ``(positions, tiles, channels)`` int16, which stays in the second-level cache.
Then a group of tiles at a time: a small matrix product into int32 scratch at each position, their inverse transform,
the epilogue.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.codec import decode_expr
from tvm_qfp8.topi.float_contract import bind, with_lanes
from tvm_qfp8.topi.gemm import MIN_PARALLEL_MACS
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.micro_kernel import RegisterTile
from tvm_qfp8.topi.panels import (
    CHANNEL_PADDING,
    balanced_blocks,
    overlapped_start,
)
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, load, prefetch_run, store, vector_runs
from tvm_qfp8.topi.schedules import SCRATCH_BYTES
from tvm_qfp8.topi.sharing import favours_rows, shared_blocks
from tvm_qfp8.topi.static_memory import filled_once
from tvm_qfp8.topi.winograd_inputs import InputTransform
from tvm_qfp8.topi.winograd_plan import TAPS, WinogradPlan
from tvm_qfp8.topi.winograd_rows import left_of_tile, row_of_tiles
from tvm_qfp8.topi.winograd_tiling import FILTER
from tvm_qfp8.topi.winograd_transforms import (
    divide_outputs,
    in_both_directions,
    transform_filters,
    transform_outputs,
)
from tvm_qfp8.topi.wrapping import with_wrapping_sums, wrapping_add

CACHE_LINE = 32
"""int16 values of a cache line."""

FILTERS_AHEAD = 8192
"""So many int16 values before filters are read they are asked for: they come from far, between reads of many tiles."""

PRODUCT_BYTES = 64 * 1024
"""Products of a group of tiles at all positions, beside its filters in the second-level cache."""


def emit_winograd(
    isa: InstructionSet, plan: WinogradPlan, x, codes, corrections, offset, epilogue: Callable, threads: int
) -> None:
    """Emit the loops; ``offset`` is that of the transformed filters, ``epilogue`` is called as in conv2d.

    ``corrections`` are ``offset_products``, or None where inputs have no offsets.
    """
    kernel = _Kernel(isa, plan)
    panels = filled_once(
        offset, plan.filter_values(isa), lambda target: kernel.transform_filters(codes, target)
    )
    shape = plan.shape
    macs = shape.batch * shape.out_height * shape.out_width * shape.out_channels * TAPS * shape.channels
    convolution = _Convolution(isa, plan, x, corrections, epilogue)
    convolution.blocks(panels, threads if macs >= MIN_PARALLEL_MACS else 1)


def filter_function(isa: InstructionSet, plan: WinogradPlan, codes: np.ndarray) -> tirx.PrimFunc:
    """The function of a ``static_memory.Filler``: arguments are the packed ``codes`` and the offset."""

    def body(packed, offset, done) -> None:
        kernel = _Kernel(isa, plan)
        filled_once(
            load(offset, 0, 1),
            plan.filter_values(isa),
            lambda target: kernel.transform_filters(packed, target),
        )
        store(done, 0, tirx.const(1, "int32"), 1)

    specs = [TensorSpec(codes.shape, "uint8"), TensorSpec((1,), "int64"), TensorSpec((1,), "int32")]
    return build_prim_func("transform_filters", specs, body)


class _Kernel:
    """What filters and convolution share."""

    def __init__(self, isa: InstructionSet, plan: WinogradPlan) -> None:
        self.isa, self.plan, self.shape, self.tiling = isa, plan, plan.shape, plan.tiling
        self.depth = plan.depth(isa)
        self.vectors = plan.vectors(isa)
        self.width = self.vectors * isa.lanes
        self.panel_count = -(-self.shape.out_channels // self.width)

    def transform_filters(self, codes, target) -> None:
        """``(panels, 9, depth, width)`` codes -> ``(panels, parts, positions, depth / parts, width)`` int16.

        So the kernel reads them in order.
        """
        _, layout = self.shape.layouts()
        step = self.depth * self.width
        part_step, positions = step // self.plan.parts, self.tiling.positions

        def emit(panel, part, at, lanes) -> None:
            source = T.bind(panel * (TAPS * step) + part * part_step + at)
            result = T.bind((panel * self.plan.parts + part) * (positions * part_step) + at)
            taps = [
                bind(decode_expr(load(codes, source + tap * step, lanes), layout, "int16", self.isa))
                for tap in range(TAPS)
            ]
            rows = [taps[row : row + FILTER] for row in range(0, TAPS, FILTER)]
            transformed = in_both_directions(lambda g: transform_filters(self.tiling, g), rows)
            for position, value in enumerate(v for row in transformed for v in row):
                store(target, result + position * part_step, value, lanes)

        with T.serial(0, self.panel_count) as panel, T.serial(0, self.plan.parts) as part:
            vector_runs(
                part_step, self.isa.lanes * self.isa.pair, lambda at, lanes: emit(panel, part, at, lanes)
            )


class _Convolution(_Kernel):
    def __init__(self, isa: InstructionSet, plan: WinogradPlan, x, corrections, epilogue: Callable) -> None:
        super().__init__(isa, plan)
        self.x, self.corrections, self.epilogue = x, corrections, epilogue
        self.offsets = plan.offset_of_position()

    # -- blocks of tile rows, counted over all images

    def blocks(self, panels, threads: int) -> None:
        plan = self.plan
        rows = plan.tile_rows
        by_rows = threads > 1 and favours_rows(rows, 1, self.panel_count, threads, decodes=False)
        most = max(1, SCRATCH_BYTES // (2 * self.tiling.positions * self.depth * plan.tiles_wide))
        self.block_rows, blocks = shared_blocks(rows, most, threads if by_rows else 1)
        self.block_tiles = self.block_rows * plan.tiles_wide
        product_bytes = 4 * self.tiling.positions * self.width
        self.group, self.groups = balanced_blocks(self.block_tiles, max(1, PRODUCT_BYTES // product_bytes))
        self.tiles = plan.tiles_at_once(self.isa, self.group)
        # An odd number of cache lines between positions: their lines fall into different sets.
        lines = -(-self.block_tiles * self.depth // CACHE_LINE)
        self.position_step = (lines | 1) * CACHE_LINE
        transform = InputTransform(self.isa, plan, self.x, self.position_step)

        def block(index) -> None:
            first_row = overlapped_start(index, self.block_rows, rows)
            inputs = T.alloc_buffer((self.tiling.positions * self.position_step,), "int16", align=64)
            transform.rows(first_row, self.block_rows, inputs)
            with (T.parallel if threads > 1 and not by_rows else T.serial)(0, self.panel_count) as panel:
                self.panel(first_row, inputs, panels, panel)

        with (T.parallel if by_rows and blocks > 1 else T.serial)(0, blocks) as index:
            block(index)

    # -- products and outputs

    def panel(self, first_row, inputs, panels, panel) -> None:
        """All tiles of a block times one panel of filters."""
        scratch = T.alloc_buffer((self.tiling.positions * self.group * self.width,), "int32", align=64)
        pixels = self.tiling.outputs**2
        sums = None
        if self.plan.parts > 1:
            sums = T.alloc_buffer((pixels * self.group * self.width,), "int32", align=64)
        with T.serial(0, self.groups) as group:
            first = overlapped_start(group, self.group, self.block_tiles)
            if sums is None:
                self.products(inputs, panels, panel, first, 0, scratch)
            else:
                zero = tirx.const(0, with_lanes("int32", self.isa.lanes))
                with T.serial(0, pixels * self.group * self.vectors) as i:
                    store(sums, i * self.isa.lanes, zero, self.isa.lanes)
                with T.serial(0, self.plan.parts) as part:
                    self.products(inputs, panels, panel, first, part, scratch)
                    with T.serial(0, self.group) as i:
                        self.add_outputs(scratch, sums, i, part, panel)
            with T.serial(0, self.group) as i:
                self.finish(scratch, sums, first_row, first + i, i, panel)

    def products(self, inputs, panels, panel, first, part, scratch) -> None:
        """At each position, ``tiles x channels`` times ``channels x width``."""
        isa, vector = self.isa, self.isa.lanes * self.isa.pair
        part_depth, parts, positions = self.depth // self.plan.parts, self.plan.parts, self.tiling.positions
        with T.serial(0, positions) as position:
            run = T.bind((panel * parts + part) * positions + position)
            weights = T.bind(run * (part_depth * self.width))

            def load_weights(k, j):
                at = weights + k * (self.width * isa.pair)
                if j == 0:
                    prefetch_run(panels, at + FILTERS_AHEAD, self.width * isa.pair)
                return T.bind(load(panels, at + j * vector, vector))

            with T.serial(0, -(-self.group // self.tiles)) as index:
                tile = overlapped_start(index, self.tiles, self.group)
                registers = RegisterTile(with_wrapping_sums(isa), self.tiles, self.vectors)
                row = T.bind(position * self.position_step + (first + tile) * self.depth + part * part_depth)
                starts = [row + i * self.depth for i in range(self.tiles)]
                registers.reduce(inputs, starts, part_depth // isa.pair, 1, load_weights)
                for i in range(self.tiles):
                    for j in range(self.vectors):
                        at = (position * self.group + tile + i) * self.width + j * isa.lanes
                        store(scratch, at, registers.value(i, j), isa.lanes)

    def outputs(self, scratch, i, at, part, panel) -> list:
        """The outputs of a tile for the vector ``at`` of a panel, row by row."""
        lanes, window = self.isa.lanes, self.tiling.window

        def product(position: int):
            value = load(scratch, (position * self.group + i) * self.width + at, lanes)
            if position in self.offsets:
                row = part * len(self.offsets) + list(self.offsets).index(position)
                column = self.first_column(panel) + at
                taken = load(
                    self.corrections, row * (self.shape.out_channels + CHANNEL_PADDING) + column, lanes
                )
                value = wrapping_add(value, taken)
            return bind(value)

        products = [[product(row * window + column) for column in range(window)] for row in range(window)]
        transformed = in_both_directions(lambda m: transform_outputs(self.tiling, m), products)
        return [divide_outputs(self.tiling, v) for row in transformed for v in row]

    def first_column(self, panel):
        """Output channel of a panel's first column."""
        return overlapped_start(panel, self.width, self.shape.out_channels)

    def each_vector(self, emit: Callable) -> None:
        """``emit(at, valid)`` for the vectors of a panel; a loop where all are whole, as the code of one is long."""
        lanes, channels = self.isa.lanes, self.shape.out_channels
        if channels >= self.width or channels % lanes == 0:
            with T.serial(0, self.vectors) as j:
                emit(T.bind(j * lanes), lanes)
        else:
            for at in range(0, self.width, lanes):
                emit(at, min(lanes, channels - at))

    def add_outputs(self, scratch, sums, i, part, panel) -> None:
        lanes = self.isa.lanes

        def add(at, _valid) -> None:
            values = self.outputs(scratch, i, at, part, panel)
            for pixel, value in enumerate(values):
                place = (i * len(values) + pixel) * self.width + at
                store(sums, place, load(sums, place, lanes) + value, lanes)

        self.each_vector(add)

    def finish(self, scratch, sums, first_row, tile, i, panel) -> None:
        """The epilogue of one tile."""
        lanes, shape, outputs = self.isa.lanes, self.shape, self.tiling.outputs
        step_h, step_w = shape.dilation
        tile_row = T.bind(tirx.floordiv(tile, self.plan.tiles_wide))
        row = row_of_tiles(self.plan, first_row + tile_row)
        left = (
            left_of_tile(self.plan, row, tile - tile_row * self.plan.tiles_wide) * step_w + row.first_column
        )
        top = row.top * step_h + row.first_row
        corner = T.bind((row.image * shape.out_height + top) * shape.out_width + left)
        first_column = self.first_column(panel)

        def finish_vector(at, valid) -> None:
            if sums is None:
                values = self.outputs(scratch, i, at, 0, panel)
            else:
                places = [(i * outputs**2 + pixel) * self.width + at for pixel in range(outputs**2)]
                values = [bind(load(sums, place, lanes)) for place in places]
            for pixel, value in enumerate(values):
                place = corner + pixel // outputs * step_h * shape.out_width + pixel % outputs * step_w
                self.epilogue(value, place, first_column + at, valid)

        self.each_vector(finish_vector)
