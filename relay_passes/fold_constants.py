"""Evaluates operators on constants with their NumPy twins, at once; TVM's ``FoldConstant`` compiles each of them.

Before::

    lv = R.reshape(metadata["ir.GenericConst"][1], R.shape([1, 48, 1, 1]))
    lv1 = R.add(x, lv)

After::

    lv1 = R.add(x, metadata["ir.GenericConst"][1])
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.ir import GenericConst

from tvm_qfp8.calibration.evaluate import evaluate_constant_call
from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter

OF_SHAPE = ("relax.full_like", "relax.zeros_like", "relax.ones_like")
"""Operators that ask a tensor for its shape and type only."""


@tvm.transform.module_pass(opt_level=0, name="FoldConstants")
class FoldConstants:
    """Fold what has a NumPy twin; the rest is left to TVM."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return _Rewriter(mod).rewrite()


class _Rewriter(MainRewriter):
    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        if isinstance(value, GenericConst):
            self.variables[var] = value
            return
        if op_name(value) == "relax.shape_of" and static_shape(value.args[0]) is not None:
            self.variables[var] = relax.ShapeExpr(shape_of(value.args[0]))
            return
        tensor = isinstance(var.ty, relax.TensorType)  # not a shape or a tuple
        folded = self._fold(value) if tensor and isinstance(value, relax.Call) else None
        if folded is None:
            self.keep(var, value)
        else:
            # ascontiguousarray would give a scalar a dimension.
            self.variables[var] = relax.const(np.array(folded, order="C"), str(var.ty.dtype))

    def _fold(self, call: relax.Call) -> np.ndarray | None:
        arguments = [self._value(argument) for argument in call.args]
        if op_name(call) in OF_SHAPE and arguments[0] is None and static_shape(call.args[0]) is not None:
            arguments[0] = np.broadcast_to(np.float32(0), shape_of(call.args[0]))
        if not arguments or any(argument is None for argument in arguments):
            return None
        return evaluate_constant_call(call, arguments)

    def _value(self, argument: relax.Expr) -> Any:
        """An argument as NumPy and Python values, None if it is not constant."""
        if isinstance(argument, relax.Var):
            argument = self.variables.get(argument)
        if isinstance(argument, GenericConst):
            return argument.value.numpy()
        if isinstance(argument, relax.ShapeExpr) and all(hasattr(v, "value") for v in argument.values):
            return tuple(int(v) for v in argument.values)
        if isinstance(argument, tirx.IntImm | tirx.FloatImm):
            return argument.value
        if isinstance(argument, relax.Tuple):
            fields = tuple(self._value(field) for field in argument.fields)
            return None if any(field is None for field in fields) else fields
        return None
