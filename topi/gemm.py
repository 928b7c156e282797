"""Dense layers: ``(rows, depth)`` times weight panels, of codes exactly in int32, then the epilogue.

Activations of a block of rows are decoded once into scratch (float32 ones stay where they are); a weight panel is
decoded into cache and reused by every tile of the block. With few rows (batch 1) there is nothing to reuse: weights are
decoded in registers. Parallel over blocks of rows, or over panels where there are few rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.format import Layout
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.matrix_kernel import decode_row_of_pair, register_tile
from tvm_qfp8.topi.panels import (
    PanelShape,
    PanelWeights,
    decode_operand,
    for_each_panel,
    overlapped_start,
    round_up,
    zero_run,
)
from tvm_qfp8.topi.schedules import GemmSchedule
from tvm_qfp8.topi.sharing import shared_blocks

MIN_PARALLEL_MACS = 1_500_000
"""Below this a parallel region (about 7 us) costs more than it gives."""


@dataclass(frozen=True)
class GemmShape:
    """``(rows, depth) x (depth, columns)`` and the layouts of both operands."""

    rows: int
    columns: int
    depth: int
    activation: Layout | None
    """None for float32, likewise the weight's."""
    weight: Layout | None

    def layouts(self) -> tuple[Layout, Layout]:
        """Layouts of activation and weight, where both are quantized."""
        assert self.activation is not None and self.weight is not None
        return self.activation, self.weight


def emit_gemm(
    isa: InstructionSet,
    shape: GemmShape,
    x,
    panels,
    epilogue: Callable,
    threads: int,
    schedule: GemmSchedule,
) -> None:
    """Emit the loops. ``epilogue(acc, row, column, valid)`` finishes and stores one vector of sums.

    ``valid`` is the number of lanes that are real columns (the last panel may be padded).
    """
    tile_rows, vectors = schedule.tile_rows, schedule.vectors
    depth = round_up(shape.depth, isa.pair)
    panel_shape = PanelShape(shape.columns, depth, vectors, shape.weight)
    parallel = threads > 1 and shape.rows * shape.columns * shape.depth >= MIN_PARALLEL_MACS

    by_rows = parallel and schedule.parallel_rows
    most = max(tile_rows, schedule.scratch_bytes // (isa.operand_bytes * depth))
    block_rows, blocks = shared_blocks(shape.rows, most, threads if by_rows else 1, tile_rows)
    # Where rows go in pairs, an odd block computes its last row twice.
    stored_rows = round_up(block_rows, isa.row_group)
    part_size = stored_rows * depth

    # Codes that are the bytes to multiply need no scratch.
    as_they_are = isa.takes(shape.activation) and depth == shape.depth

    def row_of(row):
        return row if stored_rows == block_rows else T.bind(tirx.min(row, block_rows - 1))

    def decode_block(first_row, scratch) -> None:
        parts = isa.split.activation_parts if isa.split else None

        if isa.split is not None and isa.row_group > 1:
            activation, _ = shape.layouts()
            with T.serial(0, stored_rows) as row:
                source = (first_row + row_of(row)) * shape.depth
                split = isa.split, isa.split.activation_parts
                decode_row_of_pair(activation, *split, x, source, scratch, row, shape.depth, depth, part_size)
            return

        def decode(source_at, target_at, length: int) -> None:
            decode_operand(isa, shape.activation, parts, x, source_at, scratch, target_at, length, part_size)

        if depth == shape.depth:
            decode(first_row * depth, 0, block_rows * depth)
            return
        with T.serial(0, block_rows) as row:
            decode((first_row + row) * shape.depth, row * depth, shape.depth)
            for part in range(isa.activation_parts):
                end = part * part_size + row * depth + shape.depth
                zero_run(isa, scratch, end, depth - shape.depth)

    def tile(scratch, first_row, row_in_block, weights: PanelWeights) -> None:
        registers = register_tile(isa, tile_rows, vectors)
        for product in range(isa.products):
            groups = range(0, tile_rows, isa.row_group)
            first = isa.activation_part(product) * part_size
            starts = [first + (row_in_block + i) * depth for i in groups]

            def load_weights(step, vector, product=product):
                return weights.load(step, vector, product)

            registers.reduce(scratch, starts, depth // isa.pair, schedule.unroll, load_weights, product)
        for i in range(tile_rows):
            for j, valid in enumerate(weights.valid):
                row = first_row + row_of(row_in_block + i)
                total = weights.without_offset(registers.value(i, j), j)
                epilogue(total, row, weights.column(j), valid)

    def tiles_of_block(body: Callable, prefetch: Callable | None = None) -> None:
        tiles = -(-stored_rows // tile_rows)
        with T.serial(0, tiles) as t:
            if prefetch is not None:
                prefetch(t, tiles)
            body(overlapped_start(t, tile_rows, stored_rows))

    def block(index) -> None:
        first_row = overlapped_start(index, block_rows, shape.rows)
        if as_they_are:
            scratch = T.decl_buffer(
                (part_size,),
                str(x.dtype),
                data=x.data,
                elem_offset=T.bind(first_row * depth) if blocks > 1 else 0,
            )
        else:
            scratch = T.alloc_buffer((isa.activation_parts * part_size,), isa.operand_dtype, align=64)
            decode_block(first_row, scratch)

        def walk_panels(body: Callable, loop=T.serial) -> None:
            for_each_panel(isa, panel_shape, panels, body, loop=loop, in_registers=schedule.register_decode)

        loop = T.parallel if parallel and not by_rows else T.serial
        if schedule.rows_outer and loop is T.serial:
            tiles_of_block(lambda row: walk_panels(lambda weights: tile(scratch, first_row, row, weights)))
        else:

            def panel(weights: PanelWeights) -> None:
                # A panel that is only run through once the processor fetches by itself.
                ahead = None if schedule.register_decode else weights.prefetch_next
                tiles_of_block(lambda row: tile(scratch, first_row, row, weights), ahead)

            walk_panels(panel, loop)

    if blocks == 1:
        block(0)
    else:
        with (T.parallel if by_rows else T.serial)(0, blocks) as index:
            block(index)
