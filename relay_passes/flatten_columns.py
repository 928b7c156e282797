"""Softmax and norms over an axis before the last, as the kernels take them: one axis after it, or none.

Before::

    lv = R.nn.softmax(x, axis=1)                  # x (2, 19, 33, 7)

After::

    lv = R.reshape(x, (2, 19, 231))
    lv1 = R.nn.softmax(lv, axis=1)
    lv2 = R.reshape(lv1, (2, 19, 33, 7))

Runs after ``ChooseLayout``, which may have made the axis the last one.
"""

from __future__ import annotations

import math

import tvm
from tvm import relax, tirx

from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.fuse import normalized_axis, op_name, shape_of
from tvm_qfp8.relay_passes.rewriter import MainRewriter


@tvm.transform.module_pass(opt_level=0, name="FlattenColumns")
class FlattenColumns:
    """Rewrite ``main``."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return _Rewriter(mod).rewrite()


class _Rewriter(MainRewriter):
    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        axis = normalized_axis(value)
        if axis is None or axis == len(shape_of(var)) - 1:
            self.keep(var, value)
            return
        shape = shape_of(var)
        before, inner = shape[:axis], math.prod(shape[axis + 1 :])
        if inner == 1:
            flat: tuple[int, ...] = (*(before or (1,)), shape[axis])
            place = len(flat) - 1
        elif axis == len(shape) - 2:
            self.keep(var, value)
            return
        else:
            flat, place = (math.prod(before), shape[axis], inner), 1
        x = self.builder.emit(relax.op.reshape(self.expression(value.args[0]), flat))
        call = self.builder.emit(_over(value, x, place), var.name)
        self.variables[var] = self.builder.emit(relax.op.reshape(call, shape), f"{var.name}_reshaped")


def _over(value: relax.Call, x: relax.Expr, axis: int) -> relax.Call:
    """The operator of ``value`` on ``x``, over ``axis``."""
    name = op_name(value)
    if name == "relax.nn.softmax":
        return relax.op.nn.softmax(x, axis)
    if name == "relax.nn.log_softmax":
        return relax.op.nn.log_softmax(x, axis)
    if name == "relax.qfp8.l2_normalize":
        floor = value.args[1]
        assert isinstance(floor, tirx.FloatImm)
        return qfp8_ops.l2_normalize(x, float(floor.value), axis)
    epsilon = float(value.attrs.epsilon)
    if name == "relax.nn.rms_norm":
        return relax.op.nn.rms_norm(x, value.args[1], axes=[axis], epsilon=epsilon)
    attrs = value.attrs
    return relax.op.nn.layer_norm(
        x, *value.args[1:], axes=axis, epsilon=epsilon, center=bool(attrs.center), scale=bool(attrs.scale)
    )
