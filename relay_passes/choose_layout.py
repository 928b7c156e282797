"""Convolutions and all that surrounds them in NHWC, weights in OHWI.

Kernels keep the channels of a pixel together, so the canonical layout has them last. Before::

    lv = R.nn.conv2d(x, w, data_layout="NCHW", kernel_layout="OIHW")
    lv1 = R.add(lv, bias)                     # (1, C, 1, 1)
    lv2 = R.mean(lv1, axis=[2, 3])

After::

    x1 = R.permute_dims(x, axes=[0, 2, 3, 1])
    lv = R.nn.conv2d(x1, w1, data_layout="NHWC", kernel_layout="OHWI")
    lv1 = R.add(lv, bias1)                    # (1, 1, 1, C)
    lv2 = R.mean(lv1, axis=[1, 2])

Convolutions start a region of channels last, and images that the file has turned from there or made of rows of
tokens; the operators of ``layout_rules`` follow their inputs into it; before any other operator the tensor is turned
back. A 1-D convolution becomes a 2-D one of height 1, and its surroundings with it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.layout_rules import FOLLOWS, REDUCTIONS, STARTS, TO_NHWC, weights_to_ohwi
from tvm_qfp8.relay_passes.rewriter import MainRewriter


@tvm.transform.module_pass(opt_level=0, name="ChooseLayout")
class ChooseLayout:
    """Rewrite ``main``; constants are turned at once."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


class _Rewriter(MainRewriter):
    """``nhwc`` holds the NHWC form of variables of rank 4 and, as images of height 1, of rank 3."""

    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.nhwc: dict[relax.Var, relax.Expr] = {}
        self.tuples: dict[relax.Var, relax.Expr] = {}
        items = [v.tuple_value for v in self.definition.values() if isinstance(v, relax.TupleGetItem)]
        self.items = Counter(item for item in items if isinstance(item, relax.Var))

    def expression(self, expr: relax.Expr) -> relax.Expr:
        """In the file's own layout: turned back where only the NHWC form exists."""
        if isinstance(expr, relax.Var) and expr not in self.variables and expr in self.nhwc:
            self.variables[expr] = self.builder.emit(self._turned_back(expr), f"{expr.name}_nchw")
        return super().expression(expr)

    def _turned_back(self, var: relax.Var) -> relax.Expr:
        turned, shape = self.nhwc[var], shape_of(var)
        if np.prod(shape[2:]) == 1 or shape[1] == 1:
            return relax.op.reshape(turned, shape)
        if len(shape) == 4:
            return relax.op.permute_dims(turned, [0, 3, 1, 2])
        rows = self.builder.emit(relax.op.reshape(turned, (shape[0], shape[2], shape[1])))
        return relax.op.permute_dims(rows, [0, 2, 1])

    def channels_last(self, expr: relax.Expr, rank: int) -> relax.Expr | None:
        """The NHWC form of a tensor of ``rank`` 3 or 4, or of a constant that broadcasts against one; else None."""
        constant = self.constant(expr)
        if constant is not None:
            return _turned_constant(constant, rank)
        if not isinstance(expr, relax.Var) or len(static_shape(expr) or ()) != rank:
            return None
        if expr not in self.nhwc:
            self.nhwc[expr] = self._turned(expr)
        return self.nhwc[expr]

    def _turned(self, var: relax.Var) -> relax.Expr:
        shape, name = shape_of(var), f"{var.name}_nhwc"
        x = super().expression(var)
        if len(shape) == 3:
            x = self.builder.emit(relax.op.permute_dims(x, TO_NHWC[3]))
            return self.builder.emit(relax.op.reshape(x, (shape[0], 1, shape[2], shape[1])), name)
        return self.builder.emit(relax.op.permute_dims(x, TO_NHWC[4]), name)

    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        if isinstance(value, relax.TupleGetItem) and value.tuple_value in self.tuples:
            part = relax.TupleGetItem(self.tuples[value.tuple_value], value.index)
            self.nhwc[var] = self.builder.emit(part, var.name)
            return
        name = op_name(value)
        if name == "relax.permute_dims" and self._follows(value):
            self._permute(var, value)
            return
        image = self._image(var, value)
        if image is not None:
            self.nhwc[var] = image
            return
        straight = weights_to_ohwi(self, value) if name == "relax.nn.conv2d" else None
        if straight is not None:
            self.variables[var] = self.builder.emit(straight, var.name)
            return
        rule = STARTS.get(name) or (FOLLOWS.get(name) if self._follows(value) else None)
        if name == "relax.split" and self.uses.get(var, 0) != self.items.get(var, 0):
            rule = None  # the tuple itself is read
        result = rule(self, var, value) if rule else None
        if result is None:
            self.keep(var, value)
            return
        emitted = self.builder.emit(result, var.name)
        if name == "relax.split":
            self.tuples[var] = emitted
        elif name in REDUCTIONS and not value.attrs.keepdims:
            self.variables[var] = emitted
        else:
            self.nhwc[var] = emitted

    def _image(self, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        """The NHWC form of an image that is turned from it, or made of the rows ``(batch, pixels, channels)``."""
        shape = static_shape(var) or ()
        if len(shape) != 4:
            return None
        if _turns(value, [0, 3, 1, 2]):
            return self.expression(value.args[0])
        columns = value.args[0] if op_name(value) == "relax.reshape" else None
        turned = self.bound(columns)
        if not _turns(turned, [0, 2, 1]) or shape_of(columns)[:2] != shape[:2]:
            return None
        rows = self.expression(turned.args[0])
        return self.builder.emit(relax.op.reshape(rows, (shape[0], *shape[2:], shape[1])), var.name)

    def _follows(self, value: relax.Call) -> bool:
        arguments = [*getattr(value, "args", ())]
        if arguments and isinstance(arguments[0], relax.Tuple):
            arguments = [*arguments[0].fields]
        return any(isinstance(argument, relax.Var) and argument in self.nhwc for argument in arguments)

    def _permute(self, var: relax.Var, value: relax.Call) -> None:
        """A transposition of the file itself is joined with the turning."""
        source = value.args[0]
        shape, turned = shape_of(source), self.nhwc[source]
        rank = len(shape)
        wanted = (
            list(range(rank))[::-1] if value.attrs.axes is None else [int(a) % rank for a in value.attrs.axes]
        )
        axes = [TO_NHWC[rank].index(axis) for axis in wanted]
        if rank == 3:
            turned = self.builder.emit(relax.op.reshape(turned, (shape[0], shape[2], shape[1])), var.name)
        if axes == list(range(rank)):
            self.variables[var] = turned
        else:
            self.variables[var] = self.builder.emit(relax.op.permute_dims(turned, axes), var.name)


def _turns(value: Any, order: list[int]) -> bool:
    axes = value.attrs.axes if op_name(value) == "relax.permute_dims" else None
    return axes is not None and [int(axis) % len(axes) for axis in axes] == order


def _turned_constant(constant: GenericConst, rank: int) -> relax.Expr | None:
    array = constant.value.numpy()
    if array.ndim > rank:
        return None
    if array.size == 1:
        return relax.const(array.reshape(()), str(array.dtype))
    array = array.reshape((1,) * (rank - array.ndim) + array.shape)
    image = array if rank == 4 else array[:, :, None]
    return relax.const(np.ascontiguousarray(image.transpose(0, 2, 3, 1)), str(array.dtype))
