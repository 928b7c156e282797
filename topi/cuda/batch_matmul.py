"""Product of two activations: one thread makes one value, in the order of the CPU kernels.

Grid values of both operands may be anything, so no useful length of a sum on tensor cores is exact for all codes.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.batch_matmul import BatchMatmulShape
from tvm_qfp8.topi.codec import decode_expr
from tvm_qfp8.topi.cuda.float_sum import FloatSum
from tvm_qfp8.topi.cuda.launch import for_each
from tvm_qfp8.topi.float_contract import add, to_float
from tvm_qfp8.topi.prim_func import load, store


def emit_batch_matmul(shape: BatchMatmulShape, x, y, epilogue: Callable) -> None:
    """``epilogue(sum, row, column, valid)``, ``row`` counted over all batches; codes or, without layouts, float32."""

    def one(index) -> None:
        row, column = T.bind(index // shape.columns), T.bind(index % shape.columns)
        batch = T.bind(row // shape.rows)

        def right(k):
            at = column * shape.depth + k if shape.transpose_y else k * shape.columns + column
            return load(y, batch * (shape.depth * shape.columns) + at, 1)

        def left(k):
            return load(x, row * shape.depth + k, 1)

        total = _float_sum(shape, left, right) if shape.x is None else _code_sum(shape, left, right)
        epilogue(total, row, column, 1)

    for_each(shape.batch * shape.rows * shape.columns, one)


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
