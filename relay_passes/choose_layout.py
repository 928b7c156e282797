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

Elementwise operators, pooling, reductions, concatenation and resizing follow their inputs; before any other operator
the tensor is turned back. A 1-D convolution becomes a 2-D one of height 1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter

TO_NHWC = [0, 2, 3, 1]
TO_NCHW = [0, 3, 1, 2]

ELEMENTWISE = {
    f"relax.{name}"
    for names in (
        "add subtract multiply divide maximum minimum power where astype",
        "negative abs sqrt rsqrt square exp log erf tanh sigmoid clip floor ceil round",
        "greater greater_equal less less_equal equal not_equal",
        "nn.relu nn.gelu nn.gelu_tanh nn.silu nn.leakyrelu nn.softplus nn.prelu",
    )
    for name in names.split(" ")
}
REDUCTIONS = {"relax.mean": relax.op.mean, "relax.max": relax.op.max, "relax.sum": relax.op.sum}


@tvm.transform.module_pass(opt_level=0, name="ChooseLayout")
class ChooseLayout:
    """Rewrite ``main``; constants are turned at once."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


def _array(constant: GenericConst) -> np.ndarray:
    return constant.value.numpy()


class _Rewriter(MainRewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.nhwc: dict[relax.Var, relax.Expr] = {}
        self._handlers: dict[str, Callable] = {
            "relax.nn.conv1d": self._conv1d,
            "relax.nn.conv2d": self._conv2d,
            "relax.nn.conv2d_transpose": self._conv2d_transpose,
            "relax.nn.max_pool2d": self._pool,
            "relax.nn.avg_pool2d": self._pool,
            "relax.nn.adaptive_avg_pool2d": self._adaptive_pool,
            "relax.image.resize2d": self._resize,
            "relax.concat": self._concat,
            "relax.permute_dims": self._permute,
            **dict.fromkeys(REDUCTIONS, self._reduce),
            **dict.fromkeys(ELEMENTWISE, self._elementwise),
        }

    def expression(self, expr: relax.Expr) -> relax.Expr:
        """In the file's own layout: turned back where only the NHWC form exists."""
        if isinstance(expr, relax.Var) and expr not in self.variables and expr in self.nhwc:
            turned = self.nhwc[expr]
            shape = shape_of(expr)
            if shape[2] * shape[3] == 1:
                back = relax.op.reshape(turned, shape)
            else:
                back = relax.op.permute_dims(turned, TO_NCHW)
            self.variables[expr] = self.builder.emit(back, expr.name)
        return super().expression(expr)

    def channels_last(self, expr: relax.Expr) -> relax.Expr | None:
        """The NHWC form of a 4-D tensor, or of anything that broadcasts against one; None if there is none."""
        constant = self.constant(expr)
        if constant is not None:
            array = _array(constant)
            if array.ndim > 4:
                return None
            aligned = array.reshape((1,) * (4 - array.ndim) + array.shape).transpose(TO_NHWC)
            return constant if array.size == 1 else relax.const(np.ascontiguousarray(aligned))
        if not isinstance(expr, relax.Var) or len(static_shape(expr) or ()) != 4:
            return None
        if expr not in self.nhwc:
            self.nhwc[expr] = self.builder.emit(
                relax.op.permute_dims(super().expression(expr), TO_NHWC), f"{expr.name}_nhwc"
            )
        return self.nhwc[expr]

    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        handler = self._handlers.get(op_name(value))
        result = handler(var, value) if handler else None
        if result is None:
            self.keep(var, value)
        elif len(static_shape(var) or ()) == 4 and handler not in (self._permute,):
            self.nhwc[var] = self.builder.emit(result, var.name)
        else:
            self.variables[var] = self.builder.emit(result, var.name)

    def _follows(self, value: relax.Call) -> bool:
        return any(isinstance(argument, relax.Var) and argument in self.nhwc for argument in value.args)

    # -- convolutions -----------------------------------------------------------------------------------------

    def _conv2d(self, _var, value: relax.Call) -> relax.Call | None:
        weight = self.constant(value.args[1])
        attrs = value.attrs
        if weight is None or str(attrs.data_layout) != "NCHW" or str(attrs.kernel_layout) != "OIHW":
            return None
        return relax.op.nn.conv2d(
            self.channels_last(value.args[0]),
            relax.const(np.ascontiguousarray(_array(weight).transpose(0, 2, 3, 1))),
            strides=list(attrs.strides),
            padding=list(attrs.padding),
            dilation=list(attrs.dilation),
            groups=int(attrs.groups),
            data_layout="NHWC",
            kernel_layout="OHWI",
        )

    def _conv1d(self, var, value: relax.Call) -> relax.Call | None:
        weight = self.constant(value.args[1])
        attrs = value.attrs
        if weight is None or str(attrs.data_layout) != "NCW" or str(attrs.kernel_layout) != "OIW":
            return None
        batch, channels, width = shape_of(value.args[0])
        x = self.builder.emit(relax.op.permute_dims(self.expression(value.args[0]), [0, 2, 1]))
        x = self.builder.emit(relax.op.reshape(x, (batch, 1, width, channels)))
        padding = [int(p) for p in attrs.padding]
        conv = relax.op.nn.conv2d(
            x,
            relax.const(np.ascontiguousarray(_array(weight)[:, :, None].transpose(0, 2, 3, 1))),
            strides=[1, int(attrs.strides[0])],
            padding=[0, padding[0], 0, padding[-1]],
            dilation=[1, int(attrs.dilation[0])],
            groups=int(attrs.groups),
            data_layout="NHWC",
            kernel_layout="OHWI",
        )
        y = self.builder.emit(conv, var.name)
        batch, channels, width = shape_of(var)
        y = self.builder.emit(relax.op.reshape(y, (batch, width, channels)))
        return relax.op.permute_dims(y, [0, 2, 1])

    def _conv2d_transpose(self, _var, value: relax.Call) -> relax.Call | None:
        attrs = value.attrs
        if self.constant(value.args[1]) is None or str(attrs.data_layout) != "NCHW":
            return None
        return relax.op.nn.conv2d_transpose(
            self.channels_last(value.args[0]),
            value.args[1],
            strides=list(attrs.strides),
            padding=list(attrs.padding),
            output_padding=list(attrs.output_padding),
            dilation=list(attrs.dilation),
            groups=int(attrs.groups),
            data_layout="NHWC",
            kernel_layout=str(attrs.kernel_layout),
        )

    # -- what follows -----------------------------------------------------------------------------------------

    def _elementwise(self, var, value: relax.Call) -> relax.Call | None:
        if not self._follows(value) or len(static_shape(var) or ()) != 4:
            return None
        arguments = []
        for argument in value.args:
            if isinstance(argument.ty, relax.TensorType):
                turned = self.channels_last(argument)
                if turned is None:
                    return None
                arguments.append(turned)
            else:
                arguments.append(argument)
        return relax.Call(value.op, arguments, value.attrs, value.ty_args)

    def _pool(self, _var, value: relax.Call) -> relax.Call | None:
        attrs = value.attrs
        if not self._follows(value) or str(attrs.layout) != "NCHW":
            return None
        make = relax.op.nn.max_pool2d if op_name(value).endswith("max_pool2d") else relax.op.nn.avg_pool2d
        return make(
            self.channels_last(value.args[0]),
            list(attrs.pool_size),
            list(attrs.strides),
            list(attrs.padding),
            list(attrs.dilation),
            bool(attrs.ceil_mode),
            bool(attrs.count_include_pad),
            "NHWC",
        )

    def _adaptive_pool(self, _var, value: relax.Call) -> relax.Call | None:
        size = value.attrs.output_size
        if not self._follows(value) or size is None or [int(s) for s in size] != [1, 1]:
            return None
        return relax.op.mean(self.channels_last(value.args[0]), [1, 2], keepdims=True)

    def _resize(self, _var, value: relax.Call) -> relax.Call | None:
        attrs = value.attrs
        if not self._follows(value) or str(attrs.layout) != "NCHW":
            return None
        names = (
            "method",
            "coordinate_transformation_mode",
            "rounding_method",
            "cubic_alpha",
            "cubic_exclude",
            "extrapolation_value",
            "out_dtype",
        )
        kept = {name: getattr(attrs, name) for name in names}
        roi = [float(bound) for bound in attrs.roi]
        return relax.op.image.resize2d(
            self.channels_last(value.args[0]), value.args[1], roi=roi, layout="NHWC", **kept
        )

    def _reduce(self, var, value: relax.Call) -> relax.Call | None:
        axes = value.attrs.axis
        if not self._follows(value) or axes is None or sorted(int(a) % 4 for a in axes) != [2, 3]:
            return None
        return REDUCTIONS[op_name(value)](
            self.channels_last(value.args[0]), [1, 2], keepdims=bool(value.attrs.keepdims)
        )

    def _concat(self, var, value: relax.Call) -> relax.Call | None:
        parts = value.args[0]
        if not isinstance(parts, relax.Tuple) or len(static_shape(var) or ()) != 4:
            return None
        if not any(isinstance(part, relax.Var) and part in self.nhwc for part in parts.fields):
            return None
        turned = [self.channels_last(part) for part in parts.fields]
        return relax.op.concat(turned, TO_NHWC.index(int(value.attrs.axis) % 4))

    def _permute(self, _var, value: relax.Call) -> relax.Call | None:
        source = value.args[0]
        if not self._follows(value) or value.attrs.axes is None:
            return None
        axes = [TO_NHWC.index(int(axis) % 4) for axis in value.attrs.axes]
        if axes == [0, 1, 2, 3]:
            return self.nhwc[source]
        return relax.op.permute_dims(self.nhwc[source], axes)
