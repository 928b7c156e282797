"""Recognises L2 normalisation over an axis, which no importer has an operator for.

Runs after import. Before (as torch's exporter writes ``functional.normalize``)::

    lv1 = R.power(R.abs(x), 2.0)
    lv2 = R.sum(lv1, axis=[-1], keepdims=True)
    lv3 = R.power(lv2, 0.5)
    lv4 = R.broadcast_to(R.maximum(lv3, 1e-12), ...)      # the floor may be missing
    lv5 = R.divide(x, lv4)

After::

    lv5 = R.qfp8.l2_normalize(x, 1e-12, -1)
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.ir import GenericConst

from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter


@tvm.transform.module_pass(opt_level=0, name="RecognizeL2")
class RecognizeL2:
    """Rewrite ``main``; what the normalisation was made of is left to dead code elimination."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


class _Rewriter(MainRewriter):
    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        found = self._floor_and_axis(value) if op_name(value) == "relax.divide" else None
        if found is None:
            self.keep(var, value)
            return
        call = qfp8_ops.l2_normalize(self.expression(value.args[0]), *found)
        self.variables[var] = self.builder.emit(call, var.name)

    def _floor_and_axis(self, value: relax.Call) -> tuple[float, int] | None:
        """The least norm that the quotient divides by, 0 without one, and the axis; None if it is none."""
        x, norm = value.args
        if static_shape(x) is None or str(x.ty.dtype) != "float32" or 0 in shape_of(x):
            return None
        call: Any = self._call(norm)
        if op_name(call) == "relax.broadcast_to":
            call = self._call(call.args[0])
        floor = 0.0
        if op_name(call) == "relax.maximum":
            given = self._number(call.args[1])
            if given is None or not given >= 0.0:
                return None
            floor, call = given, self._call(call.args[0])
        total: Any = self._call(call.args[0]) if self._is_root(call) else None
        if op_name(total) != "relax.sum" or not total.attrs.keepdims or total.attrs.axis is None:
            return None
        axes = [int(axis) % len(shape_of(x)) for axis in total.attrs.axis]
        if len(axes) != 1 or not self._is_square(self._call(total.args[0]), x):
            return None
        return floor, axes[0]

    def _is_root(self, call: Any) -> bool:
        return op_name(call) == "relax.sqrt" or (
            op_name(call) == "relax.power" and self._number(call.args[1]) == 0.5
        )

    def _is_square(self, call: Any, x: relax.Expr) -> bool:
        name = op_name(call)
        if name == "relax.multiply":
            return all(argument.same_as(x) for argument in call.args)
        if name != "relax.square" and not (name == "relax.power" and self._number(call.args[1]) == 2.0):
            return False
        base = self._call(call.args[0])
        return call.args[0].same_as(x) or (op_name(base) == "relax.abs" and base.args[0].same_as(x))

    def _call(self, expr: relax.Expr) -> Any:
        """What a variable is bound to; None for anything else."""
        return self.definition.get(expr) if isinstance(expr, relax.Var) else None

    def _number(self, expr: relax.Expr) -> float | None:
        constant = self.constant(expr) if isinstance(expr, relax.Var | GenericConst) else None
        if constant is None or constant.value.numpy().size != 1:
            return None
        return float(constant.value.numpy().reshape(()))
