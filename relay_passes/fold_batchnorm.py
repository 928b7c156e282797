"""Folds what scales and shifts the channels of a linear layer's output into its weights and one bias.

Runs in canonical layout, where the channels of every linear layer come last, after BatchNorm is decomposed to
arithmetic and its constants are folded. Before::

    lv = R.nn.conv2d(x, weight)
    lv1 = R.add(lv, bias)                         # (C,)
    lv2 = R.multiply(lv1, scale)                  # BatchNorm, or any other scale per channel
    lv3 = R.add(lv2, shift)

After::

    lv = R.nn.conv2d(x, weight * scale)
    lv3 = R.add(lv, bias * scale + shift)

A chain after any other operator, as BatchNorm after a concatenation, becomes one product and one sum. A convolution
that only scales channels is part of a chain, too.

Between a layer and its chain may stand the mark of its training (``trained``), whose scales are multiplied likewise.
A value that is also read elsewhere ends the chain. Weights keep float32; the arithmetic is float64.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from tvm_qfp8.calibration.linear import LINEAR
from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter
from tvm_qfp8.relay_passes.scale_channels import channel_scales

AFFINE = ("relax.add", "relax.subtract", "relax.multiply", "relax.divide")


@tvm.transform.module_pass(opt_level=0, name="FoldBatchnorm")
class FoldBatchnorm:
    """Rewrite ``main``."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


class _Rewriter(MainRewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.folded: set[relax.Var] = set()

    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        if var in self.folded:
            return
        axis = self._output_axis(value)
        if axis is None:
            if not self._shorten(var, value):
                self.keep(var, value)
            return
        mark = self._mark(var)
        chain, scale, shift = self._chain(var if mark is None else mark)
        if not chain or (len(chain) == 1 and np.all(scale == 1)):
            self.keep(var, value)
            return
        weight = value.args[1].value.numpy()
        scaled = relax.const((weight * _along_weights(value, weight, scale, axis)).astype(np.float32))
        call = relax.Call(value.op, [self.expression(value.args[0]), scaled], value.attrs, value.ty_args)
        result = self.builder.emit(call, var.name)
        if mark is not None:
            made = self.definition[mark]
            scales = made.args[1].value.numpy() * np.abs(scale)
            arguments = [result, relax.const(scales.astype(np.float32))]
            result = self.builder.emit(relax.Call(made.op, arguments, made.attrs), mark.name)
            self.folded.add(mark)
        if shift.any():
            bias = relax.const(shift.astype(np.float32))
            result = self.builder.emit(relax.op.add(result, bias), f"{var.name}_out")
        self.variables[chain[-1]] = result
        self.folded.update(chain)

    def _shorten(self, var: relax.Var, value: relax.Expr) -> bool:
        """Emit a product and a sum for two or more that start here, with a number for each channel among them."""
        if op_name(value) not in AFFINE or not static_shape(value) or str(value.ty.dtype) != "float32":
            return False
        tensors = [argument for argument in value.args if self.constant(argument) is None]
        if len(tensors) != 1 or not isinstance(tensors[0], relax.Var):
            return False
        affine = self._affine(tensors[0], var, value)
        if affine is None:
            return False
        chain, scale, shift = self._chain(var)
        scale, shift = scale * affine[0], shift + scale * affine[1]
        if not chain or (len(set(scale)) == 1 and len(set(shift)) == 1):
            return False
        result = self.expression(tensors[0])
        for operator, numbers, neutral in ((relax.op.multiply, scale, 1.0), (relax.op.add, shift, 0.0)):
            if np.any(numbers != neutral):
                result = self.builder.emit(
                    operator(result, relax.const(numbers.astype(np.float32))), var.name
                )
        self.variables[chain[-1]] = result
        self.folded.update([var, *chain])
        return True

    def _mark(self, linear: relax.Var) -> relax.Var | None:
        """The mark that alone reads a layer, with a scale for each channel or one for all."""
        readers = self.readers[linear]
        if self.uses.get(linear) != 1 or len(readers) != 1:
            return None
        value = self.definition[readers[0]]
        fits = op_name(value) == "relax.qfp8.trained" and shape_of(value.args[1])[0] in (
            1,
            shape_of(linear)[-1],
        )
        return readers[0] if fits else None

    def _output_axis(self, value: relax.Expr) -> int | None:
        """The axis of the weights that runs over output channels, None if this is no canonical linear layer."""
        name = op_name(value)
        if name not in LINEAR:
            return None
        weight = value.args[1]
        if (
            not isinstance(weight, GenericConst)
            or static_shape(value) is None
            or str(value.ty.dtype) != "float32"
        ):
            return None
        if name == "relax.matmul":
            return 1 if len(shape_of(weight)) == 2 and len(shape_of(value)) >= 2 else None
        if str(value.attrs.data_layout) != "NHWC":
            return None
        expected, axis = ("OHWI", 0) if name == "relax.nn.conv2d" else ("IOHW", 1)
        return axis if str(value.attrs.kernel_layout) == expected else None

    def _chain(self, linear: relax.Var) -> tuple[list[relax.Var], np.ndarray, np.ndarray]:
        """The bindings after a linear layer that only scale and shift channels, and what they do together."""
        channels = shape_of(linear)[-1]
        scale, shift = np.ones(channels), np.zeros(channels)
        chain: list[relax.Var] = []
        var = linear
        while self.uses.get(var) == 1 and len(self.readers[var]) == 1:
            after = self.readers[var][0]
            affine = self._affine(var, after, self.definition[after])
            if affine is None:
                break
            factor, offset = affine
            scale, shift = scale * factor, shift * factor + offset
            chain.append(after)
            var = after
        return chain, scale, shift

    def _affine(
        self, var: relax.Var, after: relax.Var, value: relax.Expr
    ) -> tuple[np.ndarray | float, np.ndarray | float] | None:
        """(a, b), each one number per channel or one for all, where ``after = a * var + b``."""
        factors = channel_scales(value)
        if factors is not None and self._mark(after) is None:
            return factors.astype(np.float64), 0.0
        if op_name(value) not in AFFINE or static_shape(after) != static_shape(var):
            return None
        x_first = isinstance(value.args[0], relax.Var) and value.args[0].same_as(var)
        constant = self.constant(value.args[1 if x_first else 0])
        if constant is None:
            return None
        array = constant.value.numpy().astype(np.float64)
        channels = shape_of(var)[-1]
        if array.size != 1 and not array.size == array.shape[-1] == channels:
            return None
        number = array.reshape(-1)
        operator = op_name(value)
        if operator == "relax.multiply":
            return number, 0.0
        if operator == "relax.add":
            return 1.0, number
        if operator == "relax.subtract":
            return (1.0, -number) if x_first else (-1.0, number)
        return (1 / number, 0.0) if x_first and number.all() else None


def _along_weights(value: relax.Call, weight: np.ndarray, scale: np.ndarray, axis: int) -> np.ndarray:
    """A number per output channel in the shape that multiplies the weights."""
    if op_name(value) != "relax.nn.conv2d_transpose":
        shape = [1] * weight.ndim
        shape[axis] = -1
        return scale.reshape(shape)
    # (in, out / groups, kernel height, kernel width): each group of inputs has output channels of its own
    groups = int(value.attrs.groups)
    return np.repeat(scale.reshape(groups, -1), weight.shape[0] // groups, axis=0)[:, :, None, None]
