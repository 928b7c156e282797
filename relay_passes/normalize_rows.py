"""Every normalisation as one over the last axis, which is what the row kernels compute.

Runs after ``RecognizeNorms``. Before::

    lv = R.nn.group_norm(x, gamma, beta, num_groups=4, channel_axis=1, axes=[2, 3])   # x (2, 8, 5, 5)

After::

    lv = R.reshape(x, (2, 4, 50))
    lv1 = R.nn.layer_norm(lv, ones, zeros, axes=[-1])
    lv2 = R.reshape(lv1, (2, 8, 5, 5))
    lv3 = R.add(R.multiply(lv2, gamma), beta)        # gamma and beta (8, 1, 1)

InstanceNorm is GroupNorm with a group per channel; LayerNorm and RMSNorm over several last axes become one over their
product. Other axes stay as they are.
"""

from __future__ import annotations

import math

import numpy as np
import tvm
from tvm import relax

from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter

PER_CHANNEL = ("relax.nn.group_norm", "relax.nn.instance_norm")
PER_ROW = ("relax.nn.layer_norm", "relax.nn.rms_norm")


@tvm.transform.module_pass(opt_level=0, name="NormalizeRows")
class NormalizeRows:
    """Rewrite ``main``; ``images`` False leaves GroupNorm and InstanceNorm, which ``ChooseLayout`` may turn first."""

    def __init__(self, images: bool = True) -> None:
        self.images = images

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod, self.images).rewrite())


class _Rewriter(MainRewriter):
    def __init__(self, mod: tvm.IRModule, images: bool) -> None:
        super().__init__(mod)
        self.images = images

    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        found = None
        operators = (*PER_CHANNEL, *PER_ROW) if self.images else PER_ROW
        if op_name(value) in operators and _usable(value):
            found = self._per_channel(value) if op_name(value) in PER_CHANNEL else self._several_axes(value)
        if found is None:
            self.keep(var, value)
        else:
            self.variables[var] = self.builder.emit(found, var.name)

    def _normalized(self, x: relax.Expr, rows: tuple[int, ...], epsilon: float, name: str) -> relax.Expr:
        """``x`` normalised over the last axis of its shape ``rows``, in its own shape, without scale and shift."""
        one, zero = (relax.const(np.full(rows[-1], v, np.float32)) for v in (1.0, 0.0))
        flat = self.builder.emit(relax.op.reshape(self.expression(x), rows))
        if name == "relax.nn.rms_norm":
            call = relax.op.nn.rms_norm(flat, one, axes=[-1], epsilon=epsilon)
        else:
            call = relax.op.nn.layer_norm(flat, one, zero, axes=-1, epsilon=epsilon)
        return self.builder.emit(relax.op.reshape(self.builder.emit(call), shape_of(x)))

    def _affine(self, y: relax.Expr, operands: list[relax.Expr], shape: tuple[int, ...], attrs) -> relax.Expr:
        """``y * scale + shift``, both in a shape that broadcasts."""
        wanted = (getattr(attrs, "scale", True), getattr(attrs, "center", True))
        for operand, op, used in zip(operands, (relax.op.multiply, relax.op.add), wanted, strict=False):
            if not used:
                continue
            constant = self.constant(operand)
            if constant is not None:
                factor: relax.Expr = relax.const(constant.value.numpy().reshape(shape))
            else:
                factor = self.builder.emit(relax.op.reshape(self.expression(operand), shape))
            y = self.builder.emit(op(y, factor))
        return y

    def _per_channel(self, value: relax.Call) -> relax.Expr:
        x = value.args[0]
        shape = shape_of(x)
        name = op_name(value)
        groups = int(value.attrs.num_groups) if name == "relax.nn.group_norm" else shape[1]
        rows = (shape[0], groups, math.prod(shape[1:]) // groups)
        y = self._normalized(x, rows, float(value.attrs.epsilon), name)
        return self._affine(y, list(value.args[1:]), (shape[1], *(1,) * (len(shape) - 2)), value.attrs)

    def _several_axes(self, value: relax.Call) -> relax.Expr | None:
        x = value.args[0]
        shape, count = shape_of(x), len(value.attrs.axes)
        constants = [self.constant(operand) for operand in value.args[1:]]
        if count == 1 < len(shape) and all(constants):
            return None
        # A row has a dimension before it, if only of 1.
        rows = (*(shape[: len(shape) - count] or (1,)), math.prod(shape[len(shape) - count :]))
        y = self._normalized(x, rows, float(value.attrs.epsilon), op_name(value))
        return self._affine(y, list(value.args[1:]), shape[len(shape) - count :], value.attrs)


def _usable(value: relax.Call) -> bool:
    """A static float32 tensor, normalised over all of its last axes."""
    x = value.args[0]
    if static_shape(x) is None or 0 in shape_of(x) or str(x.ty.dtype) != "float32":
        return False
    if op_name(value) in PER_CHANNEL:
        return normalises_channels(value)
    rank = len(shape_of(x))
    axes = sorted(int(axis) % rank for axis in value.attrs.axes)
    return axes == list(range(axes[0], rank))


def normalises_channels(value: relax.Call) -> bool:
    """Whether GroupNorm or InstanceNorm has channels in axis 1 and is over all axes after them."""
    shape = shape_of(value.args[0])
    axes = sorted(int(axis) % len(shape) for axis in value.attrs.axes)
    # torch's exporter writes InstanceNorm with the batch among the channels and over the batch of 1.
    if axes[:1] == [0] and shape[0] == 1:
        axes = axes[1:]
    return int(value.attrs.channel_axis) % len(shape) == 1 and axes == list(range(2, len(shape)))
