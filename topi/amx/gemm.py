"""Dense layers and 1x1 convolutions on tiles.

Activations of a block of rows become operands in scratch, or are read where they lie if their codes are the bytes to
multiply; likewise the weights of a panel. Sums of a block of tiles go through memory to the epilogue.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.format import decode_grid
from tvm_qfp8.topi.amx.decode import decode_for_tiles
from tvm_qfp8.topi.amx.plan import TilePlan, plan_tiles, tile_kind
from tvm_qfp8.topi.amx.sums import add_products, for_each_sum, sums_buffer
from tvm_qfp8.topi.amx.tiles import BFLOAT16, with_tiles
from tvm_qfp8.topi.gemm import MIN_PARALLEL_MACS, GemmShape
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import balanced_blocks, overlapped_start, pack_panels, zero_run
from tvm_qfp8.topi.prim_func import prefetch_run
from tvm_qfp8.topi.schedules import REGISTER_DECODE_ROWS

SCRATCH_BYTES = 512 * 1024
"""Operands of a block of rows: a quarter of these CPUs' second-level cache."""


FEW_ROWS = REGISTER_DECODE_ROWS
"""Up to so many rows the time is that of reading and decoding weights."""


def plan_tile_gemm(isa: InstructionSet, shape: GemmShape, codes: np.ndarray) -> TilePlan | None:
    """The plan for a dense layer of weight ``codes`` ``(columns, depth)``; None where other kernels are better."""
    if not isa.tiles or shape.activation is None or shape.weight is None or shape.rows <= FEW_ROWS:
        return None
    kind = tile_kind(shape.activation, shape.weight)
    return plan_tiles(kind, codes[:, None], shape.layouts(), shape.rows, shape.columns)


def pack_tile_weights(plan: TilePlan, layout, codes: np.ndarray) -> np.ndarray:
    """Codes ``(columns, runs, run)`` -> panels as tiles read them, uint8 ``(panels, size)``; bytes to multiply if linear."""
    padded = np.zeros((len(codes), plan.runs, plan.chunks * plan.steps), np.uint8)
    padded[:, :, : plan.run] = codes
    if plan.kind is not BFLOAT16:
        padded = decode_grid(padded, layout).astype(np.int8).view(np.uint8)
    panels = pack_panels(padded.reshape(len(codes), -1), plan.registers.width, plan.kind.pair)
    return panels.reshape(len(panels), -1)


def emit_tile_gemm(
    isa: InstructionSet, shape: GemmShape, plan: TilePlan, x, panels, epilogue: Callable, threads: int
) -> None:
    """Emit the kernel; ``epilogue(acc, row, column, valid)`` as in ``gemm.py``."""
    with_tiles(lambda: _emit(isa, shape, plan, x, panels, epilogue, threads))


def _emit(isa, shape, plan, x, panels, epilogue, threads) -> None:
    kind, registers = plan.kind, plan.registers
    activation, weight = shape.layouts()
    # Rows of scratch start an odd number of cache lines apart, so that those of a tile use different sets.
    row_lines = -(-plan.depth * kind.element_bytes // 64) | 1
    row_size = row_lines * 64 // kind.element_bytes
    width = registers.width
    count = -(-shape.columns // width)
    panel_size = plan.depth * width
    valid = [min(16, shape.columns - at) for at in range(0, min(width, shape.columns), 16)]

    parallel = threads > 1 and shape.rows * shape.columns * shape.depth >= MIN_PARALLEL_MACS
    by_rows = parallel and shape.rows >= 2 * threads * 48
    most = max(registers.all_rows, SCRATCH_BYTES // (row_size * kind.element_bytes))
    if by_rows:
        most = min(most, -(-shape.rows // threads))
    block_rows, blocks = balanced_blocks(shape.rows, most, registers.all_rows)
    groups = -(-block_rows // registers.all_rows)
    codes_are_bytes = kind is not BFLOAT16 and not activation.signed
    in_place = codes_are_bytes and plan.depth == shape.depth and block_rows >= registers.all_rows

    def panel_of_block(panel, first_row, operands, row_stride) -> None:
        first_column = overlapped_start(panel, width, shape.columns)
        if kind is BFLOAT16:
            weights, start = T.alloc_buffer((panel_size,), kind.dtype, align=64), 0
            decode_for_tiles(isa, kind, weight, panels, panel * panel_size, weights, 0, panel_size)
        else:
            weights, start = panels, T.bind(panel * panel_size)
        sums = sums_buffer(plan)
        with T.serial(0, groups) as group:
            row = overlapped_start(group, registers.all_rows, block_rows)
            if kind is BFLOAT16:
                length = -(-panel_size // groups)
                prefetch_run(panels, (panel + 1) * panel_size + group * length, length)

            def activations(product):
                return lambda tile: (
                    operands,
                    (row + tile * registers.rows) * row_stride + product * plan.steps,
                    row_stride,
                )

            def columns(product):
                at = start + product * (plan.steps * width)
                return lambda tile: (weights, at + tile * (16 * kind.pair), width * kind.pair)

            add_products(plan, sums, activations, columns)

            def finish(r, column, total) -> None:
                epilogue(total, first_row + row + r, first_column + column * 16, valid[column])

            for_each_sum(plan, sums, min(registers.all_rows, block_rows), len(valid), finish)

    def block(index) -> None:
        first_row = overlapped_start(index, block_rows, shape.rows)
        if in_place:
            operands = T.decl_buffer(
                (block_rows * shape.depth,),
                "uint8",
                data=x.data,
                elem_offset=T.bind(first_row * shape.depth) if blocks > 1 else 0,
            )
            row_stride = shape.depth
        else:
            rows = groups * registers.all_rows
            operands, row_stride = T.alloc_buffer((rows * row_size,), kind.dtype, align=64), row_size
            with T.serial(0, block_rows) as row:
                at = row * row_size
                source = (first_row + row) * shape.depth
                decode_for_tiles(isa, kind, activation, x, source, operands, at, shape.depth)
                zero_run(isa, operands, at + shape.depth, plan.depth - shape.depth)
        if parallel and not by_rows:
            with T.parallel(0, count) as panel:
                registers.configure()
                panel_of_block(panel, first_row, operands, row_stride)
                registers.release()
        else:
            registers.configure()
            with T.serial(0, count) as panel:
                panel_of_block(panel, first_row, operands, row_stride)
            registers.release()

    if blocks == 1:
        block(0)
    else:
        with (T.parallel if by_rows else T.serial)(0, blocks) as index:
            block(index)
