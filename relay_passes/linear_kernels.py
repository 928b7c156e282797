"""Kernels whose anchor is a linear operator, and those of products of two activations."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.relay_passes.conv_kernels import conv2d_kernel
from tvm_qfp8.relay_passes.dense_kernels import for_floats, matmul_kernel
from tvm_qfp8.relay_passes.fuse import shape_of
from tvm_qfp8.relay_passes.operands import Emitter, Operands, layout_of
from tvm_qfp8.relay_passes.qfp8_ops import HEADS_INSIDE, logical_shapes, product_scales
from tvm_qfp8.topi.amx.batch_matmul import emit_tile_products, plan_tile_products
from tvm_qfp8.topi.batch_matmul import BatchMatmulShape, Product, emit_batch_matmul
from tvm_qfp8.topi.float_contract import bind, lanes_of, mul
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.prim_func import load
from tvm_qfp8.topi.rows import like_scalar
from tvm_qfp8.topi.schedules import (
    BatchMatmulSchedule,
    ScheduleChooser,
)


def product_of(call) -> Product:
    """The static description of a ``qfp8.batch_matmul`` call."""
    x, y = call.args[:2]
    x_shape, y_shape = ([int(extent) for extent in shape] for shape in logical_shapes(call))
    transpose = bool(call.attrs["transpose_y"])
    shape = BatchMatmulShape(
        int(np.prod(x_shape[:-2], dtype=np.int64)),
        x_shape[-2],
        y_shape[-2] if transpose else y_shape[-1],
        x_shape[-1],
        layout_of(x),
        layout_of(y),
        transpose,
    )
    inside = [bool(call.attrs[name]) for name in HEADS_INSIDE]
    return Product(shape, x_shape[1] if any(inside) else 1, *inside)


def _batch_matmul(
    call, isa: InstructionSet, threads: int, operands: Operands, choose: ScheduleChooser
) -> Emitter:
    x, y = call.args[:2]
    product = product_of(call)
    shape = product.shape
    x_at, y_at = operands.tensor(x), operands.tensor(y)
    scale = product_scale(call, product, operands)
    plan = plan_tile_products(isa, shape)
    if plan is not None:
        emit = functools.partial(emit_tile_products, isa, product, plan, threads=threads)
    else:
        variant, chooser = for_floats(isa, choose) if shape.x is None else (isa, choose)
        schedule = chooser(BatchMatmulSchedule, variant, shape, threads)
        emit = functools.partial(emit_batch_matmul, variant, product, threads=threads, schedule=schedule)

    def body(inputs, finish) -> None:
        def epilogue(total, row, column, valid) -> None:
            finish(scale(inputs, total, row), row, column, isa.lanes, valid)

        emit(inputs[x_at], inputs[y_at], epilogue)

    return body, (product, plan)


def product_scale(call, product: Product, operands: Operands) -> Callable:
    """``(inputs, sums, row of the result) -> values``: what the sums of a product of two activations are multiplied by.

    The scalar, then the scale of x's row or sample, then that of y's sample.
    """
    scalar = operands.scalar(float(call.attrs["scale"]))
    scales = [
        None if found is None else (operands.tensor(found), math.prod(shape_of(found)))
        for found in product_scales(call)
    ]
    rows = product.shape.batch * product.shape.rows

    def scaled_sums(inputs, total, row):
        lanes = lanes_of(total)
        value = bind(mul(total, like_scalar(load(inputs[-1], scalar, 1), lanes)))
        for found in scales:
            if found is not None:
                argument, count = found
                at = product.line_of_result(row) if count == rows else T.bind(row // (rows // count))
                value = bind(mul(value, like_scalar(bind(load(inputs[argument], at, 1)), lanes)))
        return value

    return scaled_sums


LINEAR_ANCHORS: dict[str, Callable] = {
    "relax.qfp8.matmul": matmul_kernel,
    "relax.qfp8.conv2d": conv2d_kernel,
    "relax.qfp8.batch_matmul": _batch_matmul,
}
