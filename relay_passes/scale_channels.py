"""Convolutions that only multiply each channel by a number become products.

TensorFlow Lite writes a BatchNorm that it could not fold as such a convolution. Before::

    lv = R.nn.conv2d(x, w, groups=16)             # 1x1, w of shape (16, 1, 1, 1)

After::

    lv = R.multiply(x, R.const(w))                # (16,)

As a product it joins what comes before it, and nothing is rounded for its sake. Runs after branches are joined, which
takes it into a larger kernel where it can. One that training has quantized stays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter
from tvm_qfp8.relay_passes.trained import TRAINED


def channel_scales(value: Any) -> np.ndarray | None:
    """What a convolution in NHWC multiplies channels by, float32 ``(channels,)``; None where it does more."""
    if op_name(value) != "relax.nn.conv2d" or str(value.attrs.data_layout) != "NHWC":
        return None
    x, weight = value.args
    if (
        not isinstance(weight, GenericConst)
        or static_shape(x) is None
        or static_shape(x) != static_shape(value)
    ):
        return None
    channels = shape_of(x)[-1]
    plain = not any(map(int, value.attrs.padding)) and [*map(int, value.attrs.strides)] == [1, 1]
    if not plain or int(value.attrs.groups) != channels or shape_of(weight) != (channels, 1, 1, 1):
        return None
    return weight.value.numpy().reshape(-1)


@tvm.transform.module_pass(opt_level=0, name="ScaleChannels")
class ScaleChannels:
    """Rewrite ``main``."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return _Rewriter(mod).rewrite()


class _Rewriter(MainRewriter):
    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        scales = channel_scales(value)
        if scales is None or any(op_name(self.definition[reader]) == TRAINED for reader in self.readers[var]):
            self.keep(var, value)
            return
        call = relax.op.multiply(self.expression(value.args[0]), relax.const(scales))
        self.variables[var] = self.builder.emit(call, var.name)
