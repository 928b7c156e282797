"""Product of two activations (attention), codes or float32: ``(batch, m, k)`` by ``(batch, k, n)`` or its transpose.

Both operands change from call to call, so the right one is decoded into panels at run time. The reduction of codes is
cut into blocks short enough that no int32 sum can overflow for any; blocks are added in float32, in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.format import Layout
from tvm_qfp8.topi.codec import decode_expr
from tvm_qfp8.topi.float_contract import add, dtype_of, to_float, with_lanes
from tvm_qfp8.topi.gemm import MIN_PARALLEL_MACS
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.micro_kernel import RegisterTile
from tvm_qfp8.topi.overflow import INT32_LIMIT
from tvm_qfp8.topi.panels import decode_run, operand_expr, overlapped_start, round_up, zero_run
from tvm_qfp8.topi.prim_func import load, store, vector_runs
from tvm_qfp8.topi.schedules import BatchMatmulSchedule

CACHED_ELEMENTS, TOGETHER_ROWS = 2**17, 12
"""A result that the second cache holds is written panel by panel of columns. Of a larger one a few rows are finished
together: its rows lie on pages of their own, and of a dozen pages the first cache keeps track."""


@dataclass(frozen=True)
class BatchMatmulShape:
    """``(batch, rows, depth) x (batch, depth, columns)``; ``transpose_y``: y is ``(batch, columns, depth)``."""

    batch: int
    rows: int
    columns: int
    depth: int
    x: Layout | None
    y: Layout | None
    """None where both activations are float32."""
    transpose_y: bool

    def layouts(self) -> tuple[Layout, Layout]:
        """Layouts of x and y, where both are quantized."""
        assert self.x is not None and self.y is not None
        return self.x, self.y

    @property
    def block_depth(self) -> int:
        """Longest reduction (even) whose sum cannot overflow int32, whatever the codes; of float32 all."""
        if self.x is None:
            return self.depth
        x, y = self.layouts()
        return (INT32_LIMIT - 1) // (x.max_grid * y.max_grid) // 2 * 2


@dataclass(frozen=True)
class Product:
    """A product, and where the heads of its operands and its result are: the last of the batches, or inside.

    Inside is between the lines and what lies in a line: ``(batch, lines, heads, values)``.
    """

    shape: BatchMatmulShape
    heads: int = 1
    x_inside: bool = False
    y_inside: bool = False
    result_inside: bool = False

    def row_of_x(self, batch, row):
        """The place of a batch's row among all of x."""
        return self._line(self.x_inside, batch, self.shape.rows, row)

    def row_of_y(self, batch, row):
        """The same of y, whose rows are columns of the product if it is transposed, else steps of the reduction."""
        rows = self.shape.columns if self.shape.transpose_y else self.shape.depth
        return self._line(self.y_inside, batch, rows, row)

    def row_of_result(self, batch, row):
        """The same of the result."""
        return self._line(self.result_inside, batch, self.shape.rows, row)

    def line_of_result(self, row):
        """The place that a row of the result has with heads outside."""
        if not self.result_inside:
            return row
        line = T.bind(row // self.heads)
        return T.bind(
            (line // self.shape.rows * self.heads + row % self.heads) * self.shape.rows
            + line % self.shape.rows
        )

    def _line(self, inside: bool, batch, lines: int, line):
        if not inside:
            return batch * lines + line
        return (batch // self.heads * lines + line) * self.heads + batch % self.heads


def emit_batch_matmul(
    isa: InstructionSet,
    product: Product,
    x,
    y,
    epilogue: Callable,
    threads: int,
    schedule: BatchMatmulSchedule,
) -> None:
    """Emit the loops; ``epilogue(sum float32xL, row, column, valid)`` with ``row`` counted over all batches."""
    shape = product.shape
    tile_rows, vectors = schedule.tile_rows, schedule.vectors
    width = vectors * isa.lanes
    depth = round_up(shape.depth, isa.pair)
    steps = depth // isa.pair
    block_steps = max(1, shape.block_depth // isa.pair)
    panel_step = width * isa.pair
    panel_count = -(-shape.columns // width)
    macs = shape.batch * shape.rows * shape.columns * shape.depth
    parallel = threads > 1 and shape.batch > 1 and macs >= MIN_PARALLEL_MACS

    def decode_transposed(batch, panels) -> None:
        row = T.alloc_buffer((depth,), isa.operand, align=64)
        zero_run(isa, row, 0, depth)
        with T.serial(0, panel_count) as panel:
            first = overlapped_start(panel, width, shape.columns)
            with T.serial(0, min(width, shape.columns)) as lane:
                source = product.row_of_y(batch, first + lane) * shape.depth
                decode_run(isa, shape.y, y, source, row, 0, shape.depth)
                start = T.bind(panel * steps * panel_step + lane * isa.pair)
                with T.serial(0, steps) as step:
                    store(panels, start + step * panel_step, load(row, step * isa.pair, isa.pair), isa.pair)

    def decode_straight(batch, panels) -> None:
        """Rows of y are steps of the reduction: neighbouring columns stay neighbours."""

        def columns_of(panel, step) -> None:
            first = overlapped_start(panel, width, shape.columns)

            def emit(offset, lanes):
                at = (panel * steps + step) * panel_step + offset * isa.pair

                def values(k):
                    return load(y, product.row_of_y(batch, k) * shape.columns + first + offset, lanes)

                if isa.pair == 1:
                    store(panels, at, operand_expr(isa, shape.y, values(step)), lanes)
                    return

                def grid(k):
                    return decode_expr(values(k), shape.layouts()[1], "int32", isa)

                lane32 = with_lanes("int32", lanes)
                low = grid(2 * step) & tirx.const(0xFFFF, lane32)
                high = tirx.const(0, lane32)
                if shape.depth % 2 == 0:
                    high = grid(2 * step + 1) << tirx.const(16, lane32)
                else:
                    # An odd last row has no partner: read it again and take nothing of it.
                    partner = tirx.min(2 * step + 1, shape.depth - 1)
                    keep = tirx.Select(
                        2 * step + 1 < shape.depth, tirx.const(-1, "int32"), tirx.const(0, "int32")
                    )
                    mask = tirx.Broadcast(keep, lanes) if lanes > 1 else keep
                    high = (grid(partner) & mask) << tirx.const(16, lane32)
                pairs = tirx.reinterpret(with_lanes("int16", 2 * lanes), low | high)
                store(panels, at, pairs, 2 * lanes)

            vector_runs(min(width, shape.columns), isa.lanes, emit)

        with T.serial(0, steps) as step:
            with T.serial(0, panel_count) as panel:
                columns_of(panel, step)

    valid_vectors = [
        min(isa.lanes, shape.columns - at) for at in range(0, min(width, shape.columns), isa.lanes)
    ]

    def tile(scratch, panels, batch, first_row, panel, first_column) -> None:
        lanes = isa.lanes
        single = steps <= block_steps
        totals = None
        if not single:
            totals = T.alloc_buffer((tile_rows * vectors * lanes,), "float32", scope="local")
            for index in range(tile_rows * vectors):
                store(totals, index * lanes, tirx.const(0.0, with_lanes("float32", lanes)), lanes)

        def block(first_step, count: int) -> RegisterTile:
            registers = RegisterTile(isa, tile_rows, vectors)

            starts = [(first_row + i) * depth + first_step * isa.pair for i in range(tile_rows)]
            base = (panel * steps + first_step) * panel_step

            def load_weights(k, j):
                return T.bind(load(panels, base + k * panel_step + j * lanes * isa.pair, lanes * isa.pair))

            registers.reduce(scratch, starts, count, schedule.unroll, load_weights)
            return registers

        def add_block(first_step, count: int) -> None:
            registers = block(first_step, count)
            for i in range(tile_rows):
                for j in range(vectors):
                    at = (i * vectors + j) * lanes
                    store(totals, at, add(load(totals, at, lanes), to_float(registers.value(i, j))), lanes)

        if single:
            registers = block(0, steps)
        else:
            with T.serial(0, steps // block_steps) as b:
                add_block(b * block_steps, block_steps)
            if steps % block_steps:
                add_block(steps // block_steps * block_steps, steps % block_steps)
        for i in range(tile_rows):
            for j, valid in enumerate(valid_vectors):
                at = (i * vectors + j) * lanes
                value = registers.value(i, j) if single else load(totals, at, lanes)
                value = to_float(value) if dtype_of(value).startswith("int32") else value
                epilogue(value, product.row_of_result(batch, first_row + i), first_column + j * lanes, valid)

    with (T.parallel if parallel else T.serial)(0, shape.batch) as batch:
        scratch = T.alloc_buffer((shape.rows * depth,), isa.operand, align=64)
        with T.serial(0, shape.rows) as row:
            source = product.row_of_x(batch, row) * shape.depth
            decode_run(isa, shape.x, x, source, scratch, row * depth, shape.depth)
            zero_run(isa, scratch, row * depth + shape.depth, depth - shape.depth)
        panels = T.alloc_buffer((panel_count * depth * width,), isa.operand, align=64)
        if shape.columns < width:
            zero_run(isa, panels, 0, panel_count * depth * width)
        (decode_transposed if shape.transpose_y else decode_straight)(batch, panels)

        def finish_tiles(first, count) -> None:
            with T.serial(0, panel_count) as panel:
                first_column = overlapped_start(panel, width, shape.columns)
                with T.serial(0, count) as t:
                    first_row = overlapped_start(first + t, tile_rows, shape.rows)
                    tile(scratch, panels, batch, first_row, panel, first_column)

        tiles = -(-shape.rows // tile_rows)
        if shape.rows * shape.columns <= CACHED_ELEMENTS:
            finish_tiles(0, tiles)
        else:
            together = min(tiles, max(1, TOGETHER_ROWS // tile_rows))
            with T.serial(0, tiles // together) as block:
                finish_tiles(T.bind(block * together), together)
            if tiles % together:
                finish_tiles(tiles - tiles % together, tiles % together)
