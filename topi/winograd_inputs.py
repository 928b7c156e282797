"""Inputs of a convolution by Winograd's algorithm: decoded row by row, transformed tile by tile.

With dilation tiles are of one phase (``winograd_plan.py``), whose pixels lie apart in the image.
"""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.float_contract import bind, like
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import decode_run, zero_run
from tvm_qfp8.topi.prim_func import load, store, vector_runs
from tvm_qfp8.topi.winograd_plan import WinogradPlan
from tvm_qfp8.topi.winograd_rows import TileRow, left_of_tile, row_of_tiles
from tvm_qfp8.topi.winograd_tiling import FILTER
from tvm_qfp8.topi.winograd_transforms import in_both_directions, transform_inputs


class InputTransform:
    """From codes ``x`` to ``(positions, tiles, channels)`` int16, ``position_step`` values from one to the next."""

    def __init__(self, isa: InstructionSet, plan: WinogradPlan, x, position_step: int) -> None:
        self.isa, self.plan, self.x, self.position_step = isa, plan, x, position_step
        self.shape, self.tiling, self.offsets = plan.shape, plan.tiling, plan.offset_of_position()
        self.depth = plan.depth(isa)
        self.slab_row = (plan.phase_width + FILTER - 1) * self.depth

    def rows(self, first_row, count: int, inputs) -> None:
        """Of ``count`` rows of tiles: decodes the input rows of each, two of which the next one needs again."""
        window, shared = self.tiling.window, FILTER - 1
        slab = T.alloc_buffer((window * self.slab_row,), "int16", align=64)
        with T.serial(0, count) as r:
            row = row_of_tiles(self.plan, first_row + r)
            start = T.bind(tirx.if_then_else(tirx.any(r == 0, row.top == 0), 0, shared))
            with T.serial(0, window - start) as k:
                self.decode_row(row, row.top + start + k, slab)
            rows = [T.bind(tirx.floormod(row.top + k, window) * self.slab_row) for k in range(window)]
            with T.serial(0, self.plan.tiles_wide) as c:
                left = T.bind(left_of_tile(self.plan, row, c) * self.depth)
                target = T.bind((r * self.plan.tiles_wide + c) * self.depth)
                vector_runs(
                    self.depth,
                    2 * self.isa.lanes,
                    lambda at, lanes: self.transform_tile(slab, rows, left + at, inputs, target + at, lanes),
                )

    def decode_row(self, tile_row: TileRow, slab_row, slab) -> None:
        """One padded input row of a phase, at its place in a ring of as many as a tile reads."""
        shape = self.shape
        at = T.bind(tirx.floormod(slab_row, self.tiling.window) * self.slab_row)
        row = T.bind(tile_row.first_row + slab_row * shape.dilation[0] - shape.padding[0])
        with T.If(tirx.all(row >= 0, row < shape.height)):
            with T.Then():
                source = T.bind((tile_row.image * shape.height + row) * (shape.width * shape.channels))
                if shape.dilation[1] == 1:
                    self.decode_neighbours(source, slab, at)
                else:
                    self.decode_every(tile_row.first_column, source, slab, at)
            with T.Else():
                zero_run(self.isa, slab, at, self.slab_row)

    def decode_neighbours(self, source, slab, at) -> None:
        """All pixels of a row, between its padding."""
        (_, left, _, right), width = self.shape.padding, self.shape.width
        zero_run(self.isa, slab, at, left * self.depth)
        first = at + left * self.depth
        if self.depth == self.shape.channels:
            self.decode(source, slab, first, width * self.depth)
        else:
            with T.serial(0, width) as pixel:
                self.decode_pixel(source + pixel * self.shape.channels, slab, first + pixel * self.depth)
        zero_run(self.isa, slab, first + width * self.depth, right * self.depth)

    def decode_every(self, first_column, source, slab, at) -> None:
        """The pixels of a row that a phase reads, of which padding are those outside."""
        shape = self.shape
        with T.serial(0, self.slab_row // self.depth) as pixel:
            column = T.bind(first_column + pixel * shape.dilation[1] - shape.padding[1])
            target = at + pixel * self.depth
            with T.If(tirx.all(column >= 0, column < shape.width)):
                with T.Then():
                    self.decode_pixel(source + column * shape.channels, slab, target)
                with T.Else():
                    zero_run(self.isa, slab, target, self.depth)

    def decode_pixel(self, source, slab, target) -> None:
        """And zeros behind its channels."""
        channels = self.shape.channels
        self.decode(source, slab, target, channels)
        zero_run(self.isa, slab, target + channels, self.depth - channels)

    def decode(self, source, slab, target, values: int) -> None:
        decode_run(self.isa, self.shape.layouts()[0], self.x, source, slab, target, values)

    def transform_tile(self, slab, rows, at, inputs, target, lanes: int) -> None:
        window = [
            [bind(load(slab, row + column * self.depth + at, lanes)) for column in range(len(rows))]
            for row in rows
        ]
        transformed = in_both_directions(lambda d: transform_inputs(self.tiling, d), window)
        for position, value in enumerate(v for row in transformed for v in row):
            if position in self.offsets:
                value = value - like(self.offsets[position], value, "int16")
            store(inputs, target + position * self.position_step, value, lanes)
