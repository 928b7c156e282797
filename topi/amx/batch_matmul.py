"""Products of two activations on tiles, as bfloat16: both operands are brought into the tiles' order at run time."""

from __future__ import annotations

import functools
from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.amx.decode import decode_for_tiles, operands_of
from tvm_qfp8.topi.amx.panels import Panels
from tvm_qfp8.topi.amx.plan import TilePlan, best_block, exact_blocks, fits_tiles, scratch_row
from tvm_qfp8.topi.amx.sums import emit_sums, sum_buffers
from tvm_qfp8.topi.amx.tiles import BFLOAT16, ROWS, tile_buffer, with_tiles
from tvm_qfp8.topi.batch_matmul import BatchMatmulShape, Product
from tvm_qfp8.topi.exact_sums import EXACT
from tvm_qfp8.topi.float_contract import bind, dtype_of, to_float, with_lanes
from tvm_qfp8.topi.gemm import MIN_PARALLEL_MACS
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import overlapped_start, round_up, zero_run
from tvm_qfp8.topi.prim_func import load, store

PAIR = BFLOAT16.pair


def plan_tile_products(isa: InstructionSet, shape: BatchMatmulShape) -> TilePlan | None:
    """The plan for a product of codes; None where sums are too long for int32."""
    extents = shape.batch, shape.columns, shape.depth
    if shape.rows < 2 or not fits_tiles(isa, (shape.x, shape.y), *extents) or shape.depth > shape.block_depth:
        return None
    x, y = shape.layouts()
    chunks = -(-shape.depth // BFLOAT16.most)
    steps = round_up(-(-shape.depth // chunks), 4)
    block, shift = exact_blocks(
        chunks, x, lambda count, largest: count * steps * largest * y.max_grid < EXACT
    )
    tiles = -(-shape.rows // ROWS)
    rows = -(-shape.rows // tiles)
    column_bytes = block * steps * ROWS * BFLOAT16.element_bytes
    block_of_tiles = best_block((tiles, -(-shape.columns // ROWS)), rows, block, column_bytes)
    return TilePlan(BFLOAT16, rows, *block_of_tiles, shape.depth, 1, steps, block, shift)


class ActivationPanels(Panels):
    """All of the right operand lies in a buffer."""

    def start(self, buffer, _first_panel, _count):
        return buffer

    def next_slice(self, *_arguments) -> None:
        """Nothing is left to decode."""

    def place(self, first_panel, unit):
        return first_panel * self.plan.blocks + unit


def emit_tile_products(
    isa: InstructionSet, product: Product, plan: TilePlan, x, y, epilogue: Callable, threads: int
) -> None:
    """Emit the kernel; ``epilogue(sum float32x16, row, column, valid)`` as in ``batch_matmul.py``."""
    shape = product.shape
    registers = plan.registers
    x_layout, y_layout = shape.layouts()
    panels = ActivationPanels(plan, shape.columns)
    width, depth = registers.width, plan.products * plan.steps
    row_size = scratch_row(depth * plan.parts, BFLOAT16)
    groups = -(-shape.rows // registers.all_rows)
    macs = shape.batch * shape.rows * shape.columns * shape.depth
    parallel = threads > 1 and shape.batch > 1 and macs >= MIN_PARALLEL_MACS

    def place(panel, step, column):
        """Where in the panels the pair of steps from ``step`` of a column lies."""
        return panel * (depth * width) + step * width + column * PAIR

    def decode_rows(layout, source, row_of: Callable, rows: int, target, parts, together: bool) -> None:
        """So many rows of an operand whose rows are steps of the reduction; ``row_of(row)`` is their place.

        ``together``: one lies behind the other.
        """
        if row_size == shape.depth and together:
            decode_for_tiles(BFLOAT16, layout, source, row_of(0) * shape.depth, target, 0, rows * row_size)
            return
        with T.serial(0, rows) as row:
            start = T.bind(row_of(row) * shape.depth)
            for index, part in enumerate(parts):
                at = row * row_size + index * depth
                decode_for_tiles(BFLOAT16, layout, source, start, target, at, shape.depth, part)
                zero_run(isa, target, at + shape.depth, depth - shape.depth)

    def turn_columns(batch, turned, panels_buffer) -> None:
        """y is ``(columns, depth)``: 16 of its rows at a time, turned as a matrix of pairs."""
        with T.serial(0, panels.count) as panel:
            first = overlapped_start(panel, width, shape.columns)
            for vector, valid in enumerate(panels.valid):
                first_row = T.bind(first + vector * ROWS)

                def row_of(row, first_row=first_row):
                    return product.row_of_y(batch, first_row + row)

                decode_rows(y_layout, y, row_of, valid, turned, [None], not product.y_inside)
                with T.serial(0, -(-depth // BFLOAT16.most)) as chunk:
                    at = T.bind(chunk * BFLOAT16.most)
                    rows = [
                        bind(tirx.reinterpret("int32x16", load(turned, row * row_size + at, BFLOAT16.most)))
                        for row in range(ROWS)
                    ]
                    for pair, column in enumerate(transposed(rows)):
                        # Steps beyond the depth belong to the next panel, which is written later.
                        target = place(panel, at + pair * PAIR, vector * ROWS)
                        store(panels_buffer, target, tirx.reinterpret("uint16x32", column), BFLOAT16.most)

    def pair_rows(batch, _turned, panels_buffer) -> None:
        """y is ``(depth, columns)``: two of its rows at a time, element beside element."""
        with T.serial(0, panels.count) as panel:
            first = overlapped_start(panel, width, shape.columns)

            def pair(step, both: bool) -> None:
                vector = 0
                while vector < len(panels.valid):
                    # Two whole vectors are as many codes as are looked up at once.
                    count = 2 if panels.valid[vector : vector + 2] == [ROWS, ROWS] else 1
                    lanes = count * ROWS
                    column = first + vector * ROWS

                    def codes_of(row, column=column, valid=panels.valid[vector], lanes=lanes):
                        return _codes(y, product.row_of_y(batch, row) * shape.columns + column, valid, lanes)

                    rows = [codes_of(step)]
                    if both:
                        rows.append(codes_of(step + 1))
                    else:
                        rows.append(tirx.const(0, with_lanes("uint8", lanes)))
                    order = [half * lanes + lane for lane in range(lanes) for half in (0, 1)]
                    codes = bind(tirx.Shuffle(rows, [tirx.const(i, "int32") for i in order]))
                    for at, values in operands_of(BFLOAT16, y_layout, codes):
                        target = place(panel, step, vector * ROWS) + at
                        store(panels_buffer, target, values, BFLOAT16.most)
                    vector += count

            with T.serial(0, shape.depth // PAIR) as index:
                pair(T.bind(index * PAIR), both=True)
            if shape.depth % PAIR:
                pair(shape.depth - 1, both=False)
            rest = round_up(shape.depth, PAIR)
            zero_run(isa, panels_buffer, place(panel, rest, 0), (depth - rest) * width)

    def some(first_batch, count) -> None:
        operands = tile_buffer(groups * registers.all_rows * row_size, BFLOAT16.dtype)
        turned = tile_buffer(ROWS * row_size + BFLOAT16.most, BFLOAT16.dtype) if shape.transpose_y else None
        # Steps beyond the depth of the last panel are written, too.
        panels_buffer = tile_buffer((panels.count * depth + BFLOAT16.most) * width, BFLOAT16.dtype)
        sums = sum_buffers(plan, groups)
        with T.serial(0, count) as index:
            batch = T.bind(first_batch + index)
            decode_rows(
                x_layout,
                x,
                functools.partial(product.row_of_x, batch),
                shape.rows,
                operands,
                plan.decoded_parts,
                not product.x_inside,
            )
            (turn_columns if shape.transpose_y else pair_rows)(batch, turned, panels_buffer)
            one(batch, operands, panels_buffer, sums)

    def one(batch, operands, panels_buffer, sums) -> None:
        def first_of(group):
            return overlapped_start(group, registers.all_rows, shape.rows)

        def rows_of(group, product, part):
            at = T.bind(first_of(group) * row_size + part * depth + product * plan.steps)
            return lambda tile: (operands, at + tile * (plan.rows * row_size), row_size)

        def finish(panel, group, row):
            first_column = overlapped_start(panel, width, shape.columns)
            at = T.bind(product.row_of_result(batch, first_of(group) + row))

            def column(vector, total) -> None:
                value = to_float(total) if dtype_of(total).startswith("int32") else total
                epilogue(value, at, first_column + vector * ROWS, panels.valid[vector])

            return column

        rows = min(registers.all_rows, shape.rows)
        emit_sums(panels, panels_buffer, (0, panels.count), sums, groups, rows, rows_of, finish)

    with_tiles(lambda: registers.share(shape.batch, threads if parallel else 1, some))


def _codes(y, at, valid: int, lanes: int):
    """Neighbouring codes; zeros beyond the first ``valid`` if those are fewer than a vector."""
    if valid == ROWS:
        return load(y, at, lanes)
    found = [load(y, at + lane, 1) for lane in range(valid)] + [tirx.const(0, "uint8")] * (ROWS - valid)
    return tirx.Shuffle(found, [tirx.const(i, "int32") for i in range(ROWS)])


def transposed(rows: list) -> list:
    """16 vectors of 16 numbers, as a matrix turned: four rounds of exchanges between two vectors each."""
    for distance in (1, 2, 4, 8):
        rows = [_exchanged(rows, index, distance) for index in range(len(rows))]
    return rows


def _exchanged(rows: list, index: int, distance: int):
    """Of vectors ``distance`` apart: where the lane's bit differs from the vector's, its partner's lane across."""
    high = bool(index & distance)
    a, b = (rows[index - distance], rows[index]) if high else (rows[index], rows[index + distance])
    order = []
    for lane in range(ROWS):
        across = bool(lane & distance)
        if high:
            order.append(16 + lane if across else lane + distance)
        else:
            order.append(16 + lane - distance if across else lane)
    return bind(tirx.Shuffle([a, b], [tirx.const(i, "int32") for i in order]))
