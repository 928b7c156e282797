"""Moves a scale by one number up through views and products of activations to the linear layer before them.

Attention scales its queries, and in torch.export's form its keys too, after they are cut into heads, or the product of
both, which stands for the same. Before::

    lv = R.add(R.matmul(x, w), bias)
    lv1 = R.permute_dims(R.reshape(lv, R.shape([1, 64, 12, 32])), axes=[0, 2, 1, 3])
    lv2 = R.multiply(lv1, R.const(0.176776695))

After, for FoldBatchnorm to fold into weights and bias::

    lv1 = R.multiply(R.add(R.matmul(x, w), bias), R.const(0.176776695))
    lv2 = R.permute_dims(R.reshape(lv1, R.shape([1, 64, 12, 32])), axes=[0, 2, 1, 3])

A value that is also read elsewhere stays as it is.
"""

from __future__ import annotations

import tvm
from tvm import relax

from tvm_qfp8.calibration.linear import LINEAR
from tvm_qfp8.relay_passes.fold_batchnorm import AFFINE
from tvm_qfp8.relay_passes.fuse import op_name, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter
from tvm_qfp8.relay_passes.simplify_views import VIEWS


@tvm.transform.module_pass(opt_level=0, name="HoistScales")
class HoistScales:
    """Rewrite ``main``; what is not read any more is removed."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


class _Rewriter(MainRewriter):
    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        views = self._views_of_linear(value) if op_name(value) in ("relax.multiply", "relax.divide") else []
        scale = self.constant(value.args[1]) or self.constant(value.args[0]) if views else None
        if scale is None:
            self.keep(var, value)
            return
        operator = relax.op.multiply if op_name(value) == "relax.multiply" else relax.op.divide
        number = relax.const(scale.value.numpy().reshape(()))
        result = self.builder.emit(operator(self.expression(views[-1].args[0]), number))
        for view in reversed(views):
            others = [self.expression(argument) for argument in view.args[1:]]
            call = relax.Call(view.op, [result, *others], view.attrs, view.ty_args)
            result = self.builder.emit(call)
        self.variables[var] = result

    def _views_of_linear(self, value: relax.Call) -> list[relax.Call]:
        """Views and products, last first, between a scale by one number and a linear layer; none if it is any other."""
        x, scale = value.args
        if op_name(value) == "relax.multiply" and self.constant(x) is not None:
            x, scale = scale, x
        number = self.constant(scale)
        same_shape = static_shape(x) is not None and static_shape(x) == static_shape(value)
        if number is None or number.value.numpy().size != 1 or not same_shape:
            return []
        views = []
        while self.uses.get(x) == 1:
            view = self.definition.get(x)
            if not isinstance(view, relax.Call) or not self._passes_scales(view):
                break
            views.append(view)
            x = view.args[0]
        return views if self._is_linear(x) else []

    def _passes_scales(self, value: relax.Call) -> bool:
        """Whether scaling the first argument scales the result."""
        product = op_name(value) == "relax.matmul" and self.constant(value.args[1]) is None
        return product or op_name(value) in (*VIEWS, "relax.permute_dims")

    def _is_linear(self, var: relax.Expr) -> bool:
        """Whether a linear layer and nothing but scales and shifts lie behind what is read only once."""
        if not isinstance(var, relax.Var) or self.uses.get(var) != 1:
            return False
        value = self.definition.get(var)
        if not isinstance(value, relax.Call) or op_name(value) not in (*LINEAR, *AFFINE):
            return False
        if op_name(value) in LINEAR:
            return self.constant(value.args[1]) is not None
        tensors = [argument for argument in value.args if self.constant(argument) is None]
        return len(tensors) == 1 and self._is_linear(tensors[0])
