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
from tvm_qfp8.relay_passes.rewriter import MainRewriter


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
        folded = self._fold(value) if isinstance(value, relax.Call) else None
        if folded is None:
            self.keep(var, value)
        else:
            self.variables[var] = relax.const(np.ascontiguousarray(folded), str(var.ty.dtype))

    def _fold(self, call: relax.Call) -> np.ndarray | None:
        arguments: list[Any] = []
        for argument in call.args:
            if isinstance(argument, relax.Var):
                argument = self.variables.get(argument)
            if isinstance(argument, GenericConst):
                arguments.append(argument.value.numpy())
            elif isinstance(argument, relax.ShapeExpr) and all(hasattr(v, "value") for v in argument.values):
                arguments.append(tuple(int(v) for v in argument.values))
            elif isinstance(argument, tirx.IntImm | tirx.FloatImm):
                arguments.append(argument.value)
            else:
                return None
        return evaluate_constant_call(call, arguments) if arguments else None
