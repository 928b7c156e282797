"""Puts GroupNorm and InstanceNorm back together, which ONNX files hold as rows between two reshapes.

Runs after ``RecognizeNorms``, which finds the rows. Before::

    lv = R.reshape(x, (2, 4, 50))                                       # x (2, 8, 5, 5)
    lv1 = R.nn.layer_norm(lv, ones, zeros, axes=[-1])
    lv2 = R.reshape(lv1, (2, 8, 5, 5))

After::

    lv2 = R.nn.group_norm(x, ones, zeros, num_groups=4, channel_axis=1, axes=[2, 3], center=False, scale=False)

Normalisation over height and width, ``R.nn.layer_norm(x, ones, zeros, axes=[-2, -1])``, or over the width of what a
1-D convolution gives, is one with a group per channel. So ``ChooseLayout`` sees what is normalised; scale and shift
stay behind it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter


@tvm.transform.module_pass(opt_level=0, name="RecognizeGroupNorm")
class RecognizeGroupNorm:
    """Rewrite ``main``; what is not read any more is removed."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


class _Rewriter(MainRewriter):
    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        found = None
        if op_name(value) == "relax.reshape":
            found = self._rows(var, value)
        elif op_name(value) == "relax.nn.layer_norm":
            found = self._image(value)
        if found is None:
            self.keep(var, value)
            return
        x, groups, epsilon = found
        channels = shape_of(x)[1]
        one, zero = (relax.const(np.full(channels, number, np.float32)) for number in (1.0, 0.0))
        call = relax.op.nn.group_norm(
            self.expression(x),
            one,
            zero,
            num_groups=groups,
            channel_axis=1,
            axes=list(range(2, len(shape_of(x)))),
            epsilon=epsilon,
            center=False,
            scale=False,
        )
        self.variables[var] = self.builder.emit(call, var.name)

    def _rows(self, var: relax.Var, value: relax.Call) -> tuple[relax.Expr, int, float] | None:
        """(x, groups, epsilon) where rows that hold whole channels are put in the shape of x again."""
        norm: Any = self.definition.get(value.args[0])
        if op_name(norm) != "relax.nn.layer_norm" or self.uses.get(value.args[0]) != 1:
            return None
        before: Any = self.definition.get(norm.args[0])
        if op_name(before) != "relax.reshape" or not self._plain(norm, 1):
            return None
        x, shape, rows = before.args[0], static_shape(var), shape_of(norm)
        if not shape or not 3 <= len(shape) <= 4 or static_shape(x) != shape or len(rows) != 3:
            return None
        groups = rows[1]
        if rows[0] != shape[0] or shape[1] % groups or rows[2] != math.prod(shape[1:]) // groups:
            return None
        return x, groups, float(norm.attrs.epsilon)

    def _image(self, value: relax.Call) -> tuple[relax.Expr, int, float] | None:
        """The same where height and width are normalised, or the width of what a 1-D convolution gives."""
        x, shape = value.args[0], static_shape(value) or ()
        is_image = len(shape) == 4 and self._plain(value, 2)
        if not is_image and not (len(shape) == 3 and self._plain(value, 1) and self._is_conv1d(x)):
            return None
        return x, shape[1], float(value.attrs.epsilon)

    def _is_conv1d(self, x: relax.Expr) -> bool:
        """Without a bias or with one."""
        made: Any = self.definition.get(x)
        if op_name(made) == "relax.add" and self.constant(made.args[1]) is not None:
            made = self.definition.get(made.args[0])
        return op_name(made) == "relax.nn.conv1d"

    def _plain(self, norm: relax.Call, count: int) -> bool:
        """Whether a LayerNorm of float32 is over the ``count`` last axes, without scale and shift."""
        if str(norm.ty.dtype) != "float32":
            return False
        rank = len(static_shape(norm) or ())
        if sorted(int(axis) % rank for axis in norm.attrs.axes) != list(range(rank - count, rank)):
            return False
        scale, shift = (self.constant(argument) for argument in norm.args[1:])
        if scale is None or shift is None:
            return False
        return bool((scale.value.numpy() == 1).all() and not shift.value.numpy().any())
