"""Recognises a softmax or log-softmax that a file holds as exponentials and their sum.

Runs after import. Before::

    lv = R.max(x, axis=[-1], keepdims=True)       # may be missing
    lv1 = R.exp(R.subtract(x, lv))
    lv2 = R.sum(lv1, axis=[-1], keepdims=True)
    lv3 = R.divide(lv1, lv2)

After::

    lv3 = R.nn.softmax(x, axis=-1)

torch's attention gives 0 where a mask leaves nothing of a row, which softmax does here (``topi/softmax.py``)::

    lv = R.logical_not(R.equal(x, R.const(-inf)))
    lv1 = R.logical_not(R.astype(R.max(R.astype(lv, "int8"), axis=[-1], keepdims=True), "bool"))
    lv2 = R.where(lv1, R.const(zeros), R.nn.softmax(x, axis=-1))

or, as its ONNX exporters write it, ``R.where(R.isnan(y), 0, y)`` with the softmax y.

Log-softmax is the logarithm of a softmax, or the difference ``(x - m) - log(s)`` or ``x - (log(s) + m)``, where m is
the maximum above and s the sum of ``exp(x - m)``; both become ``R.nn.log_softmax``.
"""

from __future__ import annotations

import math

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
        make, found = relax.op.nn.softmax, None
        if op_name(value) == "relax.where":
            found = self._guarded_softmax(value)
        elif op_name(value) == "relax.divide":
            found = self._softmax(value)
        elif op_name(value) in ("relax.subtract", "relax.log"):
            make = relax.op.nn.log_softmax
            found = self._of_softmax(value) if op_name(value) == "relax.log" else self._log_softmax(value)
        if found is None:
            self.keep(var, value)
            return
        x, axis = found
        self.variables[var] = self.builder.emit(make(self.expression(x), axis), var.name)

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
        shifted = self._shifted(x, axis)
        return (x if shifted is None else shifted[0]), axis

    def _guarded_softmax(self, value: relax.Call) -> tuple[relax.Expr, int] | None:
        """(x, axis) where the value is the softmax of x, or 0 in rows of only -infinity."""
        nothing, zeros, result = value.args
        softmax = self._defined(result, "relax.nn.softmax")
        if softmax is None or not self._all_equal(zeros, 0.0):
            return None
        undefined = self._argument(nothing, "relax.isnan")
        if undefined is not None and undefined.same_as(result):
            return softmax.args[0], int(softmax.attrs.axis)
        anything = self._argument(nothing, "relax.logical_not")
        counted = self._defined(self._argument(anything, "relax.astype"), "relax.max")
        finite = self._argument(counted.args[0], "relax.astype") if counted is not None else None
        compared = self._defined(self._argument(finite, "relax.logical_not"), "relax.equal")
        axis = int(softmax.attrs.axis) % len(shape_of(softmax.args[0]))
        if counted is None or compared is None or _one_axis(counted) != axis:
            return None
        same = compared.args[0].same_as(softmax.args[0])
        return (softmax.args[0], axis) if same and self._all_equal(compared.args[1], -math.inf) else None

    def _argument(self, expr: relax.Expr | None, name: str) -> relax.Expr | None:
        """The only argument of the call that ``expr`` is bound to."""
        call = self._defined(expr, name)
        return None if call is None else call.args[0]

    def _all_equal(self, expr: relax.Expr, number: float) -> bool:
        constant = self.constant(expr)
        return constant is not None and bool((constant.value.numpy() == number).all())

    def _shifted(self, expr: relax.Expr, axis: int) -> tuple[relax.Expr, relax.Expr] | None:
        """(x, m) where ``expr`` is x less its maximum m along the axis."""
        difference = self._defined(expr, "relax.subtract")
        largest = self._maximum(difference.args[1]) if difference is not None else None
        if difference is None or largest is None or not largest.args[0].same_as(difference.args[0]):
            return None
        return tuple(difference.args) if _one_axis(largest) == axis else None

    def _maximum(self, expr: relax.Expr) -> relax.Call | None:
        """The maximum that ``expr`` is; torch's logsumexp takes 0 where that is infinite."""
        guarded = self._defined(expr, "relax.where")
        return self._defined(expr if guarded is None else guarded.args[2], "relax.max")

    def _of_softmax(self, value: relax.Call) -> tuple[relax.Expr, int] | None:
        """(x, axis) where the logarithm is of the softmax of x."""
        softmax = self._defined(value.args[0], "relax.nn.softmax")
        if softmax is not None:
            return softmax.args[0], int(softmax.attrs.axis)
        quotient = self._defined(value.args[0], "relax.divide")
        return self._softmax(quotient) if quotient is not None else None

    def _log_softmax(self, value: relax.Call) -> tuple[relax.Expr, int] | None:
        """(x, axis) where the difference is the log-softmax of x."""
        left, right = value.args
        total = self._defined(right, "relax.add")
        for log, largest in [(right, None)] if total is None else [total.args, reversed(total.args)]:
            logarithm = self._defined(log, "relax.log")
            summed = self._defined(logarithm.args[0], "relax.sum") if logarithm is not None else None
            exponential = self._defined(summed.args[0], "relax.exp") if summed is not None else None
            axis = _one_axis(summed) if summed is not None else None
            if exponential is None or axis is None:
                continue
            shifted = self._shifted(exponential.args[0], axis)
            if largest is None and left.same_as(exponential.args[0]):
                return (left if shifted is None else shifted[0]), axis
            if largest is not None and shifted is not None:
                x, maximum = shifted
                if left.same_as(x) and largest.same_as(maximum):
                    return x, axis
        return None

    def _defined(self, expr: relax.Expr | None, name: str) -> relax.Call | None:
        value = self.bound(expr)
        return value if op_name(value) == name else None


def _one_axis(call: relax.Call) -> int | None:
    """The axis of a reduction that keeps its dimensions and has one axis."""
    axes = call.attrs.axis
    if axes is None or len(axes) != 1 or not call.attrs.keepdims or static_shape(call.args[0]) is None:
        return None
    return int(axes[0]) % len(shape_of(call.args[0]))
