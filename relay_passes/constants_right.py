"""Products with a constant on the left become dense layers, which have it on the right.

As in graph convolutions, which multiply nodes by a constant adjacency, mel filters, and transforms of a signal by a
matrix. Before::

    lv = R.matmul(w, x)                           # w (64, 32), x (10, 32, 16)

After::

    lv1 = R.permute_dims(x, axes=[0, 2, 1])
    lv2 = R.matmul(lv1, transposed w)             # (10, 16, 64)
    lv = R.permute_dims(lv2, axes=[0, 2, 1])
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter


@tvm.transform.module_pass(opt_level=0, name="ConstantsRight")
class ConstantsRight:
    """Rewrite ``main``."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return _Rewriter(mod).rewrite()


class _Rewriter(MainRewriter):
    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        weight = self._left(value)
        if weight is None:
            self.keep(var, value)
            return
        rank = len(shape_of(value))
        swapped = [*range(rank - 2), rank - 1, rank - 2]
        x = self.builder.emit(relax.op.permute_dims(self.expression(value.args[1]), swapped))
        product = self.builder.emit(relax.op.matmul(x, relax.const(np.ascontiguousarray(weight.T))), var.name)
        self.variables[var] = self.builder.emit(relax.op.permute_dims(product, swapped), var.name)

    def _left(self, value: relax.Expr) -> np.ndarray | None:
        """The matrix that multiplies something computed, of as many dimensions as the product."""
        if op_name(value) != "relax.matmul" or not static_shape(value) or str(value.ty.dtype) != "float32":
            return None
        left, right = value.args
        constant = self.constant(left)
        if constant is None or self.constant(right) is not None or static_shape(right) is None:
            return None
        shape = shape_of(left)
        matrices = len(shape) >= 2 and len(shape_of(right)) == len(shape_of(value)) >= 2
        if not matrices or any(extent != 1 for extent in shape[:-2]):
            return None
        return constant.value.numpy().reshape(shape[-2:])
