"""The rules of ``layout_rules`` for norms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from tvm_qfp8.relay_passes.fuse import op_name, static_shape
from tvm_qfp8.relay_passes.normalize_rows import normalises_channels

ROW_NORMS: dict[str, Callable] = {
    "relax.nn.layer_norm": relax.op.nn.layer_norm,
    "relax.nn.rms_norm": relax.op.nn.rms_norm,
}


def channel_norm(rewriter: Any, _var: relax.Var, value: relax.Call) -> relax.Call | None:
    """LayerNorm and RMSNorm over the channels of each pixel."""
    rank, attrs = len(static_shape(value.args[0]) or ()), value.attrs
    if not rank or [int(axis) % rank for axis in attrs.axes] != [1]:
        return None
    x = rewriter.channels_last(value.args[0], rank)
    scale_shift = [rewriter.expression(operand) for operand in value.args[1:]]
    return ROW_NORMS[op_name(value)](x, *scale_shift, axes=[-1], epsilon=float(attrs.epsilon))


def group_norm(rewriter: Any, _var: relax.Var, value: relax.Call) -> relax.Call | None:
    """GroupNorm, and InstanceNorm, which has a channel in each group; of one group, rows of what is in NHWC.

    Scale and shift are put behind it.
    """
    x, attrs = value.args[0], value.attrs
    shape = static_shape(x)
    constants = [rewriter.constant(operand) for operand in value.args[1:]]
    if not shape or any(constant is None for constant in constants) or not normalises_channels(value):
        return None
    channels, epsilon = shape[1], float(attrs.epsilon)
    groups = channels if op_name(value) == "relax.nn.instance_norm" else int(attrs.num_groups)
    emit = rewriter.builder.emit
    turned = rewriter.channels_last(x, len(shape))
    image = [int(extent) for extent in turned.ty.shape]

    def without_scale(length: int) -> list[relax.Expr]:
        return [relax.const(np.full(length, number, np.float32)) for number in (1.0, 0.0)]

    if groups == 1:
        pixels = math.prod(image[1:])
        rows = emit(relax.op.reshape(turned, (image[0], 1, pixels)))
        rows = emit(relax.op.nn.layer_norm(rows, *without_scale(pixels), axes=2, epsilon=epsilon))
        y = relax.op.reshape(rows, image)
    else:
        y = relax.op.nn.group_norm(
            turned,
            *without_scale(channels),
            num_groups=groups,
            channel_axis=3,
            axes=[1, 2],
            epsilon=epsilon,
            center=False,
            scale=False,
        )
    for constant, operator, used in zip(
        constants, (relax.op.multiply, relax.op.add), (attrs.scale, attrs.center), strict=True
    ):
        if used:
            y = operator(emit(y), constant)
    return y


NORMS: dict[str, Callable] = {
    **dict.fromkeys(ROW_NORMS, channel_norm),
    "relax.nn.group_norm": group_norm,
    "relax.nn.instance_norm": group_norm,
}
