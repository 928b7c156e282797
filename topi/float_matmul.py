"""Product of two float32 activations that were left out of quantization; reproducible like ``float_linear``."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.batch_matmul import BatchMatmulShape
from tvm_qfp8.topi.float_contract import LANES, with_lanes
from tvm_qfp8.topi.float_linear import LaneAccumulators
from tvm_qfp8.topi.gemm import MIN_PARALLEL_MACS
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import round_up
from tvm_qfp8.topi.prim_func import load, store, vector_runs


def emit_float_batch_matmul(
    isa: InstructionSet, shape: BatchMatmulShape, x, y, epilogue: Callable, threads: int
) -> None:
    """Emit the loops; ``epilogue(sum float32xL, row, column, valid)`` with ``row`` counted over all batches."""
    lanes = isa.lanes
    depth = round_up(shape.depth, LANES)
    macs = shape.batch * shape.rows * shape.columns * shape.depth
    parallel = threads > 1 and shape.batch > 1 and macs >= MIN_PARALLEL_MACS

    def zero(target, length: int) -> None:
        vector_runs(
            length, lanes, lambda o, n: store(target, o, tirx.const(0.0, with_lanes("float32", n)), n)
        )

    def fill_panel(batch, column: int, valid: int, panel) -> None:
        """Columns ``column ..`` of y as ``(depth, lanes)``."""
        start = batch * shape.depth * shape.columns
        with T.serial(0, shape.depth) as k:
            for lane in range(valid):
                if shape.transpose_y:
                    value = load(y, start + (column + lane) * shape.depth + k, 1)
                else:
                    value = load(y, start + k * shape.columns + column + lane, 1)
                store(panel, k * lanes + lane, value, 1)

    with (T.parallel if parallel else T.serial)(0, shape.batch) as batch:
        rows = T.alloc_buffer((shape.rows * depth,), "float32", align=64)
        zero(rows, shape.rows * depth)
        with T.serial(0, shape.rows) as row:
            source = (batch * shape.rows + row) * shape.depth
            vector_runs(
                shape.depth, lanes, lambda o, n: store(rows, row * depth + o, load(x, source + o, n), n)
            )
        panel = T.alloc_buffer((depth * lanes,), "float32", align=64)
        for column in range(0, shape.columns, lanes):
            valid = min(lanes, shape.columns - column)
            zero(panel, depth * lanes)
            fill_panel(batch, column, valid, panel)
            with T.serial(0, shape.rows) as row:
                sums = LaneAccumulators(lanes)
                with T.serial(0, depth // LANES) as k:
                    sums.add_products(rows, row * depth + k * LANES, panel, k * LANES * lanes)
                epilogue(sums.total(), batch * shape.rows + row, column, valid)
