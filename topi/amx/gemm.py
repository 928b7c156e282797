"""Dense layers and 1x1 convolutions on tiles.

Activations of a block of rows become operands in scratch, or are read where they lie if their codes are the bytes to
multiply.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.amx.decode import decode_for_tiles
from tvm_qfp8.topi.amx.panels import WeightPanels
from tvm_qfp8.topi.amx.plan import SCRATCH_BYTES, TilePlan, fits_tiles, plan_tiles, scratch_row, shares_rows
from tvm_qfp8.topi.amx.sums import emit_sums, sum_buffers
from tvm_qfp8.topi.amx.tiles import BFLOAT16, UNSIGNED, tile_buffer, with_tiles
from tvm_qfp8.topi.gemm import MIN_PARALLEL_MACS, GemmShape
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import overlapped_start, zero_run
from tvm_qfp8.topi.schedules import REGISTER_DECODE_ROWS
from tvm_qfp8.topi.sharing import shared_blocks


def plan_tile_gemm(isa: InstructionSet, shape: GemmShape, codes: np.ndarray) -> TilePlan | None:
    """The plan for a dense layer of weight ``codes`` ``(columns, depth)``; None where other kernels are better.

    With few rows the time is that of reading and decoding weights.
    """
    operands = shape.activation, shape.weight
    if shape.rows <= REGISTER_DECODE_ROWS or not fits_tiles(isa, operands, shape.columns, shape.depth):
        return None
    return plan_tiles(codes[:, None], shape.layouts(), shape.rows)


def emit_tile_gemm(
    isa: InstructionSet, shape: GemmShape, plan: TilePlan, x, packed, epilogue: Callable, threads: int
) -> None:
    """Emit the kernel; ``epilogue(acc, row, column, valid)`` as in ``gemm.py``."""
    kind, registers = plan.kind, plan.registers
    activation, weight = shape.layouts()
    panels = WeightPanels(plan, shape.columns, weight)
    depth = plan.real_products * plan.steps
    row_size = scratch_row(depth * plan.parts, kind)

    parallel = threads > 1 and shape.rows * shape.columns * shape.depth >= MIN_PARALLEL_MACS
    weight_bytes, activation_bytes = shape.columns * shape.depth, shape.rows * shape.depth
    by_rows = (
        parallel
        and -(-shape.rows // registers.all_rows) >= threads
        # Each thread decodes what it reads, of weights and of activations.
        and (shape.columns <= shape.rows if kind is BFLOAT16 else shares_rows(weight_bytes, activation_bytes))
    )
    most = max(registers.all_rows, SCRATCH_BYTES // (row_size * kind.element_bytes))
    block_rows, blocks = shared_blocks(shape.rows, most, threads if by_rows else 1, registers.all_rows)
    groups = -(-block_rows // registers.all_rows)
    in_place = kind is UNSIGNED and depth == shape.depth and block_rows >= registers.all_rows
    rows = min(registers.all_rows, block_rows)

    def products(panel_range: tuple, first_row, operands, row_stride) -> None:
        def first_of(group):
            return overlapped_start(group, registers.all_rows, block_rows)

        def rows_of(group, product, part):
            at = T.bind(first_of(group) * row_stride + part * depth + product * plan.steps)
            return lambda tile: (operands, at + tile * (plan.rows * row_stride), row_stride)

        def finish(panel, group, row):
            first_column = overlapped_start(panel, registers.width, shape.columns)
            at = T.bind(first_row + first_of(group) + row)
            return lambda column, total: epilogue(
                total, at, first_column + panels.starts[column], panels.valid[column]
            )

        emit_sums(panels, packed, panel_range, sum_buffers(plan, groups), groups, rows, rows_of, finish)

    def decode_rows(operands, first_row) -> None:
        with T.serial(0, block_rows) as row:
            source = (first_row + row) * shape.depth
            for index, part in enumerate(plan.decoded_parts):
                at = row * row_size + index * depth
                decode_for_tiles(kind, activation, x, source, operands, at, shape.depth, part)
                zero_run(isa, operands, at + shape.depth, depth - shape.depth)

    def operands_of(first_row) -> tuple:
        """(buffer, elements from row to row) of a block of rows."""
        if in_place:
            offset = T.bind(first_row * shape.depth) if blocks > 1 else 0
            size = block_rows * shape.depth
            return T.decl_buffer((size,), "uint8", data=x.data, elem_offset=offset), shape.depth
        operands = tile_buffer(groups * registers.all_rows * row_size, kind.dtype)
        if row_size == shape.depth:
            source = first_row * shape.depth
            decode_for_tiles(kind, activation, x, source, operands, 0, block_rows * shape.depth)
        else:
            decode_rows(operands, first_row)
        return operands, row_size

    def block(index) -> None:
        first_row = overlapped_start(index, block_rows, shape.rows)

        def part(*panel_range) -> None:
            # Each thread decodes for itself: to wait for another's cache takes longer.
            products(panel_range, first_row, *operands_of(first_row))

        registers.share(panels.count, threads if parallel and not by_rows else 1, part)

    def body() -> None:
        if blocks == 1:
            block(0)
            return
        with (T.parallel if by_rows else T.serial)(0, blocks) as index:
            block(index)

    with_tiles(body)
