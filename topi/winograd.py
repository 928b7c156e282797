"""Convolution 3x3 with stride 1 by Winograd's algorithm, bit-equal with the direct form (``winograd_plan.py``).

Filters are transformed to int16 at the first call and kept in memory that the module owns. A block of tiles is
decoded and transformed into ``(16 positions, tiles, channels)`` int16, which stays in the second-level cache.
Then a few tiles at a time: 16 small matrix products into int32 scratch, their inverse transform, the epilogue.
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
from tvm_qfp8.topi.panels import balanced_blocks, decode_run, overlapped_start, zero_run
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, load, store, vector_runs
from tvm_qfp8.topi.schedules import SCRATCH_BYTES
from tvm_qfp8.topi.static_memory import filled_once
from tvm_qfp8.topi.winograd_plan import POSITIONS, TAPS, WinogradPlan

CACHE_LINE = 32
"""int16 values of a cache line."""


def emit_winograd(
    isa: InstructionSet, plan: WinogradPlan, x, codes, offset, epilogue: Callable, threads: int
) -> None:
    """Emit the loops; ``offset`` is that of the transformed filters, ``epilogue`` is called as in conv2d."""
    kernel = _Kernel(isa, plan, x, epilogue)
    panels = filled_once(
        offset, plan.filter_values(isa), lambda target: kernel.transform_filters(codes, target)
    )
    shape = plan.shape
    macs = shape.batch * shape.out_height * shape.out_width * shape.out_channels * TAPS * shape.channels
    kernel.blocks(panels, threads if macs >= MIN_PARALLEL_MACS else 1)


def filter_function(isa: InstructionSet, plan: WinogradPlan, codes: np.ndarray) -> tirx.PrimFunc:
    """The function of a ``static_memory.Filler``: arguments are the packed ``codes`` and the offset."""

    def body(packed, offset, done) -> None:
        kernel = _Kernel(isa, plan, None, None)
        filled_once(
            load(offset, 0, 1),
            plan.filter_values(isa),
            lambda target: kernel.transform_filters(packed, target),
        )
        store(done, 0, tirx.const(1, "int32"), 1)

    specs = [TensorSpec(codes.shape, "uint8"), TensorSpec((1,), "int64"), TensorSpec((1,), "int32")]
    return build_prim_func("transform_filters", specs, body)


class _Kernel:
    def __init__(self, isa: InstructionSet, plan: WinogradPlan, x, epilogue: Callable | None) -> None:
        self.isa, self.plan, self.shape, self.x, self.epilogue = isa, plan, plan.shape, x, epilogue
        self.depth = plan.depth(isa)
        self.most_tiles, self.vectors = plan.tile(isa)
        self.width = self.vectors * isa.lanes
        self.panel_count = -(-self.shape.out_channels // self.width)
        self.slab_row = self.shape.slab_width * self.depth

    # -- filters, once

    def transform_filters(self, codes, target) -> None:
        """``(panels, 9, depth, width)`` codes -> ``(panels, 16, depth, width)`` int16."""
        _, layout = self.shape.layouts()
        step = self.depth * self.width

        def emit(panel, at, lanes) -> None:
            source, result = panel * (TAPS * step) + at, panel * (POSITIONS * step) + at
            taps = [
                bind(decode_expr(load(codes, source + tap * step, lanes), layout, "int16", self.isa))
                for tap in range(TAPS)
            ]
            columns = [_filter_transform(taps[column::3]) for column in range(3)]
            for row in range(4):
                for column, value in enumerate(_filter_transform([columns[c][row] for c in range(3)])):
                    store(target, result + (4 * row + column) * step, value, lanes)

        with T.serial(0, self.panel_count) as panel:
            vector_runs(step, self.isa.lanes * self.isa.pair, lambda at, lanes: emit(panel, at, lanes))

    # -- blocks of tile rows, counted over all images

    def blocks(self, panels, threads: int) -> None:
        plan = self.plan
        rows = self.shape.batch * plan.tiles_high
        by_rows = threads > 1 and rows >= 2 * threads
        most = max(1, SCRATCH_BYTES // (2 * POSITIONS * self.depth * plan.tiles_wide))
        if by_rows:
            most = min(most, -(-rows // threads))
        self.block_rows, blocks = balanced_blocks(rows, most)
        self.block_tiles = self.block_rows * plan.tiles_wide
        self.tiles = min(self.most_tiles, self.block_tiles)
        # An odd number of cache lines between positions: their lines fall into different sets.
        lines = -(-self.block_tiles * self.depth // CACHE_LINE)
        self.position_step = (lines | 1) * CACHE_LINE

        def block(index) -> None:
            first_row = overlapped_start(index, self.block_rows, rows)
            inputs = T.alloc_buffer((POSITIONS * self.position_step,), "int16", align=64)
            self.transform_inputs(first_row, inputs)
            with (T.parallel if threads > 1 and not by_rows else T.serial)(0, self.panel_count) as panel:
                self.panel(first_row, inputs, panels, panel)

        with (T.parallel if by_rows and blocks > 1 else T.serial)(0, blocks) as index:
            block(index)

    def position_of(self, tile_row) -> tuple:
        """(image, first output row) of a tile row; the last one of an odd height overlaps the one before it."""
        image = T.bind(tirx.floordiv(tile_row, self.plan.tiles_high)) if self.shape.batch > 1 else 0
        row = (tile_row - image * self.plan.tiles_high) * 2
        return image, T.bind(tirx.min(row, self.shape.out_height - 2))

    # -- inputs

    def transform_inputs(self, first_row, inputs) -> None:
        """Decode four input rows for each row of tiles, two of which the next row needs again."""
        slab = T.alloc_buffer((4 * self.slab_row,), "int16", align=64)
        with T.serial(0, self.block_rows) as r:
            image, top = self.position_of(first_row + r)
            start = T.bind(tirx.if_then_else(tirx.any(r == 0, top == 0), 0, 2))
            with T.serial(0, 4 - start) as k:
                self.decode_row(image, top + start + k, slab)
            rows = [T.bind(tirx.floormod(top + k, 4) * self.slab_row) for k in range(4)]
            with T.serial(0, self.plan.tiles_wide) as c:
                left = T.bind(tirx.min(c * 2, self.shape.out_width - 2) * self.depth)
                target = T.bind((r * self.plan.tiles_wide + c) * self.depth)
                vector_runs(
                    self.depth,
                    2 * self.isa.lanes,
                    lambda at, lanes: self.transform_tile(slab, rows, left + at, inputs, target + at, lanes),
                )

    def decode_row(self, image, slab_row, slab) -> None:
        """One padded input row, at its place in a ring of four."""
        shape, channels = self.shape, self.shape.channels
        top, left, _, right = shape.padding
        activation, _ = shape.layouts()
        at = T.bind(tirx.floormod(slab_row, 4) * self.slab_row)
        row = T.bind(slab_row - top)
        with T.If(tirx.all(row >= 0, row < shape.height)):
            with T.Then():
                zero_run(self.isa, slab, at, left * self.depth)
                source = T.bind((image * shape.height + row) * (shape.width * channels))
                first = at + left * self.depth
                if self.depth == channels:
                    decode_run(self.isa, activation, self.x, source, slab, first, shape.width * channels)
                else:
                    with T.serial(0, shape.width) as pixel:
                        target = first + pixel * self.depth
                        decode_run(
                            self.isa, activation, self.x, source + pixel * channels, slab, target, channels
                        )
                        zero_run(self.isa, slab, target + channels, self.depth - channels)
                zero_run(self.isa, slab, at + (left + shape.width) * self.depth, right * self.depth)
            with T.Else():
                zero_run(self.isa, slab, at, self.slab_row)

    def transform_tile(self, slab, rows, at, inputs, target, lanes: int) -> None:
        window = [
            [bind(load(slab, row + column * self.depth + at, lanes)) for column in range(4)] for row in rows
        ]
        columns = [_input_transform([window[row][column] for row in range(4)]) for column in range(4)]
        for row in range(4):
            for column, value in enumerate(_input_transform([columns[c][row] for c in range(4)])):
                store(inputs, target + (4 * row + column) * self.position_step, value, lanes)

    # -- products and outputs

    def panel(self, first_row, inputs, panels, panel) -> None:
        """All tiles of a block times one panel of filters."""
        scratch = T.alloc_buffer((POSITIONS * self.tiles * self.width,), "int32", align=64)
        sums = None
        if self.plan.parts > 1:
            sums = T.alloc_buffer((4 * self.tiles * self.width,), "int32", align=64)
        with T.serial(0, -(-self.block_tiles // self.tiles)) as group:
            first = overlapped_start(group, self.tiles, self.block_tiles)
            if sums is None:
                self.products(inputs, panels, panel, first, 0, scratch)
            else:
                zero = tirx.const(0, with_lanes("int32", self.isa.lanes))
                with T.serial(0, 4 * self.tiles * self.vectors) as i:
                    store(sums, i * self.isa.lanes, zero, self.isa.lanes)
                with T.serial(0, self.plan.parts) as part:
                    self.products(inputs, panels, panel, first, part, scratch)
                    with T.serial(0, self.tiles) as i:
                        self.add_outputs(scratch, sums, i)
            with T.serial(0, self.tiles) as i:
                self.finish(scratch, sums, first_row, first + i, i, panel)

    def products(self, inputs, panels, panel, first, part, scratch) -> None:
        """At each position, ``tiles x channels`` times ``channels x width``."""
        isa, vector = self.isa, self.isa.lanes * self.isa.pair
        steps = self.depth // isa.pair
        part_steps = steps // self.plan.parts
        with T.serial(0, POSITIONS) as position:
            registers = RegisterTile(isa, self.tiles, self.vectors)
            row = T.bind(position * self.position_step + first * self.depth)
            weights = T.bind((panel * POSITIONS + position) * (steps * self.width * isa.pair))
            first = part * part_steps
            starts = [row + i * self.depth + first * isa.pair for i in range(self.tiles)]

            def load_weights(k, j, weights=weights):
                at = weights + (first + k) * (self.width * isa.pair)
                return T.bind(load(panels, at + j * vector, vector))

            registers.reduce(inputs, starts, part_steps, 1, load_weights)
            for i in range(self.tiles):
                for j in range(self.vectors):
                    target = (position * self.tiles + i) * self.width + j * isa.lanes
                    store(scratch, target, registers.value(i, j), isa.lanes)

    def outputs(self, scratch, i, j: int) -> list:
        """The four outputs of a tile, row by row."""
        lanes = self.isa.lanes

        def product(row: int, column: int):
            return bind(load(scratch, ((4 * row + column) * self.tiles + i) * self.width + j * lanes, lanes))

        columns = [_output_transform([product(row, column) for row in range(4)]) for column in range(4)]
        values = [v for row in range(2) for v in _output_transform([columns[c][row] for c in range(4)])]
        return [bind(v >> tirx.const(2, with_lanes("int32", lanes))) for v in values]

    def add_outputs(self, scratch, sums, i) -> None:
        for j in range(self.vectors):
            for pixel, value in enumerate(self.outputs(scratch, i, j)):
                at = (i * 4 + pixel) * self.width + j * self.isa.lanes
                store(sums, at, load(sums, at, self.isa.lanes) + value, self.isa.lanes)

    def finish(self, scratch, sums, first_row, tile, i, panel) -> None:
        """The epilogue of one tile."""
        isa, shape, epilogue = self.isa, self.shape, self.epilogue
        assert epilogue is not None
        tile_row = T.bind(tirx.floordiv(tile, self.plan.tiles_wide))
        image, top = self.position_of(first_row + tile_row)
        left = tirx.min((tile - tile_row * self.plan.tiles_wide) * 2, shape.out_width - 2)
        corner = T.bind((image * shape.out_height + top) * shape.out_width + left)
        first_column = overlapped_start(panel, self.width, shape.out_channels)
        for j in range(self.vectors):
            at = j * isa.lanes
            if at >= shape.out_channels:
                break
            valid = min(isa.lanes, shape.out_channels - at)
            if sums is None:
                values = self.outputs(scratch, i, j)
            else:
                values = [bind(load(sums, (i * 4 + p) * self.width + at, isa.lanes)) for p in range(4)]
            for pixel, value in enumerate(values):
                row = corner + pixel // 2 * shape.out_width + pixel % 2
                epilogue(value, row, first_column + at, valid)


def _input_transform(d: list) -> list:
    """B^T d."""
    return [bind(v) for v in (d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3])]


def _filter_transform(g: list) -> list:
    """The doubled G times g."""
    ends = bind(g[0] + g[2])
    return [bind(v) for v in (g[0] + g[0], ends + g[1], ends - g[1], g[2] + g[2])]


def _output_transform(m: list) -> list:
    """A^T m."""
    return [bind(m[0] + m[1] + m[2]), bind(m[1] - m[2] - m[3])]
