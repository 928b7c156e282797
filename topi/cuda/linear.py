"""Which kernel a dense layer or convolution gets, with its plan and its weights as that kernel reads them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tvm_qfp8.topi.conv2d import ConvShape
from tvm_qfp8.topi.cuda import conv_plan, gemv
from tvm_qfp8.topi.cuda.conv_plan import ConvPlan, GroupPlan, IntegerGroupPlan, IntegerPlan
from tvm_qfp8.topi.cuda.direct_conv import emit_direct_conv, pack_direct_weights
from tvm_qfp8.topi.cuda.gemm import emit_conv
from tvm_qfp8.topi.cuda.integer_gemm import emit_integer_conv, pack_integers
from tvm_qfp8.topi.cuda.warpgroup_gemm import emit_group_conv, pack_for_groups
from tvm_qfp8.topi.gemm import GemmShape

Described = ConvPlan | gemv.GemvPlan | ConvShape


def linear_kernel(
    shape: ConvShape, codes: np.ndarray, hopper: bool
) -> tuple[Described, np.ndarray, Callable]:
    """``(described, packed weights, emit)`` with ``emit(described, x, packed weights, epilogue)``.

    Parameters
    ----------
    codes : array of uint8 OHWI
        Of a convolution in codes; a dense layer is one of 1 x 1 over a row of pixels.
    hopper : bool
        The GPU has Hopper's instructions.
    """
    if shape.is_pointwise:
        dense = GemmShape(
            shape.batch * shape.height * shape.width, shape.out_channels, shape.channels, *shape.layouts()
        )
        rows = codes.reshape(shape.out_channels, shape.channels)
        few = gemv.plan_gemv(dense, rows)
        if few is not None:
            return few, gemv.pack_weights(rows, few.depth), gemv.emit_gemv
    plan = conv_plan.plan_conv(shape, codes, hopper)
    if plan is None:
        return shape, pack_direct_weights(codes), emit_direct_conv
    packed = conv_plan.pack_weights(codes, plan.depth)
    if isinstance(plan, IntegerGroupPlan):
        return plan, pack_integers(packed), emit_integer_conv
    if isinstance(plan, GroupPlan):
        return plan, pack_for_groups(packed), emit_group_conv
    if isinstance(plan, IntegerPlan):
        return plan, conv_plan.as_integers(packed), emit_conv
    return plan, packed, emit_conv
