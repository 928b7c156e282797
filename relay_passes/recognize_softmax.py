"""Recognises a softmax that a file holds as exponentials and their sum.

Runs after import. Before::

    lv = R.max(x, axis=[-1], keepdims=True)       # may be missing
    lv1 = R.exp(R.subtract(x, lv))
    lv2 = R.sum(lv1, axis=[-1], keepdims=True)
    lv3 = R.divide(lv1, lv2)

After::

    lv3 = R.nn.softmax(x, axis=-1)
"""

from __future__ import annotations

import tvm
from tvm import relax

from tvm_qfp8.relay_passes.fuse import op_name, shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter


@tvm.transform.module_pass(opt_level=0, name="RecognizeSoftmax")
class RecognizeSoftmax:
    """Rewrite ``main``; what softmax was made of is left to dead code elimination."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(_Rewriter(mod).rewrite())


class _Rewriter(MainRewriter):
    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        found = self._softmax(value) if op_name(value) == "relax.divide" else None
        if found is None:
            self.keep(var, value)
            return
        x, axis = found
        self.variables[var] = self.builder.emit(relax.op.nn.softmax(self.expression(x), axis), var.name)

    def _softmax(self, value: relax.Call) -> tuple[relax.Expr, int] | None:
        """(x, axis) where the quotient is the softmax of x."""
        numerator, denominator = value.args
        total, exponential = self._defined(denominator, "relax.sum"), self._defined(numerator, "relax.exp")
        if total is None or exponential is None or not total.args[0].same_as(numerator):
            return None
        axis = _one_axis(total)
        if axis is None:
            return None
        x = exponential.args[0]
        difference = self._defined(x, "relax.subtract")
        if difference is not None:
            largest = self._defined(difference.args[1], "relax.max")
            same = largest is not None and largest.args[0].same_as(difference.args[0])
            if same and _one_axis(largest) == axis:
                x = difference.args[0]
        return x, axis

    def _defined(self, expr: relax.Expr, name: str) -> relax.Call | None:
        value = self.definition.get(expr) if isinstance(expr, relax.Var) else None
        return value if op_name(value) == name else None


def _one_axis(call: relax.Call) -> int | None:
    """The axis of a reduction that keeps its dimensions and has one axis."""
    axes = call.attrs.axis
    if axes is None or len(axes) != 1 or not call.attrs.keepdims or static_shape(call.args[0]) is None:
        return None
    return int(axes[0]) % len(shape_of(call.args[0]))
