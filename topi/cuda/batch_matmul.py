"""Product of two activations: by warps on tensor cores where no code can make a sum round, else a thread a value.

A warp makes 16 rows of up to 32 columns, codes decoded in registers. Both operands may be anything, so sums go to int32
after as many steps as are exact for the largest grid values; a step is 16 codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.batch_matmul import BatchMatmulShape, Product
from tvm_qfp8.topi.codec import decode_expr
from tvm_qfp8.topi.cuda.device import MMA_COLUMNS, MMA_DEPTH, MMA_ROWS, decode_pairs, grid_exponent, mma
from tvm_qfp8.topi.cuda.float_sum import FloatSum
from tvm_qfp8.topi.cuda.gemm import Accumulators, words_of
from tvm_qfp8.topi.cuda.launch import MANY_BLOCKS, for_each
from tvm_qfp8.topi.exact_sums import EXACT
from tvm_qfp8.topi.float_contract import add, to_float
from tvm_qfp8.topi.prim_func import load, store

WARPS = (4, 1)
"""Of a block, and where tiles are few."""
FRAGMENTS = (4, 2, 1)
"""Times eight columns of a warp: the most that keep a GPU busy."""
UNROLLED = 8
"""Most steps whose loads are on their way together."""
LANE = 4
"""Codes of a step that a thread has of a row: a word."""


def emit_batch_matmul(product: Product, x, y, epilogue: Callable) -> None:
    """``epilogue(sum, row, column, valid)``, ``row`` counted over all batches; codes or, without layouts, float32."""
    shape, steps = product.shape, exact_steps_of_any(product.shape)
    if steps:
        _emit_by_warps(product, steps, x, y, epilogue)
        return

    def one(index) -> None:
        row, column = T.bind(index // shape.columns), T.bind(index % shape.columns)
        batch = T.bind(row // shape.rows)

        def right(k):
            if shape.transpose_y:
                return load(y, product.row_of_y(batch, column) * shape.depth + k, 1)
            return load(y, product.row_of_y(batch, k) * shape.columns + column, 1)

        first = T.bind(product.row_of_x(batch, row % shape.rows) * shape.depth)

        def left(k):
            return load(x, first + k, 1)

        total = _float_sum(shape, left, right) if shape.x is None else _code_sum(shape, left, right)
        epilogue(total, product.row_of_result(batch, row % shape.rows), column, 1)

    for_each(shape.batch * shape.rows * shape.columns, one)


def exact_steps_of_any(shape: BatchMatmulShape) -> int:
    """Steps of a tensor core that are exact for all codes; 0 where none is, or where CPUs add blocks in float32."""
    if shape.x is None or shape.depth > shape.block_depth:
        return 0
    x, y = shape.layouts()
    return (EXACT - 1) // (x.max_grid * y.max_grid) // MMA_DEPTH


def _emit_by_warps(product: Product, exact: int, x, y, epilogue: Callable) -> None:
    shape = product.shape
    layouts = shape.layouts()
    exponent = sum(grid_exponent(layout) for layout in layouts)
    down, steps = -(-shape.rows // MMA_ROWS), -(-shape.depth // MMA_DEPTH)

    def across_with(fragments: int) -> int:
        return -(-shape.columns // (fragments * MMA_COLUMNS))

    sizes = [n for n in FRAGMENTS if n * MMA_COLUMNS < shape.columns + MMA_COLUMNS]
    busy = [n for n in sizes if shape.batch * down * across_with(n) >= MANY_BLOCKS]
    fragments = (busy or sizes[-1:])[0]
    across = across_with(fragments)
    tiles = shape.batch * down * across
    warps = next((n for n in WARPS if tiles // n >= MANY_BLOCKS), WARPS[-1])
    with T.launch_thread("blockIdx.x", -(-tiles // warps)) as block:
        with T.launch_thread("threadIdx.x", 32 * warps) as thread:
            lane = T.bind(thread % 32)
            group, place = T.bind(lane // 4), T.bind(lane % 4)
            tile = T.bind(tirx.min(block * warps + thread // 32, tiles - 1))
            batch, within = T.bind(tile // (down * across)), T.bind(tile % (down * across))
            first_row = T.bind(within // across * MMA_ROWS)
            first_column = T.bind(within % across * (fragments * MMA_COLUMNS))
            rows = [
                T.bind(product.row_of_x(batch, row))
                for row in (tirx.min(first_row + h * 8 + group, shape.rows - 1) for h in range(2))
            ]
            columns = [
                T.bind(tirx.min(first_column + part * MMA_COLUMNS + group, shape.columns - 1))
                for part in range(fragments)
            ]
            left, right = _Rows(shape.depth, x, shape.batch * shape.rows), _right(product, y, batch)
            one_block = steps <= exact
            sums = [Accumulators(4, exponent, one_block) for _ in range(fragments)]
            with (T.unroll if steps <= UNROLLED else T.serial)(0, steps) as step:
                k = T.bind(step * MMA_DEPTH + place * LANE)
                upper, lower = (decode_pairs(left.word(row, k, zero_beyond=True), layouts[0]) for row in rows)
                pixels = [T.bind(v) for v in (upper[0], lower[0], upper[1], lower[1])]
                for column, found in zip(columns, sums, strict=True):
                    T.evaluate(mma(found.floats, 0, pixels, list(decode_pairs(right(column, k), layouts[1]))))
                if not one_block:
                    with T.If(tirx.Or(tirx.floormod(step, exact) == exact - 1, step == steps - 1)):
                        with T.Then():
                            for found in sums:
                                found.empty()
            for index in range(fragments * 4):
                part, h, e = index // 4, index // 2 % 2, index % 2
                row = first_row + h * 8 + group
                column = first_column + part * MMA_COLUMNS + 2 * place + e
                with T.If(tirx.And(row < shape.rows, column < shape.columns)):
                    with T.Then():
                        total = sums[part].value(2 * h + e).astype("int32")
                        at = T.bind(product.row_of_result(batch, row))
                        epilogue(T.bind(to_float(total)), at, T.bind(column), 1)


class _Rows:
    """Codes of which a reduction's neighbours lie side by side, four at a time."""

    def __init__(self, depth: int, buffer, rows: int) -> None:
        self.depth, self.buffer = depth, buffer
        self.words = words_of(buffer, depth * rows) if depth % LANE == 0 else None

    def word(self, row, k, zero_beyond: bool = False):
        """Codes ``k`` to ``k + 3`` of a row as uint32; those beyond the last are 0 or whatever."""
        if self.words is not None:
            at = T.bind((row * self.depth + tirx.min(k, self.depth - LANE)) // LANE)
            value = T.bind(load(self.words, at, 1))
            if zero_beyond and self.depth % MMA_DEPTH:
                return T.bind(tirx.Select(k < self.depth, value, tirx.const(0, "uint32")))
            return value
        start = T.bind(row * self.depth)
        return _word_of(
            lambda i: load(self.buffer, start + tirx.min(k + i, self.depth - 1), 1),
            (lambda i: k + i < self.depth) if zero_beyond else None,
        )


def _right(product: Product, y, batch) -> Callable:
    """``word(column, k)`` of the right operand; beyond the last k the left one is 0."""
    shape = product.shape
    if shape.transpose_y:
        rows = _Rows(shape.depth, y, shape.batch * shape.columns)
        return lambda column, k: rows.word(T.bind(product.row_of_y(batch, column)), k)

    def code(k, column):
        return load(y, product.row_of_y(batch, k) * shape.columns + column, 1)

    return lambda column, k: _word_of(lambda i: code(tirx.min(k + i, shape.depth - 1), column))


def _word_of(code: Callable, keep: Callable | None = None):
    """Four codes as uint32."""
    word: Any = None
    for i in range(LANE):
        byte = code(i).astype("uint32")
        if keep is not None:
            byte = tirx.Select(keep(i), byte, tirx.const(0, "uint32"))
        byte = byte << tirx.const(8 * i, "uint32")
        word = byte if word is None else word | byte
    return T.bind(word)


def _code_sum(shape: BatchMatmulShape, left: Callable, right: Callable):
    """int32 blocks, added in order in float32."""
    x, y = shape.layouts()
    part = T.alloc_buffer((1,), "int32", scope="local")
    total = T.alloc_buffer((1,), "float32", scope="local")
    store(total, 0, tirx.const(0.0, "float32"), 1)

    def block(start, length: int) -> None:
        store(part, 0, tirx.const(0, "int32"), 1)
        with T.serial(0, length) as step:
            product = decode_expr(left(start + step), x, "int32") * decode_expr(
                right(start + step), y, "int32"
            )
            store(part, 0, load(part, 0, 1) + product, 1)
        store(total, 0, add(load(total, 0, 1), to_float(load(part, 0, 1))), 1)

    length = min(shape.block_depth, shape.depth)
    with T.serial(0, shape.depth // length) as index:
        block(index * length, length)
    if shape.depth % length:
        block(shape.depth // length * length, shape.depth % length)
    return T.bind(load(total, 0, 1))


def _float_sum(shape: BatchMatmulShape, left: Callable, right: Callable):
    total = FloatSum()
    with T.serial(0, shape.depth) as step:
        total.add_product(left(step), right(step))
    return total.value()
