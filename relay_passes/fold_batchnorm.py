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

A value that is also read elsewhere ends the chain. Weights keep float32; the arithmetic is float64.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter

AFFINE = ("relax.add", "relax.subtract", "relax.multiply", "relax.divide")


@tvm.transform.module_pass(opt_level=0, name="FoldBatchnorm")
class FoldBatchnorm:
    """Rewrite ``main``."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


class _Rewriter(MainRewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.readers: dict[relax.Var, list[relax.Var]] = {}
        for var, value in self.definition.items():
            for read in relax.analysis.free_vars(value):
                self.readers.setdefault(read, []).append(var)
        self.folded: dict[relax.Var, relax.Var] = {}  # from the last binding of a chain to its linear layer

    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        axis = self._output_axis(value)
        if axis is None:
            self.keep(var, value)
            return
        chain, scale, shift = self._chain(var)
        if len(chain) < 2 and (scale == 1).all():
            self.keep(var, value)
            return
        weight = self.constant(value.args[1]).value.numpy()
        along = np.ones(weight.ndim, int)
        along[axis] = -1
        if op_name(value) == "relax.nn.conv2d_transpose":  # (in, out / groups, ...): channels run over both axes
            groups = int(value.attrs.groups)
            factor = np.repeat(scale.reshape(groups, -1), weight.shape[0] // groups, axis=0)[:, :, None, None]
        else:
            factor = scale.reshape(along)
        scaled = relax.const((weight * factor).astype(np.float32))
        call = relax.Call(value.op, [self.expression(value.args[0]), scaled], value.attrs, value.ty_args)
        result = self.builder.emit(call, var.name)
        bias = relax.const(shift.astype(np.float32))
        self.variables[chain[-1]] = self.builder.emit(relax.op.add(result, bias), chain[-1].name)
        self.folded.update(dict.fromkeys(chain, var))

    def keep(self, var: relax.Var, value: relax.Expr) -> None:
        if var not in self.folded:
            super().keep(var, value)

    def _output_axis(self, value: relax.Expr) -> int | None:
        """The axis of the weights that runs over output channels, None if this is no canonical linear layer."""
        name = op_name(value)
        if name not in ("relax.matmul", "relax.nn.conv2d", "relax.nn.conv2d_transpose"):
            return None
        weight = self.constant(value.args[1])
        if weight is None or static_shape(value) is None or str(value.ty.dtype) != "float32":
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
        while self.uses.get(var) == 1 and len(self.readers.get(var, ())) == 1:
            after = self.readers[var][0]
            value = self.definition[after]
            number = self._per_channel(var, after, value)
            if number is None:
                break
            name = op_name(value)
            if name == "relax.multiply":
                scale, shift = scale * number, shift * number
            elif name == "relax.divide":
                scale, shift = scale / number, shift / number
            else:
                # a - x turns the sign of x
                if name == "relax.subtract" and value.args[0] is not var and not value.args[0].same_as(var):
                    scale, shift = -scale, -shift
                    shift = shift + number
                else:
                    shift = shift + (number if name == "relax.add" else -number)
            chain.append(after)
            var = after
        return chain, scale, shift

    def _per_channel(self, var: relax.Var, after: relax.Var, value: relax.Expr) -> np.ndarray | None:
        """The constant of ``after = value``, one number per channel."""
        if op_name(value) not in AFFINE or static_shape(after) != static_shape(var):
            return None
        a, b = value.args
        first = isinstance(a, relax.Var) and a.same_as(var)
        constant = self.constant(b if first else a)
        if not isinstance(constant, GenericConst) or (op_name(value) == "relax.divide" and not first):
            return None
        array = constant.value.numpy().astype(np.float64)
        channels = shape_of(var)[-1]
        if array.size not in (1, channels) or (array.size == channels > 1 and array.shape[-1] != channels):
            return None
        result = np.broadcast_to(array.reshape(-1), (channels,))
        if op_name(value) == "relax.divide" and not result.all():
            return None
        return result
